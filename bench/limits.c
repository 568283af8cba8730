// The machine's limits, read by plain loops. Prints one number.
//
//   cc -O3 -march=native -fopenmp bench/limits.c -o limits
//   limits read BYTES THREADS     GB/s of reading BYTES over and over, each thread its own slice
//   limits fma THREADS            GFLOP/s of fp32 fused multiply-add, widest vectors of the build
//   limits int8 THREADS           GOP/s of u8*s8 dot products into int32 (VNNI, or AVX2's maddubs + madd)
//   limits bf16 THREADS           GFLOP/s of AVX-512 BF16 dot products
//   limits amx_int8 THREADS       GOP/s of tdpbusd;  limits amx_bf16 THREADS  GFLOP/s of tdpbf16ps
// Add -mno-avx512f for the AVX2 rates. Exit status 3: this build or machine has no such instruction.
// bench/limits.py compiles it and runs each reading in a process of its own, so that a fault costs one reading.

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { CHAINS = 12, STEPS = 1 << 16, TRIES = 12 };  // 12 independent chains hide a latency of 4 to 5 on 2 ports

static volatile float float_sink;
static volatile uint64_t int_sink;

// Keeps a vector in a register and the compiler from folding the loop; used by every rate below.
#define KEEP(v) __asm__ volatile("" : "+x"(v))

#if defined(__AVX512F__)
typedef __m512 floats;
typedef __m512i ints;
#define ZERO_F _mm512_setzero_ps()
#define FMA(c, a, b) _mm512_fmadd_ps(a, b, c)
#define ZERO_I _mm512_setzero_si512()
#define FIRST_F(v) _mm512_cvtss_f32(v)
#define FIRST_I(v) _mm_cvtsi128_si32(_mm512_castsi512_si128(v))
#undef KEEP
#define KEEP(v) __asm__ volatile("" : "+v"(v))
#else
typedef __m256 floats;
typedef __m256i ints;
#define ZERO_F _mm256_setzero_ps()
#define FMA(c, a, b) _mm256_fmadd_ps(a, b, c)
#define ZERO_I _mm256_setzero_si256()
#define FIRST_F(v) _mm256_cvtss_f32(v)
#define FIRST_I(v) _mm_cvtsi128_si32(_mm256_castsi256_si128(v))
#endif

#if defined(__AVX512VNNI__)
#define DOT8(c, a, b) _mm512_dpbusd_epi32(c, a, b)
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
#define DOT8(c, a, b) _mm256_dpbusd_avx_epi32(c, a, b)
#elif !defined(__AVX512F__)
#define DOT8(c, a, b) \
    _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)))
#endif

// Twelve accumulators by name: an array would be kept in memory, and the stores would set the pace.
#define EACH(DO) \
    DO(c0) DO(c1) DO(c2) DO(c3) DO(c4) DO(c5) DO(c6) DO(c7) DO(c8) DO(c9) DO(c10) DO(c11)

// Each of these returns operations done, two for a multiply-add.
static double fma_chains(void) {
  floats a = ZERO_F, b = ZERO_F;
  KEEP(a);
  KEEP(b);
#define START(c) floats c = ZERO_F;
#define STEP(c) \
    c = FMA(c, a, b); \
    KEEP(c);
#define END(c) float_sink = FIRST_F(c);
  EACH(START)
  for (int i = 0; i < STEPS; i++) {
    EACH(STEP)
  }
  EACH(END)
#undef START
#undef STEP
#undef END
  return 2.0 * STEPS * CHAINS * (sizeof(floats) / 4);
}

#ifdef DOT8
static double int8_chains(void) {
  ints a = ZERO_I, b = ZERO_I;
  KEEP(b);
#define START(c) ints c = ZERO_I;
#define STEP(c) \
    KEEP(a); /* as if a changed: AVX2's products must not leave the loop */ \
    c = DOT8(c, a, b); \
    KEEP(c);
#define END(c) int_sink += (uint64_t)FIRST_I(c);
  EACH(START)
  for (int i = 0; i < STEPS; i++) {
    EACH(STEP)
  }
  EACH(END)
#undef START
#undef STEP
#undef END
  return 2.0 * STEPS * CHAINS * sizeof(ints);
}
#endif

