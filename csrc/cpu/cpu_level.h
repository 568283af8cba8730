// Which compiled variant of the CPU kernels this process runs.
//
// Users know five level names (scalar avx2 avx512 amx amx-twin). Two of them have a richer variant that is taken where
// the CPU has one more bit: avx2 with AVX-VNNI, avx512 with BF16.
#pragma once

// Every variant that was compiled. FASTDL_VARIANTS(X) expands X(name) for each; a room declares its kernels with it.
// FASTDL_VECTORS(X): those that differ in their vectors; kernels that use neither integer dot products nor tiles are
// compiled for these alone. FASTDL_FEW_LEVELS: one of each kind of instructions is enough under the sanitizers.
// CMakeLists.txt has the same lists.
#if defined(__x86_64__) && defined(FASTDL_FEW_LEVELS)
#define FASTDL_VARIANTS(X) FASTDL_VECTORS(X) X(amx_twin)
#define FASTDL_VECTORS(X) X(scalar) X(avx2) X(avx512_bf16)
#elif defined(__x86_64__)
#define FASTDL_VARIANTS(X) FASTDL_VECTORS(X) X(avx2_vnni) X(amx) X(amx_twin)
#define FASTDL_VECTORS(X) X(scalar) X(avx2) X(avx512) X(avx512_bf16)
#else
#define FASTDL_VARIANTS(X) FASTDL_VECTORS(X)
#define FASTDL_VECTORS(X) X(scalar)
#endif

namespace fastdl {

// In rising order; amx_twin is not above amx, it is chosen only by name.
enum class CpuVariant { scalar, avx2, avx2_vnni, avx512, avx512_bf16, amx, amx_twin };

// The widest variant that this CPU, this system and the cap allow. Cheap: one atomic load.
CpuVariant cpu_variant();
// The widest of FASTDL_VECTORS that is not above it.
CpuVariant cpu_vectors(CpuVariant variant = cpu_variant());

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
