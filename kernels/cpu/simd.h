// Vectors of floats for every instruction set from one source: GCC's and Clang's vector extensions
// compile the arithmetic for whatever the compiler was told to target; only what they cannot
// express (expansion by a mask, half-precision conversion) is written per instruction set.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "numbers.h"

namespace spark {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(SPARK_NEON)
constexpr int LANES = 4;  // GCC takes vectors of two registers apart, number by number
#else
constexpr int LANES = 8;
#endif

typedef float F __attribute__((vector_size(LANES * 4)));
typedef int32_t I __attribute__((vector_size(LANES * 4)));
typedef uint32_t U __attribute__((vector_size(LANES * 4)));

constexpr float INF = std::numeric_limits<float>::infinity();

constexpr int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

template <class V = F>
inline V load(const void* address) {
  V v;
  std::memcpy(&v, address, sizeof(V));
  return v;
}
inline void store(float* address, F v) { std::memcpy(address, &v, sizeof(F)); }
// The lowest byte of each lane, and of four vectors.
inline void store_low_bytes(void* p, I numbers) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // GCC would take the numbers out of the vector one by one.
  const __m256i low = _mm256_shuffle_epi8(__m256i(numbers), _mm256_set1_epi32(0x0c080400));
  _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
#elif defined(SPARK_NEON)
  const uint16x4_t halves = vmovn_u32(uint32x4_t(numbers));
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(halves, halves));
  std::memcpy(p, &bytes, LANES);
#else
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  const Bytes bytes = __builtin_convertvector(numbers, Bytes);
  std::memcpy(p, &bytes, LANES);
#endif
}
inline void store_low_bytes(void* p, I a, I b, I c, I d) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i low = _mm256_set1_epi32(255), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i first = _mm256_packs_epi32(__m256i(a) & low, __m256i(b) & low);
  const __m256i last = _mm256_packs_epi32(__m256i(c) & low, __m256i(d) & low);
  _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, last), order));
#elif defined(SPARK_NEON)
  const uint16x8_t first = vuzp1q_u16(uint16x8_t(a), uint16x8_t(b)), last = vuzp1q_u16(uint16x8_t(c), uint16x8_t(d));
  const uint8x16_t bytes = vuzp1q_u8(uint8x16_t(first), uint8x16_t(last));
  std::memcpy(p, &bytes, 4 * LANES);
#else
  const I all[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) store_low_bytes(static_cast<char*>(p) + i * LANES, all[i]);
#endif
}
inline F splat(float x) { return F{} + x; }
inline I splat(int32_t x) { return I{} + x; }

template <size_t... L>
inline I lanes(std::index_sequence<L...>) {
  return I{static_cast<int32_t>(L)...};
}
// 0, 1, 2, ...
inline I lanes() { return lanes(std::make_index_sequence<LANES>{}); }

// LANES numbers in a row

inline F load_floats(const float* p) { return load(p); }
inline F load_floats(const bf16* p) {
#if defined(__AVX512F__)
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
#elif defined(__AVX2__)
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
#elif defined(SPARK_NEON)
  return F(vshlq_n_u32(vmovl_u16(load<uint16x4_t>(p)), 16));
#else
  typedef uint16_t U16 __attribute__((vector_size(LANES * 2)));
  return bit_cast<F>(__builtin_convertvector(load<U16>(p), I) << 16);
#endif
}
inline F load_floats(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#elif defined(SPARK_NEON)
  return F(vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(load<uint32_t>(p)))))));
#else
  F v;
  for (int i = 0; i < LANES; ++i) v[i] = p[i];
  return v;
#endif
}
inline F load_floats(const half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__) && defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(SPARK_NEON)
  return F(vcvt_f32_f16(load<float16x4_t>(p)));
#else
  F v;
  for (int i = 0; i < LANES; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// The first count <= LANES numbers, then zeros; nothing behind them is read.
template <class T>
inline F load_floats(const T* p, int64_t count) {
  if (count >= LANES) return load_floats(p);
  F v{};
  for (int64_t i = 0; i < count; ++i) v[i] = to_float(p[i]);
  return v;
}

// All lanes whose bit is set are all ones.
inline I lane_mask(uint32_t bits) { return (splat(int32_t(bits)) & (splat(1) << lanes())) != 0; }

// The bits of the lanes that are all ones; the others are zeros.
inline uint32_t lane_bits(I mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)mask));
#elif defined(SPARK_NEON)
  return vaddvq_u32(uint32x4_t(mask & (splat(1) << lanes())));
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}

// Whether a lane of any of some masks is set: they are collected by or, and looked at once.
#if defined(SPARK_NEON)
typedef I AnyLane;
inline I any_lane(I mask) { return mask; }
inline bool is_set(I any) { return vmaxvq_u32(uint32x4_t(any)) != 0; }
#else
typedef uint32_t AnyLane;
inline uint32_t any_lane(I mask) { return lane_bits(mask); }
inline bool is_set(uint32_t any) { return any != 0; }
#endif

// v with the sign of the lanes whose bit is set turned.
inline F negate(F v, uint32_t bits) {
#if defined(__AVX2__)
  const I set = splat(int32_t(bits)) << (splat(31) - lanes());  // in the highest bit of each lane
#else
  const I set = lane_mask(bits);
#endif
  return bit_cast<F>(bit_cast<I>(v) ^ (set & splat(int32_t(0x80000000))));
}

