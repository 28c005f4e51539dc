// Blocks of int8 and quantized tokens, and of spark keys in int8, as bytes for integer products.
//
// Stored levels go into the products as they are, and queries and softmax weights, which they meet there, are
// whole numbers of a unit. Where products have bytes without sign, levels of keys are stored as level + 128, which
// the products' engine takes away again. Spark keys are two planes, kept channels and signs. Dense tokens are float32.
#pragma once

#include "float_engine.h"
#include "levels.h"
#include "query_digits.h"

namespace spark {

// What these products can do: values of one part, so that a weight carries their amplitude.
inline bool can_levels(const Problem& p) {
  const Format &keys = *p.keys.format, &values = *p.values.format;
  const auto has_levels = [](const Format& f) { return f.kind == Kind::int8 || f.kind == Kind::quantized; };
  return (has_levels(keys) || (keys.kind == Kind::spark && keys.int8)) && has_levels(values) && values.part_count <= 1;
}

// T: the model's dtype. Queries: as whole numbers, which meet levels + OFFSET. N: tokens of a block.
template <class T, class Queries, int N>
class LevelEngine : public FloatEngine<T, N> {
  using Base = FloatEngine<T, N>;
  static constexpr int OFFSET = Queries::OFFSET;

 public:
  static constexpr int BLOCK = Base::BLOCK;

  explicit LevelEngine(const Problem& p)
      : Base(p), parts_(columns_of(*p.keys.format)), width_(parts_.back().column + round_up(parts_.back().channels, 64)),
        value_width_(round_up(p.value_dim, 64)), keys_(scratch<uint8_t>(BLOCK * width_ + 64)),
        levels_(scratch<int8_t>(BLOCK * value_width_ + 64)), digits_(p.query_rows(), parts_.size(), width_) {}

  void start(int64_t b, int64_t h) {
    Base::start(b, h);
    if (!p_.packed) return;
    const Scratch<float> query = scratch<float>(width_);
    for (int64_t row = 0; row < p_.query_rows(); ++row) {
      const float* from = this->packed_query(row);
      for (size_t p = 0; p < parts_.size(); ++p) {
        float* to = &query[parts_[p].column];
        std::copy_n(from + parts_[p].first, parts_[p].channels, to);
        for (int64_t j = 0; parts_[p].signs && j < parts_[p].channels; ++j) to[j] *= this->key_weights()[j];
        digits_.split(row, p, parts_[p], to);
      }
    }
  }

  void expand_keys(const Block& block) {
    if (!block.packed) return Base::expand_keys(block);
    const Format& f = *p_.keys.format;
    p_.each_run(block, [&](const Run& run) {
      const TokenRequests requests = this->requests(BlockRequests::KEYS);
      uint8_t* out = &keys_[run.first * width_];
      if (f.int8) {
        if (f.kind != Kind::spark) copy_levels<OFFSET>(run.keys, run.count, p_.keys, out, width_, requests);
        else if (f.dim == 64) expand_kept<64>(run, out, requests);
        else if (f.dim == 128) expand_kept<128>(run, out, requests);
        else expand_kept<0>(run, out, requests);
        to_floats(run.keys.at<T>(f.step), run.count, amplitudes_[0] + run.first);
        if (f.kind == Kind::spark) to_floats(run.keys.at<T>(f.scale), run.count, amplitudes_[1] + run.first);
        return;
      }
      const uint8_t* codes = run.keys.at<uint8_t>(f.scale);
      for (int p = 0; p < f.part_count; ++p) {
        expand_part<OFFSET>(f.parts[p], run.keys.rows(f.channels), run.count, reinterpret_cast<int8_t*>(out) + parts_[p].column,
                         width_, p ? nullptr : &requests);
        read_amplitudes(codes, f.part_count, p, run.count, amplitudes_[p] + run.first);
      }
    });
  }

 protected:
  using Base::p_;

  // Steps of values, and 0 for tokens that are not there: what is left of earlier blocks meets weights of 0.
  void read_value_steps(const Block& block) {
    const Format& f = *p_.values.format;
    std::fill_n(steps_, BLOCK, 0.0f);
    p_.each_run(block, [&](const Run& run) {
      if (f.kind == Kind::int8) return to_floats(run.values.at<T>(f.step), run.count, steps_ + run.first);
      read_amplitudes(run.values.at<uint8_t>(f.scale), 1, 0, run.count, steps_ + run.first);
    });
  }

