// Vectors of bytes, of 64 with AVX-512, of 32 with AVX2 and of 16 with NEON.
#pragma once

#include <algorithm>

#include "simd.h"

namespace spark {

#if defined(__AVX512BW__)
typedef __m512i Bytes;
typedef uint64_t ByteMask;  // a bit for each byte
#elif defined(__AVX2__)
typedef __m256i Bytes;
typedef uint32_t ByteMask;
#else
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t ByteMask;
#endif
typedef uint8_t Sixteen __attribute__((vector_size(16)));
constexpr int WIDE = sizeof(Bytes);
typedef uint16_t Words __attribute__((vector_size(sizeof(Bytes))));

inline void store_bytes(void* p, Bytes v) { std::memcpy(p, &v, WIDE); }

// WIDE bits of a plane of `bytes` bytes from channel `first` on.
inline ByteMask plane_bytes(const uint8_t* plane, int64_t first, int64_t bytes) {
  constexpr int64_t COUNT = sizeof(ByteMask);
  if (bytes - first / 8 >= COUNT) return load<ByteMask>(plane + first / 8);
  ByteMask bits = 0;
  for (int64_t i = 0; i < bytes - first / 8; ++i) bits |= ByteMask(plane[first / 8 + i]) << (8 * i);
  return bits;
}

#if !defined(__AVX512BW__)
// The first `count` bytes, then zeros; nothing after them is read, or with an `end` nothing from there on.
inline Bytes some_bytes(const int8_t* p, int64_t count) {
  if (count >= WIDE) return load<Bytes>(p);
#if defined(__AVX2__)
  if (count % 4 == 0) return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), __m256i(lanes() < splat(int32_t(count / 4))));
#endif
  int8_t copy[WIDE] = {};
  std::memcpy(copy, p, size_t(count));
  return load<Bytes>(copy);
}
inline Bytes some_bytes(const int8_t* p, int64_t count, const char* end) {
  return reinterpret_cast<const char*>(p + WIDE) <= end ? load<Bytes>(p) : some_bytes(p, count);
}
inline void store_some(int8_t* p, int64_t count, Bytes v) { std::memcpy(p, &v, size_t(std::min<int64_t>(count, WIDE))); }
#endif

#if defined(__AVX512BW__)

inline Bytes splat_byte(int x) { return _mm512_set1_epi8(char(x)); }
inline Bytes sum_of_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
// 16-bit words, shifted; bits of one byte get into the other one.
inline Bytes right(Bytes v, int count) { return _mm512_srli_epi16(v, unsigned(count)); }
inline Bytes right(Bytes v, Words counts) { return _mm512_srlv_epi16(v, __m512i(counts)); }
template <int COUNT>
inline Bytes left(Bytes v) { return _mm512_slli_epi16(v, COUNT); }
// The bytes of a table that others, which are below 16, point to.
inline Bytes look_up(Sixteen table, Bytes v) { return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(__m128i(table)), v); }
inline Bytes choose(ByteMask mask, Bytes yes, Bytes no) { return _mm512_mask_mov_epi8(no, mask, yes); }
inline I nearest_whole(F x) { return I(_mm512_cvtps_epi32(__m512(x))); }

inline ByteMask first_bits(int64_t count) { return _bzhi_u64(~uint64_t(0), unsigned(std::min<int64_t>(count, WIDE))); }
// The first `count` bytes, then zeros; nothing after them is read.
inline Bytes some_bytes(const int8_t* p, int64_t count) { return _mm512_maskz_loadu_epi8(first_bits(count), p); }
inline void store_some(int8_t* p, int64_t count, Bytes v) { _mm512_mask_storeu_epi8(p, first_bits(count), v); }
// The same, but what follows the first ones may be anything; nothing from `end` on is read.
inline Bytes some_bytes(const int8_t* p, int64_t count, const char*) { return some_bytes(p, count); }
// Byte j gets packed[rank of j among the set bits], or 0 without a bit. Of more than `count` set bits the others
// may get anything; nothing from `end` on is read.
inline Bytes expand_bytes(ByteMask mask, const int8_t* packed, int64_t count, const char* end) {
  Bytes few = reinterpret_cast<const char*>(packed + WIDE) <= end ? load<Bytes>(packed) : some_bytes(packed, count);
  asm("" : "+v"(few));  // expanding from memory takes several times as long
  return _mm512_maskz_expand_epi8(mask, few);
}

// COUNT bytes over and over.
template <int COUNT>
inline Bytes repeated(const uint8_t* p) {
  if constexpr (COUNT == 64) return _mm512_loadu_si512(p);
  else if constexpr (COUNT == 32) return _mm512_broadcast_i64x4(load<__m256i>(p));
  else if constexpr (COUNT == 16) return _mm512_broadcast_i32x4(load<__m128i>(p));
  else if constexpr (COUNT == 8) return _mm512_set1_epi64(load<int64_t>(p));
  else if constexpr (COUNT == 4) return _mm512_set1_epi32(load<int32_t>(p));
  else return _mm512_set1_epi16(load<int16_t>(p));
}

#elif defined(__AVX2__)

