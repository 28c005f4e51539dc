// Encoding tokens in the format quantized, and the constants of a head: kernels/formats/quantized.py.
#pragma once

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include <numeric>

#include "quantized.h"

namespace spark {

#if defined(__AVX512BW__)
// Rows of 16-bit numbers by rank.
inline void by_rank(const void* row, const uint16_t* order, int64_t channels, void* ranked) {
  const auto source = [&](int64_t j) {
    const uint32_t some = _bzhi_u32(~0u, unsigned(std::clamp<int64_t>(channels - j, 0, 32)));
    return _mm512_maskz_loadu_epi16(some, static_cast<const uint16_t*>(row) + j);
  };
  for (int64_t first = 0; first < channels; first += 32) {
    const __m512i rank = _mm512_loadu_si512(order + first), pair = _mm512_srli_epi16(rank, 6);
    __m512i found{};
    for (int64_t j = 0; j < channels; j += 64) {
      const __mmask32 here = _mm512_cmpeq_epi16_mask(pair, _mm512_set1_epi16(int16_t(j / 64)));
      found = _mm512_mask_mov_epi16(found, here, _mm512_permutex2var_epi16(source(j), rank, source(j + 32)));
    }
    _mm512_storeu_si512(static_cast<uint16_t*>(ranked) + first, found);
  }
}
#endif

// Encodes the tokens of one head, a few at the same time: what is found of one token, each step of which waits for the
// one before, goes on while the others' is.
template <class T>
class QuantizedEncoder {
  static constexpr int REFITS = 2;

 public:
  static constexpr int TOGETHER = 4;

  explicit QuantizedEncoder(const Format& f)
      : f_(f), stride_(round_up(f.dim, LANES) + LANES), head_(f), center_(scratch<float>(stride_)),
        factor_(scratch<float>(stride_)), rows_(scratch<float>(TOGETHER * stride_)), copies_(scratch<float>(TOGETHER * stride_)),
        magnitudes_(scratch<float>(TOGETHER * stride_)), order_(scratch<uint16_t>(f.dim + 32)),
        ranked_(scratch<T>(f.dim + 32)), codes_(scratch<uint8_t>(f.dim + LANES + 8)) {}

  void start(const Side& side, int64_t b, int64_t h) {
    head_.read(side, b, h);
    for (int64_t r = 0; f_.scaled && r < f_.dim; ++r) {
      const int64_t j = head_.order()[r];
      order_[r] = uint16_t(j), center_[r] = head_.center()[j], factor_[r] = head_.factor()[j];
    }
  }

  // `count` tokens of a page, from `place` on.
  void encode(const T* const (&rows)[TOGETHER], const Place& place, int count) {
    for (int k = 0; k < count; ++k) scale(rows[k], &rows_[k * stride_]);
    for (int p = 0; p < f_.part_count; ++p) {
      const Part& part = f_.parts[p];
      const float inverse = 1.0f / head_.gain(p);
      // Zeros follow a part where it is rotated: it may stay where it is if that needs none, or nothing follows.
      const bool moves = p + 1 < f_.part_count && part.channels % LANES;
      for (int k = 0; k < count; ++k) {
        numbers_[k] = &rows_[k * stride_ + part.first];
        if (moves) numbers_[k] = std::copy_n(numbers_[k], part.channels, &copies_[k * stride_]) - part.channels;
        head_.turn(part, numbers_[k], inverse);
      }
      with_bits(part.bits, [&](auto bits) { encode_part<bits>(p, place, count); });
    }
  }

 private:
  // A token's channels, by rank where they are scaled.
  void scale(const T* row, float* numbers) {
    if (!f_.scaled) return to_floats(row, numbers);
    const int64_t dim = f_.dim;
    const float *center = center_.get(), *factor = factor_.get();
    rank(row);
    const T* ranked = ranked_.get();  // more of them than channels can be read
    for (int64_t r = 0; r < dim; r += LANES) {
      store(numbers + r, (load_floats(ranked + r) - load(center + r)) * load(factor + r));
    }
  }

  void to_floats(const T* row, float* numbers) const {
    const int64_t dim = f_.dim, whole = dim / LANES * LANES;
    for (int64_t j = 0; j < whole; j += LANES) store(numbers + j, load_floats(row + j));
    if (whole < dim) store(numbers + whole, load_floats(row + whole, dim - whole));
  }

  void rank(const T* row) {
#if defined(__AVX512BW__)
    if constexpr (sizeof(T) == 2) return by_rank(row, order_.get(), f_.dim, ranked_.get());
#endif
    const uint16_t* order = order_.get();
    T* ranked = ranked_.get();
#pragma GCC unroll 8
    for (int64_t r = 0; r < f_.dim; ++r) ranked[r] = row[order[r]];
  }

