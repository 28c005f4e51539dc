// The operators `build` and `step`; they say so where native code cannot do what is asked for.
#pragma once

#include "float_engine.h"
#include "operands.h"
#if defined(__AVX512VNNI__)
#include "vnni_engine.h"
#elif defined(__AVX2__)
#include "madd_engine.h"
#elif defined(SPARK_NEON)
#include "neon_engine.h"
#endif
#if defined(SPARK_AMX)
#include "amx_quantized_engine.h"
#endif

namespace spark {

// Fills `built` with pages and head of the keys, then of the values; false if it cannot.
inline bool build(const Tensor& key, const Tensor& value, const std::vector<Tensor>& queries, const Spec* spec,
                  std::optional<int64_t> capacity, const std::optional<Tensor>& positions, std::array<Tensor, 4>& built) {
  if (!spec || !are_rows(key, spec->key.dtype) || !are_rows(value, spec->value.dtype)) return false;
  const int64_t batch = key.size(0), heads = key.size(1), tokens = key.size(2);
  if (value.size(0) != batch || value.size(1) != heads || value.size(2) != tokens || key.size(3) != spec->key.dim ||
      value.size(3) != spec->value.dim) {
    return false;
  }
  if (batch * heads == 0 || tokens > MOST_TOKENS) return false;
  if (capacity && (*capacity < 0 || *capacity > MOST_TOKENS)) return false;
  for (const Tensor& query : queries) {
    if (query.dim() != 4 || query.size(0) != batch || query.size(1) < 1 || query.size(1) % heads ||
        query.size(3) != spec->key.dim) {
      return false;
    }
  }
  std::array<Side, 2> sides;
  for (int i = 0; i < 2; ++i) {
    const Format& f = i ? spec->value : spec->key;
    const int64_t head_bytes = f.tail + round_up(spec->tail_rows(tokens, capacity) * f.row_bytes(), 8);
    built[2 * i] = new_pages({batch, heads, spec->page_room(tokens, capacity), f.page_bytes});
    built[2 * i + 1] = new_tensor({batch, heads, head_bytes}, ScalarType::Byte);
    std::memset(built[2 * i + 1].data_ptr(), 0, size_t(batch * heads * head_bytes));
    auto side = side_of("pages", built[2 * i], "head", built[2 * i + 1], {batch, heads}, *spec, f);
    if (!side || !set_fresh(*side, i ? value : key)) return false;
    if (positions && !set_positions(*side, *positions)) return false;
    for (const Tensor& query : queries) {
      if (f.uses_queries() && !fit_queries(query, *side)) return false;
    }
    sides[i] = *side;
  }
  for (Side& side : sides) {
    const int64_t due = side.due(side.fresh_tokens, KEEP_ALL);
    std::vector<Queries> all;
    for (const Tensor& query : queries) {
      if (side.format->uses_queries()) all.push_back(queries_of(query, side));
    }
    with_dtype(side.format->dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      observe<T>(side, all);
      append<T>(side, due, KEEP_ALL, {});
    });
  }
  return true;
}

struct StepOperands {
  Tensor query, new_key, new_value, key_pages, key_head, value_pages, value_head;
  std::optional<Tensor> mask, sinks;
  std::optional<int64_t> causal_offset, keep;
  std::optional<Tensor> position;
  std::string_view spec;
};

// Raises std::invalid_argument unless the new tokens and queries go with the cache, and the counters are
// some that a cache can have.
inline void check_operands(const StepOperands& o, const Side& keys, const Side& values) {
  const int64_t tokens = size_of(o.new_key, 2), groups = std::max<int64_t>(size_of(o.query, 1) / keys.heads, 1);
  check("new_key", o.new_key, keys.format->dtype, {keys.batch, keys.heads, tokens, keys.format->dim});
  check("new_value", o.new_value, values.format->dtype, {keys.batch, keys.heads, tokens, values.format->dim});
  check("query", o.query, o.query.scalar_type(), {keys.batch, groups * keys.heads, size_of(o.query, 2), keys.format->dim});
  keys.check_counters("key");
  values.check_counters("value");
  if (values.length != keys.length || values.packed != keys.packed || values.first != keys.first ||
      values.dropped != keys.dropped) {
    throw std::invalid_argument("keys and values are of other lengths, or packed or evicted otherwise");
  }
}

