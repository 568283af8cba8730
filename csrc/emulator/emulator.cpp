// The scheduler: blocks, threads, barriers and collectives. See emulator.h.
#include "emulator/emulator.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <sstream>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/shared_memory.h"

namespace fastdl::emulator {
namespace {

enum class State { ready, block_barrier, grid_barrier, collective, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, valid;
};

struct Block;

struct Thread {
  Indices indices;
  Block* block;
  unsigned number;  // linear index in the block
  State state = State::ready;
  const char* waits_for = "";
  Where where;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> committed_copies;
  std::unique_ptr<Fiber> fiber;
};

// A collective that some lanes of a warp have reached and others not yet.
struct Meeting {
  unsigned warp;
  const char* name;
  uint32_t mask, arrived;
  void* payloads[kWarp];
};

struct Block {
  std::vector<Thread> threads;
  std::vector<unsigned> order;
  std::vector<Meeting> meetings;
  std::unique_ptr<SharedMemory> memory;
  void* dynamic = nullptr;
  unsigned at_barrier = 0, done = 0;
  Where barrier;  // where the first of those at the barrier waits
};

struct Grid {
  Shape shape;
  const std::function<void()>* body;
  std::vector<std::unique_ptr<Block>> blocks;  // those that live
  uint64_t all_threads = 0, at_barrier = 0, done = 0;
  std::string error;
};

thread_local Grid* grid = nullptr;
thread_local Thread* self = nullptr;
thread_local StackPool stacks;
thread_local std::vector<std::unique_ptr<SharedMemory>> arenas;  // free ones
thread_local Order chosen_order = Order::forward;
constexpr uint64_t kPrime = 2654435761;  // no grid has a multiple of it as its number of blocks
const char kDynamic = 0;                 // its address declares the dynamic array

std::string text(const Where& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return std::string(slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

std::string text(const uint3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// Who waits where in a block: "31 threads (0-30) wait at __syncthreads, norm.cuh:52; 1 thread (31) has ended".
std::string waiting(const Block& block) {
  std::ostringstream out;
  out << "block " << text(block.threads[0].indices.block) << ": ";
  std::vector<bool> seen(block.threads.size());
  for (size_t i = 0; i < block.threads.size(); ++i) {
    if (seen[i]) continue;
    const Thread& one = block.threads[i];
    std::vector<unsigned> group;
    for (size_t j = i; j < block.threads.size(); ++j) {
      const Thread& other = block.threads[j];
      if (other.state != one.state || (one.state != State::done && !same(other.where, one.where))) continue;
      seen[j] = true;
      group.push_back(other.number);
    }
    out << (i ? "; " : "") << group.size() << (group.size() == 1 ? " thread (" : " threads (");
    for (size_t j = 0, shown = 0; j < group.size() && shown < 8; ++shown) {
      size_t last = j;
      while (last + 1 < group.size() && group[last + 1] == group[last] + 1) ++last;
      out << (shown ? ", " : "") << group[j];
      if (last > j) out << "-" << group[last];
      j = last + 1;
      if (shown == 7 && j < group.size()) out << ", ...";
    }
    if (one.state == State::done)
      out << ") ended";
    else if (one.state == State::ready)
      out << ") can run";
    else
      out << ") wait at " << one.waits_for << ", " << text(one.where);
  }
  return out.str();
}

void wait(State state, const char* name, const Where& where) {
  self->state = state;
  self->waits_for = name;
  self->where = where;
  self->fiber->leave(false);
}

void enter(void*) {
  try {
    (*grid->body)();
    Block& block = *self->block;
    self->state = State::done;
    ++block.done;
    ++grid->done;
    if (!self->open_copies.empty() || !self->committed_copies.empty())
      fail("a thread ended with a cp.async group that it never waited for", self->where);
    if (block.at_barrier > 0) fail("a barrier that some threads never reach; " + waiting(block), self->where);
  } catch (const std::exception& error) {
    if (grid->error.empty()) grid->error = error.what();
  }
  self->fiber->leave(true);
}

unsigned count(const dim3& d) { return d.x * d.y * d.z; }

std::unique_ptr<Block> make_block(uint64_t number) {
  auto block = std::make_unique<Block>();
  const dim3 g = grid->shape.grid, b = grid->shape.block;
  if (arenas.empty()) {
    block->memory = std::make_unique<SharedMemory>();
  } else {
    block->memory = std::move(arenas.back());
    arenas.pop_back();
    block->memory->reset();
  }
  if (grid->shape.dynamic_shared) block->dynamic = block->memory->find_or_add(&kDynamic, grid->shape.dynamic_shared);
  block->threads.resize(count(b));
  for (unsigned i = 0; i < block->threads.size(); ++i) {
    Thread& thread = block->threads[i];
    thread.number = i;
    thread.block = block.get();
    thread.indices.thread = {i % b.x, i / b.x % b.y, i / b.x / b.y};
    thread.indices.block = {static_cast<unsigned>(number % g.x), static_cast<unsigned>(number / g.x % g.y),
                            static_cast<unsigned>(number / g.x / g.y)};
    thread.indices.block_dim = b;
    thread.indices.grid_dim = g;
    thread.fiber = std::make_unique<Fiber>(stacks, enter, &thread);
    block->order.push_back(i);
  }
  if (chosen_order == Order::reverse) std::reverse(block->order.begin(), block->order.end());
  return block;
}

// Turns of all living blocks until every thread has ended; stops at the first failure.
void run_living(std::mt19937& random) {
  for (uint64_t left = 1; left > 0;) {
    bool moved = false;
    left = 0;
    if (chosen_order == Order::shuffled) std::shuffle(grid->blocks.begin(), grid->blocks.end(), random);
    for (auto& block : grid->blocks) {
      if (chosen_order == Order::shuffled) std::shuffle(block->order.begin(), block->order.end(), random);
      for (const unsigned i : block->order) {
        Thread& thread = block->threads[i];
        if (thread.state != State::ready) continue;
        self = &thread;
        moved = true;
        thread.fiber->resume();
        self = nullptr;
        if (!grid->error.empty()) return;
      }
      left += block->threads.size() - block->done;
    }
    if (left > 0 && !moved) {
      grid->error = "threads wait for others that never come; ";
      for (auto& block : grid->blocks)
        if (block->done < block->threads.size()) {
          grid->error += waiting(*block);
          return;
        }
    }
  }
  for (auto& block : grid->blocks)
    if (const std::string damage = block->memory->damage(); !damage.empty()) {
      grid->error =
          "write out of bounds in shared memory: " + damage + ", block " + text(block->threads[0].indices.block);
      return;
    }
}

void check(const Shape& shape) {
  const dim3 g = shape.grid, b = shape.block;
  const auto refuse = [](const std::string& what) { throw Failure("emulator: launch refused: " + what); };
  if (!g.x || !g.y || !g.z || !b.x || !b.y || !b.z) refuse("a grid or block of size zero");
  if (g.x > 2147483647u || g.y > 65535 || g.z > 65535) refuse("a grid may have at most 2^31 - 1, 65535, 65535 blocks");
  if (b.x > 1024 || b.y > 1024 || b.z > 64 || static_cast<uint64_t>(b.x) * b.y * b.z > 1024)
    refuse("a block may have at most 1024 threads");
  if (shape.dynamic_shared > kDynamicShared) refuse("more than 227 KB of dynamic shared memory");
  if (grid) refuse("a kernel is running; launches inside kernels are not supported");
}

}  // namespace

void set_order(Order order) { chosen_order = order; }

void run(const Shape& shape, const std::function<void()>& body) {
  check(shape);
  Grid now{shape, &body, {}, 0, 0, 0, {}};
  const uint64_t blocks = static_cast<uint64_t>(shape.grid.x) * shape.grid.y * shape.grid.z;
  now.all_threads = blocks * count(shape.block);
  struct Reset {
    ~Reset() { grid = nullptr; }
  } reset;
  grid = &now;
  std::mt19937 random(1);
  const uint64_t at_once = shape.cooperative ? blocks : 1;
  for (uint64_t first = 0; first < blocks && now.error.empty(); first += at_once) {
    for (uint64_t i = 0; i < at_once; ++i) {
      // Blocks take turns in another order too; a product with a prime is a permutation that needs no table.
      uint64_t number = first + i;
      if (chosen_order == Order::reverse) number = blocks - 1 - number;
      if (chosen_order == Order::shuffled) number = (number * kPrime + blocks / 3) % blocks;
      now.blocks.push_back(make_block(number));
    }
    run_living(random);
    for (auto& block : now.blocks) arenas.push_back(std::move(block->memory));
    now.blocks.clear();
  }
  if (!now.error.empty()) throw Failure("emulator: " + now.error);
}

const Indices& indices() { return self->indices; }

unsigned lane() { return self->number % kWarp; }

void fail(const std::string& message, Where where) {
  std::string text_ = message;
  if (self)
    text_ +=
        " [thread " + text(self->indices.thread) + " of block " + text(self->indices.block) + ", " + text(where) + "]";
  throw Failure(text_);
}

void block_barrier(Where where) {
  Block& block = *self->block;
  const bool elsewhere = block.at_barrier && !same(block.barrier, where);
  if (elsewhere || block.done) {
    self->state = State::block_barrier, self->waits_for = "__syncthreads", self->where = where;
    fail((elsewhere ? "threads of one block at different barriers; " : "a barrier that some threads never reach; ") +
             waiting(block),
         where);
  }
  block.barrier = where;
  if (++block.at_barrier < block.threads.size()) return wait(State::block_barrier, "__syncthreads", where);
  block.at_barrier = 0;
  for (Thread& thread : block.threads) thread.state = State::ready;
}

void grid_barrier(Where where) {
  if (!grid->shape.cooperative) fail("a grid barrier in a launch that is not cooperative", where);
  if (grid->done) fail("a grid barrier that some threads never reach: they have ended", where);
  if (++grid->at_barrier < grid->all_threads) return wait(State::grid_barrier, "grid_barrier", where);
  grid->at_barrier = 0;
  for (auto& block : grid->blocks)
    for (Thread& thread : block->threads) thread.state = State::ready;
}

void warp_collective(const char* name, uint32_t mask, void* payload, Collective body, Where where) {
  Block& block = *self->block;
  const unsigned warp = self->number / kWarp, mine = self->number % kWarp;
  const size_t lanes = std::min<size_t>(kWarp, block.threads.size() - warp * kWarp);
  if (!(mask >> mine & 1)) fail(std::string(name) + ": the mask lacks the calling lane", where);
  if (lanes < kWarp && mask >> lanes) fail(std::string(name) + ": the mask names lanes that the block lacks", where);
  Meeting* meeting = nullptr;
  for (Meeting& open : block.meetings)
    if (open.warp == warp && (open.mask & mask)) {
      if (open.mask != mask || std::strcmp(open.name, name) != 0) {
        self->state = State::collective, self->waits_for = name, self->where = where;
        fail("lanes of one warp in different collectives or with different masks; " + waiting(block), where);
      }
      meeting = &open;
    }
  if (!meeting) {
    block.meetings.push_back({warp, name, mask, 0, {}});
    meeting = &block.meetings.back();
  }
  meeting->arrived |= 1u << mine;
  meeting->payloads[mine] = payload;
  if (meeting->arrived != mask) return wait(State::collective, name, where);
  const Meeting complete = *meeting;
  block.meetings.erase(block.meetings.begin() + (meeting - block.meetings.data()));
  if (body) body(complete.payloads, mask);
  for (size_t i = 0; i < lanes; ++i)
    if (mask >> i & 1) block.threads[warp * kWarp + i].state = State::ready;
}

void* shared_array(const void* declaration, size_t bytes, size_t align) {
  if (align > SharedMemory::kRedZone) fail("a shared array aligned to more than 128 bytes");
  SharedMemory& memory = *self->block->memory;
  void* array = memory.find_or_add(declaration, bytes);
  if (!array || memory.used(&kDynamic) > kStaticShared) fail("more than 48 KB of static shared memory");
  return array;
}

void* dynamic_shared() {
  if (!self->block->dynamic) fail("dynamic shared memory, but the launch asks for none");
  return self->block->dynamic;
}

bool in_shared(const void* address, size_t bytes) { return self->block->memory->contains(address, bytes); }

void defer_copy(void* to, const void* from, size_t bytes, size_t valid) {
  if (!in_shared(to, bytes)) fail("cp.async: the destination is not inside a shared array");
  if (reinterpret_cast<uintptr_t>(to) % bytes || (valid && reinterpret_cast<uintptr_t>(from) % bytes))
    fail("cp.async: an address is not a multiple of its " + std::to_string(bytes) + " bytes");
  std::memset(to, 0xFF, bytes);
  self->open_copies.push_back({to, from, bytes, valid});
}

void commit_copies() {
  self->committed_copies.push_back(std::move(self->open_copies));
  self->open_copies.clear();
}

void wait_copies(unsigned groups_left) {
  while (self->committed_copies.size() > groups_left) {
    for (const Copy& copy : self->committed_copies.front()) {
      if (copy.valid) std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
    }
    self->committed_copies.pop_front();
  }
}

}  // namespace fastdl::emulator
