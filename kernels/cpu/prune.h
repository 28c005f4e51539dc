// Choosing and packing the channels of one token; formulas in kernels/reference/prune.py, values.py.
#pragma once

#include <vector>

#include "simd.h"

namespace spark {

// The largest bits t for which at least `count` of the numbers have bits >= t. Numbers >= 0 have
// the order of their bits; a negative one (padding) is below all. Exact, one bit per step.
inline int32_t nth_largest(const float* numbers, int64_t width, int64_t count) {
  int32_t threshold = 0;
  for (int32_t bit = 1 << 30; bit; bit >>= 1) {
    const I candidate = splat(threshold | bit);
    I found{};
    for (int64_t j = 0; j < width; j += LANES) found -= load<I>(numbers + j) >= candidate;
    int64_t total = 0;
    for (int i = 0; i < LANES; ++i) total += found[i];
    if (total >= count) threshold |= bit;
  }
  return threshold;
}

// Which `count` of `channels` to keep: the largest, of equal ones the first.
inline void choose(const float* salient, int64_t channels, int64_t width, int64_t count, bool* keep) {
  const int32_t threshold = nth_largest(salient, width, count);
  int64_t equal = count;
  for (int64_t j = 0; j < channels; ++j) {
    keep[j] = bit_cast<int32_t>(salient[j]) > threshold;
    equal -= keep[j];
  }
  for (int64_t j = 0; j < channels && equal > 0; ++j) {
    if (bit_cast<int32_t>(salient[j]) == threshold) keep[j] = true, --equal;
  }
}

template <class Flag>
void pack_plane(int64_t channels, uint8_t* plane, Flag flag) {
  for (int64_t j = 0; j < channels; j += 8) {
    uint8_t byte = 0;
    for (int64_t i = 0; i < 8 && j + i < channels; ++i) byte |= uint8_t(flag(j + i)) << i;
    plane[j / 8] = byte;
  }
}

// Kept channels in their dtype, or as int8 with `step`.
template <class T, class Stored>
void pack_kept(const T* row, int64_t channels, const bool* keep, Stored* kept, T* step) {
  if constexpr (!std::is_same_v<Stored, int8_t>) {
    for (int64_t j = 0, rank = 0; j < channels; ++j) {
      if (keep[j]) kept[rank++] = row[j];
    }
  } else {
    float largest = 0;
    for (int64_t j = 0; j < channels; ++j) {
      if (keep[j]) largest = std::max(largest, std::abs(to_float(row[j])));
    }
    *step = from_float<T>(largest / 127);
    const float unit = to_float(*step) > 0 ? to_float(*step) : 1.0f;
    for (int64_t j = 0, rank = 0; j < channels; ++j) {
      if (!keep[j]) continue;
      kept[rank++] = int8_t(std::clamp(std::nearbyint(to_float(row[j]) / unit), -127.0f, 127.0f));
    }
  }
}

struct KeyRule {
  int64_t channels, kept;
  bool squared, spread;  // spread: "gaussian" recovery stores the deviation too
  const float *select, *recover;  // n^p per channel
};

// Packs one key; `room` is scratch of round_up(channels, LANES) floats and flags.
template <class T, class Stored>
void prune_key(const KeyRule& rule, const T* key, float* room, bool* keep, Stored* kept,
               uint8_t* planes, T* scale) {
  const int64_t channels = rule.channels, width = round_up(channels, LANES);
  for (int64_t j = 0; j < channels; ++j) room[j] = std::abs(to_float(key[j])) * rule.select[j];
  std::fill(room + channels, room + width, -1.0f);
  choose(room, channels, width, rule.kept, keep);
  const int64_t plane = (channels + 7) / 8;
  pack_plane(channels, planes, [&](int64_t j) { return keep[j]; });
  pack_plane(channels, planes + plane, [&](int64_t j) { return to_float(key[j]) < 0; });
  float total = 0, squares = 0;
  for (int64_t j = 0; j < channels; ++j) {
    const float x = std::abs(to_float(key[j])) * rule.recover[j];
    room[j] = rule.squared ? x * x : x;
    total += keep[j] ? 0.0f : room[j];
  }
  const float pruned = float(std::max<int64_t>(channels - rule.kept, 1)), mean = total / pruned;
  const auto power = [&](float x) { return std::min(rule.squared ? std::sqrt(x) : x, largest<T>()); };
  *scale++ = from_float<T>(power(mean));
  if (rule.spread) {
    for (int64_t j = 0; j < channels; ++j) squares += keep[j] ? 0.0f : (room[j] - mean) * (room[j] - mean);
    *scale++ = from_float<T>(power(std::sqrt(squares / pruned)));
  }
  pack_kept(key, channels, keep, kept, scale);
}

// Packs one value. Without a bias every channel is kept and there are neither bits nor a fill.
template <class T, class Stored>
void pack_value(int64_t channels, int64_t count, const float* bias, const T* value, float* room,
                bool* keep, Stored* rows, uint8_t* bits, T* scale) {
  if (!bias) {
    std::fill_n(keep, channels, true);
  } else {
    const int64_t width = round_up(channels, LANES);
    for (int64_t j = 0; j < channels; ++j) room[j] = std::abs(to_float(value[j])) + bias[j];
    std::fill(room + channels, room + width, -1.0f);
    choose(room, channels, width, count, keep);
    pack_plane(channels, bits, [&](int64_t j) { return keep[j]; });
    float total = 0;
    for (int64_t j = 0; j < channels; ++j) total += keep[j] ? 0.0f : to_float(value[j]);
    *scale++ = from_float<T>(total / float(std::max<int64_t>(channels - count, 1)));
  }
  pack_kept(value, channels, keep, rows, scale);
}

// sqrt(n) or n of a floored norm: what kernels/reference/prune.py multiplies magnitudes with.
inline void norm_powers(const float* norms, int64_t stride, int64_t channels, bool squared, float* powers) {
  double total = 0;
  for (int64_t j = 0; j < channels; ++j) total += norms[j * stride];
  const float lowest = std::max(float(total / channels) * 1e-3f, 1e-12f);
  for (int64_t j = 0; j < channels; ++j) {
    const float n = std::max(norms[j * stride], lowest);
    powers[j] = squared ? std::sqrt(n) : n;
  }
}

}  // namespace spark