// The first of the positions where new tokens are written; raises std::invalid_argument where they
// are not consecutive, leave a gap after the `length` tokens, or are among the evicted ones.
inline int64_t first_position(const int64_t* positions, int64_t count, int64_t length, int64_t evicted) {
  for (int64_t i = 1; i < count; ++i) {
    if (positions[i] - i == positions[0]) continue;
    const std::span<const int64_t> few(positions, std::min<size_t>(count, 8));
    throw std::invalid_argument("positions " + listed(few) + " are not consecutive");
  }
  if (positions[0] < 0 || positions[0] > length) {
    throw std::invalid_argument("position " + std::to_string(positions[0]) + " leaves a gap after " +
        std::to_string(length) + " tokens");
  }
  if (positions[0] > 0 && positions[0] < evicted) {
    throw std::invalid_argument("position " + std::to_string(positions[0]) + " is among " +
        std::to_string(evicted) + " evicted tokens");
  }
  return positions[0];
}

// Forgets the tokens from a position on; false if native code cannot.
inline bool rewind(Side& keys, Side& values, const std::optional<Tensor>& position) {
  if (!position) return true;
  if (!position->is_cpu() || position->scalar_type() != ScalarType::Long || !position->is_contiguous()) return false;
  if (position->numel() == 0) return true;
  const int64_t first = first_position(position->const_data_ptr<int64_t>(), position->numel(), keys.tokens(), keys.first);
  if (first == keys.tokens()) return true;
  return keys.crop(keys.index_of(first)) && values.crop(values.index_of(first));
}

// The new tokens of a prompt that stay. The sides read them as long as this lives.
struct Staying {
  Tensor positions, keys, values;
};

inline Tensor taken(const Side& side, const Tensor& positions, int64_t count) {
  const int64_t bytes = side.format->row_bytes();
  Tensor rows = new_tensor({side.batch, side.heads, count, side.format->dim}, side.format->dtype);
  char* row = static_cast<char*>(rows.data_ptr());
  const int64_t* position = positions.const_data_ptr<int64_t>();
  for (int64_t at = 0; at < side.batch * side.heads; ++at) {
    for (int64_t i = 0; i < count; ++i, ++position, row += bytes) {
      std::memcpy(row, side.fresh.at(at / side.heads, at % side.heads, *position), bytes);
    }
  }
  return rows;
}

// Leaves `count` of the new tokens, as the scorer in Python says.
inline Staying evict(const StepOperands& o, Side& keys, Side& values, int64_t count) {
  need_python("spark::evict", o.spec);
  std::array<StableIValue, 5> stack{torch::stable::detail::from(o.new_key), torch::stable::detail::from(std::vector<Tensor>{o.query}),
      torch::stable::detail::from(o.mask), torch::stable::detail::from(o.causal_offset),
      torch::stable::detail::from(std::string(o.spec))};
  call("spark::evict", stack);
  const Tensor positions = torch::stable::detail::to<Tensor>(stack[0]);
  const Staying staying{positions, taken(keys, positions, count), taken(values, positions, count)};
  set_fresh(keys, staying.keys), set_fresh(values, staying.values);
  if (!set_positions(keys, positions) || !set_positions(values, positions)) {
    throw std::runtime_error("spark::evict returned positions that are not those of a prompt");
  }
  return staying;
}

