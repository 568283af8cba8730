// One way to use the threads: a region whose body learns its number and the team's size.
//
// A team of one enters no OpenMP region, so that a forked worker with one thread never touches the thread pool. Work is
// cut by shape into items; range() gives each thread a contiguous share. No result depends on the share.
#pragma once

#include <omp.h>
#include <stdint.h>

namespace fastdl {

struct Range {
  int64_t begin, end;
};

static inline Range range(int64_t items, int thread, int team) {
  return {items * thread / team, items * (thread + 1) / team};
}

// body(thread, team) on at most `wanted` threads; barriers inside are `#pragma omp barrier`. Called from inside another
// region it makes a team of one, whose barriers do not wait for the outer team.
template <class Body>
static inline void parallel_region(int wanted, const Body& body) {
  const bool nested = omp_in_parallel();
  if (wanted <= 1 && !nested) {
    body(0, 1);
    return;
  }
#pragma omp parallel num_threads(nested ? 1 : wanted)
  body(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace fastdl
