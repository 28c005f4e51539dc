// Blocks of keys and values as float32, for every format, dtype and instruction set.
#pragma once

#include "attend.h"

namespace spark {

// LANES numbers of which `count` are wanted; where more would reach beyond `end` they are not read.
template <class T>
inline F load_guarded(const T* p, int64_t count, const char* end) {
  if (reinterpret_cast<const char*>(p + LANES) <= end) return load_floats(p);
  return load_floats(p, count);
}

// LANES bits of a plane of `bytes` bytes from channel `first` on.
inline uint32_t plane_bits(const uint8_t* plane, int64_t first, [[maybe_unused]] int64_t bytes) {
  plane += first / 8;
#if defined(__AVX512F__)
  return first / 8 + 1 < bytes ? load<uint16_t>(plane) : *plane;
#elif defined(SPARK_NEON)
  return *plane >> first % 8 & 15;
#else
  return *plane;
#endif
}

// Rows of float32, `width` numbers apart, that packed tokens or dense rows of one side are worth.
template <class T>
class FloatRows {
 public:
  explicit FloatRows(const Side& side, int block)
      : f_(*side.format), end_(side.pages_end), width_(round_up(f_.dim, LANES)),
        rows_(scratch<float>(block * width_ + LANES)), weights_(scratch<float>(width_)),
        amplitudes_(scratch<float>(block)) {}

  void start(const Side& side, int64_t b, int64_t h) { recovery_weights(side, b, h, weights_.get()); }

  // Dense rows, those from `first` on of a block.
  void expand(const Tokens& rows, int first, int count) { dense(rows, count, &rows_[first * width_], [](int) {}); }

  // Packed tokens, from `place` on: those from `first` on of a block.
  void expand(const Place& place, int first, int count, const TokenRequests& ahead) {
    float* out = &rows_[first * width_];
    switch (f_.kind) {
      case Kind::dense: return dense(place.rows(f_.channels), count, out, ahead);
      case Kind::int8: return int8(place, count, out, ahead);
      case Kind::quantized: return quantized(place, count, out, &amplitudes_[first], ahead);
      default: f_.int8 ? pruned<int8_t>(place, count, out, ahead) : pruned<T>(place, count, out, ahead);
    }
  }

  int64_t width() const { return width_; }
  const float* weights() const { return weights_.get(); }  // of recovery_weights()
  const float* operator[](int64_t t) const { return &rows_[t * width_]; }
  void clear_from(int t, int block) {
    std::fill(&rows_[t * width_], &rows_[block * width_], 0.0f);
    std::fill(&amplitudes_[t], &amplitudes_[block], 0.0f);
  }
  // What the rows of the tokens of a packed block have to be multiplied with, or nothing.
  const float* amplitudes(const Block& block) const {
    return block.packed && f_.kind == Kind::quantized ? amplitudes_.get() : nullptr;
  }

 private:
  // request(t): called before token t.
  template <class Request>
  void dense(const Tokens& rows, int count, float* out, const Request& request) const {
    const int64_t dim = f_.dim, width = width_;
    for (int t = 0; t < count; ++t, out += width) {
      request(t);
      const T* row = reinterpret_cast<const T*>(rows.at(t));
      for (int64_t j = 0; j < dim; j += LANES) store(out + j, load_floats(row + j, dim - j));
    }
  }

  void int8(const Place& place, int count, float* out, const TokenRequests& ahead) const {
    const int8_t* levels = place.at<int8_t>(f_.channels);
    const T* steps = place.at<T>(f_.step);
    const int64_t dim = f_.dim, width = width_;
    for (int t = 0; t < count; ++t, levels += dim, out += width) {
      ahead(t);
      const float step = to_float(steps[t]);
      for (int64_t j = 0; j < dim; j += LANES) store(out + j, load_floats(levels + j, dim - j) * step);
    }
  }

  // Levels by rank, of several parts times their amplitudes, of one part without them: they are `factors`.
  void quantized(const Place& place, int count, float* out, float* factors, const TokenRequests& ahead) const {
    const std::array<float, 256>& worth = spark::amplitudes();
    const bool single = f_.part_count == 1;
    const uint8_t* amplitudes = place.at<uint8_t>(f_.scale);
    if (single) read_amplitudes(amplitudes, 1, 0, count, factors);
    else std::fill_n(factors, count, 1.0f);
    // What comes after a part is written, too: the next part has to follow it.
    const int together = single ? count : 1;
    for (int t = 0; t < count; t += together) {
      for (int p = 0; p < f_.part_count; ++p) {
        const float factor = single ? 1.0f : worth[amplitudes[t * f_.part_count + p]];
        levels(p, place, t, together, factor, out + t * width_, ahead);
      }
    }
  }