template <class T>
void run(const Problem& p) {
#if defined(SPARK_AMX)
  if constexpr (std::is_same_v<T, bf16>) {
    // The longer a block, the less its products are waited for, as long as it fits the first-level cache: of
    // bytes 64 tokens do, of bfloat16 or two planes with short rows.
    const bool is_short = std::max(p.key_dim, p.value_dim) <= 64;
    const Kind keys = p.keys.format->kind, values = p.values.format->kind;
    const bool fits = is_short || keys != Kind::spark || !p.keys.format->int8;
    if (can_quantized_tiles(p)) return fits ? attend<T, AmxQuantizedEngine<64>>(p) : attend<T, AmxQuantizedEngine<32>>(p);
    const bool tiles = keys != Kind::pruned && keys != Kind::quantized;
    if (tiles && values == Kind::int8) {
      return fits ? attend<T, AmxInt8Engine<64>>(p) : attend<T, AmxInt8Engine<32>>(p);
    }
    if (tiles && values != Kind::spark && values != Kind::quantized) {
      return is_short ? attend<T, AmxEngine<64>>(p) : attend<T, AmxEngine<32>>(p);
    }
  }
#endif
#if defined(__AVX512VNNI__)
  if constexpr (sizeof(T) == 2) {
    if (can_levels(p)) return attend<T, VnniEngine<T>>(p);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 2) {
    if (can_levels(p)) return attend<T, MaddEngine<T>>(p);
  }
#elif defined(SPARK_NEON)
  if constexpr (sizeof(T) == 2) {
    if (can_levels(p)) return attend<T, NeonEngine<T>>(p);
  }
#endif
  attend<T, FloatEngine<T>>(p);
}

// The output of the attention, or nothing if native code cannot do the step; then nothing is written.
// `lse` becomes the log-sum-exp of the scores, [B, Hq, L'].
inline std::optional<Tensor> step(const StepOperands& o, const Spec* spec, std::optional<Tensor>* lse = nullptr) {
  if (!spec) return std::nullopt;
  const std::array<int64_t, 2> heads{size_of(o.key_pages, 0), size_of(o.key_pages, 1)};
  auto keys = side_of("key_pages", o.key_pages, "key_head", o.key_head, heads, *spec, spec->key);
  auto values = side_of("value_pages", o.value_pages, "value_head", o.value_head, heads, *spec, spec->value);
  if (!keys || !values) return std::nullopt;
  check_operands(o, *keys, *values);
  if (!set_fresh(*keys, o.new_key) || !set_fresh(*values, o.new_value)) return std::nullopt;
  if (!fit_queries(o.query, *keys) || !fit_queries(o.query, *values)) return std::nullopt;
  if (o.keep && *o.keep < 0) return std::nullopt;
  if (!rewind(*keys, *values, o.position)) return std::nullopt;
  const int64_t fresh = keys->fresh_tokens, stays = keys->length || !o.keep ? fresh : spec->stored_tokens(fresh);
  const int64_t key_pages = o.keep ? keys->due(stays, *o.keep) : 0, value_pages = o.keep ? values->due(stays, *o.keep) : 0;
  if (spec->rolls) {
    for (Side* side : {&*keys, &*values}) side->first = std::max(side->first, side->length - spec->rolls);
  }
  Problem p(*keys, *values);
  p.query_heads = o.query.size(1), p.queries = o.query.size(2);
  p.query = rows_of(o.query, spec->key.itemsize);
  p.causal = o.causal_offset.has_value();
  // Beyond the first query or the last token it says the same, and int64 has an end.
  p.causal_offset = std::clamp(o.causal_offset.value_or(0), -p.queries, p.columns);
  Scratch<float> logits(nullptr, GiveBack{0});
  check_mask(p, o.mask);
  if (!set_mask(p, o.mask) || !read_sinks(o.sinks, p.query_heads, logits)) return std::nullopt;
  p.sink_logits = logits.get();
  Tensor output = new_tensor({p.batch, p.query_heads, p.queries, p.value_dim}, spec->value.dtype);
  p.output = rows_of(output, spec->value.itemsize);
  if (lse) {
    lse->emplace(new_tensor({p.batch, p.query_heads, p.queries}, ScalarType::Float));
    p.lse = static_cast<float*>((*lse)->data_ptr());
  }
  with_dtype(spec->key.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (p.query_rows() > 0) run<T>(p);
    std::optional<Staying> staying;
    if (stays < fresh) staying = evict(o, *keys, *values, stays);
    const Queries queries[] = {queries_of(o.query, *keys)};
    if (!o.keep) {
      observe<T>(*keys, queries);
      observe<T>(*values, queries);
      if (o.position) keys->write_counters(), values->write_counters();
    } else {
      append<T>(*keys, key_pages, *o.keep, queries);
      append<T>(*values, value_pages, *o.keep, queries);
    }
  });
  return output;
}

}  // namespace spark
