// Encoding tokens in the format quantized, and the constants of a head: kernels/formats/quantized.py.
#pragma once

#include <numeric>

#include "quantized.h"

namespace spark {

// Encodes the tokens of one head after the other.
template <class T>
class QuantizedEncoder {
  static constexpr int REFITS = 2;

 public:
  explicit QuantizedEncoder(const Format& f)
      : f_(f), head_(f), row_(scratch<float>(f.dim + LANES)), numbers_(scratch<float>(padded(f))),
        gains_(scratch<float>(padded(f))), codes_(scratch<uint8_t>(f.dim + LANES + 8)) {}

  void start(const Side& side, int64_t b, int64_t h) {
    head_.read(side, b, h);
    expected_ = 0;
    each_part([&](int p, const Part& part, int64_t at) {
      std::fill_n(&gains_[at], part.channels, head_.gain(p));
      const float size = head_.gain(p) * DEVIATION[part.bits - 1];
      expected_ += size * size * float(part.channels);
    });
  }

  void encode(const T* row, char* record) {
    spread(row);
    const float amplitude = f_.is_even() ? largest_level() : refitted();
    *reinterpret_cast<T*>(record + f_.scale) = from_float<T>(amplitude);
    const float unit = amplitude > 0 ? amplitude : 1.0f;
    each_part([&](int, const Part& part, int64_t at) {
      with_bits(part.bits, [&](auto bits) {
        const Table<bits> middles(grid_of(bits, f_.is_even()).middles);
        for (int64_t j = 0; j < part.channels; j += LANES) {
          store_codes(&codes_[j], nearest<bits>(load(&numbers_[at + j]) / unit, middles));
        }
        std::fill_n(&codes_[part.channels], 8, uint8_t(0));
        pack_codes<bits>(codes_.get(), part.channels, reinterpret_cast<uint8_t*>(record + part.codes));
      });
    });
    std::memset(record + f_.record_used, 0, f_.record_bytes - f_.record_used);
  }

 private:
  static int64_t padded(const Format& f) { return f.dim + f.part_count * LANES; }

  // Calls f(index, part, its place in `numbers_`).
  template <class Function>
  void each_part(const Function& f) const {
    for (int64_t p = 0, at = 0; p < f_.part_count; ++p) {
      f(int(p), f_.parts[p], at);
      at += round_up(f_.parts[p].channels, LANES);
    }
  }

  // Part after part in units of its gain: what is next to amplitude * level.
  void spread(const T* row) {
    for (int64_t j = 0; j < f_.dim; j += LANES) {
      F x = load_floats(row + j, f_.dim - j);
      if (f_.scaled) x = (x - load(head_.center() + j)) * load(head_.factor() + j);
      store(&row_[j], x);
    }
    each_part([&](int p, const Part& part, int64_t at) {
      head_.gather(part, row_.get(), &numbers_[at]);
      if (!f_.scaled) return;
      for (int64_t j = 0; j < part.channels; j += LANES) store(&numbers_[at + j], load(&numbers_[at + j]) / head_.gain(p));
    });
  }

  // As it is stored. A NaN stays one.
  static float stored(float amplitude) {
    return to_float(from_float<T>(amplitude > largest<T>() ? largest<T>() : amplitude));
  }

  float largest_level() const {
    F top{};
    uint32_t nan = 0;  // max() passes over it
    for (int64_t j = 0; j < f_.dim; j += LANES) {
      const F x = load(&numbers_[j]);
      top = spark::max(top, spark::abs(x)), nan |= lane_bits(x != x);
    }
    return nan ? NAN : stored(maximum(top) / float((1 << f_.parts[0].bits) - 1));
  }

  // The amplitude of normal channels, then the least squares for the levels that it has led to.
  float refitted() const {
    F energy{};
    each_part([&](int, const Part& part, int64_t at) {
      for (int64_t j = at; j < at + part.channels; j += LANES) {
        const F x = load(&numbers_[j]) * load(&gains_[j]);
        energy += x * x;
      }
    });
    float amplitude = stored(std::sqrt(sum(energy) / expected_));
    for (int i = 0; i < REFITS; ++i) {
      const float unit = amplitude > 0 ? amplitude : 1.0f;
      F with_level{}, with_itself{};
      each_part([&](int, const Part& part, int64_t at) {
        with_bits(part.bits, [&](auto bits) {
          const Grid& grid = grid_of(bits, false);
          const Table<bits> middles(grid.middles), levels(grid.levels);
          for (int64_t j = at; j < at + part.channels; j += LANES) {
            const F x = load(&numbers_[j]), gain = load(&gains_[j]);
            const F level = levels[nearest<bits>(x / unit, middles)] * gain;
            with_level += x * gain * level, with_itself += level * level;
          }
        });
      });
      amplitude = stored(sum(with_level) / sum(with_itself));
    }
    return amplitude;
  }