  // Of part p of `count` tokens, the first of which is the `first` one from `place` on.
  void levels(int p, const Place& place, int first, int count, float factor, float* out, const TokenRequests& ahead) const {
    const Part part = f_.parts[p];
    const Tokens rows = (place + first).rows(f_.channels);
    const int64_t width = width_;
    out += part.first;
    with_bits(part.bits, [&](auto bits) {
      const Levels<bits> table;
      uint8_t copy[MAX_HEAD + LANES];
      for (int t = 0; t < count; ++t, out += width) {
        if (p == 0) ahead(first + t);
        const char* row = rows.at(t);
        const uint8_t* codes = reinterpret_cast<const uint8_t*>(row);
        if (row + rows.step + LANES > end_) codes = static_cast<const uint8_t*>(std::memcpy(copy, row, rows.step));
        expand_codes<bits>(codes + part.codes, part.channels, table, factor, out);
      }
    });
  }

  template <class Stored>
  void pruned(const Place& place, int count, float* out, const TokenRequests& ahead) const {
    // Copies: what is stored below might, for all the compiler knows, change a member.
    const Format f = f_;
    const char* const end = end_;
    const float* weights = weights_.get();
    const int64_t width = width_, plane = f.plane();
    const bool is_spark = f.kind == Kind::spark;
    const Stored* row = place.at<Stored>(f.channels);
    const uint8_t *keep = place.at<uint8_t>(f.keep), *negative = place.at<uint8_t>(f.negative);
    const T *scales = place.at<T>(f.scale), *steps = place.at<T>(f.step);
    for (int t = 0; t < count; ++t, row += f.kept, keep += plane, negative += plane, out += width) {
      ahead(t);
      const float scale = to_float(scales[t]), step = f.int8 ? to_float(steps[t]) : 1.0f;
      const auto expand = [&](auto inside) {
        int64_t rank = 0;
        for (int64_t j = 0; j < f.dim; j += LANES) {
          const uint32_t kept = plane_bits(keep, j, plane);
          const int64_t set = __builtin_popcount(kept), some = inside ? set : std::min<int64_t>(set, f.kept - rank);
          F values = inside ? load_floats(row + rank) : load_guarded(row + rank, some, end);
          if constexpr (std::is_same_v<Stored, int8_t>) values *= step;
          F others = splat(scale);
          if (is_spark) others = negate(load(weights + j) * scale, plane_bits(negative, j, plane));
          store(out + j, spark::expand(others, values, kept));
          rank += some;
        }
      };
      // More bits may be set than there are channels: they promise nothing, not even that much can be read.
      if (reinterpret_cast<const char*>(row + width + LANES) <= end) expand(std::true_type{});
      else expand(std::false_type{});
    }
  }

  const Format& f_;
  const char* end_;
  const int64_t width_;
  Scratch<float> rows_, weights_, amplitudes_;
};

// T: the model's dtype. N: tokens of a block.
template <class T, int N = 32>
class FloatEngine {
 public:
  static constexpr int BLOCK = N, QUERIES = 4;  // tokens, query rows
  static int64_t padded(int64_t channels) { return round_up(channels, LANES); }
  static int64_t padded_rows(int64_t rows) { return rows; }

  explicit FloatEngine(const Problem& p)
      : keys_(p.keys, BLOCK), values_(p.values, BLOCK), key_width_(keys_.width()), value_width_(values_.width()),
        queries_(scratch<float>(p.query_rows() * key_width_)), key_head_(*p.keys.format), value_head_(*p.values.format),
        turned_(scratch<float>(p.keys.format->kind == Kind::quantized ? p.query_rows() * key_width_ : 0)), p_(p),
        biases_(scratch<float>(p.query_rows())),
        requests_({BLOCK / 4, p.query_rows(), BLOCK / 4, (p.query_rows() + 3) / 4 * (value_width_ + 15) / 16}) {}

  void start(int64_t b, int64_t h) {
    keys_.start(p_.keys, b, h);
    values_.start(p_.values, b, h);
    const bool turns = p_.packed && p_.keys.format->kind == Kind::quantized;
    if (turns) key_head_.read(p_.keys, b, h);
    if (p_.packed && p_.values.format->kind == Kind::quantized) value_head_.read(p_.values, b, h);
    const Scratch<float> copy = scratch<float>(key_width_);
    for (int64_t row = 0; row < p_.query_rows(); ++row) {
      const int64_t head = h * p_.group() + row / p_.queries;
      const T* query = p_.query.at<T>(b, head, row % p_.queries);
      for (int64_t j = 0; j < p_.key_dim; ++j) queries_[row * key_width_ + j] = to_float(query[j]);
      if (!turns) continue;
      std::copy_n(&queries_[row * key_width_], key_width_, copy.get());
      key_head_.turn_query(copy.get(), &turned_[row * key_width_], biases_[row] = 0);
    }
  }

  void expand_keys(const Block& block) {
    if (block.packed) return p_.each_run(block, [&](const Run& run) { keys_.expand(run.keys, run.first, run.count, requests(BlockRequests::KEYS)); });
    keys_.expand(block.keys, 0, block.old);
    keys_.expand(block.new_keys, block.old, block.count - block.old);
  }

