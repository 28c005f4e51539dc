// Levels of values and softmax weights, as the integer products of the tile registers want them.
#pragma once

#include "amx_rows.h"

namespace spark {

constexpr float DIGITS = 127.0f * 128.0f;  // the largest number of two digits

// The row of a tile of values where four tokens of a block lie, from t on: packing weights leaves this order.
inline int tile_row(int t) { return t / 4 % 4 * 4 + t / 16; }

// 64 weights, times 1 / unit, as two digits each: x = unit * (128 * high + low). Returns the unit.
inline float split_weights(const F (&x)[4], int8_t* high, int8_t* low) {
  const F all = (x[0] + x[1]) + (x[2] + x[3]);
  const float largest = maximum(spark::max(spark::max(x[0], x[1]), spark::max(x[2], x[3])));
  const float inverse = largest > 0 ? DIGITS / largest : 0.0f;
  const auto whole = [&](int i) { return _mm512_cvtps_epi32(x[i] * inverse); };
  const __m512i numbers[2] = {_mm512_packs_epi32(whole(0), whole(1)), _mm512_packs_epi32(whole(2), whole(3))};
  __m512i tens[2], ones[2];
  for (int i = 0; i < 2; ++i) {
    tens[i] = _mm512_srai_epi16(_mm512_add_epi16(numbers[i], _mm512_set1_epi16(64)), 7);
    ones[i] = _mm512_sub_epi16(numbers[i], _mm512_slli_epi16(tens[i], 7));
  }
  _mm512_store_si512(high, _mm512_packs_epi16(tens[0], tens[1]));
  _mm512_store_si512(low, _mm512_packs_epi16(ones[0], ones[1]));
  return lane_bits(all != all) ? NAN : largest / DIGITS;  // no digits are worth a NaN
}

// A plane of codes of four tokens, whose bytes are put side by side while they hold several codes each.
template <int WIDTH, int CHANNELS>
struct FourPlanes {
  static constexpr int BYTES = CHANNELS * WIDTH / 8;
  static_assert(BYTES >= 16, "what is moved are parts of 16 bytes");

  // codes: of each token; the plane is `offset` bytes after them.
  FourPlanes(const uint8_t* const (&codes)[4], int64_t offset) {
    for (int at = 0; at < BYTES; at += 64) {
      __m512i rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = repeated<std::min(BYTES, 64)>(codes[i] + offset + at);
      side_by_side(rows, fours[at / 64]);
    }
  }

  // Of 64 channels from `first` on the i-th quarter of side_by_side(); other bits of the code are 0.
  __m512i codes(int first, int i) const {
    const __m512i ones = splat_byte((1 << WIDTH) - 1);
    if constexpr (BYTES >= 64) return right(fours[first % BYTES / 64][i], first / BYTES * WIDTH) & ones;
    const Words shifts = [&]<size_t... W>(std::index_sequence<W...>) {
      return Words{uint16_t((int(W) / 8 * 16 + first) / BYTES * WIDTH)...};
    }(std::make_index_sequence<32>{});
    return right(fours[0][i], shifts) & ones;
  }

  __m512i fours[(BYTES + 63) / 64][4];
};

template <int BITS, int CHANNELS>
constexpr bool can_four_levels() {
  return CHANNELS * std::min(low_width(BITS), high_width(BITS) ? high_width(BITS) : 8) >= 128;
}

// The levels of four tokens' codes, in tiles as put_four() fills them.
template <int BITS, int CHANNELS>
inline void put_four_levels(const uint8_t* const (&codes)[4], int8_t* tile) {
  constexpr int LOW = low_width(BITS), HIGH = high_width(BITS);
  const FourPlanes<LOW, CHANNELS> low(codes, 0);
  const auto put = [&](auto whole) {
    for (int j = 0; j < CHANNELS; j += 64) {
      for (int i = 0; i < 4; ++i) _mm512_store_si512(tile + 64 * j + 1024 * i, level_bytes<BITS>(whole(j, i)));
    }
  };
  if constexpr (HIGH == 0) put([&](int j, int i) { return low.codes(j, i); });
  else {
    const FourPlanes<HIGH, CHANNELS> high(codes, CHANNELS * LOW / 8);
    put([&](int j, int i) { return low.codes(j, i) | left<LOW>(high.codes(j, i)); });
  }
}

}  // namespace spark
