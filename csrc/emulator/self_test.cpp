// The emulator's own tests: small kernels, right ones and ones with a planted mistake. tests/test_emulator.py calls
// fastdl_emulator_self_test(name, message, bytes) for each name of kTests: 0 when the right thing happened, and the
// message says what happened.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/platform.cuh"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"

namespace fastdl::cuda {
namespace {

constexpr int N = 64;  // threads of most kernels here: two warps

// ---- Right kernels ------------------------------------------------------------------------------------------------

__global__ void reverse_kernel(const float* x, float* y) {
  FASTDL_SHARED(float, tile, [N]);
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[N - 1 - threadIdx.x];
}

__global__ void indices_kernel(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += static_cast<int>(block * 1000 + thread);
}

__global__ void dynamic_kernel(float* y) {
  FASTDL_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = tile[(threadIdx.x + 1) % N];
}

__global__ void warp_kernel(int* y) {
  const int lane = static_cast<int>(threadIdx.x);
  y[lane] = __shfl_xor_sync(kAllLanes, lane, 5);
  y[32 + lane] = __shfl_down_sync(kAllLanes, lane, 3);
  y[64 + lane] = __shfl_up_sync(kAllLanes, lane, 3, 8);
  y[96 + lane] = __shfl_sync(kAllLanes, lane, 9, 8);
  y[128 + lane] = static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0));
  y[160 + lane] = __any_sync(kAllLanes, lane == 31) + 2 * __all_sync(kAllLanes, lane < 31);
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;  // two collectives at once
  y[192 + lane] = __shfl_xor_sync(half, lane, 1);
}

__global__ void atomic_kernel(int* counter, unsigned* top) {
  atomicAdd(counter, 2);
  atomicMax(top, threadIdx.x);
  atomicCAS(counter + 1, 0, 7);
}

__global__ void grid_kernel(int* values, int* sum, unsigned* barrier) {
  if (threadIdx.x == 0) values[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
  ptx::grid_barrier(barrier);
  int total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += values[b];
  if (threadIdx.x == 0) sum[blockIdx.x] = total;
}

__global__ void pipeline_kernel(const float* x, float* y) {
  FASTDL_SHARED(float4, stage, [2][N]);
  const auto* from = reinterpret_cast<const float4*>(x);
  ptx::cp_async<16>(&stage[0][threadIdx.x], from + threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async<16>(&stage[1][threadIdx.x], from + N + threadIdx.x, threadIdx.x < N / 2);  // the rest: zeros
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();
  reinterpret_cast<float4*>(y)[threadIdx.x] = stage[0][N - 1 - threadIdx.x];
  ptx::cp_async_wait<0>();
  __syncthreads();
  reinterpret_cast<float4*>(y)[N + threadIdx.x] = stage[1][N - 1 - threadIdx.x];
}

// c [16][8] = a [16][16] b [16][8], a row-major, b by ldmatrix.trans from row-major.
template <class T, void (*Mma)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], emulator::Where)>
__global__ void mma_kernel(const T* a, const T* b, float* c) {
  FASTDL_SHARED(T, sa, [16][16]);
  FASTDL_SHARED(T, sb, [16][8]);
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 256; i += 32) sa[i / 16][i % 16] = a[i];
  for (unsigned i = lane; i < 128; i += 32) sb[i / 8][i % 8] = b[i];
  __syncthreads();
  uint32_t ra[4], rb[2];
  ptx::ldmatrix<4, false>(ra, &sa[lane % 16][lane / 16 * 8]);
  ptx::ldmatrix<2, true>(rb, &sb[lane % 16][0]);
  float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  Mma(d, ra, rb, emulator::Where::current());
  for (unsigned i = 0; i < 4; ++i) c[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = d[i];
}

void mma_by_shuffles(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Where) {
  mma_bf16_by_shuffles(d, a, b);
}

// a [16][32], b [8][32] (each column of the product's B as a row): fragments loaded by the layout's definition.
__global__ void mma_s8_kernel(const int8_t* a, const int8_t* b, int* c) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  uint32_t ra[4], rb[2];
  for (int i = 0; i < 4; ++i) std::memcpy(&ra[i], a + (g + 8 * (i % 2)) * 32 + 4 * t + 16 * (i / 2), 4);
  for (int i = 0; i < 2; ++i) std::memcpy(&rb[i], b + g * 32 + 4 * t + 16 * i, 4);
  int d[4] = {};
  ptx::mma_m16n8k32_s8(d, ra, rb);
  for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i];
}

// ---- Planted mistakes ---------------------------------------------------------------------------------------------

