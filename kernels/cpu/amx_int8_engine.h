// Blocks of int8 values, and of int8 or bfloat16 keys, for the integer products of the tile registers.
//
// Stored numbers go to the tiles as they are; queries and softmax weights, which they meet there,
// are split into two int8 digits: x = unit * (128 * high + low), 15 bits of the largest one. Dense
// tokens take the way of the bfloat16 engine.
#pragma once

#include "amx_engine.h"
#include "amx_values.h"

namespace spark {

template <int N>
class AmxInt8Engine : public AmxEngine<N> {
  using Base = AmxEngine<N>;

 protected:
  using Base::columns, Base::key_steps_, Base::steps_, Base::weights_;

 public:
  static constexpr int BLOCK = N;
  // As many blocks have sums that fit 32 bits.
  static constexpr int64_t MOST_BLOCKS = (int64_t(1) << 31) / (64 * 127 * 127 + 1);
  static int64_t padded(int64_t channels) { return round_up(channels, 64); }
  // Two digits of eight queries at a time.
  static int64_t digit_rows(int64_t rows) { return 2 * std::min<int64_t>(rows, 8); }
  static int64_t padded_rows(int64_t rows) { return round_up(rows, digit_rows(rows)); }

  explicit AmxInt8Engine(const Problem& p) : AmxInt8Engine(p, p.keys.format->int8, padded(p.key_dim)) {}
  // int8_keys: whether products with packed keys are of int8; key_width: their numbers per token.
  AmxInt8Engine(const Problem& p, bool int8_keys, int64_t key_width)
      : Base(p, digit_rows(p.query_rows()), padded(p.value_dim)), p_(p), int8_keys_(int8_keys),
        has_signs_(p.keys.format->kind == Kind::spark && p.keys.format->recovers),
        key_width_(key_width), value_width_(padded(p.value_dim)), low_row_(digit_rows(p.query_rows()) / 2),
        kept_(scratch<int8_t>(int8_keys_ * BLOCK * key_width_ + 64)),
        signs_(scratch<int8_t>(int8_keys_ * BLOCK * key_width_)), values_(scratch<int8_t>(64 * value_width_)),
        eights_(int8_keys_ * (p.query_rows() + 7) / 8), digits_(scratch<int8_t>(2 * eights_ * 16 * key_width_)),
        units_(scratch<float>(2 * eights_ * 8)), query_(scratch<float>(key_width_)),
        whole_(scratch<int32_t>((p.query_rows() + 7) / 8 * value_width_ * 2 * low_row_)),
        sum_units_(scratch<float>(p.query_rows())) {}

  void start(int64_t b, int64_t h) {
    Base::start(b, h);
    for (int64_t row = 0; int8_keys_ && row < p_.query_rows(); ++row) {
      const bf16* query = p_.query.at<bf16>(b, h * p_.group() + row / p_.queries, row % p_.queries);
      for (int64_t j = 0; j < p_.key_dim; j += 16) store(&query_[j], load_floats(query + j, p_.key_dim - j));
      split_query(row, 0);
      if (!has_signs_) continue;
      for (int64_t j = 0; j < p_.key_dim; j += 16) store(&query_[j], load(&query_[j]) * load(&weights_[j]));
      split_query(row, 1);
    }
  }

  void expand_keys(const Block& block) {
    if (!block.packed || !int8_keys_) return Base::expand_keys(block);
    const Format& f = *p_.keys.format;
    p_.each_run(block, [&](const Run& run) {
      read_column(run.keys.at<bf16>(f.step), run.count, key_steps_ + run.first);
      if (f.kind == Kind::int8) return copy_levels(run);
      if (has_signs_) read_column(run.keys.at<bf16>(f.scale), run.count, amplitudes_ + run.first);
      const bool whole = run.keys.rows(f.channels).at(run.count) + 64 <= p_.keys.pages_end;
      if (whole && f.dim == 64) return expand_bytes<64>(run);
      if (whole && f.dim == 128) return expand_bytes<128>(run);
      expand_bytes<0>(run);
    });
  }

