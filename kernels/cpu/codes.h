// Codes of 1 to 8 bits in planes, and the levels that they stand for: kernels/formats/codes.py.
#pragma once

#include <algorithm>
#include <array>

#include "simd.h"

namespace spark {

// The widths of the planes of a code, lowest bits first; no second plane: 0.
constexpr int low_width(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }
constexpr int high_width(int bits) { return bits - low_width(bits); }

inline int64_t plane_bytes(int64_t channels, int width) { return (channels * width + 7) / 8; }
inline int64_t code_bytes(int64_t channels, int bits) {
  return plane_bytes(channels, low_width(bits)) + plane_bytes(channels, high_width(bits));
}

// Levels by code, and the numbers between two of them.
struct alignas(64) Grid {
  float levels[64] = {};   // repeated after 2^bits
  float middles[16] = {};  // of few bits, [r]: below the positive level of rank r; repeated after half of the codes
  int8_t bytes[64] = {};   // the levels again
};

// The positive levels for normal numbers.
inline constexpr int8_t NORMAL[4][8] = {{127}, {38, 127}, {14, 45, 79, 127}, {6, 18, 31, 44, 58, 75, 96, 127}};
// Standard deviation of the normal numbers in units of the best levels for them.
inline constexpr float DEVIATION[8] = {159.17f, 84.08f, 59.02f, 46.48f, 38.95f, 33.92f, 0.0f, 50.0f};
// The largest of the levels with equal distances, from 5 bits on; codes of 8 bits are int8 levels.
constexpr int largest_level(int bits) { return bits == 8 ? 127 : (1 << bits) - 1; }

constexpr Grid make_grid(int bits) {
  Grid grid;
  const int half = 1 << (bits - 1);
  for (int c = 0; c < 64; ++c) {
    const int code = c & (2 * half - 1), rank = code < half ? half - 1 - code : code - half;
    // From 5 bits on with equal distances.
    const int magnitude = bits >= 5 ? 2 * rank + 1 : NORMAL[bits - 1][rank];
    grid.bytes[c] = int8_t(code < half ? -magnitude : magnitude);
    grid.levels[c] = grid.bytes[c];
  }
  for (int r = 0; bits < 5 && r < 16; ++r) {
    const int code = half + r % half;
    grid.middles[r] = (grid.levels[code] + grid.levels[code - 1]) / 2;
  }
  return grid;
}

inline constexpr std::array<Grid, 6> GRIDS = [] {
  std::array<Grid, 6> grids;
  for (int bits = 1; bits <= 6; ++bits) grids[bits - 1] = make_grid(bits);
  return grids;
}();
inline const Grid& grid_of(int bits) { return GRIDS[bits - 1]; }  // to 6

// Calls f with an integral constant of the bits.
template <class Function>
inline void with_bits(int bits, const Function& f) {
  switch (bits) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}

// A table of 64 numbers, repeated after 2^BITS; of a code the lowest BITS bits count.
template <int BITS>
class Table {
#if defined(__AVX512F__)
  static constexpr int COUNT = BITS <= 4 ? 1 : BITS == 5 ? 2 : 4;
#elif defined(__AVX2__)
  static constexpr int COUNT = BITS <= 3 ? 1 : 2;
#elif defined(SPARK_NEON)
  static constexpr int COUNT = BITS <= 2 ? 1 : BITS == 3 ? 2 : 4;
#else
  static constexpr int COUNT = 1;
#endif

 public:
  explicit Table(const float* numbers) : numbers_(numbers) {
    for (int i = 0; i < COUNT; ++i) parts_[i] = load(numbers + i * LANES);
  }

  F operator[](I code) const {
#if defined(__AVX512F__)
    const __m512i index = (__m512i)code;
    if constexpr (BITS <= 4) return _mm512_permutexvar_ps(index, parts_[0]);
    else {
      const __m512 low = _mm512_permutex2var_ps(parts_[0], index, parts_[1]);
      if constexpr (BITS == 5) return low;
      const __m512 high = _mm512_permutex2var_ps(parts_[COUNT - 2], index, parts_[COUNT - 1]);
      return _mm512_mask_mov_ps(low, _mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), high);
    }
#elif defined(__AVX2__)
    const __m256i index = (__m256i)code;
    if constexpr (BITS <= 4) {
      const __m256 low = _mm256_permutevar8x32_ps(parts_[0], index);
      if constexpr (BITS <= 3) return low;
      const __m256 high = _mm256_permutevar8x32_ps(parts_[COUNT - 1], index);
      return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    } else {
      return _mm256_i32gather_ps(numbers_, (__m256i)(code & ((1 << BITS) - 1)), 4);
    }
#else
#if defined(SPARK_NEON)
    if constexpr (BITS <= 4) {
      // Four bytes for each code.
      const uint8x16_t bytes = uint8x16_t((code & ((1 << BITS) - 1)) * 0x04040404 + 0x03020100);
      const auto part = [&](int i) { return uint8x16_t(parts_[i]); };
      if constexpr (COUNT == 1) return F(vqtbl1q_u8(part(0), bytes));
      else if constexpr (COUNT == 2) return F(vqtbl2q_u8(uint8x16x2_t{{part(0), part(1)}}, bytes));
      else return F(vqtbl4q_u8(uint8x16x4_t{{part(0), part(1), part(2), part(3)}}, bytes));
    }
#endif
    F v;
    for (int i = 0; i < LANES; ++i) v[i] = numbers_[code[i] & ((1 << BITS) - 1)];
    return v;
#endif
  }