  // Writes the amplitudes and the codes of a part.
  template <int BITS>
  void encode_part(int p, const Place& place, int count) {
    const Part& part = f_.parts[p];
    const int64_t channels = part.channels;
    float amplitudes[TOGETHER];
    if constexpr (BITS >= 5) {
      for (int k = 0; k < count; ++k) amplitudes[k] = largest(numbers_[k], channels) / float(largest_level(BITS));
    } else refit<BITS>(channels, count, amplitudes);
    uint8_t* codes = codes_.get();
    for (int k = 0; k < count; ++k) {
      const uint8_t code = amplitude_code(amplitudes[k], BITS >= 5);
      (place + k).template at<uint8_t>(f_.scale)[p] = code;
      const Nearest<BITS> nearest(positive(spark::amplitudes()[code]));
      const float* numbers = numbers_[k];
      const auto code_at = [&](int64_t j) { return nearest.code(load(numbers + j)); };
      int64_t j = 0;
      for (; j + 4 * LANES <= channels; j += 4 * LANES) {
        store_low_bytes(codes + j, code_at(j), code_at(j + LANES), code_at(j + 2 * LANES), code_at(j + 3 * LANES));
      }
      for (; j < channels; j += LANES) store_low_bytes(codes + j, code_at(j));
      std::memset(codes + channels, 0, 8);
      pack_codes<BITS>(codes, channels, (place + k).template at<uint8_t>(f_.channels) + part.codes);
    }
  }

  static float positive(float amplitude) { return amplitude > 0 ? amplitude : 1.0f; }

  static float largest(const float* numbers, int64_t channels) {
    F top{};
    for (int64_t j = 0; j < channels; j += LANES) top = max_or_nan(top, spark::abs(load(numbers + j)));
    return maximum_or_nan(top);
  }

  // The amplitudes of normal numbers, then the least squares for the levels that they have led to.
  template <int BITS>
  void refit(int64_t channels, int count, float* amplitudes) {
    const float* positives = grid_of(BITS).levels + (1 << (BITS - 1));
    const Table<BITS - 1> levels(positives);
    constexpr int ALL = 2 * TOGETHER;
    F parts[ALL];
    float totals[std::max(ALL, LANES)];
    for (int k = count; k < TOGETHER; ++k) parts[k] = parts[TOGETHER + k] = F{};
    for (int k = 0; k < count; ++k) {
      const float* numbers = numbers_[k];
      float* magnitudes = &magnitudes_[k * stride_];
      F energy{};
      for (int64_t j = 0; j < channels; j += LANES) {
        const F x = load(numbers + j);
        energy += x * x;
        store(magnitudes + j, Nearest<BITS>::magnitude(x));
      }
      parts[k] = energy;
    }
    sums(parts, TOGETHER, totals);
    for (int k = 0; k < count; ++k) amplitudes[k] = std::sqrt(totals[k] / float(channels)) / DEVIATION[BITS - 1];
    // Zeros after the channels have the lowest level.
    const float added = float(round_up(channels, LANES) - channels) * positives[0] * positives[0];
    for (int i = 0; i < REFITS; ++i) {
      for (int k = 0; k < count; ++k) {
        const Nearest<BITS> nearest(positive(amplitudes[k]));
        const float* magnitudes = &magnitudes_[k * stride_];
        F with_level{}, with_itself{};
        for (int64_t j = 0; j < channels; j += LANES) {
          // A number and its level have the same sign.
          const F x = load(magnitudes + j), level = levels[nearest.rank(x)];
          with_level += x * level, with_itself += level * level;
        }
        parts[k] = with_level, parts[TOGETHER + k] = with_itself;
      }
      sums(parts, ALL, totals);
      for (int k = 0; k < count; ++k) amplitudes[k] = totals[k] / (totals[TOGETHER + k] - added);
    }
  }