__global__ void missing_barrier_kernel(const float* x, float* y) {
  FASTDL_SHARED(float, tile, [N]);
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[N - 1 - threadIdx.x];
}

__global__ void race_kernel(int* last) { *last = static_cast<int>(threadIdx.x); }

__global__ void block_race_kernel(int* last) { *last = static_cast<int>(blockIdx.x); }

__global__ void past_the_end_kernel(float* y) {
  FASTDL_SHARED(float, tile, [N]);
  volatile float* end = tile;
  end[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void early_exit_kernel() {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void warp_exit_kernel(float* y) {
  if (threadIdx.x == 31) return;
  y[threadIdx.x] = warp_sum(1.0f);
}

__global__ void wrong_mask_kernel(float* y) { y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 1); }

__global__ void outside_mask_kernel(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}

__global__ void forgotten_wait_kernel(const float* x, float* y) {
  FASTDL_SHARED(float4, tile, [N]);
  ptx::cp_async<16>(&tile[threadIdx.x], reinterpret_cast<const float4*>(x) + threadIdx.x);
  ptx::cp_async_commit();
  __syncthreads();
  reinterpret_cast<float4*>(y)[threadIdx.x] = tile[threadIdx.x];
}

__global__ void unwritten_kernel(float* y) {
  FASTDL_SHARED(float, tile, [N]);
  if (threadIdx.x > 0) tile[threadIdx.x] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void big_shared_kernel() {
  FASTDL_SHARED(float, tile, [13 * 1024]);
  tile[threadIdx.x] = 0.0f;
}

__global__ void grid_barrier_kernel(unsigned* barrier) { ptx::grid_barrier(barrier); }

#if defined(__SANITIZE_ADDRESS__)
__global__ void global_out_of_bounds_kernel(float* y) { y[threadIdx.x + 1] = 0.0f; }
#endif

// ---- Running them -------------------------------------------------------------------------------------------------

struct Wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void expect(bool ok, const std::string& what) {
  if (!ok) throw Wrong("wrong result: " + what);
}

// `run` must end in a Failure that contains `part`.
template <class Run>
std::string fails(const char* part, const Run& run) {
  try {
    run();
  } catch (const emulator::Failure& failure) {
    if (std::strstr(failure.what(), part)) return failure.what();
    throw Wrong(std::string("another failure: ") + failure.what());
  }
  throw Wrong("the mistake was not found");
}

template <class... P, class... A>
void go(void (*kernel)(P...), dim3 grid, dim3 block, A... arguments) {
  launch(kernel, grid, block, 0, nullptr, arguments...);
}

template <class Run>
void in_every_order(const Run& run) {
  for (const auto order : {emulator::Order::forward, emulator::Order::reverse, emulator::Order::shuffled}) {
    emulator::set_order(order);
    run();
  }
  emulator::set_order(emulator::Order::forward);
}

// How many different results `run` gives in the three orders.
template <class T, class Run>
std::string orders_differ(size_t count, const Run& run) {
  std::vector<std::vector<T>> results;
  in_every_order([&] {
    results.emplace_back(count, T{});
    run(results.back().data());
  });
  const size_t bytes = count * sizeof(T);
  if (!std::memcmp(results[0].data(), results[1].data(), bytes) &&
      !std::memcmp(results[0].data(), results[2].data(), bytes))
    throw Wrong("the mistake was not found: the results of all orders are equal");
  return "results differ between orders";
}

std::vector<float> ramp(int n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) x[static_cast<size_t>(i)] = static_cast<float>(i);
  return x;
}

template <class T, class To>
void check_mma(const To& to, void (*kernel)(const T*, const T*, float*), float (*back)(T)) {
  std::vector<T> a(256), b(128);
  for (int i = 0; i < 256; ++i) a[static_cast<size_t>(i)] = to(static_cast<float>(i * 37 % 64 - 32) / 16.0f);
  for (int i = 0; i < 128; ++i) b[static_cast<size_t>(i)] = to(static_cast<float>(i * 23 % 64 - 32) / 16.0f);
  std::vector<float> c(128);
  go(kernel, dim3(1), dim3(32), a.data(), b.data(), c.data());
  for (size_t m = 0; m < 16; ++m)
    for (size_t n = 0; n < 8; ++n) {
      float sum = 1.0f;
      for (size_t k = 0; k < 16; ++k) sum += back(a[m * 16 + k]) * back(b[k * 8 + n]);
      expect(c[m * 8 + n] == sum, "row " + std::to_string(m) + ", column " + std::to_string(n));
    }
}

// The address sanitizer ends the process at an access out of bounds: those tests get a process of their own.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

struct Test {
  const char* name;
  std::string (*run)();
};

const Test kTests[] = {
    {"barrier",
     [] {
       in_every_order([] {
         const auto x = ramp(N);
         std::vector<float> y(N);
         go(reverse_kernel, dim3(1), dim3(N), x.data(), y.data());
         for (size_t i = 0; i < N; ++i) expect(y[i] == x[N - 1 - i], std::to_string(i));
       });
       return std::string("equal");
     }},
    {"indices",
     [] {
       in_every_order([] {
         std::vector<int> out(2 * 3 * 4 * 2 * 3 * 5);
         go(indices_kernel, dim3(2, 3, 4), dim3(2, 3, 5), out.data());
         for (size_t i = 0; i < out.size(); ++i) expect(out[i] == static_cast<int>(i / 30 * 1000 + i % 30), "index");
       });
       return std::string("equal");
     }},
    {"dynamic-shared",
     [] {
       std::vector<float> y(N);
       launch(dynamic_kernel, dim3(1), dim3(N), N * sizeof(float), nullptr, y.data());
       for (size_t i = 0; i < N; ++i) expect(y[i] == static_cast<float>((i + 1) % N), std::to_string(i));
       return std::string("equal");
     }},
    {"warp",
     [] {
       in_every_order([] {
         std::vector<int> y(224);
         go(warp_kernel, dim3(1), dim3(32), y.data());
         for (size_t i = 0; i < 32; ++i) {
           const int l = static_cast<int>(i);
           expect(y[i] == (l ^ 5) && y[32 + i] == (l + 3 < 32 ? l + 3 : l), "xor, down");
           expect(y[64 + i] == (l % 8 < 3 ? l : l - 3) && y[96 + i] == l / 8 * 8 + 1, "up and read in segments");
           expect(y[128 + i] == 0x49249249 && y[160 + i] == 1 && y[192 + i] == (l ^ 1), "votes, half warps");
         }
       });
       return std::string("equal");
     }},
    {"atomics",
     [] {
       int counter[2] = {};
       unsigned top = 0;
       go(atomic_kernel, dim3(3), dim3(N), static_cast<int*>(counter), &top);
       expect(counter[0] == 2 * 3 * N + 0 && counter[1] == 7 && top == N - 1, "sums");
       return std::string("equal");
     }},
    {"grid-barrier",
     [] {
       in_every_order([] {
         std::vector<int> values(5), sum(5);
         unsigned barrier = 0;
         launch_cooperative(grid_kernel, dim3(5), dim3(N), 0, nullptr, values.data(), sum.data(), &barrier);
         for (const int s : sum) expect(s == 15, "sum");
       });
       return std::string("equal");
     }},
    {"cp-async",
     [] {
       const auto x = ramp(8 * N);
       std::vector<float> y(8 * N);
       go(pipeline_kernel, dim3(1), dim3(N), x.data(), y.data());
       for (size_t i = 0; i < 4 * N; ++i) {
         const size_t from = (N - 1 - i / 4) * 4 + i % 4;
         expect(y[i] == x[from] && y[4 * N + i] == (from < 2 * N ? x[4 * N + from] : 0.0f), std::to_string(i));
       }
       return std::string("equal");
     }},
    {"mma-f16",
     [] {
       check_mma<half_t>([](float v) { return __float2half_rn(v); }, mma_kernel<half_t, ptx::mma_m16n8k16_f16>,
                         __half2float);
       return std::string("equal");
     }},
    {"mma-bf16",
     [] {
       check_mma<bf16_t>([](float v) { return __float2bfloat16_rn(v); }, mma_kernel<bf16_t, ptx::mma_m16n8k16_bf16>,
                         __bfloat162float);
       return std::string("equal");
     }},
    {"mma-bf16-by-shuffles",
     [] {
       check_mma<bf16_t>([](float v) { return __float2bfloat16_rn(v); }, mma_kernel<bf16_t, mma_by_shuffles>,
                         __bfloat162float);
       return std::string("equal");
     }},
    {"mma-s8",
     [] {
       std::vector<int8_t> a(512), b(256);
       for (size_t i = 0; i < 512; ++i) a[i] = static_cast<int8_t>(i * 37 + 11);
       for (size_t i = 0; i < 256; ++i) b[i] = static_cast<int8_t>(i * 53 + 5);
       std::vector<int> c(128);
       go(mma_s8_kernel, dim3(1), dim3(32), a.data(), b.data(), c.data());
       for (size_t m = 0; m < 16; ++m)
         for (size_t n = 0; n < 8; ++n) {
           int sum = 0;
           for (size_t k = 0; k < 32; ++k) sum += a[m * 32 + k] * b[n * 32 + k];
           expect(c[m * 8 + n] == sum, "element");
         }
       return std::string("equal");
     }},
    {"planted-missing-barrier",
     [] {
       const auto x = ramp(N);
       return orders_differ<float>(N, [&](float* y) { go(missing_barrier_kernel, dim3(1), dim3(N), x.data(), y); });
     }},
    {"planted-race", [] { return orders_differ<int>(1, [](int* last) { go(race_kernel, dim3(1), dim3(N), last); }); }},
    {"planted-race-of-blocks",
     [] { return orders_differ<int>(1, [](int* last) { go(block_race_kernel, dim3(9), dim3(1), last); }); }},
    {kSanitized ? "crash-past-the-end" : "planted-past-the-end",
     [] {
       std::vector<float> y(N);
       return fails("byte 256 of a shared array of 256 bytes",
                    [&] { go(past_the_end_kernel, dim3(1), dim3(N), y.data()); });
     }},
    {"planted-divergent-barrier",
     [] { return fails("different barriers", [] { go(divergent_barrier_kernel, dim3(1), dim3(N)); }); }},
    {"planted-early-exit",
     [] { return fails("some threads never reach", [] { go(early_exit_kernel, dim3(1), dim3(N)); }); }},
    {"planted-exit-before-a-shuffle",
     [] {
       std::vector<float> y(N);
       return fails("wait for others that never come", [&] { go(warp_exit_kernel, dim3(1), dim3(32), y.data()); });
     }},
    {"planted-wrong-mask",
     [] {
       std::vector<float> y(N);
       return fails("lacks the calling lane", [&] { go(wrong_mask_kernel, dim3(1), dim3(32), y.data()); });
     }},
    {"planted-read-outside-mask",
     [] {
       std::vector<float> y(N);
       return fails("not in its mask", [&] { go(outside_mask_kernel, dim3(1), dim3(32), y.data()); });
     }},
    {"planted-forgotten-wait",
     [] {
       const auto x = ramp(4 * N);
       std::vector<float> y(4 * N);
       return fails("never waited for", [&] { go(forgotten_wait_kernel, dim3(1), dim3(N), x.data(), y.data()); });
     }},
    {"planted-unwritten-shared",
     [] {
       std::vector<float> y(N);
       go(unwritten_kernel, dim3(1), dim3(N), y.data());
       expect(std::isnan(y[0]) && y[1] == 1.0f, "not NaN");
       return std::string("NaN");
     }},
    {"planted-too-much-shared",
     [] { return fails("more than 48 KB", [] { go(big_shared_kernel, dim3(1), dim3(N)); }); }},
    {"planted-grid-barrier",
     [] {
       unsigned barrier = 0;
       return fails("not cooperative", [&] { go(grid_barrier_kernel, dim3(2), dim3(N), &barrier); });
     }},
    {"planted-too-many-threads",
     [] {
       unsigned barrier = 0;
       return fails("at most 1024", [&] { go(grid_barrier_kernel, dim3(1), dim3(1025), &barrier); });
     }},
#if defined(__SANITIZE_ADDRESS__)
    {"crash-global-out-of-bounds",
     [] {
       std::vector<float> y(N);
       go(global_out_of_bounds_kernel, dim3(1), dim3(N), y.data());
       return std::string("the mistake was not found");
     }},
#endif
};

}  // namespace
}  // namespace fastdl::cuda

extern "C" {
// Name of test `index`; null past the last.
__attribute__((visibility("default"))) const char* fastdl_emulator_test_name(int index) {
  constexpr int count = static_cast<int>(sizeof(fastdl::cuda::kTests) / sizeof(fastdl::cuda::kTests[0]));
  return index >= 0 && index < count ? fastdl::cuda::kTests[index].name : nullptr;
}

__attribute__((visibility("default"))) int fastdl_emulator_self_test(int index, char* message, int bytes) {
  fastdl::emulator::set_order(fastdl::emulator::Order::forward);
  try {
    std::snprintf(message, static_cast<size_t>(bytes), "%s", fastdl::cuda::kTests[index].run().c_str());
    return 0;
  } catch (const std::exception& error) {
    fastdl::emulator::set_order(fastdl::emulator::Order::forward);
    std::snprintf(message, static_cast<size_t>(bytes), "%s", error.what());
    return 1;
  }
}
}
