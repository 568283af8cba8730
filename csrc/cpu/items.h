// Work cut into items of unequal length, which threads take one after the other.
#pragma once

#include <algorithm>
#include <atomic>

#include "common/parallel.h"
#include "common/tensor.h"
#include "cpu/scratch.h"

namespace fastdl {

constexpr int64_t ITEMS_ALONE = 1 << 18;  // multiply-adds; waking up a second thread costs more than so few take

// body(item, scratch) for every item, in their order, on as many threads as there is work (multiply-adds) for. Which thread
// takes an item must not matter to its result.
template <class Body>
void for_items(int64_t items, int64_t work, int64_t scratch_bytes, const Body& body) {
  const int threads = work < ITEMS_ALONE ? 1 : static_cast<int>(std::min<int64_t>(thread_count(), items));
  const int64_t bytes = padded(scratch_bytes);
  const Scratch memory(std::max(1, threads) * bytes);
  uint8_t* const scratch = memory.data;
  std::atomic<int64_t> next{0};
  parallel_region(threads, [&](int thread, int) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(i, scratch + thread * bytes);
  });
}

}  // namespace fastdl