#ifdef __AVX512BF16__
static double bf16_chains(void) {
  __m512i bits = ZERO_I;
  KEEP(bits);
  __m512bh a = (__m512bh)bits;
#define START(c) __m512 c = ZERO_F;
#define STEP(c) \
    c = _mm512_dpbf16_ps(c, a, a); \
    KEEP(c);
#define END(c) float_sink = FIRST_F(c);
  EACH(START)
  for (int i = 0; i < STEPS; i++) {
    EACH(STEP)
  }
  EACH(END)
#undef START
#undef STEP
#undef END
  return 2.0 * STEPS * CHAINS * 32;
}
#endif

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
struct tile_config {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

static void load_tiles(void) {
  struct tile_config config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int t = 0; t < 8; t++) {
    config.bytes_per_row[t] = 64;
    config.rows[t] = 16;
  }
  __asm__ volatile("" ::"r"(&config) : "memory");  // gcc 12 and 13 drop the stores: the intrinsic reads 8 of 64 bytes
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}

static double amx_int8_chains(void) {
  load_tiles();
  for (int i = 0; i < STEPS / 4; i++) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return 2.0 * STEPS * 16 * 16 * 64;
}

static double amx_bf16_chains(void) {
  load_tiles();
  for (int i = 0; i < STEPS / 4; i++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * STEPS * 16 * 16 * 32;
}
#endif

// Best of at least TRIES and half a second: operations per nanosecond over all threads.
static double rate(double (*chains)(void), int threads) {
  double best = 0, until = omp_get_wtime() + 0.5;
  for (int t = 0; t < TRIES || omp_get_wtime() < until; t++) {
    double done = 0, start = 0;
#pragma omp parallel num_threads(threads) reduction(+ : done)
    {
      done += chains();  // wakes the units and the clock before the timed part
#pragma omp barrier
#pragma omp single
      start = omp_get_wtime();
      done = chains() + chains() + chains() + chains();
    }
    double speed = done / (omp_get_wtime() - start) / 1e9;
    if (speed > best) best = speed;
  }
  return best;
}

// Best of at least TRIES and half a second: bytes per nanosecond over all threads. Each thread touches its slice first, so pages lie near it.
static double read_rate(size_t bytes, int threads) {
  size_t slice = bytes / 64 / threads * 64 / 8;  // in 8-byte words, whole cache lines
  uint64_t* data = aligned_alloc(64, slice * 8 * threads);
  if (!data) return 0;
  double best = 0, until = omp_get_wtime() + 0.5;
  int passes = bytes && bytes < 16000000 ? 16000000 / bytes : 1;  // or starting the threads would take as long as a small read
#pragma omp parallel num_threads(threads)
  {
    uint64_t* mine = data + slice * omp_get_thread_num();
    memset(mine, 1, slice * 8);
  }
  for (int t = 0; t < TRIES || omp_get_wtime() < until; t++) {
    double start = omp_get_wtime();
    uint64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
      const uint64_t* mine = data + slice * omp_get_thread_num();
      uint64_t sum = 0;
      for (int pass = 0; pass < passes; pass++) {
#pragma omp simd reduction(+ : sum)
        for (size_t i = 0; i < slice; i++) sum += mine[i];
        __asm__ volatile("" ::: "memory");  // each pass reads anew
      }
      total += sum;
    }
    int_sink = total;
    double speed = (double)passes * slice * 8 * threads / (omp_get_wtime() - start) / 1e9;
    if (speed > best) best = speed;
  }
  free(data);
  return best;
}

int main(int argc, char** argv) {
  if (argc == 4 && !strcmp(argv[1], "read")) {
    double speed = read_rate(strtoull(argv[2], NULL, 10), atoi(argv[3]));
    printf("%.3f\n", speed);
    return speed > 0 ? 0 : 1;
  }
  if (argc != 3) {
    fprintf(stderr, "usage: limits read BYTES THREADS | limits fma|int8|bf16|amx_int8|amx_bf16 THREADS\n");
    return 2;
  }
  double (*chains)(void) = NULL;
  if (!strcmp(argv[1], "fma")) chains = fma_chains;
#ifdef DOT8
  if (!strcmp(argv[1], "int8")) chains = int8_chains;
#endif
#ifdef __AVX512BF16__
  if (!strcmp(argv[1], "bf16")) chains = bf16_chains;
#endif
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
  if (!strncmp(argv[1], "amx_", 4) && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0)
    chains = !strcmp(argv[1], "amx_int8") ? amx_int8_chains : amx_bf16_chains;
#endif
  if (!chains) return 3;
  printf("%.1f\n", rate(chains, atoi(argv[2])));
  return 0;
}
