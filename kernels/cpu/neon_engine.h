// Blocks of levels for the products of bytes of ARM's dot-product extension, sdot.
//
// As for VNNI, queries and softmax weights are split into two digits: x = unit * (128 * high + low), 15 and 14 bits of
// the largest one. Both sides of a product have a sign, so that levels are what is stored. A product adds four channels
// of a token, or four tokens of a channel, to each of four sums; a word of one side may be repeated for all of them.
#pragma once

#include "level_engine.h"

namespace spark {

// T: the model's dtype.
template <class T>
class NeonEngine : public LevelEngine<T, QueryDigits<4>, 64> {
  using Base = LevelEngine<T, QueryDigits<4>, 64>;
  using Floats = FloatEngine<T, 64>;
  using Base::amplitudes_, Base::biases_, Base::digits_, Base::keys_, Base::levels_, Base::p_, Base::parts_, Base::value_width_,
      Base::width_;

 public:
  static constexpr int BLOCK = Base::BLOCK, QUERIES = Floats::QUERIES;  // tokens, query rows

  explicit NeonEngine(const Problem& p) : Base(p), values_(scratch<uint8_t>(BLOCK * value_width_)) {}

  void scores(const Block& block, int64_t first, int count, float (*scores)[BLOCK]) {
    if (!block.packed) return Floats::scores(block, first, count, scores);
    const int columns = digits_.columns(first);
    columns == 1 ? dots<1>(first, count, scores) : columns == 2 ? dots<2>(first, count, scores) : dots<4>(first, count, scores);
  }

  void expand_values(const Block& block) {
    if (!block.packed) return Floats::expand_values(block);
    this->read_value_steps(block);
    const Format& f = *p_.values.format;
    if (f.int8) return put_values<0, 0>(block);
    with_bits(f.parts[0].bits, [&](auto bits) {
      switch (f.dim) {
        case 64: return put_values<bits, 64>(block);
        case 128: return put_values<bits, 128>(block);
        default: put_values<bits, 0>(block);
      }
    });
  }

  void accumulate(const Block& block, int64_t first, int count, float (*weights)[BLOCK], const float* rescale, float* sums) {
    if (!block.packed) return Floats::accumulate(block, first, count, weights, rescale, sums);
    Base::with_rows(count, [&](auto rows) { add_levels<rows>(weights, rescale, sums); });
  }

