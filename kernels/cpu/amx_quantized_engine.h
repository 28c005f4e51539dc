// Blocks of quantized keys or values for the integer products of the tile registers.
//
// Levels are int8: they go to the tiles as stored int8 does. The amplitude of a token, and the gain, are
// factors of a whole product, one for each part of a key.
#pragma once

#include "amx_int8_engine.h"

namespace spark {

// What the integer tiles can do: values of one part, so that a weight carries their amplitude.
inline bool can_quantized_tiles(const Problem& p) {
  const Format &keys = *p.keys.format, &values = *p.values.format;
  const bool quantized_values = values.kind == Kind::quantized && values.part_count == 1;
  if (keys.kind == Kind::pruned) return false;
  return quantized_values || (keys.kind == Kind::quantized && values.kind == Kind::int8);
}

template <int N>
class AmxQuantizedEngine : public AmxInt8Engine<N> {
  using Base = AmxInt8Engine<N>;
  using Base::kept_dots_, Base::kept_, Base::key_width_, Base::query_, Base::steps_, Base::units, Base::value_width_;

 public:
  static constexpr int BLOCK = N;

  explicit AmxQuantizedEngine(const Problem& p)
      : Base(p, is_int8(*p.keys.format), width_of(*p.keys.format)), p_(p), turns_keys_(p.keys.format->kind == Kind::quantized),
        turns_values_(p.values.format->kind == Kind::quantized), key_head_(*p.keys.format), value_head_(*p.values.format),
        levels_(scratch<int8_t>(4 * value_width_)), biases_(scratch<float>(p.query_rows() + 8)) {}

  void start(int64_t b, int64_t h) {
    if (turns_values_ && p_.packed) value_head_.read(p_.values, b, h);
    if (!turns_keys_) return Base::start(b, h);
    AmxEngine<N>::start(b, h);
    if (!p_.packed) return;
    key_head_.read(p_.keys, b, h);
    const Format& f = *p_.keys.format;
    const Scratch<float> query = scratch<float>(f.dim + LANES), turned = scratch<float>(f.dim + LANES);
    for (int64_t row = 0; row < p_.query_rows(); ++row) {
      const bf16* from = p_.query.at<bf16>(b, h * p_.group() + row / p_.queries, row % p_.queries);
      for (int64_t j = 0; j < f.dim; ++j) query[j] = to_float(from[j]);
      key_head_.turn_query(query.get(), turned.get(), biases_[row] = 0);
      each_part([&](const Part& part, int64_t at) { std::copy_n(&turned[part.first], part.channels, &query_[at]); });
      this->split_query(row, 0);
    }
  }

  void expand_keys(const Block& block) {
    if (!block.packed || !turns_keys_) return Base::expand_keys(block);
    const Format& f = *p_.keys.format;
    p_.each_run(block, [&](const Run& run) {
      const AwakeRequests ahead = this->key_requests();
      each_part([&](const Part& part, int64_t at) {
        int8_t* out = &kept_[run.first * key_width_ + at];
        expand_part<0>(part, run.keys.rows(f.channels), run.count, out, key_width_, at ? nullptr : &ahead);
      });
      for (int p = 0; p < f.part_count; ++p) {
        read_amplitudes(run.keys.at<uint8_t>(f.scale), f.part_count, p, run.count, part_amplitudes_[p] + run.first);
      }
    });
  }

  void products(const Block& block) {
    if (!block.packed || !turns_keys_) return Base::products(block);
    multiply_part(0, p_.keys.format->parts[0], 0);
  }

  void scores(const Block& block, int64_t first, int count, float (*scores)[BLOCK]) {
    if (!block.packed || !turns_keys_) return Base::scores(block, first, count, scores);
    for (int r = 0; r < count; r += 8) score_eight(first + r, std::min(count - r, 8), scores + r);
  }

  void expand_values(const Block& block) {
    if (!block.packed || !turns_values_) return Base::expand_values(block);
    const Format& f = *p_.values.format;
    std::fill_n(steps_, BLOCK, 0.0f);
    p_.each_run(block, [&](const Run& run) {
      read_amplitudes(run.values.at<uint8_t>(f.scale), 1, 0, run.count, steps_ + run.first);
    });
    const auto tile_at = [&](int t) {
      this->values_begin(t);
      return &this->values_[tile_row(t) * 64];
    };
    put_quantized(p_.values, block, levels_.get(), value_width_, tile_at);
  }

  void finish_packed(Partial partial, int64_t rows) {
    Base::finish_packed(partial, rows);
    if (!turns_values_ || !p_.packed) return;
    // In the order of the channels, and back.
    Base::finish(partial.sums, rows);
    for (int64_t row = 0; row < rows; ++row) {
      float* sums = partial.sums + row * value_width_;
      value_head_.restore(sums, partial.softmax[row].total());
      for (int64_t at = 0; at < value_width_; at += 32) {
        float ordered[32];
        std::copy_n(sums + at, 32, ordered);
        for (int c = 0; c < 16; ++c) {
          const int channel = c / 4 * 8 + c % 4;
          sums[at + c] = ordered[channel], sums[at + 16 + c] = ordered[channel + 4];
        }
      }
    }
  }

 private:
  static bool is_int8(const Format& f) { return f.int8 || f.kind == Kind::quantized; }
  // Each part begins at a multiple of 64.
  static int64_t width_of(const Format& f) {
    if (f.kind != Kind::quantized) return Base::padded(f.dim);
    int64_t width = 0;
    for (int p = 0; p < f.part_count; ++p) width += round_up(f.parts[p].channels, 64);
    return width;
  }

  // Calls f(part, its first column) for the parts of a key.
  template <class Function>
  void each_part(const Function& f) const {
    const Format& keys = *p_.keys.format;
    for (int64_t p = 0, at = 0; p < keys.part_count; ++p) {
      f(keys.parts[p], at);
      at += round_up(keys.parts[p].channels, 64);
    }
  }

  // Eight queries with a part, from column `at` on, of all keys.
  void multiply_part(int64_t first, const Part& part, int64_t at) {
    this->multiply(&kept_[at], this->digits(first, 0) + at * 16, round_up(part.channels, 64), kept_dots_);
  }

  void score_eight(int64_t first, int count, float (*scores)[BLOCK]) {
    int p = 0;
    each_part([&](const Part& part, int64_t at) {
      if (first || p) multiply_part(first, part, at);
      for (int t = 0; t < BLOCK; t += 16) {
        const F amplitude = load(part_amplitudes_[p] + t);
        for (int r = 0; r < count; r += 4) {
          F k[4];
          Base::whole_numbers(kept_dots_ + t, r, k);
          for (int i = 0; i < 4; ++i) {
            const F before = p ? load(&scores[r + i][t]) : splat(biases_[first + r + i]);
            store(&scores[r + i][t], before + k[i] * (units(first, 0)[r + i] * amplitude));
          }
        }
      }
      ++p;
    });
  }

  const Problem& p_;
  const bool turns_keys_, turns_values_;
  QuantizedHead key_head_, value_head_;
  Scratch<int8_t> levels_;
  Scratch<float> biases_;
  alignas(64) float part_amplitudes_[MAX_PARTS][BLOCK] = {};
};

}  // namespace spark
