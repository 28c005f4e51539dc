// Blocks of bfloat16 keys and values for the tile registers (AMX) of recent Intel CPUs.
//
// A tile product gives the scores of 16 tokens with up to 16 queries: nothing is reduced across
// lanes, and the cost does not depend on the number of query heads that share the key head. Pruned
// channels are recovered to the precision of bfloat16, as the dense keys would be.
#pragma once

#include "amx_rows.h"
#include "float_engine.h"
#include "tiles.h"

namespace spark {

// Blocks of N tokens, 32 or 64.
template <int N>
class AmxEngine {
 public:
  static constexpr int BLOCK = N, QUERIES = 16;  // tokens, query rows
  static int64_t padded(int64_t channels) { return round_up(channels, 32); }
  // Rows of the sums: what a tile loads must be there.
  static int64_t padded_rows(int64_t rows) { return rows <= QUERIES ? rows : round_up(rows, QUERIES); }

  explicit AmxEngine(const Problem& p)
      : AmxEngine(p, std::min<int64_t>(QUERIES, p.query_rows()), padded(p.value_dim)) {}
  // weight_rows: rows of the tiles that hold the weights and their sums with the values.
  AmxEngine(const Problem& p, int64_t weight_rows, int64_t value_width)
      : p_(p), key_width_(padded(p.key_dim)), value_width_(value_width),
        room_width_(padded(p.keys.format->kept) + 32), groups_((p.query_rows() + QUERIES - 1) / QUERIES),
        keys_(scratch<bf16>(BLOCK * key_width_)),
        room_(scratch<bf16>(BLOCK * room_width_)), values_(scratch<bf16>(BLOCK * value_width_)),
        queries_(scratch<bf16>(groups_ * key_width_ * QUERIES)),
        weights_(scratch<float>(key_width_)),
        requests_({BLOCK / 4, p.query_rows(), BLOCK / 4, (p.query_rows() + QUERIES - 1) / QUERIES * value_width / 16}) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
    for (int tile : {1, 3, 6}) config.rows[tile] = uint8_t(weight_rows);
    TILE_CONFIGURE(&config);
  }
  ~AmxEngine() { TILE_RELEASE(); }
  AmxEngine(const AmxEngine&) = delete;

  void start(int64_t b, int64_t h) {
    recovery_weights(p_.keys, b, h, weights_.get());
    for (int64_t row = 0; row < p_.query_rows(); ++row) {
      const bf16* query = p_.query.at<bf16>(b, h * p_.group() + row / p_.queries, row % p_.queries);
      for (int64_t j = 0; j < p_.key_dim; ++j) {
        // Tiles of 32 channels: pairs of channels are rows, queries are columns.
        const int64_t at = (row / QUERIES * key_width_ + j / 2 * 2) * QUERIES + row % QUERIES * 2 + j % 2;
        queries_[at] = query[j];
      }
    }
  }

  void expand_keys(const Block& block) {
    const Format& f = *p_.keys.format;
    in_steps_ = block.packed && f.int8;
    if (!block.packed) {
      plain_keys<bf16>(block.keys, 0, block.old, nullptr);
      return plain_keys<bf16>(block.new_keys, block.old, block.count - block.old, nullptr);
    }
    p_.each_run(block, [&](const Run& run) {
      if (f.int8) read_column(run.keys.at<bf16>(f.step), run.count, key_steps_ + run.first);
      if (f.has_planes()) return f.int8 ? pruned_keys<int8_t>(run) : pruned_keys<bf16>(run);
      const AwakeRequests ahead = key_requests();
      const Tokens rows = run.keys.rows(f.channels);
      f.int8 ? plain_keys<int8_t>(rows, run.first, run.count, &ahead) : plain_keys<bf16>(rows, run.first, run.count, &ahead);
    });
  }

  void expand_values(const Block& block) {
    const Format& f = *p_.values.format;
    if (!block.packed || f.kind == Kind::dense) return plain_values(block);
    f.int8 ? pruned_values<int8_t>(block) : pruned_values<bf16>(block);
  }

  // Those of the first queries. scores() reads them when there was time to store them.
  void products(const Block&) { multiply_block(0); }

  void scores(const Block&, int64_t first, int count, float (*scores)[BLOCK]) {
    if (first) multiply_block(first);
    for (int t = 0; t < BLOCK; t += 16) {
      const F step = in_steps_ ? load(&key_steps_[t]) : splat(1.0f);
      for (int r = 0; r < count; r += 4) {
        F v[4];
        columns(dots_ + t, r, v);
        for (int i = 0; i < 4; ++i) store(&scores[r + i][t], v[i] * step);
      }
    }
  }

