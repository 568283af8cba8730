// A barrier for a few threads that meet every microsecond: it spins, and lets others run when it has spun for long (more
// threads than cores). No std, so that kernel sources may use it.
#pragma once

#include <sched.h>
#include <stdint.h>

namespace fastdl {

struct alignas(64) Barrier {
  int32_t arrived = 0, phase = 0;

  __attribute__((always_inline)) void wait(int32_t team) {
    if (team <= 1) return;
    const int32_t now = __atomic_load_n(&phase, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == team) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase, now + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int32_t spins = 0; __atomic_load_n(&phase, __ATOMIC_ACQUIRE) == now; ++spins) {
      if (spins > 2000) {
        sched_yield();
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }
};

}  // namespace fastdl
