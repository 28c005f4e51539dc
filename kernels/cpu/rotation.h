// Walsh-Hadamard rotations in place: kernels/formats/rotation.py.
#pragma once

#include "simd.h"

namespace spark {

// Lanes at a distance of H become their sum and their difference.
template <int H>
inline F butterfly(F v) {
  return [&]<size_t... L>(std::index_sequence<L...>) {
    const F sign = {(int32_t(L) & H ? -1.0f : 1.0f)...};
    return shuffle<(int(L) ^ H)...>(v, v) + v * sign;  // one instruction where they can be fused
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

// Two stages between vectors at distances of `width` and twice that, after f of each: half the loads and
// stores of one stage after the other.
template <class Function>
inline void two_stages(float* x, int64_t n, int64_t width, const Function& f) {
  for (int64_t first = 0; first < n; first += 4 * width) {
    for (float* at = x + first; at < x + first + width; at += LANES) {
      const F a = f(load(at)), b = f(load(at + width)), c = f(load(at + 2 * width)), d = f(load(at + 3 * width));
      const F left = a + b, right = c + d, down = a - b, up = c - d;
      store(at, left + right), store(at + width, down + up);
      store(at + 2 * width, left - right), store(at + 3 * width, down - up);
    }
  }
}

// Rotates n channels, times a factor, by blocks of the largest power of two that divides n; zeros follow
// them up to a multiple of LANES.
inline void rotate(float* x, int64_t n, float factor = 1.0f) {
  const int64_t block = n & -n;
  const float size = float(1.0 / std::sqrt(double(block))) * factor;
  const auto inside = [&](F v) { return butterflies(v, block) * size; };
  int64_t width = LANES;
  if (4 * width <= block) {
    two_stages(x, n, width, [&](F v) { return butterflies(v, LANES) * size; });
    width *= 4;
  } else {
    for (int64_t j = 0; j < n; j += LANES) store(x + j, inside(load(x + j)));
  }
  for (; 4 * width <= block; width *= 4) two_stages(x, n, width, [](F v) { return v; });
  if (width == block || block < LANES) return;
  for (int64_t first = 0; first < n; first += 2 * width) {
    for (int64_t j = first; j < first + width; j += LANES) {
      const F low = load(x + j), high = load(x + j + width);
      store(x + j, low + high), store(x + j + width, low - high);
    }
  }
}

}  // namespace spark
