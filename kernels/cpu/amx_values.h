// Levels of values and softmax weights, as the integer products of the tile registers want them.
#pragma once

#include "amx_rows.h"

namespace spark {

constexpr float DIGITS = 127.0f * 128.0f;  // the largest number of two digits

// The row of a tile of values where four tokens of a block lie, from t on: packing weights leaves this order.
inline int tile_row(int t) { return t / 4 % 4 * 4 + t / 16; }

// 64 weights, times the inverse of their unit, as two digits each: x = unit * (128 * high + low).
inline void split_weights(const F (&x)[4], float inverse, int8_t* high, int8_t* low) {
  const auto whole = [&](int i) { return _mm512_cvtps_epi32(x[i] * inverse); };
  const __m512i numbers[2] = {_mm512_packs_epi32(whole(0), whole(1)), _mm512_packs_epi32(whole(2), whole(3))};
  __m512i tens[2], ones[2];
  for (int i = 0; i < 2; ++i) {
    tens[i] = _mm512_srai_epi16(_mm512_add_epi16(numbers[i], _mm512_set1_epi16(64)), 7);
    ones[i] = _mm512_sub_epi16(numbers[i], _mm512_slli_epi16(tens[i], 7));
  }
  _mm512_store_si512(high, _mm512_packs_epi16(tens[0], tens[1]));
  _mm512_store_si512(low, _mm512_packs_epi16(ones[0], ones[1]));
}

}  // namespace spark
