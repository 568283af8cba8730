// Which compiled variant of the CPU kernels this process runs.
//
// Users know five level names (scalar avx2 avx512 amx amx-twin). Two of them have a richer variant that is taken where
// the CPU has one more bit: avx2 with AVX-VNNI, avx512 with BF16.
#pragma once

// Every variant that was compiled. FASTDL_VARIANTS(X) expands X(name) for each; a room declares its kernels with it.
// FASTDL_FEW_LEVELS: one of each kind of instructions is enough under the sanitizers, and compiles in half the time.
#if defined(__x86_64__) && defined(FASTDL_FEW_LEVELS)
#define FASTDL_VARIANTS(X) X(scalar) X(avx2) X(avx512_bf16) X(amx_twin)
#elif defined(__x86_64__)
#define FASTDL_VARIANTS(X) X(scalar) X(avx2) X(avx2_vnni) X(avx512) X(avx512_bf16) X(amx) X(amx_twin)
#else
#define FASTDL_VARIANTS(X) X(scalar)
#endif

namespace fastdl {

// In rising order; amx_twin is not above amx, it is chosen only by name.
enum class CpuVariant { scalar, avx2, avx2_vnni, avx512, avx512_bf16, amx, amx_twin };

// The widest variant that this CPU, this system and the cap allow. Cheap: one atomic load.
CpuVariant cpu_variant();

}  // namespace fastdl

extern "C" {
// "scalar" | "avx2" | "avx512" | "amx" | "amx-twin"
const char* fastdl_cpu_level();
// Comma list of what was detected, e.g. "avx2,fma,f16c,avx512,avx512_bf16".
const char* fastdl_cpu_features();
// scalar | avx2 | avx512 | amx | amx-twin, and for tests avx2-plain (without AVX-VNNI), avx512-plain (without BF16).
// 0: ok, also when the CPU has less than that. 1: unknown name, nothing changed.
int fastdl_set_level_cap(const char* name);
}
