// What the kernels of lstm, gru and rnn share, outside the levels: the arguments that all three have.
// Names and shapes: fastdl/reference/_recurrent.py.
#pragma once

#include <stdint.h>

#include "common/barrier.h"
#include "common/parallel.h"
#include "cpu/recurrent_product.h"

namespace fastdl {

// Memory that the steps work in has units padded to whole panels: `wide` = H and `wide_p` = P so padded.
struct RecurrentArgs {
  int64_t time, batch, directions, hidden, size, gates;  // size: P
  int64_t wide, wide_p;
  int format;              // of gates_x, w_hh, w_hr, y and what is saved
  const int64_t* lengths;  // [B], or null
  const float* h_mask;     // [D][B][P], or null
  const float* ln_weight;  // [D][G H], or null
  uint64_t seed_h, seed_c;
  bool drawn;  // zoneout draws elements; else it takes the expectation
  float zoneout_h, eps;
  const uint8_t* packed;            // w_hh in panels [D][gates or 1][panels]
  Barrier* barriers;                // [2]
  const RecurrentProduct* product;  // of the level
};

// Forward: beside that
struct RecurrentForwardArgs : RecurrentArgs {
  const void* gates_x;  // [T][B][D][G H]
  const float* h0;      // [D][B][P]
  void* y;              // [T][B][D][P]
  float* h_n;           // [D][B][P]
  void* gates_out;      // [T][B][D][saved gates * H], or null in inference
  float* h;             // [D][B][wide_p], working memory as the rest
  uint8_t* operand;     // [2][D][B][wide_p] of the level's operand (at most 4 bytes): h * h_mask, rounded
  float* u;             // [D][B][G][wide], with layer norm
};

struct RecurrentBackwardArgs : RecurrentArgs {
  const void* dy;        // [T][B][D][P], or null
  const void* gates_in;  // [T][B][D][saved gates * H]
  const void* u;         // [T][B][D][G H], with layer norm
  void* da;              // [T][B][D][G H]
  void* du;              // the same, or null where it is da
  float* dh;             // [D][B][P]: comes in as dh_n (or zeros), goes out as dh0
  float* dln_weight;     // [D][G H], zeroed
  float* dh_work;        // [D][B][wide_p]
  uint8_t* operand;      // [2][D][B][G][wide] of the level's operand: du, rounded
  float* dhat;           // [D][B][G][wide], with layer norm
};

// Which directions and which share of their units a thread has. Two directions run side by side on two halves of a team.
struct Member {
  int first, last, rank, size;  // directions first .. last - 1; thread `rank` of `size`
  Barrier* barrier;

  __attribute__((always_inline)) Member(const RecurrentArgs& a, int thread, int team)
      : first(0), last((int)a.directions), rank(thread), size(team) {
    barrier = a.barriers;
    if (a.directions == 2 && team >= 2) {
      const int half = team / 2;
      first = thread < half ? 0 : 1;
      last = first + 1;
      rank = first ? thread - half : thread;
      size = first ? team - half : half;
      barrier = a.barriers + first;
    }
  }
  __attribute__((always_inline)) void meet() const { barrier->wait(size); }
  __attribute__((always_inline)) Range share(int64_t panels) const { return range(panels, rank, size); }
};

}  // namespace fastdl
