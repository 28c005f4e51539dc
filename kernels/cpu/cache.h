// One side of a cache, the keys or the values, as kernels/layout.py lays it out.
#pragma once

#include <stdexcept>
#include <string>

#include "memory.h"
#include "spec.h"

namespace spark {

// Rows that lie `step` bytes apart.
struct Tokens {
  const char* data;
  int64_t step;

  const char* at(int64_t t) const { return data + t * step; }
};

// Where a packed token is.
struct Place {
  char* page;
  int64_t token;  // of the page

  template <class T = char>
  T* at(const Field& field) const {
    return reinterpret_cast<T*>(page + field.first + token * field.bytes);
  }
  // The rows of this token and of those after it.
  Tokens rows(const Field& field) const { return {at(field), field.bytes}; }
  Place operator+(int64_t tokens) const { return {page, token + tokens}; }
};

constexpr int64_t KEEP_ALL = int64_t(1) << 62;     // tokens
constexpr int64_t MOST_TOKENS = int64_t(1) << 40;  // sums of counters never overflow

struct Side {
  const Spec* spec;
  const Format* format;
  int64_t batch, heads;
  Rows pages, head;         // `token` of pages: from one page to the next
  int64_t slots;            // pages that there is room for
  const char* pages_end;    // after the last page
  int64_t tail_rows;        // that there is room for
  Rows fresh;               // the new tokens
  int64_t fresh_tokens;
  const int64_t* fresh_positions;  // [B, H, fresh_tokens] of an evicted prompt, null for tokens that come next
  // The counters.
  int64_t length, packed, first, step, dropped;

  int64_t* counters(int64_t b, int64_t h) const { return head.at<int64_t>(b, h, 0); }
  float* constant(int64_t b, int64_t h) const { return head_at<float>(b, h, format->constant); }
  // The statistics in the slot of a step.
  float* stats(int64_t b, int64_t h, int64_t of_step) const {
    return head_at<float>(b, h, format->stats) + (of_step & 1) * format->dim;
  }
  char* tail(int64_t b, int64_t h) const { return head_at<char>(b, h, format->tail); }
  // number: of all pages, from the first one that was ever packed. Most caches never divide it, which is slow.
  char* page(int64_t b, int64_t h, int64_t number) const {
    return pages.at(b, h, number < slots ? number : number % slots);
  }
  // Dense tokens in front of the packed ones.
  int64_t sinks() const { return packed ? spec->sinks : 0; }
  // Packed tokens that are no longer part of the cache.
  int64_t stale() const { return std::min(first, packed); }
  int64_t visible() const { return length - first; }
  // Tokens since the first page as the model counts them.
  int64_t tokens() const { return length + dropped; }
  // Which one of the tokens of the model a stored or new token is, that is not packed yet.
  int64_t position_of(int64_t b, int64_t h, int64_t token) const {
    return fresh_positions ? fresh_positions[(b * heads + h) * fresh_tokens + token] : token + dropped;
  }

  void read_counters() {
    length = packed = first = step = dropped = 0;
    if (batch * heads == 0) return;
    const int64_t* of_first = counters(0, 0);
    length = of_first[0], packed = of_first[1], first = of_first[2], step = of_first[3], dropped = of_first[4];
  }
  void write_counters() const {
    for (int64_t at = 0; at < batch * heads; ++at) {
      int64_t* of_head = counters(at / heads, at % heads);
      of_head[0] = length, of_head[1] = packed, of_head[2] = first, of_head[3] = step, of_head[4] = dropped;
    }
  }
  // Raises std::invalid_argument unless the counters can be those of a cache in these tensors; nothing
  // else may be read before. Says what Store.check in kernels/reference/store.py does.
  void check_counters(const char* side) const {
    const auto check = [&](const char* name, int64_t value, int64_t least, int64_t most) {
      if (least <= value && value <= most) return;
      const std::string allowed = least < most ? std::to_string(least) + " to " : "";
      throw std::invalid_argument(std::string("the ") + side + "s of the cache are damaged: " + name + " is " +
          std::to_string(value) + ", allowed is " + allowed + std::to_string(most));
    };
    const int64_t window = spec->window, chosen = dropped ? spec->chosen_end() : 0;
    check("LENGTH", length, 0, MOST_TOKENS);
    check("PACKED", packed, 0, length);
    check("FIRST", first, 0, spec->sinks || spec->evict_tokens ? 0 : length);
    check("STEP", step, 0, KEEP_ALL);
    check("DROPPED", dropped, 0, spec->evict_tokens ? MOST_TOKENS : 0);
    check("LENGTH of an evicted prompt", length, chosen, MOST_TOKENS);
    check("PACKED of an evicted prompt", packed, std::max<int64_t>(chosen - spec->sinks, 0), length);
    check("PACKED modulo window", packed % window, 0, 0);
    check("LENGTH - PACKED", length - packed, sinks(), tail_rows);
    check("the number of live pages", packed / window - stale() / window, 0, slots);
  }

  // Number of pages to pack when new tokens are appended; there must be room for that.
  int64_t due(int64_t new_tokens, int64_t keep) const {
    const int64_t total = length + new_tokens, pages = spec->pages_due(total, total - first, packed);
    const int64_t rows = total - packed - pages * spec->window;
    if (rows > tail_rows) {
      throw std::invalid_argument(std::to_string(rows) + " dense tokens do not fit into a tail of " +
          std::to_string(tail_rows));
    }
    const int64_t evicted = std::max(first, total - keep);
    if (evicted && (spec->sinks || spec->evict_tokens)) {
      const std::string kept = spec->sinks ? std::to_string(spec->sinks) + " tokens" : "tokens by a scorer";
      throw std::invalid_argument("keep is " + std::to_string(keep) + ": a cache that keeps its first " + kept +
          " evicts none");
    }
    const int64_t live = packed / spec->window + pages - evicted / spec->window;
    if (pages && live > slots) {
      throw std::invalid_argument(std::to_string(live) + " pages do not fit into " + std::to_string(slots));
    }
    return pages;
  }

  // Number of stored tokens in front of a position of the model; raises std::invalid_argument where
  // there are evicted tokens on both sides of it (Spec.stored_index in kernels/spec.py).
  int64_t index_of(int64_t position) const {
    if (!dropped || position == 0) return position;
    const int64_t index = position - dropped, end = spec->chosen_end();
    if (index >= end) return index;
    throw std::invalid_argument("position " + std::to_string(position) + " is among the first " +
        std::to_string(dropped + end) + " tokens, of which " + std::to_string(dropped) +
        " are evicted: evicted tokens cannot be recovered");
  }

  // Forgets the stored tokens from `count` on, as the counters have it; false if a page is cut, whose tokens
  // would have to become dense ones.
  bool crop(int64_t count) {
    const int64_t sinks_ = spec->sinks, window = spec->window;
    if (packed && count < packed + sinks_) {
      const int64_t whole = std::max<int64_t>(count - sinks_, 0) / window * window;
      if (count > sinks_ + whole) return false;
      packed = whole;
    }
    length = count, first = std::min(first, count);
    if (!count) dropped = 0;
    return true;
  }

 private:
  template <class T>
  T* head_at(int64_t b, int64_t h, int64_t offset) const {
    return reinterpret_cast<T*>(head.at(b, h, 0) + offset);
  }
};

}  // namespace spark