 private:
  static F joined(int32x4_t high, int32x4_t low) { return F(vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high, 7), low))); }
  static int32x4_t sums_of(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) { return vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)); }

  // Four vectors of four numbers become their columns.
  static void transpose(int32x4_t& a, int32x4_t& b, int32x4_t& c, int32x4_t& d) {
    const int64x2_t p = int64x2_t(vtrn1q_s32(a, b)), q = int64x2_t(vtrn2q_s32(a, b));
    const int64x2_t r = int64x2_t(vtrn1q_s32(c, d)), s = int64x2_t(vtrn2q_s32(c, d));
    a = int32x4_t(vtrn1q_s64(p, r)), b = int32x4_t(vtrn1q_s64(q, s)), c = int32x4_t(vtrn2q_s64(p, r)), d = int32x4_t(vtrn2q_s64(q, s));
  }

  // The products of four tokens with the digits of ROWS queries, VECTORS of sums each, as a number for each of them.
  template <int ROWS, int VECTORS>
  static void together(int32x4_t (*own)[VECTORS], F* numbers) {
    if constexpr (ROWS == 1) {
      numbers[0] = joined(sums_of(own[0][0], own[1][0], own[2][0], own[3][0]), sums_of(own[0][1], own[1][1], own[2][1], own[3][1]));
    } else if constexpr (ROWS == 2) {
      transpose(own[0][0], own[1][0], own[2][0], own[3][0]);
      for (int r = 0; r < 2; ++r) numbers[r] = joined(own[r][0], own[2 + r][0]);
    } else {
      for (int k = 0; k < 4; ++k) own[k][0] = vaddq_s32(vshlq_n_s32(own[k][0], 7), own[k][1]);
      transpose(own[0][0], own[1][0], own[2][0], own[3][0]);
      for (int r = 0; r < 4; ++r) numbers[r] = F(vcvtq_f32_s32(own[r][0]));
    }
  }

  // Dot products of up to ROWS queries with a block.
  template <int ROWS>
  void dots(int64_t first, int count, float (*scores)[BLOCK]) {
    constexpr int TOGETHER = 8;  // tokens
    constexpr int VECTORS = ROWS == 4 ? 2 : ROWS == 2 ? 1 : 2;  // of sums of a token
    for (size_t p = 0; p < parts_.size(); ++p) {
      const int64_t from = parts_[p].column, to = from + round_up(parts_[p].channels, 16), width = width_;
      for (int t = 0; t < BLOCK; t += TOGETHER) {
        int32x4_t own[TOGETHER][VECTORS] = {};
        const uint8_t* key = &keys_[t * width];
        const int8_t* digits = digits_.at(first) + from * 2 * ROWS;
        for (int64_t j = from; j < to; j += 16, digits += 32 * ROWS) {
          int8x16_t keys[TOGETHER];
          for (int k = 0; k < TOGETHER; ++k) keys[k] = load<int8x16_t>(key + k * width + j);
          add_products<ROWS>(keys, digits, own, std::make_index_sequence<4>{});
        }
        const float* amplitudes = amplitudes_[p] + t;
        for (int k = 0; k < TOGETHER; k += 4) {
          F numbers[ROWS];
          together<ROWS>(own + k, numbers);
          for (int r = 0; r < count; ++r) {
            float* score = &scores[r][t + k];
            const F before = p ? load(score) : splat(biases_[first + r]);
            store(score, before + numbers[r] * (load(amplitudes + k) * digits_.unit(first + r, p)));
          }
        }
      }
    }
  }

  // Of 16 channels of some tokens, which are four words.
  template <int ROWS, int TOGETHER, int VECTORS, size_t... WORD>
  static void add_products(const int8x16_t (&keys)[TOGETHER], const int8_t* digits, int32x4_t (&own)[TOGETHER][VECTORS],
                           std::index_sequence<WORD...>) {
    if constexpr (ROWS == 1) {
      for (int v = 0; v < VECTORS; ++v) {
        const int8x16_t own_digits = load<int8x16_t>(digits + 16 * v);
        for (int k = 0; k < TOGETHER; ++k) own[k][v] = vdotq_s32(own[k][v], keys[k], own_digits);
      }
    } else {
      const auto add = [&](auto constant) {
        constexpr int word = decltype(constant)::value;
        for (int v = 0; v < VECTORS; ++v) {
          const int8x16_t columns = load<int8x16_t>(digits + 8 * ROWS * word + 16 * v);
          for (int k = 0; k < TOGETHER; ++k) own[k][v] = vdotq_laneq_s32(own[k][v], columns, keys[k], word);
        }
      };
      (add(std::integral_constant<int, WORD>{}), ...);
    }
  }

  // Four tokens side by side. BITS: of the codes, or 0 for int8; CHANNELS: of a value, or 0 for any number.
  template <int BITS, int CHANNELS>
  [[gnu::noinline]] void put_values(const Block& block) {
    const Format& f = *p_.values.format;
    Places places(p_.values, block);
    const int64_t dim = f.dim, width = value_width_;
    const char* end = p_.values.pages_end;
    for (int t = 0; t < block.count; t += 4) {
      this->requests_(BlockRequests::VALUES);
      const uint8_t* rows[4];
      places.next_four(block.count - t, f.channels, rows);
      for (int i = 0; BITS && !CHANNELS && i < 4; ++i) {
        if constexpr (BITS > 0) expand_levels<BITS, 0>(rows[i], dim, &levels_[i * width]);
        rows[i] = reinterpret_cast<const uint8_t*>(&levels_[i * width]);
      }
      uint8_t* to = &values_[t * 16];
      for (int64_t j = 0; j < dim; j += 16) {
        const auto levels = [&](int i) {
          if constexpr (CHANNELS > 0) return uint8x16_t(levels_of<BITS, 0, CHANNELS>(rows[i], j));
          else if constexpr (BITS > 0) return load<uint8x16_t>(rows[i] + j);
          else return uint8x16_t(some_bytes(reinterpret_cast<const int8_t*>(rows[i]) + j, dim - j, end));
        };
        const uint8x16x4_t four = {{levels(0), levels(1), levels(2), levels(3)}};
        vst4q_u8(to + j * BLOCK, four);
      }
    }
  }

  // The digits of ROWS queries' weights for every four tokens: words of the high digits, then of the low ones. They
  // share a vector where four suffice.
  template <int ROWS>
  struct WeightDigits {
    static constexpr int COLUMNS = ROWS > 2 ? 4 : ROWS, VECTORS = ROWS > 2 ? 2 : 1;
    static constexpr int column(int product) { return product / ROWS * COLUMNS + product % ROWS; }

    alignas(16) uint32_t words[VECTORS][BLOCK];
    float units[ROWS];
  };
  template <int ROWS>
  void split_weights(float (*weights)[BLOCK], WeightDigits<ROWS>& to) const {
    constexpr int COLUMNS = WeightDigits<ROWS>::COLUMNS, VECTORS = WeightDigits<ROWS>::VECTORS;
    I whole[ROWS][BLOCK / LANES];
    for (int r = 0; r < ROWS; ++r) to.units[r] = this->template whole_weights<127 * 128 + 127>(weights[r], whole[r]);
    for (int i = 0; i < BLOCK / 16; ++i) {
      uint32x4_t columns[4 * VECTORS] = {};
      for (int r = 0; r < ROWS; ++r) {
        const auto pair = [&](int k) { return vuzp1q_u16(uint16x8_t(whole[r][4 * i + k]), uint16x8_t(whole[r][4 * i + k + 1])); };
        const uint16x8_t a = pair(0), b = pair(2);
        columns[r] = uint32x4_t(vshrn_high_n_u16(vshrn_n_u16(a, 7), b, 7));
        columns[COLUMNS + r] = uint32x4_t(vandq_u8(vuzp1q_u8(uint8x16_t(a), uint8x16_t(b)), vdupq_n_u8(127)));
      }
      for (int v = 0; v < VECTORS; ++v) {
        const uint32x4x4_t four = {{columns[4 * v], columns[4 * v + 1], columns[4 * v + 2], columns[4 * v + 3]}};
        vst4q_u32(to.words[v] + 16 * i, four);
      }
    }
  }

  // 16 sums in registers where there are as many.
  template <int ROWS>
  void add_levels(float (*weights)[BLOCK], const float* rescale, float* sums) {
    constexpr int VECTORS = ROWS > 2 ? 2 : 4;  // of four channels
    WeightDigits<ROWS> digits;
    split_weights<ROWS>(weights, digits);
    const int64_t width = Base::padded(p_.value_dim);
    for (int64_t j = 0; j < width; j += 4 * VECTORS) {
      if (j % 16 == 0) this->requests_(BlockRequests::SUMS);
      int32x4_t own[VECTORS][2 * ROWS] = {};
      const uint8_t* values = &values_[j / 16 * 16 * BLOCK + j % 16 * 4];
      for (int t = 0; t < BLOCK; t += 4, values += 64) add_products<ROWS>(values, digits, t, own, std::make_index_sequence<2 * ROWS>{});
      for (int c = 0; c < VECTORS && j + 4 * c < width; ++c) {
        for (int r = 0; r < ROWS; ++r) {
          float* to = sums + r * width + j + 4 * c;
          store(to, load(to) * (rescale ? rescale[r] : 1.0f) + joined(own[c][r], own[c][ROWS + r]) * digits.units[r]);
        }
      }
    }
  }

  // Of four tokens, the first of which is t.
  template <int ROWS, int VECTORS, size_t... PRODUCT>
  static void add_products(const uint8_t* values, const WeightDigits<ROWS>& digits, int t, int32x4_t (&own)[VECTORS][2 * ROWS],
                           std::index_sequence<PRODUCT...>) {
    int8x16_t words[WeightDigits<ROWS>::VECTORS];
    for (int v = 0; v < WeightDigits<ROWS>::VECTORS; ++v) words[v] = load<int8x16_t>(digits.words[v] + t);
    for (int c = 0; c < VECTORS; ++c) {
      const int8x16_t value = load<int8x16_t>(values + 16 * c);
      const auto add = [&](auto constant) {
        constexpr int product = decltype(constant)::value, column = WeightDigits<ROWS>::column(product), word = column % 4;
        own[c][product] = vdotq_laneq_s32(own[c][product], value, words[column / 4], word);
      };
      (add(std::integral_constant<int, PRODUCT>{}), ...);
    }
  }

  Scratch<uint8_t> values_;  // of 16 channels after the other, of four tokens after the other
};

}  // namespace spark
