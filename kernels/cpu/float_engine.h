// Blocks of keys and values as float32, for every dtype and instruction set.
#pragma once

#include "attend.h"

namespace spark {

// LANES numbers of which `count` are wanted; where more would reach behind `end` they are not read.
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
#else
  return *plane;
#endif
}

// T: the model's dtype; K and V: what keys and values are stored in, T or int8_t.
template <class T, class K, class V>
class FloatEngine {
 public:
  static constexpr int BLOCK = 32, QUERIES = 4;  // tokens, query rows
  static int64_t padded(int64_t channels) { return round_up(channels, LANES); }
  static int64_t padded_rows(int64_t rows) { return rows; }

  explicit FloatEngine(const Problem& p)
      : p_(p), key_width_(padded(p.key_dim)), value_width_(padded(p.value_dim)),
        keys_(scratch<float>(BLOCK * key_width_)), values_(scratch<float>(BLOCK * value_width_)),
        queries_(scratch<float>(p.query_rows() * key_width_)), weights_(scratch<float>(key_width_)) {}

  void start(int64_t b, int64_t h) {
    recovery_weights(p_, b, h, weights_.get());
    for (int64_t row = 0; row < p_.query_rows(); ++row) {
      const int64_t head = h * p_.group() + row / p_.queries;
      const T* query = p_.query.at<T>(b, head, row % p_.queries);
      for (int64_t j = 0; j < p_.key_dim; ++j) queries_[row * key_width_ + j] = to_float(query[j]);
    }
  }

  void expand_keys(const Block& block) {
    for (int t = 0; t < block.count; ++t) {
      float* key = &keys_[t * key_width_];
      if (block.packed) {
        expand_key(block, block.key_row + t, key);
      } else {
        const T* row = p_.tail.at<T>(block.batch, block.head, block.key_row + t);
        for (int64_t j = 0; j < p_.key_dim; j += LANES) store(key + j, load_floats(row + j, p_.key_dim - j));
      }
    }
  }

  void expand_values(const Block& block) {
    for (int t = 0; t < block.count; ++t) {
      const int64_t token = block.value_row + t;
      float* value = &values_[t * value_width_];
      const V* row = p_.values.at<V>(block.batch, block.head, token);
      float step = 1.0f;
      if constexpr (std::is_same_v<V, int8_t>) {
        step = to_float(p_.value_scale.at<T>(block.batch, block.head, token)[p_.value_entries - 1]);
      }
      if (p_.value_bits.data) {
        expand_value(block, token, row, step, value);
      } else {
        for (int64_t j = 0; j < p_.value_dim; j += LANES) {
          store(value + j, load_floats(row + j, p_.value_dim - j) * step);
        }
      }
    }
    // Weights of tokens that are not there are 0, which would not save the sum from a NaN.
    std::fill(&values_[block.count * value_width_], &values_[BLOCK * value_width_], 0.0f);
  }

  // Dot products of `count` queries from row `first` on with the block.
  void scores(const Block&, int64_t first, int count, float (*scores)[BLOCK]) {
    const float* query = &queries_[first * key_width_];
    if (count == 4) return dots<4>(query, scores);
    if (count == 3) return dots<3>(query, scores);
    if (count == 2) return dots<2>(query, scores);
    dots<1>(query, scores);
  }

  void accumulate(const Block&, float (*weights)[BLOCK], int count, const float* rescale, float* sums) {
    if (rescale) rescale_sums(rescale, count, value_width_, sums);
    if (count == 4) return add_values<4>(weights, sums);
    if (count == 3) return add_values<3>(weights, sums);
    if (count == 2) return add_values<2>(weights, sums);
    add_values<1>(weights, sums);
  }

  void finish(float*, int64_t) {}

 private:
  void expand_key(const Block& block, int64_t token, float* key) {
    const K* row = p_.kept.at<K>(block.batch, block.head, token);
    const T* scale = p_.scale.at<T>(block.batch, block.head, token);
    const float amplitude = to_float(scale[0]);
    const int64_t plane = (p_.key_dim + 7) / 8;
    const uint8_t* keep = p_.bits.at<uint8_t>(block.batch, block.head, token);
    int rank = 0;
    for (int64_t j = 0; j < p_.key_dim; j += LANES) {
      const uint32_t kept = plane_bits(keep, j, plane), negative = plane_bits(keep + plane, j, plane);
      const int count = std::min(__builtin_popcount(kept), int(p_.kept_channels) - rank);
      F values = load_guarded(row + rank, count, p_.kept.end);
      if constexpr (std::is_same_v<K, int8_t>) values *= to_float(scale[p_.scale_entries - 1]);
      const F recovered = negate(load(&weights_[j]) * amplitude, negative);
      store(key + j, expand(recovered, values, kept));
      rank += count;
    }
  }

  void expand_value(const Block& block, int64_t token, const V* row, float step, float* value) {
    const float fill = to_float(p_.value_scale.at<T>(block.batch, block.head, token)[0]);
    const uint8_t* keep = p_.value_bits.at<uint8_t>(block.batch, block.head, token);
    const int64_t plane = (p_.value_dim + 7) / 8;
    int rank = 0;
    for (int64_t j = 0; j < p_.value_dim; j += LANES) {
      const uint32_t kept = plane_bits(keep, j, plane);
      const int count = std::min(__builtin_popcount(kept), int(p_.kept_values) - rank);
      const F values = load_guarded(row + rank, count, p_.values.end) * step;
      store(value + j, expand(splat(fill), values, kept));
      rank += count;
    }
  }

  template <int R>
  void dots(const float* query, float (*scores)[BLOCK]) {
    for (int block = 0; block < BLOCK; block += LANES) {
      F partial[R][LANES];
      // Two tokens at a time: enough independent sums to hide the latency of an addition.
      for (int t = 0; t < LANES; t += 2) {
        const float* key = &keys_[(block + t) * key_width_];
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
      for (int r = 0; r < R; ++r) total[r] = load(sums + r * value_width_ + j);
      for (int t = 0; t < BLOCK; t += 2) {
        const F v0 = load(&values_[t * value_width_ + j]), v1 = load(&values_[(t + 1) * value_width_ + j]);
        for (int r = 0; r < R; ++r) total[r] += v0 * weights[r][t], more[r] += v1 * weights[r][t + 1];
      }
      for (int r = 0; r < R; ++r) store(sums + r * value_width_ + j, total[r] + more[r]);
    }
  }

  const Problem& p_;
  const int64_t key_width_, value_width_;
  Scratch<float> keys_, values_, queries_, weights_;
};

}  // namespace spark
