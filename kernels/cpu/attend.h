// Attention over packed keys and a dense tail: one pass over the cache in blocks of tokens.
//
// A task is a chunk of tokens of one key head. It expands each block once, for all query heads of
// the group: scores, online softmax (Milakov and Gimelshein, arXiv 1805.02867), weighted sum of
// the values. Chunks are merged by their log-sum-exp (flash decoding). No dense copy longer than
// a block is ever written.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <vector>

#include "prune.h"

namespace spark {

constexpr int MAX_HEAD = 1024;  // channels

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

// Zeros.
template <class T>
Scratch<T> scratch(int64_t count) {
  const size_t bytes = round_up(std::max<int64_t>(count, 1) * sizeof(T), 64);
  void* data = Pool::mine().take(bytes);
  std::memset(data, 0, bytes);
  return Scratch<T>(static_cast<T*>(data), GiveBack{bytes});
}

// A tensor [B, H, S, ...] whose last dimension is contiguous; strides in elements.
struct Rows {
  char* data = nullptr;
  int64_t itemsize = 0, batch = 0, head = 0, token = 0;
  const char* end = nullptr;  // behind the last element

  template <class T>
  T* at(int64_t b, int64_t h, int64_t s) const {
    return reinterpret_cast<T*>(data + (b * batch + h * head + s * token) * itemsize);
  }
};

enum class MaskKind { none, boolean, float32, bfloat16, float16 };

struct Problem {
  int64_t batch, query_heads, kv_heads, queries, key_dim, value_dim;
  int64_t kept_channels, kept_values;  // more bits may be set than there are: they promise nothing
  int64_t scale_entries, value_entries;
  int64_t length, packed, sinks;  // tokens: in all, packed, dense ones in front of the packed
  Rows query, kept, bits, scale, tail, values, value_bits, value_scale;
  const float* norms;
  int64_t norms_batch, norms_head, norms_channel;
  bool recovers, squared;
  float attn_scale, softcap;
  bool causal;
  int64_t causal_offset;
  MaskKind mask_kind = MaskKind::none;
  const char* mask = nullptr;
  int64_t mask_strides[4] = {};
  const float* sink_logits = nullptr;
  Rows output;
  float* lse = nullptr;  // [B, Hq, L] or null

  int64_t group() const { return query_heads / kv_heads; }
  int64_t query_rows() const { return group() * queries; }
};

// Tokens of one kind: packed, or dense in the tail.
struct Block {
  int64_t batch, head;
  bool packed;
  int64_t key_row, value_row;  // of the first token, in its buffer
  int count;                   // tokens, at most the engine's BLOCK
};

// Asks for a part of the row that lies TOKENS behind the one that is worked on. At most 16
// lines are on their way at a time, and who asks for more has to wait: so it is done row by row.
// Into the second-level cache: from there the lines displace nothing of the first one's.
struct Ahead {
  static constexpr int64_t TOKENS = 64;
  int64_t first, last;  // bytes behind the row in hand

  Ahead(int64_t step_bytes, int64_t first, int64_t last)
      : first(TOKENS * step_bytes + first), last(TOKENS * step_bytes + last) {}

  void operator()(const void* row) const {
    const uintptr_t from = reinterpret_cast<uintptr_t>(row);
    for (int64_t at = first; at < last; at += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(from + at), 0, 2);
      asm volatile("");  // GCC drops calls of functions that do nothing but prefetch
    }
  }
};
// Expanding keys leaves more time between two requests than expanding values does: the first half of
// a value (in whole lines) is asked for with its key.
inline int64_t early_bytes(int64_t row_bytes) { return round_up((row_bytes + 1) / 2, 64); }

// What q is multiplied with where a channel is pruned: 1 / n^p, or 0 without recovery.
inline void recovery_weights(const Problem& p, int64_t b, int64_t h, float* weights) {
  const float* norms = p.norms + b * p.norms_batch + h * p.norms_head;
  norm_powers(norms, p.norms_channel, p.key_dim, p.squared, weights);
  for (int64_t j = 0; j < p.key_dim; ++j) weights[j] = p.recovers ? 1.0f / weights[j] : 0.0f;
}

// What a mask's number adds to a score.
template <class M>
float masking(M x) {
  if constexpr (std::is_same_v<M, bool>) return x ? 0.0f : -INF;
  else return to_float(x);
}
// The same for the first `count` of LANES numbers.
template <class M>
F masking(const M* x, int64_t count) {
  if constexpr (!std::is_same_v<M, bool>) return load_floats(x, count);
  else return select(load_floats(reinterpret_cast<const int8_t*>(x), count) != F{}, F{}, splat(-INF));
}

