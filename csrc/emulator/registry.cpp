// What libfastdl_emulated.so has beside the rooms' .cu files: the marker that the loader looks for, and, for tests, by
// ctypes, the order of threads and the plans of launchers for any device.
#include "cuda/recurrent_plan.h"
#include "emulator/emulator.h"
#include "fastdl_schema_hash.h"

extern "C" {
__attribute__((visibility("default"))) extern const char fastdl_schema_marker[];
const char fastdl_schema_marker[] = "FASTDL_SCHEMA_HASH=" FASTDL_SCHEMA_HASH;

// 0 forward, 1 reverse, 2 shuffled; of the calling thread.
__attribute__((visibility("default"))) void fastdl_emulator_set_order(int order) {
  fastdl::emulator::set_order(static_cast<fastdl::emulator::Order>(order));
}

// csrc/cuda/recurrent_plan.h: out = units, slices, groups, batch, columns, parts, depth, chunk, shared. device: processors,
// shared bytes, major. task: bytes, bf16, steps, batch, directions, hidden, rows of a unit, depth, states.
__attribute__((visibility("default"))) void fastdl_emulator_recurrent_plan(const int64_t* task, const int64_t* device,
                                                                           int64_t* out) {
  using namespace fastdl::cuda;
  const PersistentPlan p = persistent_plan({static_cast<int>(task[0]), task[1] != 0, task[2], task[3], task[4], task[5],
                                            task[6], task[7], static_cast<int>(task[8])},
                                           {static_cast<int>(device[0]), device[1], static_cast<int>(device[2]), true});
  const int64_t numbers[] = {p.units, p.slices, p.groups, p.batch, p.columns, p.parts, p.depth, p.chunk, p.shared};
  std::copy(std::begin(numbers), std::end(numbers), out);
}
}