  void expand_values(const Block& block) {
    if (block.packed) {
      p_.each_run(block, [&](const Run& run) { values_.expand(run.values, run.first, run.count, requests(BlockRequests::VALUES)); });
    } else {
      values_.expand(block.values, 0, block.old);
      values_.expand(block.new_values, block.old, block.count - block.old);
    }
    // Weights of tokens that are not there are 0, which would not save the sum from a NaN.
    values_.clear_from(block.count, BLOCK);
  }

  // What scores() has to wait for.
  void products(const Block&) {}

  // Dot products of `count` queries from row `first` on with the block.
  void scores(const Block& block, int64_t first, int count, float (*scores)[BLOCK]) {
    const float* amplitudes = keys_.amplitudes(block);
    const float* query = amplitudes ? &turned_[first * key_width_] : &queries_[first * key_width_];
    if (count == 4) dots<4>(query, scores);
    else if (count == 3) dots<3>(query, scores);
    else if (count == 2) dots<2>(query, scores);
    else dots<1>(query, scores);
    for (int r = 0; amplitudes && r < count; ++r) {
      for (int t = 0; t < BLOCK; t += LANES) {
        store(&scores[r][t], load(&scores[r][t]) * load(amplitudes + t) + biases_[first + r]);
      }
    }
  }

  void accumulate(const Block& block, int64_t, int count, float (*weights)[BLOCK], const float* rescale, float* sums) {
    const float* amplitudes = values_.amplitudes(block);
    for (int r = 0; amplitudes && r < count; ++r) {
      for (int t = 0; t < BLOCK; t += LANES) store(&weights[r][t], load(&weights[r][t]) * load(amplitudes + t));
    }
    if (rescale) rescale_sums(rescale, count, value_width_, sums);
    if (count == 4) return add_values<4>(weights, sums);
    if (count == 3) return add_values<3>(weights, sums);
    if (count == 2) return add_values<2>(weights, sums);
    add_values<1>(weights, sums);
  }

  void begin(const Block& block) { requests_.begin(p_, block); }
  void before_softmax() { requests_(BlockRequests::SOFTMAX); }
  // Sums of levels become those of the values.
  void finish_packed(Partial partial, int64_t rows) {
    if (!p_.packed || p_.values.format->kind != Kind::quantized) return;
    for (int64_t row = 0; row < rows; ++row) value_head_.restore(partial.sums + row * value_width_, partial.softmax[row].total());
  }
  void finish(float*, int64_t) {}

 private:
  template <int R>
  void dots(const float* query, float (*scores)[BLOCK]) {
    for (int block = 0; block < BLOCK; block += LANES) {
      F partial[R][LANES];
      // Two tokens at a time: enough independent sums to hide the latency of an addition.
      for (int t = 0; t < LANES; t += 2) {
        const float* key = keys_[block + t];
        F sums[R][2] = {};
        for (int64_t j = 0; j < key_width_; j += LANES) {
          const F k0 = load(key + j), k1 = load(key + key_width_ + j);
          for (int r = 0; r < R; ++r) {
            const F q = load(query + r * key_width_ + j);
            sums[r][0] += q * k0;
            sums[r][1] += q * k1;
          }
        }
        for (int r = 0; r < R; ++r) partial[r][t] = sums[r][0], partial[r][t + 1] = sums[r][1];
      }
      for (int r = 0; r < R; ++r) {
        sums(partial[r]);
        store(&scores[r][block], partial[r][0]);
      }
    }
  }

  template <int R>
  void add_values(float (*weights)[BLOCK], float* sums) {
    for (int64_t j = 0; j < value_width_; j += LANES) {
      F total[R], more[R] = {};
      requests_(BlockRequests::SUMS);
      for (int r = 0; r < R; ++r) total[r] = load(sums + r * value_width_ + j);
      for (int t = 0; t < BLOCK; t += 2) {
        const F v0 = load(values_[t] + j), v1 = load(values_[t + 1] + j);
        for (int r = 0; r < R; ++r) total[r] += v0 * weights[r][t], more[r] += v1 * weights[r][t + 1];
      }
      for (int r = 0; r < R; ++r) store(sums + r * value_width_ + j, total[r] + more[r]);
    }
  }

  FloatRows<T> keys_, values_;
  const int64_t key_width_, value_width_;
  Scratch<float> queries_;
  // Of quantized sides: queries and sums of values in the space of their codes.
  QuantizedHead key_head_, value_head_;
  Scratch<float> turned_;

 protected:
  // What packed keys meet in place of a row of queries.
  const float* packed_query(int64_t row) const {
    const bool turns = p_.keys.format->kind == Kind::quantized;
    return turns ? &turned_[row * key_width_] : &queries_[row * key_width_];
  }

  const float* key_weights() const { return keys_.weights(); }
  TokenRequests requests(BlockRequests::Stage stage) { return {requests_, stage}; }

  const Problem& p_;
  Scratch<float> biases_;
  BlockRequests requests_;
};

}  // namespace spark
