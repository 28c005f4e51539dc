// Attention over packed and dense tokens: one pass over the cache in blocks of tokens.
//
// A task is a chunk of tokens of one key head. It expands each block once, for all query heads of
// the group: scores, online softmax (Milakov and Gimelshein, arXiv 1805.02867), weighted sum of
// the values. Chunks are merged by their log-sum-exp (flash decoding). No dense copy longer than
// a block is ever written.
#pragma once

#include <numeric>
#include <optional>

#include "problem.h"
#include "threads.h"

namespace spark {

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

// Masks the scores of tokens at `positions`.
template <class M>
void add_mask(const M* mask, int64_t step, int count, const int64_t* positions, float* scores) {
  for (int t = 0; t < count; ++t) scores[t] += masking(mask[positions[t] * step]);
}

// Scaled, capped and masked scores of one query with a block, in place of its dot products. `positions`
// are those of the tokens where they do not follow each other, else null.
template <int BLOCK>
void finish_scores(const Problem& p, const Block& block, const int64_t* positions, int64_t row, float (&scores)[BLOCK]) {
  const int64_t g = row / p.queries, i = row % p.queries;
  const float scale = p.keys.spec->scale, softcap = p.keys.spec->softcap;
  for (int t = 0; t < BLOCK; t += LANES) {
    F s = load(scores + t) * scale;
    if (softcap != 0) s = tanh(s / softcap) * softcap;
    store(scores + t, s);
  }
  const int64_t first = positions ? 0 : p.column(block), latest = i + p.causal_offset;
  int visible = block.count;
  if (p.causal && !positions) visible = std::clamp<int64_t>(latest + 1 - first, 0, visible);
  if (p.mask_kind != MaskKind::none) {
    const int64_t *steps = p.mask_strides, step = steps[3];
    const int64_t at = block.batch * steps[0] + (block.head * p.group() + g) * steps[1] + i * steps[2] + first * step;
    const auto add = [&](const auto* mask) {
      if (positions) add_mask(mask + at, step, visible, positions, scores);
      else add_mask(mask + at, step, visible, scores);
    };
    switch (p.mask_kind) {
      case MaskKind::boolean: add(reinterpret_cast<const bool*>(p.mask)); break;
      case MaskKind::float32: add(reinterpret_cast<const float*>(p.mask)); break;
      case MaskKind::bfloat16: add(reinterpret_cast<const bf16*>(p.mask)); break;
      default: add(reinterpret_cast<const half*>(p.mask));
    }
  }
  for (int t = 0; positions && p.causal && t < visible; ++t) {
    if (positions[t] > latest) scores[t] = -INF;
  }
  for (int t = visible; t < BLOCK; ++t) scores[t] = -INF;
}

// Running maximum and sum of a query's softmax. Scores become weights; returns what the weighted
// sum so far has to be multiplied with.
struct Softmax {
  float max = -INF;
  F totals{};  // of the weights, lane by lane

  float total() const { return sum(totals); }

