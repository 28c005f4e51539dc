// Blocks of int8 and quantized tokens, and of spark keys in int8, for the integer dot products of AVX-512 VNNI.
//
// As for the integer tiles, stored levels go into the products as they are, and queries and softmax weights,
// which they meet there, are split into two digits: x = unit * (128 * high + low), 15 bits of the largest
// one. A product multiplies bytes without sign by bytes with one: levels of keys are stored as level + 128,
// which 128 * (sum of the digits) takes away again, and weights have no sign. Spark keys are two planes, kept
// channels and signs. Dense tokens are float32.
#pragma once

#include "float_engine.h"
#include "levels.h"
#include "query_digits.h"

namespace spark {

// What these products can do: values of one part, so that a weight carries their amplitude.
inline bool can_vnni(const Problem& p) {
  const Format &keys = *p.keys.format, &values = *p.values.format;
  const auto has_levels = [](const Format& f) { return f.kind == Kind::int8 || f.kind == Kind::quantized; };
  return (has_levels(keys) || (keys.kind == Kind::spark && keys.int8)) && has_levels(values) && values.part_count <= 1;
}

// T: the model's dtype.
template <class T>
class VnniEngine : public FloatEngine<T> {
  using Base = FloatEngine<T>;
  using Base::biases_, Base::p_;
  static constexpr float WEIGHT_DIGITS = 127 * 128 + 127;

 public:
  static constexpr int BLOCK = Base::BLOCK, QUERIES = 8;  // tokens, query rows

  explicit VnniEngine(const Problem& p)
      : Base(p), parts_(columns_of(*p.keys.format)), width_(parts_.back().column + round_up(parts_.back().channels, 64)),
        value_width_(round_up(p.value_dim, 64)), keys_(scratch<uint8_t>(BLOCK * width_ + 64)),
        levels_(scratch<int8_t>(BLOCK * value_width_ + 64)), values_(scratch<int8_t>(64 * value_width_)),
        digits_(p.query_rows(), parts_.size(), width_) {}

  void start(int64_t b, int64_t h) {
    Base::start(b, h);
    if (!p_.packed) return;
    const Scratch<float> query = scratch<float>(width_);
    for (int64_t row = 0; row < p_.query_rows(); ++row) {
      const float* from = this->packed_query(row);
      for (size_t p = 0; p < parts_.size(); ++p) {
        float* to = &query[parts_[p].column];
        std::copy_n(from + parts_[p].first, parts_[p].channels, to);
        for (int64_t j = 0; parts_[p].signs && j < parts_[p].channels; ++j) to[j] *= this->key_weights()[j];
        digits_.split(row, p, parts_[p], to);
      }
    }
  }

  void expand_keys(const Block& block) {
    if (!block.packed) return Base::expand_keys(block);
    const Format& f = *p_.keys.format;
    p_.each_run(block, [&](const Run& run) {
      const Requests requests{Ahead(f), Ahead(*p_.values.format), run.keys, run.values};
      uint8_t* out = &keys_[run.first * width_];
      if (f.int8) {
        f.kind == Kind::spark ? expand_kept(run, out, requests) : copy_levels(run, out, requests);
        to_floats(run.keys.at<T>(f.step), run.count, amplitudes_[0] + run.first);
        if (f.kind == Kind::spark) to_floats(run.keys.at<T>(f.scale), run.count, amplitudes_[1] + run.first);
        return;
      }
      const uint8_t* codes = run.keys.at<uint8_t>(f.scale);
      for (int p = 0; p < f.part_count; ++p) {
        expand_part<128>(f.parts[p], run.keys.rows(f.channels), run.count, reinterpret_cast<int8_t*>(out) + parts_[p].column,
                         width_, p ? nullptr : &requests);
        for (int t = 0; t < run.count; ++t) amplitudes_[p][run.first + t] = spark::amplitudes()[codes[t * f.part_count + p]];
      }
    });
  }

  void scores(const Block& block, int64_t first, int count, float (*scores)[BLOCK]) {
    if (block.packed) {
      const int columns = digits_.columns(first);
      return columns == 2 ? dots<2>(first, count, scores) : columns == 4 ? dots<4>(first, count, scores) : dots<8>(first, count, scores);
    }
    for (int r = 0; r < count; r += Base::QUERIES) Base::scores(block, first + r, std::min(count - r, Base::QUERIES), scores + r);
  }

