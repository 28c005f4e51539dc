// Where AVX-512's integer products, VNNI's and the tiles', want values, and what becomes of their sums.
#pragma once

#include "levels.h"

namespace spark {

// 64 bytes of each of four tokens, four tokens' next to each other. The first vector gets the first four bytes
// of each quarter.
inline void side_by_side(const __m512i* rows, __m512i* fours) {
  const __m512i a = _mm512_unpacklo_epi8(rows[0], rows[1]), b = _mm512_unpackhi_epi8(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi8(rows[2], rows[3]), d = _mm512_unpackhi_epi8(rows[2], rows[3]);
  fours[0] = _mm512_unpacklo_epi16(a, c), fours[1] = _mm512_unpackhi_epi16(a, c);
  fours[2] = _mm512_unpacklo_epi16(b, d), fours[3] = _mm512_unpackhi_epi16(b, d);
}
// 64 channels of four tokens, in tiles of 16 channels whose rows are four tokens.
inline void put_four(const __m512i* rows, int8_t* tile) {
  __m512i fours[4];
  side_by_side(rows, fours);
  for (int i = 0; i < 4; ++i) _mm512_store_si512(tile + 1024 * i, fours[i]);
}

// The quarters of four vectors, transposed: the first one gets all first quarters.
inline void transpose_quarters(__m512i& a, __m512i& b, __m512i& c, __m512i& d) {
  const __m512i p = _mm512_shuffle_i32x4(a, b, 0x88), q = _mm512_shuffle_i32x4(a, b, 0xdd);
  const __m512i r = _mm512_shuffle_i32x4(c, d, 0x88), s = _mm512_shuffle_i32x4(c, d, 0xdd);
  a = _mm512_shuffle_i32x4(p, r, 0x88), c = _mm512_shuffle_i32x4(p, r, 0xdd);
  b = _mm512_shuffle_i32x4(q, s, 0x88), d = _mm512_shuffle_i32x4(q, s, 0xdd);
}

// 16 vectors of 16 numbers become their columns: first in each quarter of four of them, then the quarters.
inline void transpose(__m512i* v) {
  for (int i = 0; i < 16; i += 4) {
    const __m512i p = _mm512_unpacklo_epi32(v[i], v[i + 1]), q = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    const __m512i r = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), s = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    v[i] = _mm512_unpacklo_epi64(p, r), v[i + 1] = _mm512_unpackhi_epi64(p, r);
    v[i + 2] = _mm512_unpacklo_epi64(q, s), v[i + 3] = _mm512_unpackhi_epi64(q, s);
  }
  for (int i = 0; i < 4; ++i) transpose_quarters(v[i], v[4 + i], v[8 + i], v[12 + i]);
}

// What put_four() did to the order of 64 channels undone, of which four vectors have 16 each.
inline void in_order(F* v) {
  __m512i whole[4];
  for (int i = 0; i < 4; ++i) whole[i] = bit_cast<__m512i>(v[i]);
  transpose_quarters(whole[0], whole[1], whole[2], whole[3]);
  for (int i = 0; i < 4; ++i) v[i] = bit_cast<F>(whole[i]);
}

// Products with the high digits and with the low ones, put together again.
inline F joined(__m512i high, __m512i low) {
  return F(_mm512_cvtepi32_ps(high)) * 128.0f + F(_mm512_cvtepi32_ps(low));
}

}  // namespace spark