  // Levels of int8 tokens from `place` on, plus ADDED, as rows of `width` bytes.
  template <int ADDED>
  static void copy_levels(const Place& place, int count, const Side& side, uint8_t* out, int64_t width,
                          const TokenRequests& ahead) {
    const int64_t dim = side.format->dim;
    const Tokens rows = place.rows(side.format->channels);
    for (int t = 0; t < count; ++t, out += width) {
      ahead(t);
      const int8_t* row = reinterpret_cast<const int8_t*>(rows.at(t));
      for (int64_t j = 0; j < dim; j += WIDE) store_bytes(out + j, some_bytes(row + j, dim - j, side.pages_end) ^ splat_byte(ADDED));
    }
  }

  // Calls f with an integral constant of the rows, 1 to 4.
  template <class Function>
  static void with_rows(int count, const Function& f) {
    switch (count) {
      case 1: return f(std::integral_constant<int, 1>{});
      case 2: return f(std::integral_constant<int, 2>{});
      case 3: return f(std::integral_constant<int, 3>{});
      default: f(std::integral_constant<int, 4>{});
    }
  }

  // Weights times steps as whole numbers up to LIMIT; returns the unit.
  template <int LIMIT>
  float whole_weights(const float* weights, I* whole) const {
    F scaled[BLOCK / LANES], top{};
    AnyLane nan{};
    for (int i = 0; i < BLOCK / LANES; ++i) {
      scaled[i] = load(weights + LANES * i) * load(steps_ + LANES * i);
      top = spark::max(top, scaled[i]), nan |= any_lane(scaled[i] != scaled[i]);
    }
    const float largest = maximum(top), inverse = largest > 0 ? float(LIMIT) / largest : 0.0f;
    for (int i = 0; i < BLOCK / LANES; ++i) whole[i] = nearest_whole(scaled[i] * inverse);
    return is_set(nan) ? NAN : largest / float(LIMIT);
  }

  const std::vector<Columns> parts_;
  const int64_t width_, value_width_;
  Scratch<uint8_t> keys_;   // level + OFFSET
  Scratch<int8_t> levels_;  // of values
  Queries digits_;
  alignas(64) float amplitudes_[MAX_PARTS][BLOCK] = {};

 private:
  static void to_floats(const T* from, int count, float* numbers) {
    for (int t = 0; t < count; ++t) numbers[t] = to_float(from[t]);
  }

  // Kept channels, and 1 or -1 where channels are pruned; zeros elsewhere. DIM: channels of a key whose planes
  // are whole words, or 0 for any number.
  template <int DIM>
  [[gnu::noinline]] void expand_kept(const Run& run, uint8_t* out, const TokenRequests& requests) {
    const Format f = *p_.keys.format;
    const int64_t dim = DIM ? DIM : f.dim, plane = DIM ? DIM / 8 : f.plane(), signs = parts_.back().column, width = width_;
    const char* end = p_.keys.pages_end;
    const int8_t* row = run.keys.at<int8_t>(f.channels);
    const uint8_t *keep = run.keys.at<uint8_t>(f.keep), *negative = run.keys.at<uint8_t>(f.negative);
    const Bytes zero = splat_byte(OFFSET), plus = splat_byte(OFFSET + 1), minus = splat_byte(OFFSET - 1);
    for (int t = 0; t < run.count; ++t, row += f.kept, keep += plane, negative += plane, out += width) {
      requests(t);
      int64_t rank = 0;
      for (int64_t j = 0; j < dim; j += WIDE) {
        // More bits may be set than there are channels: they promise nothing.
        const ByteMask kept = plane_bytes(keep, j, plane), below = plane_bytes(negative, j, plane);
        const int64_t few = std::clamp<int64_t>(f.kept - rank, 0, __builtin_popcountll(kept));
        store_bytes(out + j, expand_bytes(kept, row + rank, few, end) ^ zero);
        rank += few;
        if (signs) store_bytes(out + signs + j, choose(kept, zero, choose(below, minus, plus)));
      }
    }
  }

  alignas(64) float steps_[BLOCK] = {};
};

}  // namespace spark
