// Encoding one token in its format; formulas in kernels/formats.
#pragma once

#include <bit>

#include "cache.h"

namespace spark {

// Bits t so that `count` of the numbers have bits >= t, or more where several equal t. Numbers >= 0
// have the order of their bits; a negative one (padding) is below all. Exact, one bit per step.
inline int32_t nth_largest(const float* numbers, int64_t width, int64_t count) {
  int32_t threshold = 0;
  for (int32_t bit = 1 << 30; bit; bit >>= 1) {
    const I candidate = splat(threshold | bit);
    int64_t found = 0;
    for (int64_t j = 0; j < width; j += LANES) found += std::popcount(lane_bits(load<I>(numbers + j) >= candidate));
    if (found >= count) threshold |= bit;
    if (found == count) break;
  }
  return threshold;
}

// Which channels of a token are kept, LANES bits at a time.
struct Kept {
  uint32_t words[MAX_HEAD / LANES];

  // The `count` largest, of equal ones the first; padding after the numbers is negative.
  void choose(const float* salient, int64_t width, int64_t count) {
    const int32_t threshold = nth_largest(salient, width, count);
    for (int64_t j = 0; j < width; j += LANES) {
      words[j / LANES] = lane_bits(load<I>(salient + j) > splat(threshold));
      count -= std::popcount(words[j / LANES]);
    }
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

  // Copies the kept ones of `from`, which has a number per channel.
  template <class Number>
  void compress(const Number* from, int64_t channels, Number* to) const {
    for (int64_t j = 0; j < channels; j += LANES) {
      for (uint32_t left = words[j / LANES]; left; left &= left - 1) *to++ = from[j + std::countr_zero(left)];
    }
  }
};

// Writes LANES bits of a plane from channel `first` on; nothing after its end.
inline void write_bits(uint8_t* plane, int64_t first, int64_t channels, uint32_t bits) {
  plane[first / 8] = uint8_t(bits);
  if (LANES > 8 && first + 8 < channels) plane[first / 8 + 1] = uint8_t(bits >> 8);
}

// sqrt(n) or n of a floored norm: what magnitudes are multiplied with.
inline void norm_powers(const float* norms, int64_t channels, bool squared, float* powers) {
  double total = 0;
  for (int64_t j = 0; j < channels; ++j) total += norms[j];
  const float lowest = std::max(float(total / channels) * 1e-3f, 1e-12f);
  for (int64_t j = 0; j < channels; ++j) {
    const float n = std::max(norms[j], lowest);
    powers[j] = squared ? std::sqrt(n) : n;
  }
}

// Encodes the tokens of one head after the other.
template <class T>
class Encoder {
 public:
  explicit Encoder(const Format& format)
      : f_(format), width_(round_up(f_.dim, LANES)), numbers_(scratch<float>(width_)), salient_(scratch<float>(width_)),
        select_(scratch<float>(width_)), recover_(scratch<float>(width_)), levels_(scratch<int8_t>(width_)) {
    kept_.all(f_.dim);
  }

  // The square roots of the statistics are the norms that select.
  void start(const Side& side, int64_t b, int64_t h) {
    if (f_.kind == Kind::pruned) std::copy_n(side.constant(b, h), f_.dim, select_.get());
    if (f_.kind != Kind::spark) return;
    const float *constant = side.constant(b, h), *stats = side.stats(b, h, side.step);
    for (int64_t j = 0; j < f_.dim; ++j) numbers_[j] = std::sqrt(stats[j]);
    norm_powers(numbers_.get(), f_.dim, f_.squared, select_.get());
    norm_powers(constant, f_.dim, f_.squared, recover_.get());
  }

