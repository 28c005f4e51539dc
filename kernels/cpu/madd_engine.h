// Blocks of levels for AVX2's products of 16-bit numbers, vpmaddwd, or AVX-VNNI's, vpdpwssd, which add them up, too.
//
// Levels are stored as level + 128: of a vector of bytes the even ones and the odd ones are 16-bit numbers after
// one instruction each. They meet queries, or softmax weights, of 16 bits; a sum of two products has 32 bits.
#pragma once

#include "level_engine.h"

namespace spark {

// T: the model's dtype.
template <class T>
class MaddEngine : public LevelEngine<T, QueryWords, 32> {
  using Base = LevelEngine<T, QueryWords, 32>;
  using Floats = FloatEngine<T>;
  using Base::amplitudes_, Base::biases_, Base::digits_, Base::keys_, Base::levels_, Base::p_, Base::parts_, Base::value_width_,
      Base::width_;

 public:
  static constexpr int BLOCK = Base::BLOCK, QUERIES = Floats::QUERIES;  // tokens, query rows

  explicit MaddEngine(const Problem& p) : Base(p), values_(scratch<uint8_t>(BLOCK * value_width_)) {}

  void scores(const Block& block, int64_t first, int count, float (*scores)[BLOCK]) {
    if (!block.packed) return Floats::scores(block, first, count, scores);
    Base::with_rows(count, [&](auto rows) { dots<rows>(first, scores); });
  }

  // Four tokens side by side, for the weights of pairs() to meet.
  void expand_values(const Block& block) {
    if (!block.packed) return Floats::expand_values(block);
    this->read_value_steps(block);
    const Format& f = *p_.values.format;
    p_.each_run(block, [&](const Run& run) {
      const TokenRequests requests = this->requests(BlockRequests::VALUES);
      int8_t* out = &levels_[run.first * value_width_];
      if (f.int8) Base::template copy_levels<128>(run.values, run.count, p_.values, reinterpret_cast<uint8_t*>(out), value_width_, requests);
      else expand_part<128>(f.parts[0], run.values.rows(f.channels), run.count, out, value_width_, &requests);
    });
    for (int t = 0; t < block.count; t += 4) {
      const int8_t* row = &levels_[t * value_width_];
      for (int64_t j = 0; j < value_width_; j += 32, row += 32) {
        __m256i rows[4];
        for (int i = 0; i < 4; ++i) rows[i] = load<__m256i>(row + i * value_width_);
        const __m256i a = _mm256_unpacklo_epi8(rows[0], rows[1]), b = _mm256_unpackhi_epi8(rows[0], rows[1]);
        const __m256i c = _mm256_unpacklo_epi8(rows[2], rows[3]), d = _mm256_unpackhi_epi8(rows[2], rows[3]);
        uint8_t* to = &values_[j * BLOCK + t * 16];
        store_bytes(to, _mm256_unpacklo_epi16(a, c)), store_bytes(to + 32, _mm256_unpackhi_epi16(a, c));
        to += 16 * BLOCK;
        store_bytes(to, _mm256_unpacklo_epi16(b, d)), store_bytes(to + 32, _mm256_unpackhi_epi16(b, d));
      }
    }
  }

  void accumulate(const Block& block, int64_t first, int count, float (*weights)[BLOCK], const float* rescale, float* sums) {
    if (!block.packed) return Floats::accumulate(block, first, count, weights, rescale, sums);
    Base::with_rows(count, [&](auto rows) { add_levels<rows>(weights, rescale, sums); });
  }

 private:
  static __m256i even(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi16(0xff)); }
  static __m256i odd(__m256i bytes) { return _mm256_srli_epi16(bytes, 8); }
  static __m256i plus_products(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
    return in_register(_mm256_dpwssd_avx_epi32(sum, a, b));
#else
    return in_register(_mm256_add_epi32(sum, _mm256_madd_epi16(a, b)));
#endif
  }
  // At this place of the program: GCC would add products to each other first, for which registers do not
  // suffice, and load a query for each product.
  static __m256i in_register(__m256i v) {
    asm volatile("" : "+x"(v));
    return v;
  }

