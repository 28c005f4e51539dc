// Stored channels as vectors of 32 bfloat16 numbers or 64 bytes, as the tile engines want them.
#pragma once

#include <immintrin.h>

#include "digit_products.h"
#include "tiles.h"

namespace spark {

inline __m512i words(__m512bh v) { return bit_cast<__m512i>(v); }

// The 32 stored channels at p as bfloat16; int8 becomes whole numbers, which bfloat16 holds exactly.
inline __m512i load_words(const bf16* p) { return _mm512_loadu_si512(p); }
inline __m512i load_words(const int8_t* p) {
  const __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
  const __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + 16)));
  return words(_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low)));
}
// The first `count` of them; nothing after them is read.
template <class Stored>
inline __m512i load_words(const Stored* p, int64_t count) {
  if (count >= 32) return load_words(p);
  Stored few[32] = {};
  std::memcpy(few, p, std::max<int64_t>(count, 0) * sizeof(Stored));
  return load_words(few);
}
template <class Stored>
inline __m512i load_words_guarded(const Stored* p, int count, const char* end) {
  return reinterpret_cast<const char*>(p + 32) <= end ? load_words(p) : load_words(p, count);
}

// As expand() in simd.h. From memory the instruction takes several times as long, so that the
// compiler must not be left to merge it with the load.
inline __m512i expand_words(__m512i others, __m512i packed, uint32_t bits) {
  asm("" : "+v"(packed));
  return _mm512_mask_expand_epi16(others, bits, packed);
}

inline uint32_t plane_word(const uint8_t* plane, int64_t first, int64_t bytes) {
  plane += first / 8, bytes -= first / 8;
  if (bytes >= 4) return load<uint32_t>(plane);
  return plane[0] | (bytes > 1 ? plane[1] << 8 : 0) | (bytes > 2 ? plane[2] << 16 : 0);
}

// A pruned value, 32 channels after the other; zeros for a token that is not there.
template <class V>
struct PrunedValue {
  PrunedValue() = default;
  PrunedValue(const Side& side, const Place& place) {
    const Format& f = *side.format;
    row = place.at<V>(f.channels), keep = place.at<uint8_t>(f.keep);
    end = side.pages_end, left = int(f.kept), plane = f.plane();
    if (f.int8) step = to_float(*place.at<bf16>(f.step));
    if (step == 0) step = 1.0f;
    fill = _mm512_set1_epi16(from_float<bf16>(to_float(*place.at<bf16>(f.scale)) / step).bits);
  }

  __m512i next(int64_t j) {
    if (!row) return _mm512_setzero_si512();
    const uint32_t kept = plane_word(keep, j, plane);
    const int count = std::min(__builtin_popcount(kept), left);
    const __m512i stored = load_words_guarded(row, count, end);
    row += count, left -= count;
    return expand_words(fill, stored, kept);
  }

  const V* row = nullptr;
  const uint8_t* keep = nullptr;
  float step = 1.0f;  // the row's numbers are in units of it; the weights carry it
  const char* end = nullptr;
  int64_t plane = 0;
  __m512i fill = {};
  int left = 0;  // stored channels; more bits may be set than there are
};

// Requests, and products now and then, while keys are expanded.
struct AwakeRequests : TokenRequests {
  void operator()(int t) const {
    TokenRequests::operator()(t);
    if (t % 8 == 0) TILE_STAY_AWAKE();
  }
};

// `count` bfloat16 numbers as floats; nothing after them is read or written.
inline void read_column(const bf16* from, int count, float* numbers) {
  for (int t = 0; t < count; t += 16) {
    const __mmask16 some = __mmask16(_bzhi_u32(0xffff, unsigned(count - t)));
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from + t));
    _mm512_mask_storeu_ps(numbers + t, some, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
  }
}

// 32 channels of two tokens, in two tiles whose rows are pairs of tokens.
inline void put_pair(bf16* tile, __m512i even, __m512i odd) {
  _mm512_store_si512(tile, _mm512_unpacklo_epi16(even, odd));
  _mm512_store_si512(tile + 16 * 32, _mm512_unpackhi_epi16(even, odd));
}

// Whole numbers of two digits each as the digits.
inline void split(F x, int8_t* high, int8_t* low) {
  const __m512i whole = _mm512_cvtps_epi32(x);
  const __m512i tens = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
  const __m512i ones = _mm512_sub_epi32(whole, _mm512_slli_epi32(tens, 7));
  _mm_storeu_si128((__m128i*)high, _mm512_cvtepi32_epi8(tens));
  _mm_storeu_si128((__m128i*)low, _mm512_cvtepi32_epi8(ones));
}

// Four columns of rows 0, 4, 8 and 12 of a tile.
inline F four_rows(const float* tile) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(tile));
  v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps(tile + 4 * 16));
  v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps(tile + 8 * 16));
  return _mm512_mask_broadcast_f32x4(v, 0xf000, _mm_loadu_ps(tile + 12 * 16));
}

// The 4 x 4 numbers in each quarter, transposed: rows of tokens become rows of queries.
inline void transpose(F* v) {
  const __m512 a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]);
  const __m512 c = _mm512_unpacklo_ps(v[2], v[3]), d = _mm512_unpackhi_ps(v[2], v[3]);
  v[0] = _mm512_shuffle_ps(a, c, 0x44), v[1] = _mm512_shuffle_ps(a, c, 0xee);
  v[2] = _mm512_shuffle_ps(b, d, 0x44), v[3] = _mm512_shuffle_ps(b, d, 0xee);
}

}  // namespace spark
