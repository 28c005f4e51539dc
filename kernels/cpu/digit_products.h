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
    return right(fours[0][i], Shifts<WIDTH, BYTES, 8>::from(first)) & ones;
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

// Levels of a block's quantized values in tiles, those of four tokens at once. CHANNELS: of a value, or 0 for any
// number. tile_at(t): where the four tokens from t on go, asked for in turn; levels: room for four rows of `width` bytes.
template <int BITS, int CHANNELS, class TileAt>
[[gnu::noinline]] void put_quantized(const Side& side, const Block& block, int8_t* levels, int64_t width, const TileAt& tile_at) {
  const Field& field = side.format->channels;
  Places places(side, block);
  for (int t = 0; t < block.count; t += 4) {
    int8_t* tile = tile_at(t);
    const uint8_t* codes[4];
    places.next_four(block.count - t, field, codes);
    if constexpr (can_four_levels<BITS, CHANNELS>()) put_four_levels<BITS, CHANNELS>(codes, tile);
    else {
      for (int i = 0; i < 4; ++i) {
        expand_tokens<BITS, 0, CHANNELS, TokenRequests>(codes[i], 0, 1, side.format->dim, levels + i * width, width, nullptr);
      }
      for (int64_t j = 0; j < width; j += 64) {
        __m512i rows[4];
        for (int i = 0; i < 4; ++i) rows[i] = _mm512_loadu_si512(levels + i * width + j);
        put_four(rows, tile + 64 * j);
      }
    }
  }
}

template <class TileAt>
inline void put_quantized(const Side& side, const Block& block, int8_t* levels, int64_t width, const TileAt& tile_at) {
  with_bits(side.format->parts[0].bits, [&](auto bits) {
    switch (side.format->dim) {
      case 64: return put_quantized<bits, 64>(side, block, levels, width, tile_at);
      case 128: return put_quantized<bits, 128>(side, block, levels, width, tile_at);
      default: put_quantized<bits, 0>(side, block, levels, width, tile_at);
    }
  });
}

// Products with the high digits and with the low ones, put together again.
inline F joined(__m512i high, __m512i low) {
  return F(_mm512_cvtepi32_ps(high)) * 128.0f + F(_mm512_cvtepi32_ps(low));
}

}  // namespace spark