  void expand_values(const Block& block) {
    if (!block.packed) return Base::expand_values(block);
    const Format& f = *p_.values.format;
    const int64_t width = value_width_, channels = f.dim;
    Places places(p_.values, block);
    std::fill_n(steps_, BLOCK, 0.0f);
    p_.each_run(block, [&](const Run& run) { read_column(run.values.at<bf16>(f.step), run.count, steps_ + run.first); });
    for (int t = 0; t < BLOCK; t += 4) {
      this->values_begin(t);
      const bool whole = t + 4 <= block.count && channels == width;
      const int8_t* from[4] = {};
      for (int i = 0; i < 4 && t + i < block.count; ++i) from[i] = places.next().at<int8_t>(f.channels);
      for (int64_t j = 0; j < width; j += 64) {
        __m512i rows[4];
        for (int i = 0; i < 4; ++i) {
          rows[i] = whole ? _mm512_loadu_si512(from[i] + j) : from[i] ? some_bytes(from[i] + j, channels - j) : __m512i{};
        }
        put_four(rows, &values_[(j + tile_row(t)) * 64]);
      }
    }
  }

  void products(const Block& block) {
    if (!block.packed || !int8_keys_) return Base::products(block);
    multiply_eight(0);
  }

  void scores(const Block& block, int64_t first, int count, float (*scores)[BLOCK]) {
    if (!block.packed || !int8_keys_) return Base::scores(block, first, count, scores);
    for (int r = 0; r < count; r += 8) {
      has_signs_ ? score_eight<true>(first + r, std::min(count - r, 8), scores + r)
                 : score_eight<false>(first + r, std::min(count - r, 8), scores + r);
    }
  }

  void accumulate(const Block& block, int64_t first, int count, float (*weights)[BLOCK], const float* rescale, float* sums) {
    if (!block.packed) return Base::accumulate(block, first, count, weights, rescale, sums);
    if (first == 0) ++blocks_;
    for (int r = 0; r < count; r += 8) {
      accumulate_eight(first + r, std::min(count - r, 8), weights + r, rescale ? rescale + r : nullptr, sums + r * value_width_);
    }
  }

  // From the order of these sums to the one that dense tokens have; finish() undoes that one.
  void finish_packed(Partial partial, int64_t rows) {
    float* sums = partial.sums;
    for (int64_t row = 0; row < rows; ++row) add_whole(row, sums + row * value_width_);
    for (int64_t at = 0; at < rows * value_width_; at += 64) {
      float ordered[64];
      for (int i = 0; i < 64; ++i) ordered[i % 16 / 4 * 16 + i / 16 * 4 + i % 4] = sums[at + i];
      for (int i = 0; i < 64; ++i) {
        const int c = i % 16, channel = c / 4 * 8 + c % 4 + i % 32 / 16 * 4;
        sums[at + i] = ordered[i / 32 * 32 + channel];
      }
    }
  }

 protected:
  // kind 0: the query; 1: the query over n^p. Tiles of 64 channels: rows of four channels; columns 0
  // to 7 are the high digits of eight queries, columns 8 to 15 the low ones.
  int8_t* digits(int64_t row, int kind) { return &digits_[(row / 8 * 2 + kind) * 16 * key_width_]; }
  float* units(int64_t row, int kind) { return &units_[(row / 8 * 2 + kind) * 8]; }
  void split_query(int64_t row, int kind) {
    F top{};
    uint32_t nan = 0;  // no digits are worth it
    for (int64_t j = 0; j < key_width_; j += 16) {
      const F x = load(&query_[j]);
      top = spark::max(top, spark::abs(x)), nan |= lane_bits(x != x);
    }
    const float largest = maximum(top), inverse = largest > 0 ? DIGITS / largest : 0.0f;
    units(row, kind)[row % 8] = nan ? NAN : largest / DIGITS;
    int8_t* tile = digits(row, kind) + row % 8 * 4;
    for (int64_t j = 0; j < key_width_; j += 16, tile += 4 * 64) {
      int8_t high[16], low[16];
      split(load(&query_[j]) * inverse, high, low);
      for (int i = 0; i < 4; ++i) {
        std::memcpy(tile + 64 * i, high + 4 * i, 4);
        std::memcpy(tile + 64 * i + 32, low + 4 * i, 4);
      }
    }
  }

