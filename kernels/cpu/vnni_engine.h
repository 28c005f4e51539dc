// Blocks of levels for the integer dot products of AVX-512 VNNI.
//
// As for the integer tiles, queries and softmax weights are split into two digits: x = unit * (128 * high +
// low), 15 bits of the largest one. A product multiplies bytes without sign by bytes with one: levels of keys
// are stored as level + 128, which 128 * (sum of the digits) takes away again, and weights have no sign.
#pragma once

#include "digit_products.h"
#include "level_engine.h"

namespace spark {

// T: the model's dtype.
template <class T>
class VnniEngine : public LevelEngine<T, QueryDigits<8>, 64> {
  using Base = LevelEngine<T, QueryDigits<8>, 64>;
  using Floats = FloatEngine<T, 64>;
  using Base::amplitudes_, Base::biases_, Base::digits_, Base::keys_, Base::levels_, Base::p_, Base::parts_, Base::value_width_,
      Base::width_;

 public:
  static constexpr int BLOCK = Base::BLOCK, QUERIES = 8;  // tokens, query rows

  explicit VnniEngine(const Problem& p)
      : Base(p), values_(scratch<int8_t>(64 * value_width_)), keeps_order_(Base::padded(p.value_dim) == value_width_) {}

  void scores(const Block& block, int64_t first, int count, float (*scores)[BLOCK]) {
    if (block.packed) {
      const int columns = digits_.columns(first);
      return columns == 2 ? dots<2>(first, count, scores) : columns == 4 ? dots<4>(first, count, scores) : dots<8>(first, count, scores);
    }
    for (int r = 0; r < count; r += Floats::QUERIES) Floats::scores(block, first + r, std::min(count - r, Floats::QUERIES), scores + r);
  }

  void expand_values(const Block& block) {
    if (!block.packed) return Floats::expand_values(block);
    this->read_value_steps(block);
    const Format& f = *p_.values.format;
    const auto tile_at = [&](int t) {
      this->requests_(BlockRequests::VALUES);
      return &values_[t * 16];
    };
    if (f.kind == Kind::quantized) return put_quantized(p_.values, block, levels_.get(), value_width_, tile_at);
    Places places(p_.values, block);
    for (int t = 0; t < block.count; t += 4) {
      const int8_t* levels[4];
      places.next_four(block.count - t, f.channels, levels);
      int8_t* tile = tile_at(t);
      for (int64_t j = 0; j < value_width_; j += 64) {
        __m512i rows[4];
        for (int i = 0; i < 4; ++i) rows[i] = some_bytes(levels[i] + j, f.dim - j);
        put_four(rows, tile + 64 * j);
      }
    }
  }

  void accumulate(const Block& block, int64_t first, int count, float (*weights)[BLOCK], const float* rescale, float* sums) {
    const int64_t width = Base::padded(p_.value_dim);
    for (int r = 0; r < count; r += 4) {
      const int few = std::min(count - r, 4);
      const float* own = rescale ? rescale + r : nullptr;
      if (block.packed) accumulate_four(weights + r, few, own, sums + r * width);
      else Floats::accumulate(block, first + r, few, weights + r, own, sums + r * width);
    }
  }

  // From the order of the tiles of values to the one that dense tokens have.
  void finish_packed(Partial partial, int64_t rows) {
    for (int64_t at = 0; p_.packed && keeps_order_ && at < rows * value_width_; at += 64) {
      F parts[4];
      for (int i = 0; i < 4; ++i) parts[i] = load(partial.sums + at + 16 * i);
      in_order(parts);
      for (int i = 0; i < 4; ++i) store(partial.sums + at + 16 * i, parts[i]);
    }
    Floats::finish_packed(partial, rows);
  }

 private:
  // Dot products of up to ROWS queries with a block.
  template <int ROWS>
  void dots(int64_t first, int count, float (*scores)[BLOCK]) {
    constexpr int SPAN = 8 / ROWS, TOGETHER = 8;  // words, tokens
    for (int t = 0; t < BLOCK; t += 16) {
      for (size_t p = 0; p < parts_.size(); ++p) {
        const int64_t from = parts_[p].column, to = from + round_up(parts_[p].channels, 4 * SPAN);
        __m512i sums[16];
        for (int i = 0; i < 16; i += TOGETHER) {
          __m512i own[TOGETHER] = {};
          const uint8_t* key = &keys_[(t + i) * width_];
          for (int64_t j = from; j < to; j += 4 * SPAN) {
            const __m512i digit = _mm512_loadu_si512(digits_.at(first) + j * 16 / SPAN);
            for (int k = 0; k < TOGETHER; ++k) {
              own[k] = _mm512_dpbusd_epi32(own[k], repeated<4 * SPAN>(key + k * width_ + j), digit);
            }
          }
          std::copy_n(own, TOGETHER, sums + i);
        }
        const F amplitude = load(amplitudes_[p] + t);
        I whole[ROWS];
        together<ROWS>(sums, whole);
        for (int r = 0; r < count; ++r) {
          const int32_t correction = digits_.correction(first + r, p);
          const F before = p ? load(&scores[r][t]) : splat(biases_[first + r]);
          const F number = F(_mm512_cvtepi32_ps(_mm512_sub_epi32(__m512i(whole[r]), _mm512_set1_epi32(correction))));
          store(&scores[r][t], before + number * (amplitude * digits_.unit(first + r, p)));
        }
      }
    }
  }

