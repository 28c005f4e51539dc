// One attention over a cache and new tokens, and its blocks of tokens.
#pragma once

#include "quantized.h"

namespace spark {

enum class MaskKind { none, boolean, float32, bfloat16, float16 };

// Tokens of one kind. Packed ones are in pages, dense ones are rows of the tail and then new ones.
struct Block {
  int64_t batch, head, first;  // first: the first token among all that are attended to
  int count;                   // tokens, at most the engine's BLOCK
  bool packed;
  int64_t page = 0, token = 0;  // of packed ones: where the first one is
  int old = 0;                  // of dense ones: those in front of the new ones
  Tokens keys{}, values{}, new_keys{}, new_values{};

  const char* key(int t) const { return t < old ? keys.at(t) : new_keys.at(t - old); }
  const char* value(int t) const { return t < old ? values.at(t) : new_values.at(t - old); }
};

// Packed tokens of a block that are in one page of either side.
struct Run {
  Place keys, values;  // of the first one
  int first, count;    // tokens of the block
};

// The packed tokens of a block one after the other, on one side.
class Places {
 public:
  Places(const Side& side, const Block& block)
      : side_(side), block_(block), page_(block.page), next_{side.page(block.batch, block.head, page_), block.token} {}

  Place next() {
    if (next_.token == side_.spec->window) next_ = {side_.page(block_.batch, block_.head, ++page_), 0};
    return {next_.page, next_.token++};
  }

  // Where a field of the next four tokens is, of `left` ones; of those that are not there, at the first one.
  template <class T>
  void next_four(int left, const Field& field, const T* (&rows)[4]) {
    for (int i = 0; i < 4; ++i) {
      rows[i] = rows[0];
      if (i >= left) continue;
      rows[i] = next().template at<T>(field);
    }
  }

 private:
  const Side& side_;
  const Block& block_;
  int64_t page_;
  Place next_;
};

// The order of the tokens: dense sinks, packed ones, the rest of the tail, new ones.
struct Problem {
  Problem(const Side& keys, const Side& values) : keys(keys), values(values) {
    batch = keys.batch, kv_heads = keys.heads;
    key_dim = keys.format->dim, value_dim = values.format->dim;
    sinks = keys.sinks(), packed = keys.packed - keys.stale();
    length = keys.visible() + keys.fresh_tokens, columns = length + keys.dropped;
  }

  const Side &keys, &values;
  int64_t batch, kv_heads, key_dim, value_dim;
  int64_t length, packed, sinks;  // tokens: in all, packed, dense ones in front of the packed
  int64_t columns;                // tokens with those of the prompt that were evicted, which a mask has too
  int64_t query_heads = 0, queries = 0;
  Rows query, output;
  float* lse = nullptr;  // [B, Hq, L], the log-sum-exp of each row's scores, where it is asked for
  bool causal = false;
  int64_t causal_offset = 0;
  MaskKind mask_kind = MaskKind::none;
  const char* mask = nullptr;
  int64_t mask_strides[4] = {};
  const float* sink_logits = nullptr;

  int64_t group() const { return query_heads / kv_heads; }
  int64_t query_rows() const { return group() * queries; }

  // Whether packed tokens have to be masked each at its position: else what is in front of the latest
  // tokens of an evicted prompt is visible to all queries.
  bool is_scattered() const {
    if (!keys.dropped) return false;
    return mask_kind != MaskKind::none || (causal && causal_offset + 1 < keys.dropped + keys.spec->chosen_end());
  }
  // The position of a block's first token, if the others come right after it.
  int64_t column(const Block& block) const { return block.first < sinks ? block.first : block.first + keys.dropped; }
  // The positions of a block of packed tokens.
  void read_positions(const Block& block, int64_t* positions) const {
    each_run(block, [&](const Run& run) {
      const uint32_t* stored = run.keys.at<uint32_t>(keys.format->position);
      // A damaged one leaves no mask.
      for (int t = 0; t < run.count; ++t) positions[run.first + t] = std::min<int64_t>(stored[t], columns - 1);
    });
  }
  // Calls f(run) for a block of packed tokens, page by page.
  template <class Function>
  void each_run(const Block& block, const Function& f) const {
    int64_t page = block.page, token = block.token;
    for (int first = 0; first < block.count; ++page, token = 0) {
      const int count = int(std::min<int64_t>(block.count - first, keys.spec->window - token));
      const auto place = [&](const Side& side) { return Place{side.page(block.batch, block.head, page), token}; };
      f(Run{place(keys), place(values), first, count});
      first += count;
    }
  }