  void accumulate(const Block&, int64_t, int count, float (*weights)[BLOCK], const float* rescale, float* sums) {
    const int64_t width = value_width_;
    if (rescale) rescale_sums(rescale, count, width, sums);
    alignas(64) bf16 pairs[QUERIES][BLOCK];
    for (int r = 0; r < count; ++r) {
      for (int t = 0; t < BLOCK; t += 32) {
        const F low = load(&weights[r][t]) * load(&steps_[t]), high = load(&weights[r][t + 16]) * load(&steps_[t + 16]);
        _mm512_store_si512(&pairs[r][t], words(_mm512_cvtne2ps_pbh(high, low)));
      }
    }
    std::memset(pairs[count], 0, (QUERIES - count) * sizeof(pairs[0]));
    TILE_LOAD(1, pairs, sizeof(pairs[0]));
    if (N > 32) TILE_LOAD(3, pairs[0] + 32, sizeof(pairs[0]));
    for (int64_t j = 0; j < width; j += 16) {
      requests_(BlockRequests::SUMS);
      TILE_LOAD(6, sums + j, width * 4);
      TILE_LOAD(7, &values_[j * 32], 64);
      TILE_ADD_BF16(6, 1, 7);
      if (N > 32) {
        TILE_LOAD(5, &values_[(width + j) * 32], 64);
        TILE_ADD_BF16(6, 3, 5);
      }
      TILE_STORE(6, sums + j, width * 4);
    }
  }

  void begin(const Block& block) { requests_.begin(p_, block); }
  // Of each query row.
  void before_softmax() {
    requests_(BlockRequests::SOFTMAX);
    stay_awake();
  }

  // Sums of packed and of dense tokens have the same order.
  void finish_packed(Partial, int64_t) {}

  // Channels in their own order again.
  void finish(float* sums, int64_t rows) {
    for (int64_t at = 0; at < rows * value_width_; at += 32) {
      float ordered[32];
      for (int c = 0; c < 16; ++c) {
        const int channel = c / 4 * 8 + c % 4;
        ordered[channel] = sums[at + c], ordered[channel + 4] = sums[at + 16 + c];
      }
      std::memcpy(sums + at, ordered, sizeof(ordered));
    }
  }

 protected:
  static void stay_awake() { TILE_STAY_AWAKE(); }
  AwakeRequests key_requests() { return {{requests_, BlockRequests::KEYS}}; }

  // Keys that have every channel, those from `first` on of a block.
  template <class K>
  void plain_keys(const Tokens& rows, int first, int count, const AwakeRequests* ahead) {
    bf16* key = &keys_[first * key_width_];
    for (int t = 0; t < count; ++t, key += key_width_) {
      if (ahead) (*ahead)(t);
      const K* row = reinterpret_cast<const K*>(rows.at(t));
      for (int64_t j = 0; j < key_width_; j += 32) _mm512_store_si512(key + j, load_words(row + j, p_.key_dim - j));
    }
  }

  template <class K>
  void pruned_keys(const Run& run) {
    Tokens rows = run.keys.rows(p_.keys.format->channels);
    // Rows that end far enough before the pages do may be read in whole vectors.
    if (std::is_same_v<K, int8_t> || rows.at(run.count) + 64 > p_.keys.pages_end) {
      copy_rows<K>(rows, run.count);
      rows = {reinterpret_cast<const char*>(room_.get()), room_width_ * int64_t(sizeof(bf16))};
    }
    switch (p_.key_dim) {
      case 64: return expand_rows<K, 64>(run, rows);
      case 128: return expand_rows<K, 128>(run, rows);
      default: expand_rows<K, 0>(run, rows);
    }
  }

  // Kept channels as bfloat16, with 32 more that may be read after each row.
  template <class K>
  void copy_rows(const Tokens& rows, int count) {
    const int64_t kept = p_.keys.format->kept;
    for (int t = 0; t < count; ++t) {
      const K* row = reinterpret_cast<const K*>(rows.at(t));
      for (int64_t j = 0; j < kept; j += 32) {
        _mm512_storeu_si512(&room_[t * room_width_ + j], load_words_guarded(row + j, kept - j, p_.keys.pages_end));
      }
    }
  }

  // rows: the kept channels. CHANNELS: of a key, or 0 for any number; loops over known numbers become
  // straight code.
  template <class K, int CHANNELS>
  [[gnu::noinline]] void expand_rows(const Run& run, Tokens rows) {
    // Copies: what is stored below might, for all the compiler knows, change a member.
    const bool whole = CHANNELS;
    const Format f = *p_.keys.format;
    const AwakeRequests ahead = key_requests();
    const int64_t width = whole ? CHANNELS : key_width_, plane = whole ? CHANNELS / 8 : f.plane(), kept = f.kept;
    const bf16* amplitudes = run.keys.at<bf16>(f.scale);
    const uint8_t *keep = run.keys.at<uint8_t>(f.keep), *negative = run.keys.at<uint8_t>(f.negative);
    const float* weights = weights_.get();
    float* steps = key_steps_ + run.first;
    bf16* key = &keys_[run.first * width];
    for (int t = 0, count = run.count; t < count; ++t, rows.data += rows.step, keep += plane, negative += plane) {
      ahead(t);
      float amplitude = to_float(amplitudes[t]);
      if constexpr (std::is_same_v<K, int8_t>) {
        // Keys are in units of the step, the amplitude too. A step of 0: kept channels are 0.
        if (steps[t] == 0) steps[t] = 1.0f;
        amplitude /= steps[t];
      }
      const bf16 *stored = reinterpret_cast<const bf16*>(rows.data), *const end = stored + kept;
      for (int64_t j = 0; j < width; j += 32, key += 32) {
        const uint32_t mask = whole ? load<uint32_t>(keep + j / 8) : plane_word(keep, j, plane);
        const uint32_t turned = whole ? load<uint32_t>(negative + j / 8) : plane_word(negative, j, plane);
        const F low = load(weights + j) * amplitude, high = load(weights + j + 16) * amplitude;
        const __m512i signs = _mm512_maskz_set1_epi16(turned, int16_t(0x8000));
        const __m512i recovered = _mm512_xor_si512(words(_mm512_cvtne2ps_pbh(high, low)), signs);
        _mm512_store_si512(key, expand_words(recovered, load_words(stored), mask));
        stored = std::min(stored + __builtin_popcount(mask), end);
      }
    }
  }