  void expand_values(const Block& block) {
    if (!block.packed) return Base::expand_values(block);
    const Format& f = *p_.values.format;
    std::fill_n(steps_, BLOCK, 0.0f);
    p_.each_run(block, [&](const Run& run) {
      int8_t* out = &levels_[run.first * value_width_];
      if (f.kind == Kind::quantized) {
        expand_part<0>(f.parts[0], run.values.rows(f.channels), run.count, out, value_width_, nullptr);
        const uint8_t* codes = run.values.at<uint8_t>(f.scale);
        for (int t = 0; t < run.count; ++t) steps_[run.first + t] = spark::amplitudes()[codes[t]];
      } else {
        const Tokens rows = run.values.rows(f.channels);
        for (int t = 0; t < run.count; ++t) {
          const int8_t* row = reinterpret_cast<const int8_t*>(rows.at(t));
          for (int64_t j = 0; j < value_width_; j += 64) _mm512_storeu_si512(out + t * value_width_ + j, some_bytes(row + j, f.dim - j));
        }
        to_floats(run.values.at<T>(f.step), run.count, steps_ + run.first);
      }
    });
    // What is left of earlier blocks meets weights of 0.
    for (int t = 0; t < block.count; t += 4) {
      for (int64_t j = 0; j < value_width_; j += 64) {
        __m512i rows[4];
        for (int i = 0; i < 4; ++i) rows[i] = _mm512_loadu_si512(&levels_[(t + i) * value_width_ + j]);
        put_four(rows, &values_[j * 64 + t * 16]);
      }
    }
  }

  void accumulate(const Block& block, float (*weights)[BLOCK], int count, const float* rescale, float* sums) {
    const int64_t width = Base::padded(p_.value_dim);
    for (int r = 0; r < count; r += 4) {
      const int few = std::min(count - r, 4);
      const float* own = rescale ? rescale + r : nullptr;
      if (block.packed) accumulate_four(weights + r, few, own, sums + r * width);
      else Base::accumulate(block, weights + r, few, own, sums + r * width);
    }
  }

 private:
  static void to_floats(const T* from, int count, float* numbers) {
    for (int t = 0; t < count; ++t) numbers[t] = to_float(from[t]);
  }

  void copy_levels(const Run& run, uint8_t* out, const Requests& requests) {
    const Format& f = *p_.keys.format;
    const Tokens rows = run.keys.rows(f.channels);
    const __m512i sign = _mm512_set1_epi8(int8_t(0x80));
    for (int t = 0; t < run.count; ++t, out += width_) {
      requests(t);
      const int8_t* row = reinterpret_cast<const int8_t*>(rows.at(t));
      for (int64_t j = 0; j < width_; j += 64) _mm512_storeu_si512(out + j, _mm512_xor_si512(some_bytes(row + j, f.dim - j), sign));
    }
  }

  // Kept channels, and 1 or -1 where channels are pruned; zeros elsewhere.
  void expand_kept(const Run& run, uint8_t* out, const Requests& requests) {
    const Format& f = *p_.keys.format;
    const int64_t plane = f.plane(), signs = parts_.back().column;
    const __m512i zero = _mm512_set1_epi8(int8_t(128)), plus = _mm512_set1_epi8(int8_t(129)), minus = _mm512_set1_epi8(127);
    for (int t = 0; t < run.count; ++t, out += width_) {
      requests(t);
      const Place place = run.keys + t;
      const int8_t* row = place.at<int8_t>(f.channels);
      const uint8_t *keep = place.at<uint8_t>(f.keep), *negative = place.at<uint8_t>(f.negative);
      int64_t rank = 0;
      for (int64_t j = 0; j < f.dim; j += 64) {
        // More bits may be set than there are channels: they promise nothing.
        const uint64_t kept = plane_bytes(keep, j, plane), below = plane_bytes(negative, j, plane);
        const int64_t few_count = std::clamp<int64_t>(f.kept - rank, 0, __builtin_popcountll(kept));
        __m512i few = some_bytes(row + rank, few_count);
        asm("" : "+v"(few));  // expanding from memory takes several times as long
        _mm512_storeu_si512(out + j, _mm512_xor_si512(_mm512_maskz_expand_epi8(kept, few), zero));
        rank += few_count;
        if (signs) _mm512_storeu_si512(out + signs + j, _mm512_mask_mov_epi8(_mm512_mask_mov_epi8(plus, below, minus), kept, zero));
      }
    }
  }

