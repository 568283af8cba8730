// What libfastdl_emulated.so has beside the rooms' .cu files: the marker that the loader looks for, and the order of
// threads for tests, by ctypes.
#include "emulator/emulator.h"
#include "fastdl_schema_hash.h"

extern "C" {
__attribute__((visibility("default"))) extern const char fastdl_schema_marker[];
const char fastdl_schema_marker[] = "FASTDL_SCHEMA_HASH=" FASTDL_SCHEMA_HASH;

// 0 forward, 1 reverse, 2 shuffled; of the calling thread.
__attribute__((visibility("default"))) void fastdl_emulator_set_order(int order) {
  fastdl::emulator::set_order(static_cast<fastdl::emulator::Order>(order));
}
}