  // Where a pair of tokens begins in the tiles of the values; finish() undoes the order of its channels.
  bf16* pair(int t) { return &values_[t / 32 * 32 * value_width_ + t % 32 * 16]; }

  // Before every four tokens whose values are expanded.
  void values_begin(int t) {
    requests_(BlockRequests::VALUES);
    if (t % 8 == 0) stay_awake();
  }

  // Values that have every channel.
  void plain_values(const Block& block) {
    const Format& f = *p_.values.format;
    const int64_t width = value_width_, channels = p_.value_dim;
    const bool packed = block.packed;
    Places places(p_.values, block);
    const auto find = [&](int t) -> const bf16* {
      if (t >= block.count) return nullptr;
      if (!packed) return reinterpret_cast<const bf16*>(block.value(t));
      return places.next().at<const bf16>(f.channels);
    };
    const auto some = [&](const bf16* row, int64_t j) { return row ? load_words(row + j, channels - j) : __m512i{}; };
    std::fill_n(steps_, BLOCK, 1.0f);
    for (int t = 0; t < BLOCK; t += 2) {
      const bf16 *even = find(t), *odd = find(t + 1);
      bf16* tile = pair(t);
      if (t % 4 == 0) values_begin(t);
      if (odd && width == channels) {
        for (int64_t j = 0; j < width; j += 32, tile += 1024) put_pair(tile, load_words(even + j), load_words(odd + j));
      } else {
        for (int64_t j = 0; j < width; j += 32, tile += 1024) put_pair(tile, some(even, j), some(odd, j));
      }
    }
  }

  template <class V>
  void pruned_values(const Block& block) {
    const int64_t width = value_width_;
    Places places(p_.values, block);
    const auto value = [&](int t) { return t < block.count ? PrunedValue<V>(p_.values, places.next()) : PrunedValue<V>(); };
    for (int t = 0; t < BLOCK; t += 2) {
      PrunedValue<V> even = value(t), odd = value(t + 1);
      if (t % 4 == 0) values_begin(t);
      steps_[t] = even.step, steps_[t + 1] = odd.step;
      bf16* tile = pair(t);
      for (int64_t j = 0; j < width; j += 32, tile += 1024) put_pair(tile, even.next(j), odd.next(j));
    }
  }

  void multiply_block(int64_t first) {
    for (int t = 0; t < BLOCK; t += 32) multiply(&queries_[first * key_width_], &keys_[t * key_width_], dots_ + t);
  }
  // Dot products of 16 queries with 32 tokens.
  void multiply(const bf16* query, const bf16* keys, float (*dots)[16]) {
    const int64_t width = key_width_;
    // Sums side by side: a product waits 52 cycles for the one that it adds to.
    TILE_ZERO(0);
    TILE_ZERO(2);
    for (int64_t j = 0; j < width; j += 32) {
      TILE_LOAD(7, query + j * QUERIES, 64);
      TILE_LOAD(5, keys + j, width * 2);
      TILE_ADD_BF16(0, 5, 7);
      TILE_LOAD(5, keys + 16 * width + j, width * 2);
      TILE_ADD_BF16(2, 5, 7);
    }
    TILE_STORE(0, dots[0], 64);
    TILE_STORE(2, dots[16], 64);
  }

  // Columns r to r + 3 of a tile as vectors of its 16 rows.
  template <class Number>
  static void columns(const Number (*tile)[16], int r, F* v) {
    for (int i = 0; i < 4; ++i) v[i] = four_rows(reinterpret_cast<const float*>(&tile[i][r]));
    transpose(v);
  }

  const Problem& p_;
  const int64_t key_width_, value_width_, room_width_, groups_;
  Scratch<bf16> keys_, room_, values_, queries_;
  Scratch<float> weights_;
  BlockRequests requests_;
  bool in_steps_ = false;  // keys are in units of key_steps_
  alignas(64) float key_steps_[BLOCK] = {}, steps_[BLOCK] = {}, dots_[BLOCK][16];
};

}  // namespace spark
