// The CUDA execution model on the CPU, so that the very same .cuh kernels run, and are checked, without a GPU.
//
// A thread of a block is a fiber; a block's fibers take turns on one system thread. A fiber runs until it meets a barrier
// (block, warp or grid), a collective of its warp, or its end. A launch is synchronous.
//
// What it finds, as emulator::Failure:
//   - a barrier that some threads never reach (they have ended, or wait at another one), with the waiting threads
//   - a collective whose mask names lanes that take part in another one or have ended, or lacks the calling lane
//   - writes into the red zones around shared arrays; more shared memory than the hardware has
// What it shows as a wrong result: shared memory that was read before it was written (it is full of NaN bytes), races
// between barriers (results differ between the orders in which threads run, see Order), values of cp.async that were
// read before they were waited for. The address sanitizer, where it is on, sees every access out of bounds.
//
// Test: tests/test_emulator.py, csrc/emulator/self_test.cpp
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace fastdl::emulator {

using Where = std::source_location;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// In which order the runnable threads of a block, and the blocks of a grid, take turns.
enum class Order : int { forward = 0, reverse = 1, shuffled = 2 };
void set_order(Order order);

constexpr unsigned kWarp = 32;
constexpr size_t kStaticShared = 48 * 1024;    // what the compiler allows
constexpr size_t kDynamicShared = 227 * 1024;  // sm_90's opt-in maximum; smaller chips are the launcher's business

struct Shape {
  dim3 grid, block;
  size_t dynamic_shared = 0;
  bool cooperative = false;  // all blocks live at once: grid barriers work
};

// Runs body once for every thread of every block. Throws Failure.
void run(const Shape& shape, const std::function<void()>& body);

// ---- What the thread that calls sees ------------------------------------------------------------------------------
struct Indices {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
const Indices& indices();
unsigned lane();  // 0 .. 31

void block_barrier(Where where = Where::current());
void grid_barrier(Where where = Where::current());
[[noreturn]] void fail(const std::string& message, Where where = Where::current());

// The lanes in mask meet; the last one runs body(payloads, mask), payloads[i] being the pointer that lane i passed (null
// outside the mask); then all go on. `name` must be the same for all of them.
using Collective = void (*)(void* const* payloads, uint32_t mask);
void warp_collective(const char* name, uint32_t mask, void* payload, Collective body, Where where = Where::current());

// Shared memory: the array that belongs to a declaration, the same for all threads of the block.
void* shared_array(const void* declaration, size_t bytes, size_t align);
void* dynamic_shared();
bool in_shared(const void* address, size_t bytes);  // inside one array of this block

// Actions put off until a cp.async group is waited for; see emulator/ptx.h.
void defer_copy(void* to, const void* from, size_t bytes, size_t valid);
void commit_copies();
void wait_copies(unsigned groups_left);

template <class... P, class... A>
void launch(void (*kernel)(P...), const Shape& shape, A&&... arguments) {
  const std::tuple<P...> copies(static_cast<P>(std::forward<A>(arguments))...);
  run(shape, [&] { std::apply(kernel, copies); });
}

}  // namespace fastdl::emulator
