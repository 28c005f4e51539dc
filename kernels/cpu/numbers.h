// Single numbers of the dtypes, as floats and back.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(SPARK_NEON)
#include <arm_neon.h>
#endif

namespace spark {

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(SPARK_NEON)
  return bit_cast<__fp16>(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Scaled by 2^112 the float with these bits is the number, subnormals included.
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | sign);
#endif
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float(float x) {
  return x;
}
template <>
inline bf16 from_float(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline half from_float(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#elif defined(SPARK_NEON)
  return {bit_cast<uint16_t>(__fp16(x))};
#else
  const uint32_t sign = bit_cast<uint32_t>(x) >> 16 & 0x8000, bits = bit_cast<uint32_t>(x) & 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (bits < 0x38800000) {  // subnormal: adding 0.5 rounds to units of 2^-24
    return {uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) & 0x7fff))};
  }
  return {uint16_t(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13)};
#endif
}
template <class T>
constexpr float largest() {
  return std::is_same_v<T, half> ? 65504.0f
      : std::is_same_v<T, bf16>  ? 3.38953139e38f
                                 : std::numeric_limits<float>::max();
}

}  // namespace spark