 private:
  [[maybe_unused]] const float* numbers_;
  F parts_[COUNT];
};

// The levels of codes of BITS bits.
template <int BITS>
struct Levels : Table<BITS> {
  Levels() : Table<BITS>(grid_of(BITS).levels) {}
};
template <>
struct Levels<8> {
  F operator[](I code) const { return __builtin_convertvector(code << 24 >> 24, F); }
};

// Finds the codes of the levels, times a unit, next to some numbers; a NaN has the last one.
template <int BITS>
class Nearest {
  static constexpr int HALF = 1 << (BITS - 1);

 public:
  explicit Nearest(float unit) : inverse_((BITS == 8 ? 1.0f : 0.5f) / unit) {
    // Of few levels, the middles between them take the unit, so that no number has to be divided.
    for (int r = 0; BITS < 5 && r < 16; r += LANES) store(middles_ + r, load(grid_of(BITS).middles + r) * unit);
  }

  I code(F x) const {
    if constexpr (BITS >= 5) {
      // Between two of the equal distances is an even number of units; int8 levels are whole ones.
      const F place = x * inverse_ + (float(HALF) + (BITS == 8 ? 0.5f : 0.0f)), most = splat(2.0f * HALF - 1);
      const I code = __builtin_convertvector(spark::max(place < most ? place : most, F{}), I);
      return BITS == 8 ? code - HALF : code;
    } else {
      const I index = rank(magnitude(x));
      return x < F{} ? index ^ (HALF - 1) : index | HALF;
    }
  }
  // Of two levels that are as near, the higher one is the number's: a negative one is a bit less here.
  static F magnitude(F x) { return bit_cast<F>(bit_cast<I>(spark::abs(x)) + bit_cast<I>(x < F{})); }
  // Which of the positive levels of few bits is next to a magnitude.
  I rank(F magnitude) const {
    const Table<BITS - 1> middles(middles_);
    I index = magnitude < splat(middles_[HALF / 2]) ? I{} : splat(HALF / 2);
    for (int bit = HALF / 4; bit; bit /= 2) {
      const I next = index | bit;
      index = magnitude < middles[next] ? index : next;
    }
    return index;
  }

 private:
  float inverse_;
  alignas(64) float middles_[16] = {};
};

inline I load_codes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#elif defined(SPARK_NEON)
  return I(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(load<uint32_t>(p))))));
#else
  I v;
  for (int i = 0; i < LANES; ++i) v[i] = p[i];
  return v;
#endif
}
// Calls f(j, parts) for LANES channels from j on, whose parts of codes are the lowest WIDTH bits. Of calls
// that overlap the last one is right, and some of the lanes behind the last channel are none. Up to
// LANES bytes after the plane are read.
template <int WIDTH, class Function>
inline void each_code(const uint8_t* plane, int64_t channels, const Function& f) {
  const int64_t bytes = plane_bytes(channels, WIDTH);
  if (bytes % LANES == 0) {
    for (int64_t i = 0; i < bytes; i += LANES) {
      const I codes = load_codes(plane + i);
      for (int s = 0; s < 8 / WIDTH; ++s) {
        if (s * bytes + i < channels) f(s * bytes + i, codes >> (WIDTH * s));
      }
    }
    return;
  }
  for (int s = 0; s < 8 / WIDTH; ++s) {
    for (int64_t i = 0; i < bytes && s * bytes + i < channels; i += LANES) {
      f(s * bytes + i, load_codes(plane + i) >> (WIDTH * s));
    }
  }
}

// The numbers of a table (Levels, too) that codes of a part point to, times a factor; up to LANES - 1 more are
// written, and read.
template <int BITS, class Numbers>
inline void expand_codes(const uint8_t* codes, int64_t channels, const Numbers& table, float factor, float* out) {
  constexpr int LOW = low_width(BITS), HIGH = high_width(BITS);
  if constexpr (HIGH == 0) {
    each_code<LOW>(codes, channels, [&](int64_t j, I code) { store(out + j, table[code] * factor); });
  } else {
    int32_t low[1024 + LANES];  // MAX_HEAD
    each_code<LOW>(codes, channels, [&](int64_t j, I code) {
      const I part = code & ((1 << LOW) - 1);
      std::memcpy(low + j, &part, sizeof(I));
    });
    each_code<HIGH>(codes + plane_bytes(channels, LOW), channels, [&](int64_t j, I code) {
      store(out + j, table[load<I>(low + j) | (code << LOW)] * factor);
    });
  }
}