  void encode(const T* row, const Place& place) {
    if (f_.kind == Kind::dense) return (void)std::memcpy(place.at(f_.channels), row, f_.row_bytes());
    for (int64_t j = 0; j < f_.dim; j += LANES) store(&numbers_[j], load_floats(row + j, f_.dim - j));
    if (f_.kind == Kind::spark) prune_key(place);
    if (f_.kind == Kind::pruned) prune_value(place);
    if (f_.int8) quantize(place);
    else kept_.compress(row, f_.dim, place.at<T>(f_.channels));
  }

 private:
  // Whatever the sign of a NaN, its saliency must be none of the negative ones, which padding has.
  void choose(const Place& place) {
    std::fill(&salient_[f_.dim], &salient_[width_], -1.0f);
    kept_.choose(salient_.get(), width_, f_.kept);
    uint8_t* plane = place.at<uint8_t>(f_.keep);
    for (int64_t j = 0; j < width_; j += LANES) write_bits(plane, j, f_.dim, kept_.words[j / LANES]);
  }

  // The mean of f(j) over the pruned channels.
  template <class Function>
  float pruned_mean(Function f) const {
    F total{};
    for (int64_t j = 0; j < width_; j += LANES) total += select(bit_cast<I>(kept_.mask(j)), F{}, f(j));
    return sum(total) / float(std::max<int64_t>(f_.dim - f_.kept, 1));
  }

  void prune_key(const Place& place) {
    uint8_t* negative = place.at<uint8_t>(f_.negative);
    for (int64_t j = 0; j < width_; j += LANES) {
      const F key = load(&numbers_[j]);
      store(&salient_[j], spark::abs(key * load(&select_[j])));
      write_bits(negative, j, f_.dim, lane_bits(key < F{}));
    }
    choose(place);
    const float mean = pruned_mean([&](int64_t j) {
      const F x = spark::abs(load(&numbers_[j])) * load(&recover_[j]);
      return f_.squared ? x * x : x;
    });
    *place.at<T>(f_.scale) = from_float<T>(std::min(f_.squared ? std::sqrt(mean) : mean, largest<T>()));
  }

  void prune_value(const Place& place) {
    for (int64_t j = 0; j < width_; j += LANES) store(&salient_[j], spark::abs(spark::abs(load(&numbers_[j])) + load(&select_[j])));
    choose(place);
    *place.at<T>(f_.scale) = from_float<T>(pruned_mean([&](int64_t j) { return load(&numbers_[j]); }));
  }

  // Kept channels as int8 in units of the largest one's 127th part.
  void quantize(const Place& place) {
    F top{};
    uint32_t nan = 0;  // max() passes over it
    for (int64_t j = 0; j < width_; j += LANES) {
      const F x = load(&numbers_[j]);
      top = spark::max(top, select(bit_cast<I>(kept_.mask(j)), spark::abs(x), F{}));
      nan |= lane_bits(x != x) & kept_.words[j / LANES];
    }
    const T stored = from_float<T>(nan ? NAN : maximum(top) / 127);
    *place.at<T>(f_.step) = stored;
    const float step = to_float(stored), unit = step > 0 ? step : 1.0f;
    for (int64_t j = 0; j < width_; j += LANES) {
      F level = load(&numbers_[j]) / unit;
      level = select(level != level, F{}, level);  // as the reference's integers have NaN
      level = spark::max(select(level > splat(127.0f), splat(127.0f), level), splat(-127.0f));
      // 1.5 * 2^23: what the sum loses is what rounding to a whole number takes.
      store_low_bytes(&levels_[j], __builtin_convertvector((level + 12582912.0f) - 12582912.0f, I));
    }
    int8_t* channels = place.at<int8_t>(f_.channels);
    if (f_.kind == Kind::int8) std::memcpy(channels, levels_.get(), f_.dim);
    else kept_.compress(levels_.get(), f_.dim, channels);
  }

  const Format& f_;
  const int64_t width_;
  Scratch<float> numbers_, salient_, select_, recover_;
  Scratch<int8_t> levels_;
  Kept kept_;
};

}  // namespace spark
