// What linear_scan_kernel.cpp offers at each level: steps of h = a h + b for a range of channels. Raw pointers, no torch.
// Contract: fastdl/ops/linear_scan.py.
#pragma once

#include <stdint.h>

#include "cpu/cpu_level.h"

namespace fastdl {

// Steps are in the order of the recurrence. Strides are in elements; a complex number is one element of two floats.
struct LinearScanTrack {
  const void* data;  // [batch][length][channels], channels side by side
  int64_t batch, step;
};

struct LinearScanOut {
  void* data;  // null where nobody asks for it
  int64_t batch, step;
};

struct LinearScanArgs {
  LinearScanTrack a, b, h;  // forward reads a and b; backward a, grad (as b) and h
  LinearScanOut out, da;    // forward: h; backward: db and da
  const float* h0;          // [batch][channels], or null: zeros
  int64_t channels;
  int format;     // Format number of a, b, h
  bool complex;   // complex64; the format is then that of float32
  bool backward;  // r = conj(a) (grad + r) from the last step to the first, instead of h = a h + b
};

// A piece of the work: channels c0 <= c < c1 of one sequence, steps t0 <= t < t1.
struct LinearScanPiece {
  int64_t n, c0, c1, t0, t1;
};

struct LinearScanKernels {
  // Writes the outputs of the piece. state [channels]: that before its first step, and then that after its last
  // (backward: steps count from the end).
  void (*run)(const LinearScanArgs& a, const LinearScanPiece& piece, float* state);
  // The piece as one affine map: state after = product * state before + end. product, end [channels].
  void (*summarize)(const LinearScanArgs& a, const LinearScanPiece& piece, float* product, float* end);
  // state = product * state + end for c0 <= c < c1, where a state of 0 gives end.
  void (*carry)(const LinearScanArgs& a, int64_t c0, int64_t c1, const float* product, const float* end,
                const float* before, float* after);
};

#define FASTDL_DECLARE(variant) \
  namespace variant { extern const LinearScanKernels linear_scan_kernels; }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
