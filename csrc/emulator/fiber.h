// A fiber: a stack and a place to go on from. It starts by ucontext and then switches by _setjmp and _longjmp, which, other
// than swapcontext, ask nothing of the system; under the address sanitizer it stays with swapcontext, and with the calls
// that the sanitizer wants at a switch.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastdl::emulator {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

// Stacks are mapped once and used again; the page below each may not be touched, so that an overflow is a fault.
class StackPool {
 public:
  ~StackPool() {
    for (void* stack : free_) munmap(static_cast<char*>(stack) - page(), kStackBytes + page());
  }
  void* take() {
    if (free_.empty()) {
      void* base = mmap(nullptr, kStackBytes + page(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (base == MAP_FAILED || mprotect(base, page(), PROT_NONE) != 0) throw std::bad_alloc();
      return static_cast<char*>(base) + page();
    }
    void* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give(void* stack) { free_.push_back(stack); }

 private:
  static size_t page() {
    static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
  }
  std::vector<void*> free_;
};

class Fiber {
 public:
  // entry(argument) runs at the first resume() and must end by calling leave(true).
  Fiber(StackPool& pool, void (*entry)(void*), void* argument)
      : pool_(pool), stack_(pool.take()), entry_(entry), argument_(argument) {
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack_;
    inside_.uc_stack.ss_size = kStackBytes;
    inside_.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);  // makecontext passes ints only
    makecontext(&inside_, reinterpret_cast<void (*)()>(&Fiber::start), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self));
  }
  ~Fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStackBytes);  // a fiber that was given up left its frames behind
#endif
    pool_.give(stack_);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Called by the scheduler: run the fiber until it leaves.
  void resume() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_, kStackBytes);
    swapcontext(&outside_, &inside_);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    if (_setjmp(resumed_from_) != 0) return;
    if (started_) _longjmp(left_at_, 1);
    started_ = true;
    setcontext(&inside_);
#endif
  }

  // Called by the fiber: back to the scheduler; `last`: it will not be resumed again.
  void leave(bool last) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, outer_bottom_, outer_bytes_);
    swapcontext(&inside_, &outside_);
    __sanitizer_finish_switch_fiber(fake, &outer_bottom_, &outer_bytes_);
#else
    (void)last;
    if (_setjmp(left_at_) == 0) _longjmp(resumed_from_, 1);
#endif
  }

 private:
  static void start(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Fiber*>((static_cast<uintptr_t>(high) << 32) | low);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &self->outer_bottom_, &self->outer_bytes_);
#endif
    self->entry_(self->argument_);
  }

  StackPool& pool_;
  void* stack_;
  void (*entry_)(void*);
  void* argument_;
  ucontext_t inside_;
#if !defined(__SANITIZE_ADDRESS__)
  bool started_ = false;
  jmp_buf resumed_from_, left_at_;
#else
  ucontext_t outside_;
  const void* outer_bottom_ = nullptr;
  size_t outer_bytes_ = 0;
#endif
};

}  // namespace fastdl::emulator