  template <int BLOCK>
  float update(float (&scores)[BLOCK]) {
    F largest = load(scores);
    for (int t = LANES; t < BLOCK; t += LANES) {
      largest = spark::max(largest, load(scores + t));
    }
    float rescale = 1.0f;
    // Few blocks have a larger one, and folding lanes takes as long as all their weights.
    if (lane_bits(largest > splat(max))) {
      const float seen = std::max(max, maximum(largest));
      rescale = max == -INF ? 0.0f : std::exp(max - seen);
      totals *= rescale;
      max = seen;
    }
    const float base = max == -INF ? 0.0f : max;
    for (int t = 0; t < BLOCK; t += LANES) {
      const F weight = exp_nonpositive(load(scores + t) - base);
      store(scores + t, weight);
      totals += weight;
    }
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
  explicit Weights(int64_t count)
      : room(uncleared_scratch<float>(round_up(count, 16) * BLOCK)), rescale(uncleared_scratch<float>(count)),
        rows(reinterpret_cast<float (*)[BLOCK]>(room.get())) {}

  Scratch<float> room, rescale;
  float (*rows)[BLOCK];  // a tile of 16 may be written where fewer are left
};

// Adds the weighted values of a block.
template <class Engine>
void add_values(const Problem& p, Engine& engine, const Block& block, Weights<Engine::BLOCK>& weights, Partial partial) {
  const int64_t rows = p.query_rows(), width = Engine::padded(p.value_dim);
  for (int64_t first = 0; first < rows; first += Engine::QUERIES) {
    const int count = std::min<int64_t>(Engine::QUERIES, rows - first);
    const float* rescale = weights.rescale.get() + first;
    const bool changed = std::any_of(rescale, rescale + count, [](float x) { return x != 1.0f; });
    engine.accumulate(block, first, count, weights.rows + first, changed ? rescale : nullptr, partial.sums + first * width);
  }
}

// Expands a block and weighs it, and adds the values of the one before, if there is one. In this order nothing waits for
// what was stored just before: loads of tiles do, and the stores of their products take long.
template <class Engine>
void attend_block(const Problem& p, Engine& engine, const Block& block, const Block* before, Weights<Engine::BLOCK>& weights,
                  Partial partial) {
  const int64_t rows = p.query_rows();
  engine.begin(block);
  engine.expand_keys(block);
  if (before) add_values(p, engine, *before, weights, partial);
  engine.products(block);
  engine.expand_values(block);
  int64_t read[Engine::BLOCK];
  const int64_t* positions = block.packed && p.is_scattered() ? read : nullptr;
  if (positions) p.read_positions(block, read);
  for (int64_t first = 0; first < rows; first += Engine::QUERIES) {
    const int count = std::min<int64_t>(Engine::QUERIES, rows - first);
    engine.scores(block, first, count, weights.rows + first);
    for (int64_t row = first; row < first + count; ++row) {
      engine.before_softmax();
      finish_scores(p, block, positions, row, weights.rows[row]);
      weights.rescale[row] = partial.softmax[row].update(weights.rows[row]);
    }
  }
}

// The tokens [start, stop) of a key head: packed ones, then dense ones.
template <class Engine>
void attend_chunk(const Problem& p, Engine& engine, Weights<Engine::BLOCK>& weights, int64_t b, int64_t h, int64_t start,
                  int64_t stop, Partial partial) {
  const int64_t rows = p.query_rows(), width = Engine::padded(p.value_dim);
  std::fill_n(partial.softmax, rows, Softmax{});
  std::fill_n(partial.sums, Engine::padded_rows(rows) * width, 0.0f);
  engine.start(b, h);
  const int64_t packed_stop = p.sinks + p.packed;
  const auto attend_range = [&](int64_t from, int64_t to, auto block_at) {
    std::optional<Block> before;
    for (int64_t token = from; token < to; token += before->count) {
      const Block block = block_at(token, std::min<int64_t>(to - token, Engine::BLOCK));
      attend_block(p, engine, block, before ? &*before : nullptr, weights, partial);
      before.emplace(block);
    }
    if (before) add_values(p, engine, *before, weights, partial);
  };
  const auto dense = [&](int64_t token, int64_t count) { return p.dense_block(b, h, token, count); };
  attend_range(std::max(start, p.sinks), std::min(stop, packed_stop), [&](int64_t token, int64_t count) {
    return p.packed_block(b, h, token, count);
  });
  engine.finish_packed(partial, rows);
  attend_range(start, std::min(stop, p.sinks), dense);
  attend_range(std::max(start, packed_stop), stop, dense);
  engine.finish(partial.sums, rows);
}

template <class T>
void merge_row(const Problem& p, const Partial* chunks, int64_t count, int64_t b, int64_t h,
               int64_t row, int64_t width) {
  const int64_t head = h * p.group() + row / p.queries, i = row % p.queries;
  float max = p.sink_logits ? p.sink_logits[head] : -INF;
  bool nan = false;  // of a score: the largest one does not show it
  for (int64_t c = 0; c < count; ++c) {
    max = std::max(max, chunks[c].softmax[row].max);
    nan |= std::isnan(chunks[c].softmax[row].total());
  }
  T* output = p.output.at<T>(b, head, i);
  const auto note = [&](float lse) {
    if (p.lse) p.lse[(b * p.query_heads + head) * p.queries + i] = lse;
  };
  if (nan) return note(NAN), (void)std::fill_n(output, p.value_dim, from_float<T>(NAN));
  // This query sees nothing.
  if (max == -INF) return note(-INF), (void)std::fill_n(output, p.value_dim, from_float<T>(0.0f));
  float total = p.sink_logits ? std::exp(p.sink_logits[head] - max) : 0.0f;
  float sums[MAX_HEAD];
  std::fill_n(sums, p.value_dim, 0.0f);
  for (int64_t c = 0; c < count; ++c) {
    const Softmax& softmax = chunks[c].softmax[row];
    if (softmax.max == -INF) continue;
    const float share = std::exp(softmax.max - max), *part = chunks[c].sums + row * width;
    total += softmax.total() * share;
    for (int64_t j = 0; j < p.value_dim; ++j) sums[j] += part[j] * share;
  }
  for (int64_t j = 0; j < p.value_dim; ++j) output[j] = from_float<T>(sums[j] / total);
  note(max + std::log(total));
}

// As many chunks per head as give every thread the same share of the tokens (threads take equal
// numbers of tasks, one after the other), none shorter than the set-up of a task is worth.
inline int64_t chunk_tokens(const Problem& p, int64_t block) {
  const int64_t threads = thread_count(), chunks = threads / std::gcd(threads, p.batch * p.kv_heads);
  return round_up(std::max<int64_t>((p.length + chunks - 1) / chunks, 256), block);
}

template <class T, class Engine>
void attend(const Problem& p) {
  const int64_t chunk = chunk_tokens(p, Engine::BLOCK);
  const int64_t chunks = std::max<int64_t>((p.length + chunk - 1) / chunk, 1);
  const int64_t heads = p.batch * p.kv_heads, rows = p.query_rows();
  const int64_t width = Engine::padded(p.value_dim), chunk_sums = Engine::padded_rows(rows) * width;
  const Scratch<Softmax> softmaxes = uncleared_scratch<Softmax>(heads * chunks * rows);
  const Scratch<float> sums = uncleared_scratch<float>(heads * chunks * chunk_sums);
  const Scratch<Partial> partials = uncleared_scratch<Partial>(heads * chunks);
  for (int64_t task = 0; task < heads * chunks; ++task) {
    partials[task] = {softmaxes.get() + task * rows, sums.get() + task * chunk_sums};
  }
  parallel(0, heads * chunks, 1, [&](int64_t first, int64_t last) {
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
  parallel(0, heads * rows, 1, merge);
}

}  // namespace spark