  // Words of four channels, SPAN of them over and over.
  template <int SPAN>
  static __m512i repeated(const uint8_t* words) {
    if constexpr (SPAN == 1) return _mm512_set1_epi32(load<int32_t>(words));
    else if constexpr (SPAN == 2) return _mm512_set1_epi64(load<int64_t>(words));
    else return _mm512_broadcast_i32x4(load<__m128i>(words));
  }

  // Dot products of up to ROWS queries with 32 tokens.
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
              own[k] = _mm512_dpbusd_epi32(own[k], repeated<SPAN>(key + k * width_ + j), digit);
            }
          }
          std::copy_n(own, TOGETHER, sums + i);
        }
        transpose(sums);
        const F amplitude = load(amplitudes_[p] + t);
        for (int r = 0; r < count; ++r) {
          __m512i high = _mm512_set1_epi32(-digits_.correction(first + r, p, 0));
          __m512i low = _mm512_set1_epi32(-digits_.correction(first + r, p, 1));
          for (int s = 0; s < SPAN; ++s) {
            high = _mm512_add_epi32(high, sums[r * SPAN + s]);
            low = _mm512_add_epi32(low, sums[(ROWS + r) * SPAN + s]);
          }
          const F before = p ? load(&scores[r][t]) : splat(biases_[first + r]);
          store(&scores[r][t], before + joined(high, low) * (amplitude * digits_.unit(first + r, p)));
        }
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
        __m512i own[8] = {};
        const int8_t* values = &values_[j * 64 + i * 1024];
        for (int k = 0; k < BLOCK / 4; ++k) {
          const __m512i value = _mm512_load_si512(values + 64 * k);
          for (int q = 0; q < 8; ++q) own[q] = _mm512_dpbusd_epi32(own[q], _mm512_set1_epi32(load<int32_t>(&digits[q][4 * k])), value);
        }
        for (int r = 0; r < 4; ++r) parts[r][i] = joined(own[r], own[4 + r]) * units[r];
      }
      for (int r = 0; r < count; ++r) {
        in_order(parts[r]);
        for (int i = 0; i < 4 && j + 16 * i < width; ++i) {
          float* at = sums + r * width + j + 16 * i;
          store(at, load(at) * (rescale ? rescale[r] : 1.0f) + parts[r][i]);
        }
      }
    }
  }

  // The digits of weights times amplitudes, and their unit.
  float split_weights(const float* weights, uint8_t* high, uint8_t* low) const {
    F scaled[BLOCK / 16], top{};
    uint32_t nan = 0;
    for (int i = 0; i < BLOCK / 16; ++i) {
      scaled[i] = load(weights + 16 * i) * load(steps_ + 16 * i);
      top = spark::max(top, scaled[i]), nan |= lane_bits(scaled[i] != scaled[i]);
    }
    const float largest = maximum(top), inverse = largest > 0 ? WEIGHT_DIGITS / largest : 0.0f;
    for (int i = 0; i < BLOCK / 16; ++i) {
      const __m512i whole = _mm512_cvtps_epi32(__m512(scaled[i] * inverse));
      _mm_store_si128((__m128i*)(high + 16 * i), _mm512_cvtepi32_epi8(_mm512_srai_epi32(whole, 7)));
      _mm_store_si128((__m128i*)(low + 16 * i), _mm512_cvtepi32_epi8(_mm512_and_si512(whole, _mm512_set1_epi32(127))));
    }
    return nan ? NAN : largest / WEIGHT_DIGITS;
  }

  const std::vector<Columns> parts_;
  const int64_t width_, value_width_;
  Scratch<uint8_t> keys_;            // level + 128
  Scratch<int8_t> levels_, values_;  // of values: rows; four tokens side by side
  QueryDigits digits_;
  alignas(64) float amplitudes_[MAX_PARTS][BLOCK] = {}, steps_[BLOCK] = {};
};

}  // namespace spark
