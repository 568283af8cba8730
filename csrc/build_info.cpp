// The marker that the loader looks for in the file's bytes before it loads this library: the stable ABI checks how many
// arguments an op takes, not their types, so a library built from other schemas must not be loaded at all.
#include "fastdl_schema_hash.h"

// Exported, so that no linker drops it as unused.
extern "C" {
__attribute__((visibility("default"))) extern const char fastdl_schema_marker[];
const char fastdl_schema_marker[] = "FASTDL_SCHEMA_HASH=" FASTDL_SCHEMA_HASH;
}
