// Which channels of a token are kept, and packing them.
#pragma once

#include <algorithm>
#include <array>
#include <bit>

#include "simd.h"

namespace spark {

typedef int16_t Halves __attribute__((vector_size(LANES * 4)));

#if defined(__AVX2__) && !defined(__AVX512VBMI2__)
// For each eight bits, which ones are set.
alignas(64) inline constexpr std::array<std::array<uint8_t, 8>, 256> PLACES = [] {
  std::array<std::array<uint8_t, 8>, 256> made{};
  for (int bits = 0; bits < 256; ++bits) {
    for (uint8_t j = 0, rank = 0; j < 8; ++j) {
      if (bits >> j & 1) made[bits][rank++] = j;
    }
  }
  return made;
}();
#elif defined(SPARK_NEON)
// For each four bits, the bytes of the numbers of SIZE bytes whose bit is set.
template <int SIZE>
inline constexpr std::array<std::array<uint8_t, 4 * SIZE>, 16> COMPRESSIONS = [] {
  std::array<std::array<uint8_t, 4 * SIZE>, 16> made{};
  for (int bits = 0; bits < 16; ++bits) {
    for (int j = 0, rank = 0; j < LANES; rank += bits >> j & 1, ++j) {
      for (int byte = 0; (bits >> j & 1) && byte < SIZE; ++byte) made[bits][rank * SIZE + byte] = uint8_t(SIZE * j + byte);
    }
  }
  return made;
}();
#endif

// Writes those of LANES numbers whose bit is set next to each other, and others after them: LANES in all.
// Returns how many were meant.
template <class Number>
inline int64_t compress(const Number* from, uint32_t bits, Number* to) {
#if defined(__AVX512VBMI2__)
  if constexpr (sizeof(Number) == 4) store((float*)to, _mm512_maskz_compress_ps(__mmask16(bits), load(from)));
  else if constexpr (sizeof(Number) == 2) {
    _mm256_storeu_si256((__m256i*)to, _mm256_maskz_compress_epi16(__mmask16(bits), _mm256_loadu_si256((const __m256i*)from)));
  } else _mm_storeu_si128((__m128i*)to, _mm_maskz_compress_epi8(__mmask16(bits), _mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
  const __m128i places = _mm_loadl_epi64((const __m128i*)PLACES[bits].data());
  if constexpr (sizeof(Number) == 4) {
    store((float*)to, _mm256_permutevar8x32_ps(load(from), _mm256_cvtepu8_epi32(places)));
  } else if constexpr (sizeof(Number) == 2) {
    const __m128i first = _mm_add_epi8(places, places), second = _mm_or_si128(first, _mm_set1_epi8(1));
    const __m128i numbers = _mm_loadu_si128((const __m128i*)from);
    _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(numbers, _mm_unpacklo_epi8(first, second)));
  } else _mm_storel_epi64((__m128i*)to, _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i*)from), places));
#elif defined(SPARK_NEON)
  constexpr int SIZE = sizeof(Number);
  const uint8_t* places = COMPRESSIONS<SIZE>[bits].data();
  if constexpr (SIZE == 4) {
    const uint8x16_t kept = vqtbl1q_u8(load<uint8x16_t>(from), load<uint8x16_t>(places));
    std::memcpy(to, &kept, 16);
  } else {
    typedef std::conditional_t<SIZE == 2, uint64_t, uint32_t> Four;
    const uint8x8_t kept = vtbl1_u8(vcreate_u8(load<Four>(from)), vcreate_u8(load<Four>(places)));
    std::memcpy(to, &kept, 4 * SIZE);
  }
#else
  for (uint32_t left = bits; left; left &= left - 1) *to++ = from[std::countr_zero(left)];
#endif
  return std::popcount(bits);
}

// The sum of the lanes.
inline int32_t sum_of_counts(I counts) {
  return fold(counts, [](I a, I b) { return a + b; });
}
inline int32_t sum_of_counts(Halves counts) {
  const I pairs = bit_cast<I>(counts);
  return sum_of_counts((pairs & 0xffff) + (pairs >> 16));
}