  const Format& f_;
  const int64_t stride_;  // of a token's numbers
  QuantizedHead head_;
  Scratch<float> center_, factor_, rows_, copies_, magnitudes_;  // the first three by rank
  float* numbers_[TOGETHER] = {};  // of a part, with zeros after them
  Scratch<uint16_t> order_;
  Scratch<T> ranked_;
  Scratch<uint8_t> codes_;
};

inline F finite_or_zero(F x) { return select(spark::abs(x) < splat(INF), x, F{}); }

// At least a hundredth of the mean, and positive.
inline void raise_to_floor(double* numbers, int64_t count) {
  const double mean = std::accumulate(numbers, numbers + count, 0.0) / double(count), least = std::max(mean * 0.01, 1e-12);
  for (int64_t i = 0; i < count; ++i) numbers[i] = std::max(numbers[i], least);
}

// The means of f(channels, j) over tokens, for each channel; rows(s): token s. Channels that are not finite
// spoil their own token and no other.
template <class Rows, class Function>
void channel_means(const Rows& rows, int64_t count, int64_t channels, const Function& f, double* means) {
  const int64_t width = round_up(channels, LANES), whole = channels / LANES * LANES;
  const Scratch<float> sums = uncleared_scratch<float>(width);
  float* some = sums.get();
  std::fill_n(means, channels, 0.0);
  for (int64_t first = 0; first < count; first += 64) {
    std::fill_n(some, width, 0.0f);
    for (int64_t s = first; s < std::min<int64_t>(count, first + 64); ++s) {
      const auto* row = rows(s);
      const auto add = [&](F x, int64_t j) { store(some + j, load(some + j) + f(finite_or_zero(x), j)); };
      for (int64_t j = 0; j < whole; j += LANES) add(load_floats(row + j), j);
      if (whole < channels) add(load_floats(row + whole, channels - whole), whole);
    }
    for (int64_t j = 0; j < channels; ++j) means[j] += some[j];
  }
  for (int64_t j = 0; j < channels; ++j) means[j] /= double(count);
}

// Writes center, factor and order of a head; stats: whose square roots are the query norms. Sizes of the
// channels, which are squares, become those of the scaled ones by rank.
inline void rank_channels(const Format& f, const float* center, const float* stats, char* head, double* squares) {
  const int64_t channels = f.dim;
  bf16 *centers = reinterpret_cast<bf16*>(head + f.center), *factors = reinterpret_cast<bf16*>(head + f.factor);
  int16_t* order = reinterpret_cast<int16_t*>(head + f.order);
  const Scratch<double> spread = scratch<double>(channels), norms = scratch<double>(channels);
  const Scratch<float> rank = scratch<float>(channels);
  for (int64_t j = 0; j < channels; ++j) {
    spread[j] = std::sqrt(squares[j]);
    norms[j] = std::isfinite(stats[j]) ? std::sqrt(stats[j]) : 0.0;
  }
  raise_to_floor(spread.get(), channels);
  raise_to_floor(norms.get(), channels);
  for (int64_t j = 0; j < channels; ++j) {
    centers[j] = from_float<bf16>(center[j]);
    factors[j] = from_float<bf16>(float(std::sqrt(norms[j] / spread[j])));
    rank[j] = float(std::sqrt(squares[j])) * to_float(factors[j]);
  }
  std::iota(order, order + channels, int16_t(0));
  std::stable_sort(order, order + channels, [&](int a, int b) { return rank[a] > rank[b]; });
  for (int64_t r = 0; r < channels; ++r) spread[r] = squares[order[r]] * std::pow(double(to_float(factors[order[r]])), 2);
  std::copy_n(spread.get(), channels, squares);
}

// Writes the constants of a head.
template <class Rows>
void quantized_constants(const Format& f, const Rows& rows, int64_t count, const float* stats, char* head) {
  const Scratch<double> squares = scratch<double>(f.dim);
  const Scratch<float> centers = scratch<float>(f.dim + LANES);
  float* center = centers.get();
  if (f.scaled) {
    channel_means(rows, count, f.dim, [](F x, int64_t) { return x; }, squares.get());
    for (int64_t j = 0; j < f.dim; ++j) center[j] = to_float(from_float<bf16>(float(squares[j])));
  }
  const auto squared = [&](F x, int64_t j) { return (x - load(center + j)) * (x - load(center + j)); };
  channel_means(rows, count, f.dim, squared, squares.get());
  if (f.scaled) rank_channels(f, center, stats, head, squares.get());
  double sizes[MAX_PARTS];
  for (int p = 0; p < f.part_count; ++p) {
    // No rotation changes it.
    const double* first = squares.get() + f.parts[p].first;
    sizes[p] = std::sqrt(std::accumulate(first, first + f.parts[p].channels, 0.0) / double(f.parts[p].channels));
  }
  raise_to_floor(sizes, f.part_count);
  bf16* gain = reinterpret_cast<bf16*>(head + f.gain);
  for (int p = 0; p < f.part_count; ++p) gain[p] = from_float<bf16>(float(sizes[p] / double(DEVIATION[f.parts[p].bits - 1])));
}

}  // namespace spark
