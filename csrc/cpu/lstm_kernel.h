// What lstm_kernel.cpp and lstm_backward_kernel.cpp offer at each level: the steps of one thread of a team. Raw pointers,
// no torch. Contract: fastdl/ops/lstm.py.
#pragma once

#include "cpu/recurrent_kernel.h"

namespace fastdl {

struct LstmForwardArgs : RecurrentForwardArgs {
  const float* c0;           // [D][B][H]
  const float* peephole;     // [D][3][H], or null
  const float* ln_c;         // [D][H], or null
  const float* ln_c_bias;    // [D][H]
  const uint8_t* packed_hr;  // w_hr in panels [D][panels of P], or null
  float zoneout_c;
  float* c_n;    // [D][B][H]
  void* cells;   // [T][B][D][H], or null in inference
  float* c;      // [D][B][wide], working memory as the rest
  float *s, *o;  // [D][B][wide], with layer norm
  uint8_t* m;    // [D][B][wide] of the level's operand, with projection
};

struct LstmBackwardArgs : RecurrentBackwardArgs {
  const void* cells;         // [T][B][D][H]
  const float* c0;           // [D][B][H]
  const float* peephole;     // [D][3][H], or null
  const float* ln_c;         // [D][H], or null
  const float* ln_c_bias;    // [D][H]
  const uint8_t* packed_hr;  // w_hr for its gradient: panels [D][panels of H], or null
  float zoneout_c;
  float* dc;                  // [D][B][H]: comes in as dc_n (or zeros), goes out as dc0
  float* dpeephole;           // [D][3][H], zeroed
  float *dln_c, *dln_c_bias;  // [D][H], zeroed
  void* dm_out;               // [T][B][D][P], with projection
  void* m;                    // [T][B][D][H], with projection
  float* dc_work;             // [D][B][wide]
  uint8_t* out;               // [D][B][wide_p] of the level's operand, with projection
  float *dv, *s, *d_o;        // [D][B][wide], with layer norm
};

struct LstmKernels {
  // Steps of thread `thread` of `team`, which all call it at once.
  void (*forward)(const LstmForwardArgs& a, int thread, int team);
  void (*backward)(const LstmBackwardArgs& a, int thread, int team);
};

#define FASTDL_DECLARE(variant)                          \
  namespace variant {                                    \
  extern const LstmKernels lstm_kernels;                 \
  void lstm_backward(const LstmBackwardArgs&, int, int); \
  }
FASTDL_VECTORS(FASTDL_DECLARE)
#undef FASTDL_DECLARE

}  // namespace fastdl