  // `count` packed tokens from position `first` on.
  Block packed_block(int64_t b, int64_t h, int64_t first, int64_t count) const {
    const int64_t token = first - sinks + keys.stale(), window = keys.spec->window;
    return {b, h, first, int(count), true, token / window, token % window};
  }
  // `count` dense tokens from position `first` on, all sinks or none.
  Block dense_block(int64_t b, int64_t h, int64_t first, int64_t count) const {
    // Evicted tokens that are not packed are the first of the tail.
    const int64_t row = first < sinks ? first : first - packed + keys.first - keys.stale();
    const int64_t tail = keys.length - keys.packed, fresh = std::max<int64_t>(row - tail, 0);
    const auto old_rows = [&](const Side& side) {
      const int64_t bytes = side.format->row_bytes();
      return Tokens{side.tail(b, h) + row * bytes, bytes};
    };
    const auto new_rows = [&](const Side& side) { return Tokens{side.fresh.at(b, h, fresh), side.fresh.token}; };
    const int old = int(std::clamp<int64_t>(tail - row, 0, count));
    return {b, h, first, int(count), false, 0, 0, old, old_rows(keys), old_rows(values), new_rows(keys), new_rows(values)};
  }
};

// What q is multiplied with where a channel of the keys is pruned: 1 / n^p, or 0 without recovery.
inline void recovery_weights(const Side& side, int64_t b, int64_t h, float* weights) {
  const Format& f = *side.format;
  if (f.kind != Kind::spark) return;
  norm_powers(side.constant(b, h), f.dim, f.squared, weights);
  for (int64_t j = 0; j < f.dim; ++j) weights[j] = f.recovers ? 1.0f / weights[j] : 0.0f;
}

// Asks for the pages that come after a block, a few lines at a time, through all that is done with the block: at most
// 16 lines are on their way, and who asks for more has to wait. Into the second-level cache: from there the
// lines displace nothing of the first one's.
class BlockRequests {
  static constexpr int64_t TOKENS = 64;

 public:
  enum Stage { KEYS, SOFTMAX, VALUES, SUMS, STAGES };

  // calls: how often each stage asks while a block is worked on.
  explicit BlockRequests(const std::array<int64_t, STAGES>& calls) {
    for (int s = 0; s < STAGES; ++s) shares_[s] = float(1 << BITS) / float(STAGES * std::max<int64_t>(calls[s], 1));
  }

  // For the tokens that come TOKENS later than those of a block; none for dense tokens.
  void begin(const Problem& p, const Block& block) {
    lines_ = key_lines_ = asked_ = due_ = 0;
    if (block.packed) {
      const Side* sides[2] = {&p.keys, &p.values};
      for (int i = 0; i < 2; ++i) {
        const int64_t step = sides[i]->format->token_bytes;
        next_[i] = sides[i]->page(block.batch, block.head, block.page) + (block.token + TOKENS) * step;
        lines_ += (block.count * step + 63) / 64;
        if (i == 0) key_lines_ = lines_;
      }
    }
    for (int s = 0; s < STAGES; ++s) rates_[s] = int64_t(std::ceil(float(lines_) * shares_[s]));
  }

  // Asks for what a call of a stage has to.
  void operator()(Stage stage) {
    due_ += rates_[stage];
    for (const int64_t due = std::min(due_ >> BITS, lines_); asked_ < due; ++asked_) {
      const int side = asked_ >= key_lines_;
      __builtin_prefetch(next_[side], 0, 2);
      next_[side] += 64;
    }
  }

 private:
  static constexpr int BITS = 16;
  const char* next_[2] = {};
  int64_t key_lines_ = 0, lines_ = 0, asked_ = 0, due_ = 0, rates_[STAGES] = {};
  float shares_[STAGES];
};
// The requests of a stage that goes through tokens, for every four of them.
struct TokenRequests {
  BlockRequests& requests;
  BlockRequests::Stage stage;

  void operator()(int t) const {
    if (t % 4 == 0) requests(stage);
  }
};

}  // namespace spark
