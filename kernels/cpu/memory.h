// Memory: a thread's scratch, and tensors as plain pointers.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "simd.h"

namespace spark {

// Scratch memory of a thread, the small blocks kept for its next call: given back to the system,
// their pages would have to be cleared again at each.
class Pool {
  static constexpr size_t BLOCKS = 16, BLOCK_BYTES = 1 << 18;

 public:
  static Pool& mine() {
    static thread_local Pool pool;
    return pool;
  }
  void* take(size_t bytes) {
    const auto same = std::find_if(blocks_.begin(), blocks_.end(), [&](const auto& b) { return b.second == bytes; });
    if (same == blocks_.end()) return std::aligned_alloc(64, bytes);
    void* data = same->first;
    blocks_.erase(same);
    return data;
  }
  void give(void* data, size_t bytes) {
    if (bytes > BLOCK_BYTES) return std::free(data);
    blocks_.emplace_back(data, bytes);
    if (blocks_.size() > BLOCKS) std::free(blocks_.front().first), blocks_.erase(blocks_.begin());
  }
  ~Pool() {
    for (const auto& block : blocks_) std::free(block.first);
  }

 private:
  std::vector<std::pair<void*, size_t>> blocks_;
};

struct GiveBack {
  size_t bytes;
  void operator()(void* data) const { Pool::mine().give(data, bytes); }
};
template <class T>
using Scratch = std::unique_ptr<T[], GiveBack>;

template <class T>
Scratch<T> uncleared_scratch(int64_t count) {
  const size_t bytes = round_up(std::max<int64_t>(count, 1) * sizeof(T), 64);
  return Scratch<T>(static_cast<T*>(Pool::mine().take(bytes)), GiveBack{bytes});
}

// Zeros.
template <class T>
Scratch<T> scratch(int64_t count) {
  Scratch<T> room = uncleared_scratch<T>(count);
  std::memset(room.get(), 0, room.get_deleter().bytes);
  return room;
}

// Rows [B, H, S] of numbers next to each other; strides in bytes.
struct Rows {
  char* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;

  template <class T = char>
  T* at(int64_t b, int64_t h, int64_t s) const {
    return reinterpret_cast<T*>(data + b * batch + h * head + s * token);
  }
};

}  // namespace spark