constexpr int UNIT_CODE = 81, OCTAVE = 16, NOT_FINITE = 255;

inline std::array<float, 256> amplitudes_above(float codes) {
  std::array<float, 256> made{};
  for (int code = 1; code < NOT_FINITE; ++code) made[code] = std::exp2((float(code - UNIT_CODE) + codes) / OCTAVE);
  made[NOT_FINITE] = NAN;
  return made;
}
inline const std::array<float, 256> AMPLITUDES = amplitudes_above(0), BETWEEN_AMPLITUDES = amplitudes_above(0.5f);
// What codes of amplitudes stand for: kernels/formats/quantized.py.
inline const std::array<float, 256>& amplitudes() {
  return AMPLITUDES;
}

// The same for several codes: of the table only one octave, which a register holds, and the exponent.
inline F amplitudes_of(I codes) {
  const Table<4> octave(&amplitudes()[UNIT_CODE]);
  const I steps = codes - UNIT_CODE;
  const F finite = bit_cast<F>(bit_cast<I>(octave[steps]) + (steps >> 4 << 23));
  return select(codes == 0, F{}, select(codes == NOT_FINITE, splat(NAN), finite));
}

// Amplitudes of `count` tokens, for each of which there are `parts` codes: of part p.
inline void read_amplitudes(const uint8_t* codes, int parts, int p, int count, float* numbers) {
  typedef uint16_t Pairs __attribute__((vector_size(2 * LANES)));
  int t = 0;
  if (parts == 1 || parts == 2 || parts == 4) {
    for (; t + LANES <= count; t += LANES) {
      const uint8_t* from = codes + parts * t;
      const I whole = parts == 1 ? load_codes(from) : parts == 2 ? __builtin_convertvector(load<Pairs>(from), I) : load<I>(from);
      store(numbers + t, amplitudes_of(whole >> (8 * p) & 255));
    }
  }
  for (; t < count; ++t) numbers[t] = amplitudes()[codes[t * parts + p]];
}

// The code next to an amplitude, or the next higher one.
inline uint8_t amplitude_code(float amplitude, bool up) {
  if (!std::isfinite(amplitude)) return NOT_FINITE;
  if (amplitude == 0) return 0;
  const std::array<float, 256>& most = up ? AMPLITUDES : BETWEEN_AMPLITUDES;
  // The logarithm of a mantissa is at least the mantissa less 1, and at most 1.4 codes above that.
  constexpr int SHIFT = 23 - 4;
  static_assert(OCTAVE == 1 << 4);
  const int linear = UNIT_CODE + ((bit_cast<int32_t>(amplitude) - bit_cast<int32_t>(1.0f)) >> SHIFT);
  const int least = std::clamp(linear, 1, NOT_FINITE - 4);
  return uint8_t(least + (most[least] < amplitude) + (most[least + 1] < amplitude) + (most[least + 2] < amplitude));
}

// Packs a plane of WIDTH bits from bit `shift` of each code on; zeros have to follow the codes, 8 of them.
template <int WIDTH>
inline uint8_t* pack_plane(const uint8_t* __restrict codes, int64_t channels, int shift, uint8_t* __restrict plane) {
  // Words of eight bytes: there are no shifts of bytes, and those of whole words lose nothing that is wanted.
  typedef uint64_t Words __attribute__((vector_size(LANES < 8 ? 16 : 32)));
  const int64_t bytes = plane_bytes(channels, WIDTH);
  const auto pack = [&](auto packed, int64_t i) {
    typedef decltype(packed) V;
    const auto ones = 0x0101010101010101 * ((1 << WIDTH) - 1);
    for (int s = 0; s < 8 / WIDTH; ++s) packed |= (load<V>(codes + s * bytes + i) >> shift & V(V{} + ones)) << (WIDTH * s);
    std::memcpy(plane + i, &packed, sizeof(V));
  };
  int64_t i = 0;
  for (; i + int64_t(sizeof(Words)) <= bytes; i += sizeof(Words)) pack(Words{}, i);
  for (; i + int64_t(sizeof(uint64_t)) <= bytes; i += sizeof(uint64_t)) pack(uint64_t{}, i);
  for (; i < bytes; ++i) pack(uint8_t{}, i);
  return plane + bytes;
}

template <int BITS>
inline void pack_codes(const uint8_t* codes, int64_t channels, uint8_t* packed) {
  packed = pack_plane<low_width(BITS)>(codes, channels, 0, packed);
  if constexpr (high_width(BITS) > 0) pack_plane<high_width(BITS)>(codes, channels, low_width(BITS), packed);
}

}  // namespace spark
