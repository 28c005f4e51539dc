// Stored levels as vectors of 64 bytes, as integer products want them.
#pragma once

#include <immintrin.h>

#include "problem.h"

namespace spark {

// The first `count` of 64 bytes, then zeros; nothing after them is read.
inline __m512i some_bytes(const int8_t* p, int64_t count) {
  return _mm512_maskz_loadu_epi8(_bzhi_u64(~uint64_t(0), unsigned(std::min<int64_t>(count, 64))), p);
}

// 64 bits of a plane of `bytes` bytes from channel `first` on.
inline uint64_t plane_bytes(const uint8_t* plane, int64_t first, int64_t bytes) {
  if (bytes - first / 8 >= 8) return load<uint64_t>(plane + first / 8);
  uint64_t bits = 0;
  for (int64_t i = 0; i < bytes - first / 8; ++i) {
    bits |= uint64_t(plane[first / 8 + i]) << (8 * i);
  }
  return bits;
}

// 64 channels of four tokens, in tiles of 16 channels whose rows are four tokens; with 32 tokens half of
// the rows stay zero.
inline void put_four(const __m512i* rows, int8_t* tile) {
  const __m512i a = _mm512_unpacklo_epi8(rows[0], rows[1]), b = _mm512_unpackhi_epi8(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi8(rows[2], rows[3]), d = _mm512_unpackhi_epi8(rows[2], rows[3]);
  _mm512_store_si512(tile, _mm512_unpacklo_epi16(a, c));
  _mm512_store_si512(tile + 1024, _mm512_unpackhi_epi16(a, c));
  _mm512_store_si512(tile + 2048, _mm512_unpacklo_epi16(b, d));
  _mm512_store_si512(tile + 3072, _mm512_unpackhi_epi16(b, d));
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

// The levels of codes whose bits are alone in their bytes, plus OFFSET.
template <int BITS, int OFFSET = 0>
inline __m512i level_bytes(__m512i codes) {
  if constexpr (BITS >= 5) {
    return _mm512_add_epi8(_mm512_add_epi8(codes, codes), _mm512_set1_epi8(char(OFFSET + 1 - (1 << BITS))));
  } else {
    const __m128i table = _mm_add_epi8(load<__m128i>(grid_of(BITS).bytes), _mm_set1_epi8(char(OFFSET)));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
  }
}

// Codes of 64 channels from `first` on, alone in their bytes, from a plane of WIDTH bits. CHANNELS: of the
// part, a power of two; bytes behind the last one mean nothing, and nothing after the plane is read.
template <int WIDTH, int CHANNELS>
inline __m512i codes_of(const uint8_t* plane, int64_t first) {
  constexpr int BYTES = CHANNELS * WIDTH / 8;  // which repeat, each time shifted by WIDTH more
  __m512i codes;
  if constexpr (BYTES >= 64) codes = _mm512_loadu_si512(plane + first % BYTES);
  else if constexpr (BYTES == 32) codes = _mm512_broadcast_i64x4(load<__m256i>(plane));
  else if constexpr (BYTES == 16) codes = _mm512_broadcast_i32x4(load<__m128i>(plane));
  else if constexpr (BYTES == 8) codes = _mm512_set1_epi64(load<int64_t>(plane));
  else if constexpr (BYTES == 4) codes = _mm512_set1_epi32(load<int32_t>(plane));
  else codes = _mm512_set1_epi16(load<int16_t>(plane));
  const __m512i shifts = [&]<size_t... W>(std::index_sequence<W...>) {
    typedef int16_t Words __attribute__((vector_size(64)));
    const Words repeated = {int16_t(2 * W / BYTES * WIDTH)...};
    return _mm512_add_epi16((__m512i)repeated, _mm512_set1_epi16(int16_t(first / BYTES * WIDTH)));
  }(std::make_index_sequence<32>{});
  return _mm512_and_si512(_mm512_srlv_epi16(codes, shifts), _mm512_set1_epi8((1 << WIDTH) - 1));
}

// As each_code() in codes.h for 64 channels, whose parts of codes are alone in their bytes; nothing after
// the plane is read.
template <int WIDTH, class Function>
inline void each_byte(const uint8_t* plane, int64_t channels, const Function& f) {
  const int64_t bytes = plane_bytes(channels, WIDTH);
  const __m512i ones = _mm512_set1_epi8((1 << WIDTH) - 1);
  for (int s = 0; s < 8 / WIDTH; ++s) {
    for (int64_t i = 0; i < bytes && s * bytes + i < channels; i += 64) {
      const __m512i codes = some_bytes(reinterpret_cast<const int8_t*>(plane + i), bytes - i);
      f(s * bytes + i, _mm512_and_si512(_mm512_srli_epi16(codes, WIDTH * s), ones));
    }
  }
}

// The levels of a part of any number of channels, and nothing after them.
template <int BITS, int OFFSET>
inline void expand_levels(const uint8_t* codes, int64_t channels, int8_t* out) {
  constexpr int LOW = low_width(BITS), HIGH = high_width(BITS);
  uint8_t low[MAX_HEAD + 64];
  const auto put = [&](int64_t j, __m512i code) {
    _mm512_mask_storeu_epi8(out + j, _bzhi_u64(~uint64_t(0), unsigned(std::min<int64_t>(channels - j, 64))), level_bytes<BITS, OFFSET>(code));
  };
  each_byte<LOW>(codes, channels, [&](int64_t j, __m512i code) {
    if constexpr (HIGH == 0) put(j, code);
    else _mm512_storeu_si512(low + j, code);
  });
  if constexpr (HIGH > 0) {
    each_byte<HIGH>(codes + plane_bytes(channels, LOW), channels, [&](int64_t j, __m512i code) {
      put(j, _mm512_or_si512(_mm512_loadu_si512(low + j), _mm512_slli_epi16(code, LOW)));
    });
  }
}

// The levels of one part, plus OFFSET, of `count` tokens, whose codes are `step` bytes apart, as rows of `width` bytes.
// CHANNELS: of the part, whose row then has room for multiples of 64; or 0 for any number.
template <int BITS, int OFFSET, int CHANNELS>
[[gnu::noinline]] void expand_tokens(const uint8_t* codes, int64_t step, int count, int64_t channels, int8_t* out, int64_t width,
                                     const Requests* ahead) {
  constexpr int LOW = low_width(BITS), HIGH = high_width(BITS);
  for (int t = 0; t < count; ++t, codes += step, out += width) {
    if (ahead) (*ahead)(t);
    if constexpr (CHANNELS == 0) {
      expand_levels<BITS, OFFSET>(codes, channels, out);
      continue;
    } else {
      for (int j = 0; j < CHANNELS; j += 64) {
        __m512i code = codes_of<LOW, CHANNELS>(codes, j);
        if constexpr (HIGH > 0) {
          const __m512i high = codes_of<HIGH, CHANNELS>(codes + CHANNELS * LOW / 8, j);
          code = _mm512_or_si512(code, _mm512_slli_epi16(high, LOW));
        }
        _mm512_storeu_si512(out + j, level_bytes<BITS, OFFSET>(code));
      }
    }
  }
}

template <int OFFSET>
inline void expand_part(const Part& part, const Tokens& rows, int count, int8_t* out, int64_t width, const Requests* ahead) {
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(rows.data + part.codes);
  with_bits(part.bits, [&](auto bits) {
    switch (part.channels) {
      case 16: return expand_tokens<bits, OFFSET, 16>(codes, rows.step, count, 16, out, width, ahead);
      case 32: return expand_tokens<bits, OFFSET, 32>(codes, rows.step, count, 32, out, width, ahead);
      case 64: return expand_tokens<bits, OFFSET, 64>(codes, rows.step, count, 64, out, width, ahead);
      case 128: return expand_tokens<bits, OFFSET, 128>(codes, rows.step, count, 128, out, width, ahead);
      default: expand_tokens<bits, OFFSET, 0>(codes, rows.step, count, part.channels, out, width, ahead);
    }
  });
}

}  // namespace spark