  // Of 16 tokens' sums, in which lie the columns of high digits of the queries and then of low ones, each of several
  // words: 128 * high + low of each query. It wraps, as the correction does; what both make fits.
  template <int ROWS>
  static void together(__m512i* sums, I* whole) {
    if constexpr (ROWS == 4) {
      // Half as many steps as with transpose(): what is added is added first.
      __m512i fours[4];
      for (int k = 0; k < 4; ++k) {
        __m512i pairs[2];
        for (int i = 0; i < 2; ++i) {
          const __m512 a = _mm512_castsi512_ps(sums[4 * k + 2 * i]), b = _mm512_castsi512_ps(sums[4 * k + 2 * i + 1]);
          const __m512 even = _mm512_shuffle_ps(a, b, 0x88), odd = _mm512_shuffle_ps(a, b, 0xdd);
          pairs[i] = _mm512_add_epi32(_mm512_castps_si512(even), _mm512_castps_si512(odd));
        }
        const __m512i high = _mm512_shuffle_i32x4(pairs[0], pairs[1], 0x44), low = _mm512_shuffle_i32x4(pairs[0], pairs[1], 0xee);
        fours[k] = _mm512_add_epi32(_mm512_slli_epi32(high, 7), low);
      }
      // Of each quarter queries 0 and 1, or 2 and 3, of two tokens.
      const __m512i even = _mm512_setr_epi32(0, 2, 8, 10, 16, 18, 24, 26, 1, 3, 9, 11, 17, 19, 25, 27);
      const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(4));
      for (int i = 0; i < 2; ++i) {
        const __m512i index = i ? odd : even;
        const __m512i a = _mm512_permutex2var_epi32(fours[0], index, fours[1]), b = _mm512_permutex2var_epi32(fours[2], index, fours[3]);
        whole[2 * i] = I(_mm512_shuffle_i32x4(a, b, 0x44)), whole[2 * i + 1] = I(_mm512_shuffle_i32x4(a, b, 0xee));
      }
    } else {
      constexpr int SPAN = 8 / ROWS;
      transpose(sums);
      for (int r = 0; r < ROWS; ++r) {
        __m512i high = sums[r * SPAN], low = sums[(ROWS + r) * SPAN];
        for (int s = 1; s < SPAN; ++s) {
          high = _mm512_add_epi32(high, sums[r * SPAN + s]);
          low = _mm512_add_epi32(low, sums[(ROWS + r) * SPAN + s]);
        }
        whole[r] = I(_mm512_add_epi32(_mm512_slli_epi32(high, 7), low));
      }
    }
  }

  // Sums of up to four queries; `rescale` as for FloatEngine.
  void accumulate_four(float (*weights)[BLOCK], int count, const float* rescale, float* sums) {
    alignas(64) uint8_t digits[8][BLOCK] = {};
    float units[4] = {};
    for (int r = 0; r < count; ++r) units[r] = split_weights(weights[r], digits[r], digits[4 + r]);
    const int64_t width = Base::padded(p_.value_dim);
    for (int64_t j = 0; j < width; j += 64) {
      F parts[4][4];
      for (int i = 0; i < 4; ++i) {
        this->requests_(BlockRequests::SUMS);
        __m512i own[8] = {};
        const int8_t* values = &values_[j * 64 + i * 1024];
        for (int k = 0; k < BLOCK / 4; ++k) {
          const __m512i value = _mm512_load_si512(values + 64 * k);
          for (int q = 0; q < 8; ++q) own[q] = _mm512_dpbusd_epi32(own[q], _mm512_set1_epi32(load<int32_t>(&digits[q][4 * k])), value);
        }
        for (int r = 0; r < 4; ++r) parts[r][i] = joined(own[r], own[4 + r]) * units[r];
      }
      for (int r = 0; r < count; ++r) {
        if (!keeps_order_) in_order(parts[r]);
        for (int i = 0; i < 4 && j + 16 * i < width; ++i) {
          float* at = sums + r * width + j + 16 * i;
          store(at, load(at) * (rescale ? rescale[r] : 1.0f) + parts[r][i]);
        }
      }
    }
  }

  // The digits of weights times amplitudes, and their unit.
  float split_weights(const float* weights, uint8_t* high, uint8_t* low) const {
    I whole[BLOCK / LANES];
    const float unit = this->template whole_weights<127 * 128 + 127>(weights, whole);
    for (int i = 0; i < BLOCK / LANES; ++i) {
      const __m512i numbers = __m512i(whole[i]);
      _mm_store_si128((__m128i*)(high + 16 * i), _mm512_cvtepi32_epi8(_mm512_srai_epi32(numbers, 7)));
      _mm_store_si128((__m128i*)(low + 16 * i), _mm512_cvtepi32_epi8(_mm512_and_si512(numbers, _mm512_set1_epi32(127))));
    }
    return unit;
  }

  Scratch<int8_t> values_;   // four tokens side by side
  const bool keeps_order_;   // that of the tiles while packed tokens are added: rows of sums have room for it
};

}  // namespace spark
