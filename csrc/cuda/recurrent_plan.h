// Which way a call of lstm, gru or rnn takes on a GPU, as a pure function of shapes, dtype and the device: one kernel that
// stays for the whole sequence, with the weights in shared memory (recurrent_persistent.cuh), or a launch and a product a
// step (recurrent_loop.cuh). No CUDA here, so that tests ask it about any device.
//
// FASTDL_RECURRENT=loop or persistent overrides the estimate, for tests; what does not fit takes the loop all the same.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cuda/platform.cuh"

namespace fastdl::cuda {

constexpr int kPersistentThreads = 256;
constexpr int kPersistentWarps = kPersistentThreads / 32;

// What one pass of a persistent kernel does.
struct PersistentTask {
  int bytes;  // of an element: 4: float32, 2: a half
  bool bf16;  // halves: which
  int64_t steps, batch, directions, hidden;
  int64_t unit_rows;  // rows of the weights' slice for one hidden unit: G forward, 1 backward
  int64_t depth;      // their length: P forward, G * H backward
  int states;         // floats that are kept a unit and sequence
};

// How its grid is cut: blocks = directions * slices * groups, each with `units` hidden units of one direction and `batch`
// sequences, and these in passes of `columns`. The weights' rows, and the tile of h or du that they are multiplied with,
// lie in shared memory with strides that are an odd multiple of 16 bytes: neighbouring rows start in different banks.
struct PersistentPlan {
  int units = 0;  // 0: take the step loop
  int slices = 0, groups = 0, batch = 0, columns = 0;
  int parts = 0;             // parts of `depth` that different warps add up
  int depth = 0, chunk = 0;  // padded to 16; how much of it the tile holds at a time
  int weight_stride = 0, tile_stride = 0, partial_stride = 0;
  int64_t shared = 0;  // bytes
};

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The plan for a number of groups and columns; units 0 where it does not fit.
inline PersistentPlan persistent_fit(const PersistentTask& w, const DeviceLimits& device, int64_t groups,
                                     int64_t columns) {
  PersistentPlan p;
  const int64_t blocks = device.processors / (w.directions * groups);   // of a direction and group, one a processor
  const int64_t units = round_up((w.hidden + blocks - 1) / blocks, 8);  // 8: whole sectors of memory, half a tile
  const int64_t batch = round_up((w.batch + groups - 1) / groups, columns);
  const int64_t depth = round_up(w.depth, 16), rows = w.unit_rows * units, pad = 16 / w.bytes;
  const int64_t tiles = (rows + (w.bytes == 2 ? 15 : 31)) / (w.bytes == 2 ? 16 : 32);
  const int64_t parts = std::min(std::max<int64_t>(kPersistentWarps / tiles, 1), depth / 16);
  const int64_t partial_stride = columns == 8 ? 8 : columns + 8;
  const int64_t fixed =
      rows * (depth + pad) * w.bytes + parts * rows * partial_stride * 4 + w.states * units * batch * 4;
  // At most 64 KB a tile: beyond that a longer one gains nothing. Less than 128 a turn would be all barriers.
  const int64_t room = std::min<int64_t>(device.shared_bytes - fixed, 64 * 1024) / (columns * w.bytes) - pad;
  const int64_t chunk = std::min(depth, room / 16 * 16);
  if (chunk < std::min<int64_t>(depth, 128) || depth > (1 << 24)) return p;
  p.units = static_cast<int>(units);
  p.slices = static_cast<int>((w.hidden + units - 1) / units);
  p.groups = static_cast<int>((w.batch + batch - 1) / batch);
  p.batch = static_cast<int>(batch);
  p.columns = static_cast<int>(columns);
  p.parts = static_cast<int>(parts);
  p.depth = static_cast<int>(depth);
  p.chunk = static_cast<int>(chunk);
  p.weight_stride = static_cast<int>(depth + pad);
  p.tile_stride = static_cast<int>(chunk + pad);
  p.partial_stride = static_cast<int>(partial_stride);
  p.shared = fixed + columns * (chunk + pad) * w.bytes;
  return p;
}

// Clock cycles of a step in one block, without the barrier: weights from shared memory once a pass (128 bytes a cycle), the
// tile from the level-2 cache (32), and the products (tensor cores 512 a cycle by mma.sync, plain float32 64).
inline int64_t persistent_cost(const PersistentTask& w, const PersistentPlan& p) {
  const int64_t rows = w.unit_rows * p.units, passes = p.batch / p.columns;
  const int64_t product = w.bytes == 2 ? round_up(rows, 16) * p.depth * p.batch / 512 : rows * p.depth * p.batch / 64;
  return rows * p.depth * w.bytes * passes / 128 + static_cast<int64_t>(p.batch) * p.depth * w.bytes / 32 + product;
}

// What a step of the loop costs at least, some 10 us: the host prepares two launches, one of them through the dispatcher.
// A barrier of the grid costs about a tenth of it.
constexpr int64_t kLoopStepCycles = 16000;

inline PersistentPlan persistent_plan(const PersistentTask& w, const DeviceLimits& device) {
  const char* wish = std::getenv("FASTDL_RECURRENT");
  PersistentPlan best;
  if (wish && std::strcmp(wish, "loop") == 0) return best;
  const bool force = wish && std::strcmp(wish, "persistent") == 0;
  // Tensor cores take bf16 from sm_80 on (ptx.cuh); without cooperative launches there is no barrier of the grid.
  if (!device.cooperative || (w.bf16 && device.major < 8) || w.steps == 0 || w.batch == 0) return best;
  int64_t cost = force ? INT64_MAX : kLoopStepCycles;
  for (int64_t groups = 1; groups <= (w.batch + 7) / 8 && w.directions * groups <= device.processors; ++groups) {
    // The widest pass reads the weights least often.
    const int64_t wide = w.bytes == 2 ? 32 : 16;
    PersistentPlan p;
    if ((w.batch + groups - 1) / groups > 8) p = persistent_fit(w, device, groups, wide);
    if (p.units == 0) p = persistent_fit(w, device, groups, 8);
    if (p.units == 0) continue;
    const int64_t mine = persistent_cost(w, p);
    if (mine < cost) cost = mine, best = p;
  }
  return best;
}

}  // namespace fastdl::cuda
