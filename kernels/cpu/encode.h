// Encoding one token in its format; formulas in kernels/formats.
#pragma once

#include "cache.h"
#include "kept.h"

namespace spark {

// Writes LANES bits of a plane from channel `first` on; nothing after its end.
inline void write_bits(uint8_t* plane, int64_t first, int64_t channels, uint32_t bits) {
  if (LANES < 8 && first % 8) return (void)(plane[first / 8] |= uint8_t(bits << LANES));
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
        select_(scratch<float>(width_)), recover_(scratch<float>(width_)), levels_(scratch<int8_t>(width_)),
        kept_numbers_(scratch<float>(width_ + LANES)) {
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

  static constexpr int TOGETHER = 1;

  // As QuantizedEncoder's.
  void encode(const T* const (&rows)[TOGETHER], const Place& place, int) {
    const T* row = rows[0];
    if (f_.kind == Kind::dense) return (void)std::memcpy(place.at(f_.channels), row, f_.row_bytes());
    const int64_t whole = f_.dim / LANES * LANES;
    float* numbers = numbers_.get();
    for (int64_t j = 0; j < whole; j += LANES) store(numbers + j, load_floats(row + j));
    if (whole < f_.dim) store(numbers + whole, load_floats(row + whole, f_.dim - whole));
    if (f_.kind == Kind::spark) prune_key(place);
    if (f_.kind == Kind::pruned) prune_value(place);
    if (f_.int8) quantize(place);
    else keep(row, place);
  }

 private:
  // Copies the kept ones of numbers by channel. What compressing writes behind them would be another field.
  template <class Number>
  void keep(const Number* numbers, const Place& place) {
    Number* kept = reinterpret_cast<Number*>(kept_numbers_.get());
    const int64_t whole = f_.dim / LANES * LANES, rest = f_.dim - whole;
    kept_.compress(numbers, whole, kept);
    if (rest) {
      Number some[LANES] = {}, last[LANES];
      std::copy_n(numbers + whole, rest, some);
      const int64_t more = compress(some, kept_.words[whole / LANES], last);
      std::copy_n(last, more, kept + f_.kept - more);
    }
    std::memcpy(place.at(f_.channels), kept, f_.kept * sizeof(Number));
  }

  // Whatever the sign of a NaN, its saliency must be none of the negative ones, which padding has.
  void choose(const Place& place) {
    std::fill(&salient_[f_.dim], &salient_[width_], -1.0f);
    kept_.choose(salient_.get(), width_, f_.kept);
    uint8_t* plane = place.at<uint8_t>(f_.keep);
    // Bytes may be written anywhere, as far as compilers know: what loops need is in variables.
    const int64_t dim = f_.dim;
    for (int64_t j = 0; j < dim; j += LANES) write_bits(plane, j, dim, kept_.words[j / LANES]);
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
    const int64_t dim = f_.dim;
    const float *numbers = numbers_.get(), *norms = select_.get();
    float* salient = salient_.get();
    for (int64_t j = 0; j < dim; j += LANES) {
      const F key = load(numbers + j);
      store(salient + j, spark::abs(key * load(norms + j)));
      write_bits(negative, j, dim, lane_bits(key < F{}));
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
    for (int64_t j = 0; j < width_; j += LANES) {
      const I x = load<I>(&numbers_[j]) & bit_cast<I>(kept_.mask(j));
      top = max_or_nan(top, spark::abs(bit_cast<F>(x)));
    }
    const T stored = from_float<T>(maximum_or_nan(top) / 127);
    *place.at<T>(f_.step) = stored;
    const float step = to_float(stored), unit = step > 0 ? step : 1.0f;
    const int64_t width = width_;
    const float* numbers = numbers_.get();
    int8_t* levels = levels_.get();
    for (int64_t j = 0; j < width; j += LANES) {
      F level = load(numbers + j) / unit;
      level = select(level != level, F{}, level);  // as the reference's integers have NaN
      level = spark::max(select(level > splat(127.0f), splat(127.0f), level), splat(-127.0f));
      // 1.5 * 2^23: what the sum loses is what rounding to a whole number takes.
      store_low_bytes(levels + j, __builtin_convertvector((level + 12582912.0f) - 12582912.0f, I));
    }
    if (f_.kind == Kind::int8) std::memcpy(place.at(f_.channels), levels_.get(), f_.dim);
    else keep(levels_.get(), place);
  }

  const Format& f_;
  const int64_t width_;
  Scratch<float> numbers_, salient_, select_, recover_;
  Scratch<int8_t> levels_;
  Scratch<float> kept_numbers_;  // of any type
  Kept kept_;
};

}  // namespace spark