  // Neighbours in a and then in b, added, in each half.
  static __m256i neighbours(__m256i a, __m256i b) {
    const __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
    return _mm256_add_epi32(_mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88)), _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xdd)));
  }
  // The sums of eight vectors, whose neighbours are added.
  static __m256i sums_of(const __m256i* v) {
    const __m256i low = neighbours(v[0], v[1]), high = neighbours(v[2], v[3]);
    return _mm256_add_epi32(_mm256_blend_epi32(low, high, 0xf0), _mm256_permute2x128_si256(low, high, 0x21));
  }

  template <int ROWS>
  void dots(int64_t first, float (*scores)[BLOCK]) {
    for (int t = 0; t < BLOCK; t += 8) {
      for (size_t p = 0; p < parts_.size(); ++p) {
        const int64_t from = parts_[p].column, to = from + round_up(parts_[p].channels, 32);
        const int16_t* query = digits_.at(first);
        __m256i pairs[ROWS][4];
        for (int i = 0; i < 4; ++i) {
          const uint8_t *a = &keys_[(t + 2 * i) * width_], *b = a + width_;
          __m256i own[ROWS][2] = {};
          for (int64_t j = from; j < to; j += 32) {
            const __m256i x = load<__m256i>(a + j), y = load<__m256i>(b + j);
            const auto add = [&](__m256i x, __m256i y, const int16_t* query) {
              for (int r = 0; r < ROWS; ++r) {
                const __m256i q = in_register(load<__m256i>(query + r * width_));
                own[r][0] = plus_products(own[r][0], x, q), own[r][1] = plus_products(own[r][1], y, q);
              }
            };
            add(even(x), even(y), query + j), add(odd(x), odd(y), query + j + 16);
          }
          for (int r = 0; r < ROWS; ++r) pairs[r][i] = neighbours(own[r][0], own[r][1]);
        }
        const F amplitude = load(amplitudes_[p] + t);
        for (int r = 0; r < ROWS; ++r) {
          const __m256i whole = _mm256_sub_epi32(sums_of(pairs[r]), _mm256_set1_epi32(digits_.correction(first + r, p)));
          const F before = p ? load(&scores[r][t]) : splat(biases_[first + r]);
          store(&scores[r][t], before + F(_mm256_cvtepi32_ps(whole)) * (amplitude * digits_.unit(first + r, p)));
        }
      }
    }
  }

  // Weights of four tokens a, b, c, d as the pairs (a, c) and (b, d), and two more that mean nothing.
  struct Pairs {
    alignas(32) int32_t numbers[BLOCK];
    int32_t correction;
    float unit, rescale;
  };
  void pairs(const float* weights, Pairs& to) const {
    I whole[BLOCK / LANES];
    U total{};  // of damaged steps it may overflow
    to.unit = this->template whole_weights<32767>(weights, whole);
    for (int i = 0; i < BLOCK / LANES; ++i) {
      const __m256i v = __m256i(whole[i]), later = _mm256_shuffle_epi32(v, 0xee);
      _mm256_store_si256((__m256i*)(to.numbers + 8 * i), _mm256_blend_epi16(v, _mm256_slli_epi32(later, 16), 0xaa));
      total += bit_cast<U>(whole[i]);
    }
    uint32_t sum = 0;
    for (int i = 0; i < LANES; ++i) sum += total[i];
    to.correction = int32_t(0u - 128 * sum);
  }

  // Of 32 channels, 8 and those 16 after them at a time: so four tokens lie side by side.
  template <int ROWS>
  void add_levels(float (*weights)[BLOCK], const float* rescale, float* sums) {
    Pairs all[ROWS];
    for (int r = 0; r < ROWS; ++r) pairs(weights[r], all[r]), all[r].rescale = rescale ? rescale[r] : 1.0f;
    const int64_t width = Base::padded(p_.value_dim);
    const uint8_t* values = values_.get();
    for (int64_t at = 0; at < width; values += 16 * BLOCK, at += at % 16 ? 24 : 8) {
      this->requests_(BlockRequests::SUMS);
      __m256i own[ROWS][2];
      for (int r = 0; r < ROWS; ++r) own[r][0] = own[r][1] = _mm256_set1_epi32(all[r].correction);
#pragma GCC unroll 8
      for (int t = 0; t < BLOCK; t += 4) {
        const __m256i x = load<__m256i>(values + t * 16), y = load<__m256i>(values + t * 16 + 32);
        const auto add = [&](__m256i x, __m256i y, int pair) {
          for (int r = 0; r < ROWS; ++r) {
            const __m256i weights = _mm256_set1_epi32(all[r].numbers[t + pair]);
            own[r][0] = plus_products(own[r][0], x, weights), own[r][1] = plus_products(own[r][1], y, weights);
          }
        };
        add(even(x), even(y), 0), add(odd(x), odd(y), 1);
      }
      for (int r = 0; r < ROWS; ++r) {
        float* to = sums + r * width + at;
        const auto add = [&](float* to, __m256i whole) {
          store(to, load(to) * all[r].rescale + F(_mm256_cvtepi32_ps(whole)) * all[r].unit);
        };
        add(to, _mm256_permute2x128_si256(own[r][0], own[r][1], 0x20));
        if (at + 16 < width) add(to + 16, _mm256_permute2x128_si256(own[r][0], own[r][1], 0x31));
      }
    }
  }

  Scratch<uint8_t> values_;  // level + 128
};

}  // namespace spark