// Masks `count` scores.
template <class M>
void add_mask(const M* mask, int64_t step, int count, float* scores) {
  if (step != 1) {
    for (int t = 0; t < count; ++t) scores[t] += masking(mask[t * step]);
  } else {
    for (int t = 0; t < count; t += LANES) store(scores + t, load(scores + t) + masking(mask + t, count - t));
  }
}

// Scaled, capped and masked scores of one query with a block, in place of its dot products.
template <int BLOCK>
void finish_scores(const Problem& p, const Block& block, int64_t row, float (&scores)[BLOCK]) {
  const int64_t g = row / p.queries, i = row % p.queries;
  for (int t = 0; t < BLOCK; t += LANES) {
    F s = load(scores + t) * p.attn_scale;
    if (p.softcap != 0) s = tanh(s / p.softcap) * p.softcap;
    store(scores + t, s);
  }
  const int64_t first = block.value_row;  // the block's first token in the order of the tokens
  int visible = block.count;
  if (p.causal) visible = std::clamp<int64_t>(i + p.causal_offset + 1 - first, 0, visible);
  if (p.mask_kind != MaskKind::none) {
    const int64_t *steps = p.mask_strides, step = steps[3];
    const int64_t at = block.batch * steps[0] + (block.head * p.group() + g) * steps[1] + i * steps[2] + first * step;
    switch (p.mask_kind) {
      case MaskKind::boolean: add_mask(reinterpret_cast<const bool*>(p.mask) + at, step, visible, scores); break;
      case MaskKind::float32: add_mask(reinterpret_cast<const float*>(p.mask) + at, step, visible, scores); break;
      case MaskKind::bfloat16: add_mask(reinterpret_cast<const bf16*>(p.mask) + at, step, visible, scores); break;
      default: add_mask(reinterpret_cast<const half*>(p.mask) + at, step, visible, scores);
    }
  }
  for (int t = visible; t < BLOCK; ++t) scores[t] = -INF;
}

// Running maximum and sum of a query's softmax. Scores become weights; returns what the weighted
// sum so far has to be multiplied with.
struct Softmax {
  float max = -INF, total = 0;

  template <int BLOCK>
  float update(float (&scores)[BLOCK]) {
    F largest = load(scores);
    for (int t = LANES; t < BLOCK; t += LANES) {
      largest = spark::max(largest, load(scores + t));
    }
    const float seen = std::max(max, maximum(largest));
    const float base = seen == -INF ? 0.0f : seen;
    F weights{};
    for (int t = 0; t < BLOCK; t += LANES) {
      const F weight = exp_nonpositive(load(scores + t) - base);
      store(scores + t, weight);
      weights += weight;
    }
    const float rescale = max == -INF ? 0.0f : max == seen ? 1.0f : std::exp(max - seen);
    total = total * rescale + sum(weights);
    max = seen;
    return rescale;
  }
};

inline void rescale_sums(const float* rescale, int count, int64_t width, float* sums) {
  for (int r = 0; r < count; ++r, sums += width) {
    for (int64_t j = 0; j < width; j += LANES) store(sums + j, load(sums + j) * rescale[r]);
  }
}

// Result of one chunk for all query rows of a key head.
struct Partial {
  Softmax* softmax;  // [M]
  float* sums;       // [M, padded Dv]
};

// A block's scores with all query rows, then their softmax weights, and what update() returned.
template <int BLOCK>
struct Weights {
  explicit Weights(int64_t rows)
      : room(scratch<float>(round_up(rows, 16) * BLOCK)), rescale(rows),
        rows(reinterpret_cast<float (*)[BLOCK]>(room.get())) {}

  Scratch<float> room;
  std::vector<float> rescale;
  float (*rows)[BLOCK];  // a tile of 16 may be written where fewer are left
};

template <class Engine>
void attend_block(const Problem& p, Engine& engine, const Block& block, Weights<Engine::BLOCK>& weights, Partial partial) {
  const int64_t rows = p.query_rows(), width = Engine::padded(p.value_dim);
  engine.expand_keys(block);
  for (int64_t first = 0; first < rows; first += Engine::QUERIES) {
    const int count = std::min<int64_t>(Engine::QUERIES, rows - first);
    engine.scores(block, first, count, weights.rows + first);
    for (int64_t row = first; row < first + count; ++row) {
      finish_scores(p, block, row, weights.rows[row]);
      weights.rescale[row] = partial.softmax[row].update(weights.rows[row]);
    }
  }
  // Not before the scores: products would wait for these stores too.
  engine.expand_values(block);
  for (int64_t first = 0; first < rows; first += Engine::QUERIES) {
    const int count = std::min<int64_t>(Engine::QUERIES, rows - first);
    const float* rescale = weights.rescale.data() + first;
    const bool changed = std::any_of(rescale, rescale + count, [](float x) { return x != 1.0f; });
    engine.accumulate(block, weights.rows + first, count, changed ? rescale : nullptr, partial.sums + first * width);
  }
}