  // Keys that have every channel.
  void copy_levels(const Run& run) {
    const AwakeRequests ahead = this->key_requests();
    const int64_t channels = p_.key_dim;
    const int8_t* row = run.keys.at<int8_t>(p_.keys.format->channels);
    int8_t* kept = &kept_[run.first * key_width_];
    for (int t = 0; t < run.count; ++t, row += channels) {
      ahead(t);
      for (int64_t j = 0; j < key_width_; j += 64, kept += 64) _mm512_store_si512(kept, some_bytes(row + j, channels - j));
    }
  }

  // CHANNELS: of a key, with 64 bytes that may be read after each row; or 0 for any number.
  template <int CHANNELS>
  [[gnu::noinline]] void expand_bytes(const Run& run) {
    const bool whole = CHANNELS;
    const AwakeRequests ahead = this->key_requests();
    const Format f = *p_.keys.format;
    const int64_t width = whole ? CHANNELS : key_width_, plane = whole ? CHANNELS / 8 : f.plane(), channels = f.kept;
    const int8_t* row = run.keys.at<int8_t>(f.channels);
    const uint8_t *keep = run.keys.at<uint8_t>(f.keep), *negative = run.keys.at<uint8_t>(f.negative);
    int8_t *kept = &kept_[run.first * width], *signs = &signs_[run.first * width];
    const __m512i plus = _mm512_set1_epi8(1), minus = _mm512_set1_epi8(-1);
    for (int t = 0, count = run.count; t < count; ++t, row += channels, keep += plane, negative += plane) {
      ahead(t);
      int64_t rank = 0;
      for (int64_t j = 0; j < width; j += 64, kept += 64, signs += 64) {
        const uint64_t mask = whole ? load<uint64_t>(keep + j / 8) : plane_bytes(keep, j, plane);
        const uint64_t turned = whole ? load<uint64_t>(negative + j / 8) : plane_bytes(negative, j, plane);
        const int64_t few_count = std::min<int64_t>(__builtin_popcountll(mask), channels - rank);
        __m512i few = whole ? _mm512_loadu_si512(row + rank) : some_bytes(row + rank, few_count);
        asm("" : "+v"(few));  // expanding from memory takes several times as long
        _mm512_store_si512(kept, _mm512_maskz_expand_epi8(mask, few));
        _mm512_store_si512(signs, _mm512_mask_mov_epi8(_mm512_maskz_mov_epi8(~mask, plus), ~mask & turned, minus));
        rank += few_count;
      }
    }
  }

  // Sums of packed tokens, of eight queries, stay whole numbers while weights fit the digits of a query's unit: in
  // tiles of 16 channels whose first rows are those of high digits and whose last ones those of low digits.
  int32_t* whole_sums(int64_t row) { return &whole_[row / 8 * value_width_ * 2 * low_row_]; }
  // A query's whole numbers become floats, and 0.
  void add_whole(int64_t row, float* sums) {
    int32_t* high = whole_sums(row) + row % 8 * 16;
    for (int64_t j = 0; j < value_width_; j += 16, high += 2 * low_row_ * 16) {
      int32_t* low = high + low_row_ * 16;
      store(sums + j, load(sums + j) + joined(load<__m512i>(high), load<__m512i>(low)) * sum_units_[row]);
      std::fill_n(high, 16, 0), std::fill_n(low, 16, 0);
    }
    sum_units_[row] = 0;
  }