// The largest threshold >= 0 so that `count` of the numbers are at least that, or more where several equal
// it; exact, one bit per step. `vectors` is a multiple of 4 (fewer ones are negative). A step ends the search if it finds no more than `count`.
template <class Vector>
inline int32_t nth_largest(const Vector* numbers, int64_t vectors, int64_t count, int32_t highest, bool& exact) {
  typedef std::remove_cvref_t<decltype(numbers[0][0])> Number;
  int32_t threshold = 0;
  exact = false;
  for (int32_t bit = highest; bit && !exact; bit >>= 1) {
    const Vector below = Vector{} + Number((threshold | bit) - 1);
    Vector found{}, others{};
    for (int64_t i = 0; i < vectors; i += 4) {
      found -= Vector(numbers[i] > below), others -= Vector(numbers[i + 1] > below);
      found -= Vector(numbers[i + 2] > below), others -= Vector(numbers[i + 3] > below);
    }
    found += others;
    const int32_t total = sum_of_counts(found);
    if (total >= count) threshold |= bit;
    exact = total == count;
  }
  return threshold;
}

// Which channels of a token are kept, LANES bits at a time.
struct Kept {
  uint32_t words[MAX_HEAD / LANES];

  // The `count` largest, of equal ones the first; padding after the numbers is negative. Numbers >= 0 have the
  // order of their bits. Two in a lane of one: their higher halves decide, and among equal ones the lower.
  void choose(const float* salient, int64_t width, int64_t count) {
    Halves some[MAX_HEAD / LANES / 2 + 4];
    const int64_t vectors = (width / LANES + 1) / 2, filled = round_up(vectors, 4);
    for (int64_t i = vectors; i < filled; ++i) some[i] = Halves{} - int16_t(1);
    for (int64_t i = 0; i < vectors; ++i) {
      const I low = load<I>(salient + 2 * i * LANES);
      const I high = 2 * i * LANES + LANES < width ? load<I>(salient + 2 * i * LANES + LANES) : splat(-1);
      some[i] = high_halves(low, high);
    }
    bool exact;
    int32_t threshold = nth_largest(some, filled, count, 1 << 14, exact) << 16;
    if (!exact) threshold |= low_half(salient, width, count, threshold, exact);
    for (int64_t j = 0; j < width; j += LANES) {
      const I number = load<I>(salient + j);
      words[j / LANES] = exact ? lane_bits(number >= splat(threshold)) : lane_bits(number > splat(threshold));
    }
    if (exact) return;
    for (int64_t j = 0; j < width; j += LANES) count -= std::popcount(words[j / LANES]);
    for (int64_t j = 0; j < width && count > 0; j += LANES) {
      uint32_t equal = lane_bits(load<I>(salient + j) == splat(threshold));
      for (; equal && count > 0; equal &= equal - 1, --count) words[j / LANES] |= equal & -equal;
    }
  }

  // The first `channels` channels.
  void all(int64_t channels) {
    for (int64_t j = 0; j < channels; j += LANES) {
      words[j / LANES] = ~uint32_t(0) >> (32 - std::min<int64_t>(LANES, channels - j));
    }
  }

  F mask(int64_t j) const { return bit_cast<F>(lane_mask(words[j / LANES])); }

  // Copies the kept ones of `from`, which has a number per channel, up to a multiple of LANES; so many may be
  // written behind them.
  template <class Number>
  void compress(const Number* from, int64_t channels, Number* to) const {
    for (int64_t j = 0; j < channels; j += LANES) to += spark::compress(from + j, words[j / LANES], to);
  }

 private:
  // In any order: they are counted only.
  static Halves high_halves(I a, I b) {
    return bit_cast<Halves>((bit_cast<U>(a) >> 16) | (bit_cast<U>(b) & uint32_t(0xffff0000)));
  }

  // The lower half of the threshold, whose higher half is known: of the few numbers that share it.
  static int32_t low_half(const float* salient, int64_t width, int64_t count, int32_t high, bool& exact) {
    int32_t few[MAX_HEAD + 4 * LANES];
    int64_t sharing = 0;
    for (int64_t j = 0; j < width; j += LANES) {
      const I number = load<I>(salient + j);
      count -= std::popcount(lane_bits(number > splat(high | 0xffff)));
      const uint32_t bits = lane_bits((number & ~0xffff) == splat(high));
      if (bits) sharing += spark::compress((const int32_t*)salient + j, bits, few + sharing);
    }
    I numbers[MAX_HEAD / LANES + 4];
    const int64_t vectors = round_up(sharing, 4 * LANES) / LANES;
    std::fill(few + sharing, few + vectors * LANES, -1);
    for (int64_t i = 0; i < vectors; ++i) numbers[i] = load<I>(few + i * LANES) & splat(int32_t(0x8000ffff));
    exact = sharing == count;
    return exact ? 0 : nth_largest(numbers, vectors, count, 1 << 15, exact);
  }
};

}  // namespace spark