inline Bytes splat_byte(int x) { return _mm256_set1_epi8(char(x)); }
inline Bytes sum_of_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
inline Bytes right(Bytes v, int count) { return _mm256_srli_epi16(v, count); }
// There are shifts of 32-bit words alone: what gets from a word into the other one does not matter, as
// counts are below 8 and of a byte the lowest bits are wanted.
inline Bytes right(Bytes v, Words counts) {
  const __m256i both = __m256i(counts), low = _mm256_and_si256(both, _mm256_set1_epi32(0xffff));
  return _mm256_blend_epi16(_mm256_srlv_epi32(v, low), _mm256_srlv_epi32(v, _mm256_srli_epi32(both, 16)), 0xaa);
}
template <int COUNT>
inline Bytes left(Bytes v) { return _mm256_slli_epi16(v, COUNT); }
inline Bytes look_up(Sixteen table, Bytes v) { return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(__m128i(table)), v); }
inline Bytes choose(ByteMask mask, Bytes yes, Bytes no) {
  const __m256i group = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  const __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(int32_t(mask)), group), bit);
  return _mm256_blendv_epi8(no, yes, _mm256_cmpeq_epi8(bits, bit));
}
inline I nearest_whole(F x) { return I(_mm256_cvtps_epi32(__m256(x))); }

// Zeros, and then each number up to 8: how many set bits are ahead of the last eight of sixteen.
alignas(16) inline constexpr std::array<std::array<int8_t, 16>, 9> AHEAD = [] {
  std::array<std::array<int8_t, 16>, 9> made{};
  for (int count = 0; count < 9; ++count) std::fill(made[count].begin() + 8, made[count].end(), int8_t(count));
  return made;
}();
inline Bytes expand_bytes(ByteMask mask, const int8_t* packed, int64_t count, const char* end) {
  int8_t copy[WIDE];
  if (reinterpret_cast<const char*>(packed + WIDE) > end) store_bytes(copy, some_bytes(packed, count)), packed = copy;
  const auto sixteen = [&](int first) {
    const uint8_t low = uint8_t(mask >> first), high = uint8_t(mask >> (first + 8));
    const __m128 ranks = _mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)RANKS[low].data())), (const __m64*)RANKS[high].data());
    const int8_t* from = packed + __builtin_popcount(mask & ((1u << first) - 1));
    const __m128i ahead = _mm_load_si128((const __m128i*)AHEAD[__builtin_popcount(low)].data());
    return _mm_shuffle_epi8(load<__m128i>(from), _mm_add_epi8(_mm_castps_si128(ranks), ahead));
  };
  return _mm256_set_m128i(sixteen(16), sixteen(0));
}

template <int COUNT>
inline Bytes repeated(const uint8_t* p) {
  if constexpr (COUNT == 32) return load<Bytes>(p);
  else if constexpr (COUNT == 16) return _mm256_broadcastsi128_si256(load<__m128i>(p));
  else if constexpr (COUNT == 8) return _mm256_set1_epi64x(load<int64_t>(p));
  else if constexpr (COUNT == 4) return _mm256_set1_epi32(load<int32_t>(p));
  else return _mm256_set1_epi16(load<int16_t>(p));
}

#else

inline Bytes splat_byte(int x) { return Bytes{} + uint8_t(x); }
inline Bytes sum_of_bytes(Bytes a, Bytes b) { return a + b; }
inline Bytes right(Bytes v, int count) { return v >> uint8_t(count); }
inline Bytes right(Bytes v, Words counts) { return Bytes(Words(v) >> counts); }
template <int COUNT>
inline Bytes left(Bytes v) { return v << uint8_t(COUNT); }
inline Bytes look_up(Sixteen table, Bytes v) { return Bytes(vqtbl1q_u8(table, v)); }
// All ones where a bit is set.
inline Bytes byte_mask(ByteMask mask) {
  const Bytes group = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1}, bit = Bytes(vdupq_n_u64(0x8040201008040201));
  return Bytes(vtstq_u8(look_up(Bytes(vdupq_n_u16(mask)), group), bit));
}
inline Bytes choose(ByteMask mask, Bytes yes, Bytes no) { return Bytes(vbslq_u8(byte_mask(mask), yes, no)); }
inline I nearest_whole(F x) { return I(vcvtnq_s32_f32(x)); }

inline Bytes expand_bytes(ByteMask mask, const int8_t* packed, int64_t count, const char* end) {
  const Bytes set = byte_mask(mask), few = some_bytes(packed, count, end);
  // Of the bytes up to each, minus the number of set ones, in four steps: one less than that number is its rank.
  const uint8x16_t none = vdupq_n_u8(0);
  Bytes counts = set + Bytes(vextq_u8(none, set, 15));
  counts += Bytes(vextq_u8(none, counts, 14));
  counts += Bytes(vextq_u8(none, counts, 12));
  counts += Bytes(vextq_u8(none, counts, 8));
  return look_up(few, ~(counts & set));  // from 16 on: 0
}

template <int COUNT>
inline Bytes repeated(const uint8_t* p) {
  if constexpr (COUNT == 16) return load<Bytes>(p);
  else if constexpr (COUNT == 8) return Bytes(vdupq_n_u64(load<uint64_t>(p)));
  else if constexpr (COUNT == 4) return Bytes(vdupq_n_u32(load<uint32_t>(p)));
  else return Bytes(vdupq_n_u16(load<uint16_t>(p)));
}

#endif

}  // namespace spark