  // Up to eight queries from `first` on.
  void accumulate_eight(int64_t first, int count, float (*weights)[BLOCK], const float* rescale, float* sums) {
    const bool full = blocks_ % MOST_BLOCKS == 0;
    alignas(64) int8_t digits[16][64];  // rows of queries that are not there may be anything
    for (int r = 0; r < count; ++r) {
      F scaled[4] = {}, top{};
      for (int i = 0; i < BLOCK / 16; ++i) {
        scaled[i] = load(weights[r] + 16 * i) * load(steps_ + 16 * i);
        top = spark::max(top, scaled[i]);
      }
      float &unit = sum_units_[first + r], *row = sums + r * value_width_;
      const bool rescaled = rescale && rescale[r] != 1.0f;
      if (rescaled || full || lane_bits(top > splat(unit * DIGITS))) {
        add_whole(first + r, row);
        if (rescaled) rescale_sums(rescale + r, 1, value_width_, row);
        unit = maximum(top) / DIGITS;
      }
      const F all = (scaled[0] + scaled[1]) + (scaled[2] + scaled[3]);
      if (lane_bits(all != all)) std::fill_n(row, value_width_, NAN);  // no digits are worth it
      split_weights(scaled, unit > 0 ? 1 / unit : 0.0f, digits[r], digits[low_row_ + r]);
    }
    TILE_LOAD(1, digits, 64);
    const int8_t* values = values_.get();
    int32_t* whole = whole_sums(first);
    for (int64_t j = 0, step = 2 * low_row_ * 16; j < value_width_; j += 32, values += 2048, whole += 2 * step) {
      this->requests_(BlockRequests::SUMS);
      TILE_LOAD(3, whole, 64);
      TILE_LOAD(5, values, 64);
      TILE_ADD_INT8(3, 1, 5);
      this->requests_(BlockRequests::SUMS);
      TILE_LOAD(6, whole + step, 64);
      TILE_LOAD(7, values + 1024, 64);
      TILE_ADD_INT8(6, 1, 7);
      TILE_STORE(3, whole, 64);
      TILE_STORE(6, whole + step, 64);
    }
  }

  // Eight queries with all tokens of a packed block.
  void multiply_eight(int64_t first) {
    multiply(kept_.get(), digits(first, 0), key_width_, kept_dots_);
    if (has_signs_) multiply(signs_.get(), digits(first, 1), key_width_, sign_dots_);
  }

  template <bool SIGNS>
  void score_eight(int64_t first, int count, float (*scores)[BLOCK]) {
    if (first) multiply_eight(first);
    for (int t = 0; t < BLOCK; t += 16) {
      const F step = load(key_steps_ + t), amplitude = load(amplitudes_ + t);
      for (int r = 0; r < count; r += 4) {
        F k[4], s[4] = {};
        whole_numbers(kept_dots_ + t, r, k);
        if (SIGNS) whole_numbers(sign_dots_ + t, r, s);
        for (int i = 0; i < 4; ++i) {
          F dot = k[i] * (units(first, 0)[r + i] * step);
          if (SIGNS) dot += s[i] * (units(first, 1)[r + i] * amplitude);
          store(&scores[r + i][t], dot);
        }
      }
    }
  }

  // Columns r to r + 3 of 16 tokens: 128 * (high digits) + low ones.
  static void whole_numbers(const int32_t (*tile)[16], int r, F* numbers) {
    F low[4];
    columns(tile, r, numbers);
    columns(tile, r + 8, low);
    for (int i = 0; i < 4; ++i) numbers[i] = joined(bit_cast<__m512i>(numbers[i]), bit_cast<__m512i>(low[i]));
  }

  // Products of a block's tokens with the digits of eight queries, in `channels` columns; sums side by side.
  void multiply(const int8_t* keys, const int8_t* query, int64_t channels, int32_t (*dots)[16]) {
    const int64_t width = key_width_;
    for (int t = 0; t < BLOCK; t += 32, keys += 32 * width) {
      TILE_ZERO(0);
      TILE_ZERO(2);
      for (int64_t j = 0; j < channels; j += 64) {
        TILE_LOAD(7, query + j * 16, 64);
        TILE_LOAD(5, keys + j, width);
        TILE_ADD_INT8(0, 5, 7);
        TILE_LOAD(4, keys + 16 * width + j, width);
        TILE_ADD_INT8(2, 4, 7);
      }
      TILE_STORE(0, dots[t], 64);
      TILE_STORE(2, dots[t + 16], 64);
    }
  }

  const Problem& p_;
  const bool int8_keys_, has_signs_;
  const int64_t key_width_, value_width_, low_row_;
  Scratch<int8_t> kept_, signs_, values_;
  const int64_t eights_;
  Scratch<int8_t> digits_;
  Scratch<float> units_, query_;
  Scratch<int32_t> whole_;
  Scratch<float> sum_units_;
  int64_t blocks_ = 0;
  alignas(64) float amplitudes_[BLOCK] = {};
  alignas(64) int32_t kept_dots_[BLOCK][16], sign_dots_[BLOCK][16];
};

}  // namespace spark