  const Format& f_;
  QuantizedHead head_;
  Scratch<float> row_, numbers_, gains_;
  Scratch<uint8_t> codes_;
  float expected_ = 0;
};

// At least a hundredth of the mean, and positive; if one is a NaN, all are.
inline void raise_to_floor(double* numbers, int64_t count) {
  const double mean = std::accumulate(numbers, numbers + count, 0.0) / double(count);
  const double least = std::isnan(mean) ? mean : std::max(mean * 0.01, 1e-12);
  for (int64_t i = 0; i < count; ++i) numbers[i] = numbers[i] > least ? numbers[i] : least;
}

// The means of f(channels, j) over tokens, for each channel; rows(s): token s.
template <class Rows, class Function>
void channel_means(const Rows& rows, int64_t count, int64_t channels, const Function& f, double* means) {
  const Scratch<float> some = uncleared_scratch<float>(round_up(channels, LANES));
  std::fill_n(means, channels, 0.0);
  for (int64_t first = 0; first < count; first += 64) {
    std::fill_n(some.get(), round_up(channels, LANES), 0.0f);
    for (int64_t s = first; s < std::min<int64_t>(count, first + 64); ++s) {
      for (int64_t j = 0; j < channels; j += LANES) {
        store(&some[j], load(&some[j]) + f(load_floats(rows(s) + j, channels - j), j));
      }
    }
    for (int64_t j = 0; j < channels; ++j) means[j] += some[j];
  }
  for (int64_t j = 0; j < channels; ++j) means[j] /= double(count);
}

// Writes center, factor, order and gain of a head; stats: whose square roots are the query norms.
template <class Rows>
void quantized_constants(const Format& f, const Rows& rows, int64_t count, const float* stats, char* head) {
  const int64_t channels = f.dim;
  bf16 *center = reinterpret_cast<bf16*>(head + f.center), *factor = reinterpret_cast<bf16*>(head + f.factor);
  bf16* gain = reinterpret_cast<bf16*>(head + f.gain);
  int16_t* order = reinterpret_cast<int16_t*>(head + f.order);
  const Scratch<double> spread = scratch<double>(channels), floored = scratch<double>(channels), norms = scratch<double>(channels);
  const Scratch<float> middle = scratch<float>(channels), rank = scratch<float>(channels);
  channel_means(rows, count, channels, [](F x, int64_t) { return x; }, spread.get());
  for (int64_t j = 0; j < channels; ++j) {
    center[j] = from_float<bf16>(float(spread[j]));
    middle[j] = to_float(center[j]);
  }
  const auto squared = [&](F x, int64_t j) { return (x - load(&middle[j])) * (x - load(&middle[j])); };
  channel_means(rows, count, channels, squared, spread.get());
  for (int64_t j = 0; j < channels; ++j) {
    floored[j] = spread[j] = std::sqrt(spread[j]);
    norms[j] = std::sqrt(stats[j]);
  }
  raise_to_floor(floored.get(), channels);
  raise_to_floor(norms.get(), channels);
  for (int64_t j = 0; j < channels; ++j) {
    factor[j] = from_float<bf16>(float(std::sqrt(norms[j] / floored[j])));
    rank[j] = float(spread[j]) * to_float(factor[j]);
  }
  std::iota(order, order + channels, int16_t(0));
  // A NaN is the largest.
  const auto larger = [&](int a, int b) { return rank[a] > rank[b] || (rank[a] != rank[a] && rank[b] == rank[b]); };
  std::stable_sort(order, order + channels, larger);
  double sizes[MAX_PARTS];
  for (int p = 0; p < f.part_count; ++p) {
    const Part& part = f.parts[p];
    double energy = 0;  // which no rotation changes
    for (int64_t r = part.first; r < part.first + part.channels; ++r) {
      const double size = spread[order[r]] * to_float(factor[order[r]]);
      energy += size * size;
    }
    sizes[p] = std::sqrt(energy / double(part.channels));
  }
  raise_to_floor(sizes, f.part_count);
  for (int p = 0; p < f.part_count; ++p) {
    gain[p] = from_float<bf16>(float(sizes[p] / (f.is_even() ? 1.0 : double(DEVIATION[f.parts[p].bits - 1]))));
  }
}

}  // namespace spark