// The tokens [start, stop) of a key head, cut where packed and dense ones meet.
template <class Engine>
void attend_chunk(const Problem& p, Engine& engine, Weights<Engine::BLOCK>& weights, int64_t b, int64_t h, int64_t start,
                  int64_t stop, Partial partial) {
  const int64_t rows = p.query_rows(), width = Engine::padded(p.value_dim);
  std::fill_n(partial.softmax, rows, Softmax{});
  std::fill_n(partial.sums, rows * width, 0.0f);
  engine.start(b, h);
  const int64_t packed_stop = p.sinks + p.packed;
  for (int64_t token = start; token < stop;) {
    const bool packed = token >= p.sinks && token < packed_stop;
    const int64_t limit = token < p.sinks ? p.sinks : packed ? packed_stop : p.length;
    const int count = std::min({int64_t(Engine::BLOCK), limit - token, stop - token});
    const int64_t key_row = packed ? token - p.sinks : token < p.sinks ? token : token - p.packed;
    attend_block(p, engine, Block{b, h, packed, key_row, token, count}, weights, partial);
    token += count;
  }
  engine.finish(partial.sums, rows);
}

template <class T>
void merge_row(const Problem& p, const Partial* chunks, int64_t count, int64_t b, int64_t h,
               int64_t row, int64_t width) {
  const int64_t head = h * p.group() + row / p.queries, i = row % p.queries;
  float max = p.sink_logits ? p.sink_logits[head] : -INF;
  for (int64_t c = 0; c < count; ++c) max = std::max(max, chunks[c].softmax[row].max);
  T* output = p.output.at<T>(b, head, i);
  float* lse = p.lse ? p.lse + (b * p.query_heads + head) * p.queries + i : nullptr;
  if (max == -INF) {  // this query sees nothing
    std::fill_n(output, p.value_dim, from_float<T>(0.0f));
    if (lse) *lse = -INF;
    return;
  }
  float total = p.sink_logits ? std::exp(p.sink_logits[head] - max) : 0.0f;
  float sums[MAX_HEAD] = {};
  for (int64_t c = 0; c < count; ++c) {
    const Softmax& softmax = chunks[c].softmax[row];
    if (softmax.max == -INF) continue;
    const float share = std::exp(softmax.max - max), *part = chunks[c].sums + row * width;
    total += softmax.total * share;
    for (int64_t j = 0; j < p.value_dim; ++j) sums[j] += part[j] * share;
  }
  for (int64_t j = 0; j < p.value_dim; ++j) output[j] = from_float<T>(sums[j] / total);
  if (lse) *lse = max + std::log(total);
}

// As many chunks per head as give every thread the same share of the tokens (threads take equal
// numbers of tasks, one after the other), none shorter than the set-up of a task is worth.
inline int64_t chunk_tokens(const Problem& p, int64_t threads, int64_t block) {
  const int64_t chunks = threads / std::gcd(threads, p.batch * p.kv_heads);
  return round_up(std::max<int64_t>((p.length + chunks - 1) / chunks, 256), block);
}

// `parallel(begin, end, f)` calls f(first, last) for ranges of [begin, end) on all cores.
template <class T, class Engine, class Parallel>
void attend(const Problem& p, int64_t threads, Parallel parallel) {
  const int64_t chunk = chunk_tokens(p, threads, Engine::BLOCK);
  const int64_t chunks = std::max<int64_t>((p.length + chunk - 1) / chunk, 1);
  const int64_t heads = p.batch * p.kv_heads, rows = p.query_rows();
  const int64_t width = Engine::padded(p.value_dim);
  std::vector<Softmax> softmaxes(heads * chunks * rows);
  const int64_t chunk_sums = Engine::padded_rows(rows) * width;
  std::vector<float> sums(heads * chunks * chunk_sums);
  std::vector<Partial> partials(heads * chunks);
  for (int64_t task = 0; task < heads * chunks; ++task) {
    partials[task] = {softmaxes.data() + task * rows, sums.data() + task * chunk_sums};
  }
  parallel(0, heads * chunks, [&](int64_t first, int64_t last) {
    Engine engine(p);
    Weights<Engine::BLOCK> weights(rows);
    for (int64_t task = first; task < last; ++task) {
      const int64_t head = task / chunks, start = task % chunks * chunk;
      attend_chunk(p, engine, weights, head / p.kv_heads, head % p.kv_heads, start,
                   std::min(start + chunk, p.length), partials[task]);
    }
  });
  const auto merge = [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      const int64_t head = at / rows;
      merge_row<T>(p, &partials[head * chunks], chunks, head / p.kv_heads, head % p.kv_heads,
                   at % rows, width);
    }
  };
  // A few rows are merged sooner than a second thread wakes up.
  if (heads * rows * chunks < 4096) return merge(0, heads * rows);
  parallel(0, heads * rows, merge);
}

}  // namespace spark
