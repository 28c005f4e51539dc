// The space of the format quantized: what its codes are levels of, kernels/formats/quantized.py.
//
// Channels are centered, scaled and ranked, and those of a part rotated. Scores and sums of values stay
// in that space: a query goes there once, and a sum of values comes back once.
#pragma once

#include "cache.h"
#include "rotation.h"

namespace spark {

// What a head says of that space; `order` may be anything in a damaged cache, and is bounded here.
class QuantizedHead {
 public:
  explicit QuantizedHead(const Format& f)
      : f_(f), center_(scratch<float>(scaled_channels())), factor_(scratch<float>(scaled_channels())),
        order_(scratch<int32_t>(scaled_channels())), part_(scratch<float>(f.dim + LANES)) {}

  void read(const Side& side, int64_t b, int64_t h) {
    const char* head = side.head.at(b, h, 0);
    const bf16* gain = reinterpret_cast<const bf16*>(head + f_.gain);
    for (int i = 0; i < f_.part_count; ++i) gain_[i] = to_float(gain[i]);
    if (!f_.scaled) return;
    const bf16 *center = reinterpret_cast<const bf16*>(head + f_.center), *factor = reinterpret_cast<const bf16*>(head + f_.factor);
    const int16_t* order = reinterpret_cast<const int16_t*>(head + f_.order);
    for (int64_t j = 0; j < f_.dim; ++j) {
      center_[j] = to_float(center[j]), factor_[j] = to_float(factor[j]);
      order_[j] = std::clamp<int32_t>(order[j], 0, int32_t(f_.dim) - 1);
    }
  }

  float gain(int part) const { return gain_[part]; }
  const float* center() const { return center_.get(); }
  const float* factor() const { return factor_.get(); }
  const int32_t* order() const { return order_.get(); }

  // Writes the channels of a part, rotated, with zeros after them up to a multiple of LANES.
  void gather(const Part& part, const float* from, float* to) const {
    for (int64_t i = 0; i < part.channels; ++i) to[i] = from[f_.scaled ? order_[part.first + i] : part.first + i];
    turn(part, to);
  }
  // Rotates the channels of a part, if that is wanted, and multiplies them; zeros follow them.
  void turn(const Part& part, float* numbers, float factor = 1.0f) const {
    std::fill(numbers + part.channels, numbers + round_up(part.channels, LANES), 0.0f);
    if (f_.rotated) return rotate(numbers, part.channels, factor);
    for (int64_t j = 0; j < part.channels; j += LANES) store(numbers + j, load(numbers + j) * factor);
  }

  // What meets levels in a score in place of a query [D]; adds what its score has beside them to `bias`.
  void turn_query(float* query, float* turned, float& bias) {
    for (int64_t j = 0; f_.scaled && j < f_.dim; ++j) {
      bias += query[j] * center_[j];
      query[j] /= factor_[j];
    }
    for (int p = 0; p < f_.part_count; ++p) {
      const Part& part = f_.parts[p];
      gather(part, query, part_.get());
      for (int64_t i = 0; i < part.channels; ++i) turned[part.first + i] = part_[i] * gain_[p];
    }
  }

  // Sums [D] of weighted levels become those of the values; `weight`: sum of the weights.
  void restore(float* sums, float weight) {
    const Scratch<float> ranked = uncleared_scratch<float>(f_.dim);
    for (int p = 0; p < f_.part_count; ++p) {
      const Part& part = f_.parts[p];
      std::copy_n(sums + part.first, part.channels, part_.get());
      turn(part, part_.get());
      for (int64_t i = 0; i < part.channels; ++i) ranked[part.first + i] = part_[i] * gain_[p];
    }
    if (!f_.scaled) return (void)std::copy_n(ranked.get(), f_.dim, sums);
    std::fill_n(sums, f_.dim, 0.0f);
    for (int64_t r = 0; r < f_.dim; ++r) sums[order_[r]] = ranked[r];
    for (int64_t j = 0; j < f_.dim; ++j) sums[j] = sums[j] / factor_[j] + center_[j] * weight;
  }

 private:
  int64_t scaled_channels() const { return f_.scaled ? f_.dim : 0; }

  const Format& f_;
  Scratch<float> center_, factor_;
  Scratch<int32_t> order_;
  Scratch<float> part_;
  float gain_[MAX_PARTS];
};

}  // namespace spark
