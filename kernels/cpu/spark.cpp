// What torch calls: arguments are checked, become plain pointers, and go to the kernels.
//
// Registered through torch's stable ABI. What a kernel cannot do goes to the reference, which is
// `spark_reference::<name>` with the same schema.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#if defined(SPARK_AMX)
#include "amx_int8_engine.h"
#endif
#include "float_engine.h"

using spark::Problem;
using spark::Rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

namespace {

template <class... Results, class... Arguments>
std::tuple<Results...> reference(const char* name, const Arguments&... arguments) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, sizeof...(Arguments)> stack{from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return [&]<size_t... At>(std::index_sequence<At...>) {
    return std::tuple<Results...>{to<Results>(stack[At])...};
  }(std::index_sequence_for<Results...>{});
}

void parallel(int64_t begin, int64_t end, int64_t grain, auto f) {
  torch::stable::parallel_for(begin, end, grain, f);
}

// Calls f with a null pointer of the floating type; false for any other dtype.
template <class Function>
bool with_dtype(ScalarType type, Function f) {
  switch (type) {
    case ScalarType::Float: f(static_cast<float*>(nullptr)); return true;
    case ScalarType::BFloat16: f(static_cast<spark::bf16*>(nullptr)); return true;
    case ScalarType::Half: f(static_cast<spark::half*>(nullptr)); return true;
    default: return false;
  }
}

bool is_cpu_rows(const Tensor& t, int64_t dims, ScalarType type) {
  return t.dim() == dims && t.is_cpu() && t.scalar_type() == type &&
      (t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1);
}

Rows rows_of(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t last = 1;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  const int64_t itemsize = t.element_size();
  char* data = static_cast<char*>(t.data_ptr());
  return {data, itemsize, strides[0], strides[1], strides[2], t.numel() ? data + last * itemsize : data};
}

std::string shape(const Tensor& t) {
  std::string text = "(";
  for (int64_t size : t.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

void check_room(const Tensor& rows, const Tensor& fresh, int64_t first, int64_t width) {
  const int64_t last = first + fresh.size(2);
  if (first < 0 || last > rows.size(2)) {
    throw std::invalid_argument("rows " + std::to_string(first) + " to " + std::to_string(last) +
        " do not fit into a buffer of " + std::to_string(rows.size(2)));
  }
  if (rows.size(0) != fresh.size(0) || rows.size(1) != fresh.size(1) || fresh.size(3) != width) {
    throw std::invalid_argument("tokens " + shape(fresh) + " do not fit into rows " + shape(rows));
  }
}

// Query statistics

Tensor query_stats(Tensor query, int64_t kv_heads, int64_t window) {
  const bool known = query.dim() == 4 && query.is_cpu() && kv_heads > 0 && window > 0 &&
      query.size(1) % kv_heads == 0 && query.numel() > 0;
  const auto done = [&](auto* type) -> std::optional<Tensor> {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t batch = query.size(0), group = query.size(1) / kv_heads, channels = query.size(3);
    const int64_t length = query.size(2), first = std::max<int64_t>(length - window, 0);
    const Rows q = rows_of(query);
    Tensor stats = torch::stable::new_empty(query, {batch, kv_heads, channels}, ScalarType::Float);
    float* out = stats.mutable_data_ptr<float>();
    std::vector<float> mean(channels);
    for (int64_t head = 0; head < batch * kv_heads; ++head, out += channels) {
      std::fill_n(out, channels, 0.0f);
      for (int64_t i = first; i < length; ++i) {
        std::fill(mean.begin(), mean.end(), 0.0f);
        for (int64_t g = 0; g < group; ++g) {
          const T* row = q.at<T>(head / kv_heads, head % kv_heads * group + g, i);
          for (int64_t j = 0; j < channels; ++j) mean[j] += spark::to_float(row[j]);
        }
        for (int64_t j = 0; j < channels; ++j) out[j] += (mean[j] / group) * (mean[j] / group);
      }
    }
    return stats;
  };
  std::optional<Tensor> stats;
  if (known && is_cpu_rows(query, 4, query.scalar_type()) &&
      with_dtype(query.scalar_type(), [&](auto* type) { stats = done(type); })) {
    return *stats;
  }
  return std::get<0>(reference<Tensor>("spark_reference::query_stats", query, kv_heads, window));
}

// Pruning of keys

template <class T, class Stored>
void prune_rows(const Tensor& key, const Tensor& select, const Tensor& recover, bool squared,
                const Tensor& kept, const Tensor& bits, const Tensor& scale, bool spread) {
  const int64_t heads = key.size(1), tokens = key.size(2), channels = key.size(3);
  const Rows in = rows_of(key), out = rows_of(kept), planes = rows_of(bits), amplitude = rows_of(scale);
  // Grain: a range shares the powers of the norms, so it should be more than a few tokens.
  parallel(0, key.size(0) * heads * tokens, 64, [&](int64_t first, int64_t last) {
    std::vector<float> powers(2 * channels), room(spark::round_up(channels, spark::LANES));
    auto keep = std::make_unique<bool[]>(channels);
    int64_t known = -1;
    for (int64_t at = first; at < last; ++at) {
      const int64_t head = at / tokens, b = head / heads, h = head % heads, s = at % tokens;
      if (head != known) {
        const float* norms = select.const_data_ptr<float>() + b * select.stride(0) + h * select.stride(1);
        spark::norm_powers(norms, select.stride(2), channels, squared, powers.data());
        norms = recover.const_data_ptr<float>() + b * recover.stride(0) + h * recover.stride(1);
        spark::norm_powers(norms, recover.stride(2), channels, squared, powers.data() + channels);
        known = head;
      }
      const spark::KeyRule rule{channels, kept.size(3), squared, spread, powers.data(), powers.data() + channels};
      spark::prune_key(rule, in.at<T>(b, h, s), room.data(), keep.get(), out.at<Stored>(b, h, s),
                       planes.at<uint8_t>(b, h, s), amplitude.at<T>(b, h, s));
    }
  });
}

bool are_norms(const Tensor& norms, const Tensor& key) {
  return norms.dim() == 3 && norms.is_cpu() && norms.scalar_type() == ScalarType::Float &&
      norms.size(0) == key.size(0) && norms.size(1) == key.size(1) && norms.size(2) == key.size(3);
}

Triple prune(Tensor key, Tensor select, Tensor recover, int64_t kept_channels, std::string recovery,
             std::string saliency, bool quantized) {
  if (key.dim() == 4 && (kept_channels < 1 || kept_channels > key.size(3))) {
    throw std::invalid_argument("kept_channels is " + std::to_string(kept_channels) +
        ": allowed is 1 to " + std::to_string(key.size(3)));
  }
  const bool known = is_cpu_rows(key, 4, key.scalar_type()) && are_norms(select, key) && are_norms(recover, key);
  const bool spread = recovery == "gaussian", squared = saliency == "squared";
  std::optional<Triple> result;
  const auto fill = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t b = key.size(0), h = key.size(1), s = key.size(2), plane = (key.size(3) + 7) / 8;
    Tensor kept = torch::stable::new_empty(
        key, {b, h, s, kept_channels}, quantized ? ScalarType::Char : key.scalar_type());
    Tensor bits = torch::stable::new_empty(key, {b, h, s, 2, plane}, ScalarType::Byte);
    Tensor scale = torch::stable::new_empty(key, {b, h, s, 1 + spread + quantized});
    auto rows = quantized ? prune_rows<T, int8_t> : prune_rows<T, T>;
    rows(key, select, recover, squared, kept, bits, scale, spread);
    result = Triple{kept, bits, scale};
  };
  if (known && with_dtype(key.scalar_type(), fill)) return *result;
  return reference<Tensor, Tensor, Tensor>(
      "spark_reference::prune", key, select, recover, kept_channels, recovery, saliency, quantized);
}

// Storing values

struct ValueStore {
  Tensor values;
  OptionalTensor bits, scale, bias;
};

bool are_values(const ValueStore& store, const Tensor& fresh) {
  const ScalarType type = fresh.scalar_type();
  const bool quantized = store.values.scalar_type() == ScalarType::Char;
  if (fresh.dim() != 4 || !is_cpu_rows(fresh, 4, type)) return false;
  if (!is_cpu_rows(store.values, 4, quantized ? ScalarType::Char : type)) return false;
  if (!store.scale) return !quantized && !store.bits && store.values.size(3) == fresh.size(3);
  const bool pruned = store.bits.has_value();
  if (pruned != store.bias.has_value() || !is_cpu_rows(*store.scale, 4, type)) return false;
  if (store.scale->size(3) != pruned + quantized) return false;
  if (!pruned) return store.values.size(3) == fresh.size(3);
  const Tensor& bias = *store.bias;
  return store.values.size(3) <= fresh.size(3) && is_cpu_rows(*store.bits, 4, ScalarType::Byte) &&
      store.bits->size(3) == (fresh.size(3) + 7) / 8 && are_norms(bias, fresh) && bias.is_contiguous();
}

template <class T, class Stored>
void write_values(const ValueStore& store, const Tensor& fresh, int64_t start) {
  const int64_t heads = fresh.size(1), tokens = fresh.size(2), channels = fresh.size(3);
  const Rows in = rows_of(fresh), out = rows_of(store.values);
  const Rows bits = store.bits ? rows_of(*store.bits) : Rows{}, scale = store.scale ? rows_of(*store.scale) : Rows{};
  const float* bias = store.bias ? store.bias->const_data_ptr<float>() : nullptr;
  parallel(0, fresh.size(0) * heads * tokens, 256, [&](int64_t first, int64_t last) {
    std::vector<float> room(spark::round_up(channels, spark::LANES));
    auto keep = std::make_unique<bool[]>(channels);
    for (int64_t at = first; at < last; ++at) {
      const int64_t head = at / tokens, b = head / heads, h = head % heads, s = at % tokens;
      const T* row = in.at<T>(b, h, s);
      Stored* target = out.at<Stored>(b, h, start + s);
      if (!scale.data) {
        std::memcpy(target, row, channels * sizeof(T));
        continue;
      }
      spark::pack_value(channels, store.values.size(3), bias ? bias + head * channels : nullptr, row,
                        room.data(), keep.get(), target,
                        bias ? bits.at<uint8_t>(b, h, start + s) : nullptr, scale.at<T>(b, h, start + s));
    }
  });
}

void store_values(const ValueStore& store, const Tensor& fresh, int64_t start) {
  with_dtype(fresh.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool quantized = store.values.scalar_type() == ScalarType::Char;
    (quantized ? write_values<T, int8_t> : write_values<T, T>)(store, fresh, start);
  });
}

void check_values(const ValueStore& store, const Tensor& fresh, int64_t start) {
  check_room(store.values, fresh, start, fresh.size(3));
  if (store.scale) check_room(*store.scale, fresh, start, fresh.size(3));
  if (store.bits) check_room(*store.bits, fresh, start, fresh.size(3));
}

Triple pack_values(Tensor value, OptionalTensor bias, int64_t kept_channels, bool quantized) {
  const bool pruned = bias.has_value();
  if (value.dim() == 4 && (pruned || quantized) && kept_channels >= 1 && kept_channels <= value.size(3) &&
      (pruned || kept_channels == value.size(3))) {
    const int64_t b = value.size(0), h = value.size(1), s = value.size(2);
    Tensor rows = torch::stable::new_empty(
        value, {b, h, s, kept_channels}, quantized ? ScalarType::Char : value.scalar_type());
    Tensor bits = torch::stable::new_empty(
        value, {b, h, s, pruned ? (value.size(3) + 7) / 8 : 0}, ScalarType::Byte);
    Tensor scale = torch::stable::new_empty(value, {b, h, s, pruned + quantized});
    const ValueStore store{rows, pruned ? OptionalTensor(bits) : std::nullopt, scale, bias};
    if (are_values(store, value) && with_dtype(value.scalar_type(), [](auto*) {})) {
      store_values(store, value, 0);
      return {rows, bits, scale};
    }
  }
  return reference<Tensor, Tensor, Tensor>("spark_reference::pack_values", value, bias, kept_channels, quantized);
}

void append_values(Tensor values, OptionalTensor bits, OptionalTensor scale, OptionalTensor bias,
                   Tensor fresh, int64_t start) {
  const ValueStore store{values, bits, scale, bias};
  if (!are_values(store, fresh) || !with_dtype(fresh.scalar_type(), [](auto*) {})) {
    reference<>("spark_reference::append_values", values, bits, scale, bias, fresh, start);
    return;
  }
  check_values(store, fresh, start);
  store_values(store, fresh, start);
}

// Attention

int64_t packed_tokens(const Tensor& packed_length) { return *packed_length.const_data_ptr<int64_t>(); }

struct Store {
  Tensor kept, bits, scale, norms, packed_length, tail;
  ValueStore values;
};

struct How {
  OptionalTensor mask;
  std::optional<int64_t> causal_offset;
  double attn_scale, softcap;
  OptionalTensor sinks;
  int64_t sink_tokens;
  std::string recovery, saliency;
};

bool set_mask(Problem& p, const OptionalTensor& mask) {
  if (!mask) return true;
  const int64_t sizes[4] = {p.batch, p.query_heads, p.queries, p.length};
  const int64_t missing = 4 - mask->dim();
  if (missing < 0 || !mask->is_cpu()) return false;
  for (int64_t d = 0; d < 4; ++d) {
    const int64_t size = d < missing ? 1 : mask->size(d - missing);
    if (size != 1 && size != sizes[d]) return false;
    p.mask_strides[d] = size == 1 ? 0 : mask->stride(d - missing);
  }
  p.mask = static_cast<const char*>(mask->const_data_ptr());
  switch (mask->scalar_type()) {
    case ScalarType::Bool: p.mask_kind = spark::MaskKind::boolean; return true;
    case ScalarType::Float: p.mask_kind = spark::MaskKind::float32; return true;
    case ScalarType::BFloat16: p.mask_kind = spark::MaskKind::bfloat16; return true;
    case ScalarType::Half: p.mask_kind = spark::MaskKind::float16; return true;
    default: return false;
  }
}

// Whether the native kernel does this; the shapes are those of spark_compile/ops.py.
bool fits(const Tensor& query, const Store& s, const How& how, int64_t length, int64_t value_dim) {
  const ScalarType type = query.scalar_type();
  const bool quantized = s.kept.scalar_type() == ScalarType::Char;
  if (!is_cpu_rows(query, 4, type) || !is_cpu_rows(s.tail, 4, type)) return false;
  if (!is_cpu_rows(s.kept, 4, quantized ? ScalarType::Char : type)) return false;
  if (!is_cpu_rows(s.bits, 5, ScalarType::Byte) || !is_cpu_rows(s.scale, 4, type)) return false;
  const int64_t b = query.size(0), h = s.kept.size(1), d = query.size(3), plane = (d + 7) / 8;
  if (s.bits.size(3) != 2 || s.bits.size(4) != plane || s.bits.stride(3) != plane) return false;
  if (s.packed_length.scalar_type() != ScalarType::Long || !s.packed_length.is_cpu()) return false;
  const int64_t packed = packed_tokens(s.packed_length), dense = length - packed;
  if (h == 0 || query.size(1) % h || s.tail.size(3) != d || s.kept.size(3) > d) return false;
  if (!are_norms(s.norms, s.tail)) return false;
  for (const Tensor* t : {&s.kept, &s.bits, &s.scale, &s.tail, &s.values.values}) {
    if (t->size(0) != b || t->size(1) != h) return false;
  }
  for (const Tensor* t : {&s.kept, &s.bits, &s.scale}) {
    if (packed < 0 || packed > t->size(2)) return false;
  }
  if (dense < 0 || dense > s.tail.size(2) || length > s.values.values.size(2)) return false;
  if (how.sink_tokens < 0 || (packed && how.sink_tokens > dense)) return false;
  const int64_t entries = 1 + (how.recovery == "gaussian") + quantized;
  if (s.scale.size(3) < entries || d > spark::MAX_HEAD || value_dim > spark::MAX_HEAD) return false;
  if (how.sinks && (!how.sinks->is_cpu() || how.sinks->numel() != query.size(1))) return false;
  // Draws from a distribution are the reference's alone.
  return how.recovery == "degenerate" || how.recovery == "none";
}

template <class T>
std::vector<float> sink_logits(const Tensor& sinks) {
  std::vector<float> logits(sinks.numel());
  const T* data = static_cast<const T*>(sinks.const_data_ptr());
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = spark::to_float(data[i * sinks.stride(0)]);
  return logits;
}

#if defined(SPARK_AMX)
template <class K, class V, int N, class Spread>
void run_tiles(const Problem& p, int64_t threads, Spread spread) {
  if constexpr (std::is_same_v<V, int8_t>) {
    if (!p.value_bits.data) return spark::attend<spark::bf16, spark::AmxInt8Engine<K, N>>(p, threads, spread);
  }
  spark::attend<spark::bf16, spark::AmxEngine<K, V, N>>(p, threads, spread);
}
#endif

template <class T, class K, class V>
void run(const Problem& p) {
  const auto spread = [](int64_t begin, int64_t end, auto f) { parallel(begin, end, 1, f); };
  const int64_t threads = torch::stable::get_num_threads();
#if defined(SPARK_AMX)
  if constexpr (std::is_same_v<T, spark::bf16>) {
    // The longer a block, the less its products are waited for, as long as it fits the first-level cache.
    return std::max(p.key_dim, p.value_dim) <= 64 ? run_tiles<K, V, 64>(p, threads, spread)
                                                  : run_tiles<K, V, 32>(p, threads, spread);
  }
#endif
  spark::attend<T, spark::FloatEngine<T, K, V>>(p, threads, spread);
}

template <class T>
void run(const Problem& p, bool small_keys, bool small_values) {
  if (small_keys) return small_values ? run<T, int8_t, int8_t>(p) : run<T, int8_t, T>(p);
  small_values ? run<T, T, int8_t>(p) : run<T, T, T>(p);
}

// The native attention over `length` tokens, or nothing if this is not for it.
std::optional<Pair> attended(const Tensor& query, const Store& s, int64_t length, const How& how, bool return_lse) {
  const ValueStore& v = s.values;
  const int64_t value_dim = v.bias ? v.bias->size(2) : v.values.size(3);
  if (!fits(query, s, how, length, value_dim)) return std::nullopt;
  Problem p{};
  p.batch = query.size(0), p.query_heads = query.size(1), p.queries = query.size(2);
  p.kv_heads = s.kept.size(1), p.key_dim = query.size(3), p.value_dim = value_dim;
  p.kept_channels = s.kept.size(3), p.kept_values = v.values.size(3), p.scale_entries = s.scale.size(3);
  p.value_entries = v.scale ? v.scale->size(3) : 0;
  p.length = length, p.packed = packed_tokens(s.packed_length), p.sinks = p.packed ? how.sink_tokens : 0;
  p.query = rows_of(query), p.kept = rows_of(s.kept), p.bits = rows_of(s.bits), p.scale = rows_of(s.scale);
  p.tail = rows_of(s.tail), p.values = rows_of(v.values);
  if (v.bits) p.value_bits = rows_of(*v.bits);
  if (v.scale) p.value_scale = rows_of(*v.scale);
  p.norms = s.norms.const_data_ptr<float>();
  p.norms_batch = s.norms.stride(0), p.norms_head = s.norms.stride(1), p.norms_channel = s.norms.stride(2);
  p.recovers = how.recovery != "none", p.squared = how.saliency == "squared";
  p.attn_scale = float(how.attn_scale), p.softcap = float(how.softcap);
  p.causal = how.causal_offset.has_value(), p.causal_offset = how.causal_offset.value_or(0);
  if (!set_mask(p, how.mask)) return std::nullopt;
  std::vector<float> logits;
  if (how.sinks && !with_dtype(how.sinks->scalar_type(), [&](auto* type) {
        logits = sink_logits<std::remove_pointer_t<decltype(type)>>(*how.sinks);
      })) {
    return std::nullopt;
  }
  if (how.sinks) p.sink_logits = logits.data();
  Tensor output = torch::stable::new_empty(query, {p.batch, p.query_heads, p.queries, p.value_dim});
  Tensor lse = return_lse
      ? torch::stable::new_empty(query, {p.batch, p.query_heads, p.queries}, ScalarType::Float)
      : torch::stable::new_empty(query, {0}, ScalarType::Float);
  p.output = rows_of(output);
  p.lse = return_lse ? lse.mutable_data_ptr<float>() : nullptr;
  const bool small_keys = s.kept.scalar_type() == ScalarType::Char;
  const bool small_values = v.values.scalar_type() == ScalarType::Char;
  with_dtype(query.scalar_type(), [&](auto* type) {
    run<std::remove_pointer_t<decltype(type)>>(p, small_keys, small_values);
  });
  return Pair{output, lse};
}

// Tokens that the values' side is asked to hold, to check its layout without an append.
bool readable(const Tensor& query, const ValueStore& v) {
  if (!with_dtype(query.scalar_type(), [](auto*) {})) return false;
  const int64_t value_dim = v.bias ? v.bias->size(2) : v.values.size(3);
  Tensor none = torch::stable::new_empty(query, {query.size(0), v.values.size(1), 0, value_dim});
  return are_values(v, none) && (!v.scale || v.scale->size(2) == v.values.size(2)) &&
      (!v.bits || v.bits->size(2) == v.values.size(2));
}

Pair attend(Tensor query, Tensor kept, Tensor bits, Tensor scale, Tensor norms, Tensor packed_length,
            Tensor tail, Tensor values, int64_t length, OptionalTensor mask,
            std::optional<int64_t> causal_offset, double attn_scale, double softcap,
            OptionalTensor sinks, int64_t sink_tokens, std::string recovery, std::string saliency,
            bool return_lse, OptionalTensor value_bits, OptionalTensor value_scale,
            OptionalTensor value_bias) {
  const Store store{kept, bits, scale, norms, packed_length, tail, {values, value_bits, value_scale, value_bias}};
  const How how{mask, causal_offset, attn_scale, softcap, sinks, sink_tokens, recovery, saliency};
  if (readable(query, store.values)) {
    if (auto result = attended(query, store, length, how, return_lse)) return *result;
  }
  return reference<Tensor, Tensor>(
      "spark_reference::attend", query, kept, bits, scale, norms, packed_length, tail, values, length,
      mask, causal_offset, attn_scale, softcap, sinks, sink_tokens, recovery, saliency, return_lse,
      value_bits, value_scale, value_bias);
}

template <class T>
void write_rows(const Tensor& target, const Tensor& fresh, int64_t first) {
  const Rows in = rows_of(fresh), out = rows_of(target);
  const int64_t heads = fresh.size(1), tokens = fresh.size(2);
  for (int64_t at = 0; at < fresh.size(0) * heads * tokens; ++at) {
    const int64_t head = at / tokens, b = head / heads, h = head % heads, s = at % tokens;
    std::memcpy(out.at<T>(b, h, first + s), in.at<T>(b, h, s), fresh.size(3) * sizeof(T));
  }
}

Pair append_attend(Tensor query, Tensor new_key, Tensor new_value, Tensor kept, Tensor bits,
                   Tensor scale, Tensor norms, Tensor packed_length, Tensor tail, Tensor values,
                   int64_t length, OptionalTensor mask, std::optional<int64_t> causal_offset,
                   double attn_scale, double softcap, OptionalTensor sinks, int64_t sink_tokens,
                   std::string recovery, std::string saliency, bool return_lse,
                   OptionalTensor value_bits, OptionalTensor value_scale, OptionalTensor value_bias) {
  const Store store{kept, bits, scale, norms, packed_length, tail, {values, value_bits, value_scale, value_bias}};
  const How how{mask, causal_offset, attn_scale, softcap, sinks, sink_tokens, recovery, saliency};
  const ScalarType type = query.scalar_type();
  if (with_dtype(type, [](auto*) {}) && is_cpu_rows(new_key, 4, type) && is_cpu_rows(tail, 4, type) &&
      new_value.scalar_type() == type && are_values(store.values, new_value) &&
      packed_length.is_cpu() && packed_length.scalar_type() == ScalarType::Long) {
    const int64_t first = length - packed_tokens(packed_length);
    check_room(tail, new_key, first, tail.size(3));
    check_values(store.values, new_value, length);
    with_dtype(type, [&](auto* t) { write_rows<std::remove_pointer_t<decltype(t)>>(tail, new_key, first); });
    store_values(store.values, new_value, length);
    const int64_t grown = length + new_key.size(2);
    if (auto result = attended(query, store, grown, how, return_lse)) return *result;
    return reference<Tensor, Tensor>(
        "spark_reference::attend", query, kept, bits, scale, norms, packed_length, tail, values, grown,
        mask, causal_offset, attn_scale, softcap, sinks, sink_tokens, recovery, saliency, return_lse,
        value_bits, value_scale, value_bias);
  }
  return reference<Tensor, Tensor>(
      "spark_reference::append_attend", query, new_key, new_value, kept, bits, scale, norms,
      packed_length, tail, values, length, mask, causal_offset, attn_scale, softcap, sinks,
      sink_tokens, recovery, saliency, return_lse, value_bits, value_scale, value_bias);
}

void append(Tensor rows, Tensor fresh, int64_t start, OptionalTensor packed_length) {
  const ScalarType type = rows.scalar_type();
  const bool counted = !packed_length ||
      (packed_length->is_cpu() && packed_length->scalar_type() == ScalarType::Long);
  const bool known = counted && is_cpu_rows(rows, 4, type) && is_cpu_rows(fresh, 4, type);
  const int64_t first = start - (packed_length && known ? packed_tokens(*packed_length) : 0);
  const bool done = known && with_dtype(type, [&](auto* t) {
    check_room(rows, fresh, first, rows.size(3));
    write_rows<std::remove_pointer_t<decltype(t)>>(rows, fresh, first);
  });
  if (!done) reference<>("spark_reference::append", rows, fresh, start, packed_length);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spark, CPU, m) {
  m.impl("query_stats", TORCH_BOX(&query_stats));
  m.impl("prune", TORCH_BOX(&prune));
  m.impl("pack_values", TORCH_BOX(&pack_values));
  m.impl("append_values", TORCH_BOX(&append_values));
  m.impl("append", TORCH_BOX(&append));
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("append_attend", TORCH_BOX(&append_attend));
}
