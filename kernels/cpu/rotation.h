// Walsh-Hadamard rotations in place: kernels/formats/rotation.py.
#pragma once

#include "simd.h"

namespace spark {

// Lanes at a distance of H become their sum and their difference.
template <int H>
inline F butterfly(F v) {
  return [&]<size_t... L>(std::index_sequence<L...>) {
    const I turned = {(int32_t(L) & H ? int32_t(0x80000000) : 0)...};
    return shuffle<(int(L) ^ H)...>(v, v) + bit_cast<F>(bit_cast<I>(v) ^ turned);
  }(std::make_index_sequence<LANES>{});
}

// Stages inside of vectors, of blocks of so many channels.
template <int H = 1>
inline F butterflies(F v, int64_t block) {
  if constexpr (H < LANES) {
    if (H < block) return butterflies<2 * H>(butterfly<H>(v), block);
  }
  return v;
}

// Rotates n channels by blocks of the largest power of two that divides n; zeros follow them up to a
// multiple of LANES.
inline void rotate(float* x, int64_t n) {
  const int64_t block = n & -n;
  for (int64_t j = 0; j < n; j += LANES) store(x + j, butterflies(load(x + j), block));
  for (int64_t width = LANES; width < block; width *= 2) {
    for (int64_t first = 0; first < n; first += 2 * width) {
      for (int64_t j = first; j < first + width; j += LANES) {
        const F low = load(x + j), high = load(x + j + width);
        store(x + j, low + high), store(x + j + width, low - high);
      }
    }
  }
  const float size = float(1.0 / std::sqrt(double(block)));
  for (int64_t j = 0; j < n; j += LANES) store(x + j, load(x + j) * size);
}

}  // namespace spark