inline F select(I mask, F yes, F no) { return mask ? yes : no; }

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each eight bits, the ranks of the set ones among them; -128 where a bit is not set.
alignas(64) inline constexpr std::array<std::array<int8_t, 8>, 256> RANKS = [] {
  std::array<std::array<int8_t, 8>, 256> made{};
  for (int bits = 0; bits < 256; ++bits) {
    for (int j = 0, rank = 0; j < 8; rank += bits >> j & 1, ++j) made[bits][j] = int8_t(bits >> j & 1 ? rank : -128);
  }
  return made;
}();
#elif defined(SPARK_NEON)
// For each four bits, the bytes that expand() takes from where; none where there is no bit.
alignas(16) inline constexpr std::array<std::array<uint8_t, 16>, 16> EXPANSIONS = [] {
  std::array<std::array<uint8_t, 16>, 16> made{};
  for (int bits = 0; bits < 16; ++bits) {
    for (int j = 0, rank = 0; j < LANES; rank += bits >> j & 1, ++j) {
      for (int byte = 0; byte < 4; ++byte) made[bits][4 * j + byte] = uint8_t(bits >> j & 1 ? 4 * rank + byte : 255);
    }
  }
  return made;
}();
#endif

// Lane j gets packed[rank of j among the set bits]; lanes without a bit keep theirs of `others`.
inline F expand(F others, F packed, uint32_t bits) {
#if defined(__AVX512F__)
  asm("" : "+v"(packed));  // expanding from memory takes several times as long
  return _mm512_mask_expand_ps(others, __mmask16(bits), packed);
#elif defined(__AVX2__)
  const __m256i ranks = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)RANKS[bits].data()));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(packed, ranks), others, _mm256_castsi256_ps(ranks));
#elif defined(SPARK_NEON)
  return F(vqtbx1q_u8(uint8x16_t(others), uint8x16_t(packed), load<uint8x16_t>(EXPANSIONS[bits].data())));
#else
  for (int j = 0, rank = 0; j < LANES; ++j) {
    if (bits >> j & 1) others[j] = packed[rank++];
  }
  return others;
#endif
}

// Lane i is lane L[i] of a; from LANES on the lanes of b are counted.
template <int... L, class V>
inline V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, L...);
#else
  return __builtin_shuffle(a, b, I{L...});
#endif
}

// All lanes of v folded into one number, in halves: op(V, V) -> V.
template <int H = LANES / 2, class V, class Op>
inline auto fold(V v, Op op) {
  const V folded = [&]<size_t... L>(std::index_sequence<L...>) {
    return op(v, shuffle<((L + H) % LANES)...>(v, v));
  }(std::make_index_sequence<LANES>{});
  if constexpr (H == 1) return folded[0];
  else return fold<H / 2>(folded, op);
}
inline float sum(F v) {
  return fold(v, [](F a, F b) { return a + b; });
}
inline F max(F a, F b) { return a > b ? a : b; }
inline F abs(F v) { return bit_cast<F>(bit_cast<I>(v) & splat(0x7fffffff)); }
// Of magnitudes, as whole numbers, a NaN is the largest.
inline F max_or_nan(F a, F b) {
  const I x = bit_cast<I>(a), y = bit_cast<I>(b);
  return bit_cast<F>(x > y ? x : y);
}
inline float maximum(F v) { return fold(v, [](F a, F b) { return max(a, b); }); }
inline float maximum_or_nan(F v) { return fold(v, max_or_nan); }

// One halving step of sums: lane blocks of size H, alternately from a and from b.
template <int H, size_t... L>
inline F halve(F a, F b, std::index_sequence<L...>) {
  return shuffle<(L / (2 * H) * 2 * H + L % H + (L % (2 * H) < H ? 0 : LANES))...>(a, b) +
      shuffle<(L / (2 * H) * 2 * H + L % H + H + (L % (2 * H) < H ? 0 : LANES))...>(a, b);
}
// v[0] becomes the vector of the sums of v[0], v[1], ... v[LANES - 1].
template <int H = LANES / 2>
[[gnu::always_inline]] inline void sums(F* v) {
#if defined(SPARK_NEON)
  v[0] = vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3]));
#else
  for (int i = 0; i < H; ++i) v[i] = halve<H>(v[i], v[i + H], std::make_index_sequence<LANES>{});
  if constexpr (H > 1) sums<H / 2>(v);
#endif
}

// Writes the sums of `count` vectors, and zeros after them: a multiple of LANES numbers.
inline void sums(const F* v, int count, float* to) {
  for (int i = 0; i < count; i += LANES) {
    F some[LANES];
    for (int l = 0; l < LANES; ++l) some[l] = i + l < count ? v[i + l] : F{};
    sums(some);
    store(to + i, some[0]);
  }
}

// e^x for x <= 0 within 2 ulp (Cephes' polynomial); 0 below -87, -inf included.
inline F exp_nonpositive(F x) {
  const I tiny = x < splat(-87.0f);
  x = select(tiny, F{}, x);
  const F shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
  const F n = shifted - 12582912.0f;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  // Unsigned: of a NaN the sum may overflow.
  const U power = bit_cast<U>(shifted) << 23;
  return select(tiny, F{}, bit_cast<F>(bit_cast<U>(y) + power));
}

// tanh(x) = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|)
inline F tanh(F x) {
  const I sign = bit_cast<I>(x) & splat(int32_t(0x80000000));
  const F magnitude = bit_cast<F>(bit_cast<I>(x) ^ sign);
  const F e = exp_nonpositive(magnitude * -2.0f);
  return bit_cast<F>(bit_cast<I>((1.0f - e) / (1.0f + e)) | sign);
}

}  // namespace spark
