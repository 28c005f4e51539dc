// Blocks of bfloat16 keys and values for the tile registers (AMX) of recent Intel CPUs.
//
// A tile product gives the scores of 16 tokens with up to 16 queries: nothing is reduced across
// lanes, and the cost does not depend on the number of query heads that share the key head. Pruned
// channels are recovered to the precision of bfloat16, as the dense keys would be.
#pragma once

#include <immintrin.h>

#include "float_engine.h"

namespace spark {

// Shapes of the eight tile registers, as the processor reads them.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

inline __m512i words(__m512bh v) { return bit_cast<__m512i>(v); }

// The 32 stored channels at p as bfloat16; int8 becomes whole numbers, which bfloat16 holds exactly.
inline __m512i load_words(const bf16* p) { return _mm512_loadu_si512(p); }
inline __m512i load_words(const int8_t* p) {
  const __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
  const __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + 16)));
  return words(_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low)));
}
// The first `count` of them; nothing behind is read.
template <class Stored>
inline __m512i load_words(const Stored* p, int64_t count) {
  if (count >= 32) return load_words(p);
  Stored few[32] = {};
  std::memcpy(few, p, std::max<int64_t>(count, 0) * sizeof(Stored));
  return load_words(few);
}
template <class Stored>
inline __m512i load_words_guarded(const Stored* p, int count, const char* end) {
  return reinterpret_cast<const char*>(p + 32) <= end ? load_words(p) : load_words(p, count);
}

// As expand() in simd.h. From memory the instruction takes several times as long, so that the
// compiler must not be left to merge it with the load.
inline __m512i expand_words(__m512i others, __m512i packed, uint32_t bits) {
  asm("" : "+v"(packed));
  return _mm512_mask_expand_epi16(others, bits, packed);
}

inline uint32_t plane_word(const uint8_t* plane, int64_t first, int64_t bytes) {
  plane += first / 8, bytes -= first / 8;
  if (bytes >= 4) return load<uint32_t>(plane);
  return plane[0] | (bytes > 1 ? plane[1] << 8 : 0) | (bytes > 2 ? plane[2] << 16 : 0);
}

// K and V: what keys and values are stored in, bf16 or int8_t. Blocks of N tokens, 32 or 64.
template <class K, class V, int N>
class AmxEngine {
 public:
  static constexpr int BLOCK = N, QUERIES = 16;  // tokens, query rows
  static int64_t padded(int64_t channels) { return round_up(channels, 32); }
  // Rows of the sums: what a tile loads must be there.
  static int64_t padded_rows(int64_t rows) { return rows <= QUERIES ? rows : round_up(rows, QUERIES); }

  explicit AmxEngine(const Problem& p) : AmxEngine(p, std::min<int64_t>(QUERIES, p.query_rows())) {}
  // weight_rows: rows of the tiles that hold the weights and their sums with the values.
  AmxEngine(const Problem& p, int64_t weight_rows)
      : p_(p), key_width_(padded(p.key_dim)), value_width_(padded(p.value_dim)),
        room_width_(padded(p.kept_channels) + 32), groups_((p.query_rows() + QUERIES - 1) / QUERIES),
        keys_(scratch<bf16>(BLOCK * key_width_)),
        room_(scratch<bf16>(BLOCK * room_width_)), values_(scratch<bf16>(BLOCK * value_width_)),
        queries_(scratch<bf16>(groups_ * key_width_ * QUERIES)),
        weights_(scratch<float>(key_width_)) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
    for (int tile : {1, 3, 6}) config.rows[tile] = uint8_t(weight_rows);
    _tile_loadconfig(&config);
  }
  ~AmxEngine() { _tile_release(); }
  AmxEngine(const AmxEngine&) = delete;

  void start(int64_t b, int64_t h) {
    recovery_weights(p_, b, h, weights_.get());
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
    if (block.packed) return expand_packed(block);
    for (int t = 0; t < block.count; ++t) {
      const bf16* row = p_.tail.at<bf16>(block.batch, block.head, block.key_row + t);
      for (int64_t j = 0; j < key_width_; j += 32) {
        _mm512_store_si512(&keys_[t * key_width_ + j], load_words(row + j, p_.key_dim - j));
      }
    }
  }

  void expand_values(const Block& block) {
    const int64_t width = value_width_, channels = p_.value_dim;
    const int64_t value_bytes = width * sizeof(V);
    const Ahead ahead(p_.values.token * sizeof(V), early_bytes(value_bytes), value_bytes);
    for (int t = 0; t < BLOCK; t += 2) {
      ValueRow even(p_, block, t), odd(p_, block, t + 1);
      steps_[t] = even.step, steps_[t + 1] = odd.step;
      bf16* tile = &values_[t / 32 * 32 * width + t % 32 * 16];
      // Pairs of tokens side by side, as the tile product wants them; finish() undoes the order.
      const auto put = [&](__m512i a, __m512i b) {
        _mm512_store_si512(tile, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(tile + 16 * 32, _mm512_unpackhi_epi16(a, b));
        tile += 32 * 32;
      };
      if (!even.keep && width == channels && t + 1 < block.count) {
        ahead(even.row), ahead(odd.row);
        for (int64_t j = 0; j < width; j += 32) put(load_words(even.row + j), load_words(odd.row + j));
      } else {
        for (int64_t j = 0; j < width; j += 32) put(even.next(j, channels), odd.next(j, channels));
      }
    }
  }

  void scores(const Block& block, int64_t first, int count, float (*scores)[BLOCK]) {
    alignas(64) float dots[BLOCK][16];
    for (int t = 0; t < BLOCK; t += 32) multiply(&queries_[first * key_width_], &keys_[t * key_width_], dots + t);
    for (int t = 0; t < BLOCK; t += 16) {
      const F step = std::is_same_v<K, int8_t> && block.packed ? load(&key_steps_[t]) : splat(1.0f);
      for (int r = 0; r < count; r += 4) {
        F v[4];
        columns(dots + t, r, v);
        for (int i = 0; i < 4; ++i) store(&scores[r + i][t], v[i] * step);
      }
    }
  }

  void accumulate(const Block&, float (*weights)[BLOCK], int count, const float* rescale, float* sums) {
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
    _tile_loadd(1, pairs, sizeof(pairs[0]));
    if (N > 32) _tile_loadd(3, pairs[0] + 32, sizeof(pairs[0]));
    for (int64_t j = 0; j < width; j += 16) {
      _tile_loadd(6, sums + j, width * 4);
      _tile_loadd(7, &values_[j * 32], 64);
      _tile_dpbf16ps(6, 1, 7);
      if (N > 32) {
        _tile_loadd(5, &values_[(width + j) * 32], 64);
        _tile_dpbf16ps(6, 3, 5);
      }
      _tile_stored(6, sums + j, width * 4);
    }
  }

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
  void expand_packed(const Block& block) {
    const bf16* rows = nullptr;
    if constexpr (std::is_same_v<K, bf16>) {
      // Rows that end far enough before their tensor does may be read in whole vectors.
      const bf16* first = p_.kept.at<bf16>(block.batch, block.head, block.key_row);
      const bf16* last = first + (block.count - 1) * p_.kept.token + p_.kept_channels + 32;
      if (reinterpret_cast<const char*>(last) <= p_.kept.end) rows = first;
    }
    const int64_t step = rows ? p_.kept.token : room_width_;
    if (!rows) rows = copy_rows(block);
    switch (p_.key_dim) {
      case 64: return expand_rows<64>(block, rows, step);
      case 128: return expand_rows<128>(block, rows, step);
      default: expand_rows<0>(block, rows, step);
    }
  }

  // The block's kept channels as bfloat16, with 32 more that may be read behind each row.
  const bf16* copy_rows(const Block& block) {
    for (int t = 0; t < block.count; ++t) {
      const K* row = p_.kept.at<K>(block.batch, block.head, block.key_row + t);
      for (int64_t j = 0; j < p_.kept_channels; j += 32) {
        _mm512_storeu_si512(&room_[t * room_width_ + j], load_words_guarded(row + j, p_.kept_channels - j, p_.kept.end));
      }
    }
    return room_.get();
  }

  // CHANNELS: of a key, or 0 for any number; loops over known numbers become straight code.
  template <int CHANNELS>
  [[gnu::noinline]] void expand_rows(const Block& block, const bf16* rows, int64_t rows_step) {
    // Copies: what is stored below might, for all the compiler knows, change a member.
    const bool whole = CHANNELS;
    const int64_t width = whole ? CHANNELS : key_width_, plane = whole ? CHANNELS / 8 : (p_.key_dim + 7) / 8;
    const int64_t scale_step = p_.scale.token, plane_step = p_.bits.token, entries = p_.scale_entries;
    const int64_t row_bytes = p_.kept_channels * sizeof(K), step_bytes = p_.kept.token * sizeof(K);
    const bf16* scale = p_.scale.at<bf16>(block.batch, block.head, block.key_row);
    const uint8_t* keep = p_.bits.at<uint8_t>(block.batch, block.head, block.key_row);
    const char* row = p_.kept.at<char>(block.batch, block.head, block.key_row);
    const char* value = p_.values.at<char>(block.batch, block.head, block.value_row);
    const int64_t value_step = p_.values.token * sizeof(V);
    const Ahead kept_ahead(step_bytes, 0, row_bytes), planes_ahead(plane_step, 0, 2 * plane);
    const Ahead value_ahead(value_step, 0, early_bytes(p_.kept_values * sizeof(V)));
    const float* weights = weights_.get();
    bf16* key = keys_.get();
    for (int t = 0; t < block.count; ++t, scale += scale_step, keep += plane_step) {
      kept_ahead(row + t * step_bytes), planes_ahead(keep), value_ahead(value + t * value_step);
      float amplitude = to_float(scale[0]);
      if constexpr (std::is_same_v<K, int8_t>) {
        // Keys are in units of the step, the amplitude too. A step of 0: kept channels are 0.
        const float step = to_float(scale[entries - 1]);
        key_steps_[t] = step > 0 ? step : 1.0f;
        amplitude /= key_steps_[t];
      }
      const bf16 *stored = rows + t * rows_step, *const behind = stored + p_.kept_channels;
      for (int64_t j = 0; j < width; j += 32, key += 32) {
        const uint8_t* bits = keep + j / 8;
        const uint32_t mask = whole ? load<uint32_t>(bits) : plane_word(keep, j, plane);
        const uint32_t negative = whole ? load<uint32_t>(bits + plane) : plane_word(keep + plane, j, plane);
        const F low = load(weights + j) * amplitude, high = load(weights + j + 16) * amplitude;
        const __m512i signs = _mm512_maskz_set1_epi16(negative, int16_t(0x8000));
        const __m512i recovered = _mm512_xor_si512(words(_mm512_cvtne2ps_pbh(high, low)), signs);
        _mm512_store_si512(key, expand_words(recovered, load_words(stored), mask));
        stored = std::min(stored + __builtin_popcount(mask), behind);
      }
    }
  }

  // Dot products of 16 queries with 32 tokens.
  void multiply(const bf16* query, const bf16* keys, float (*dots)[16]) {
    const int64_t width = key_width_;
    // Sums side by side: a product waits 52 cycles for the one that it adds to.
    _tile_zero(0);
    _tile_zero(2);
    for (int64_t j = 0; j < width; j += 32) {
      _tile_loadd(7, query + j * QUERIES, 64);
      _tile_loadd(5, keys + j, width * 2);
      _tile_dpbf16ps(0, 5, 7);
      _tile_loadd(5, keys + 16 * width + j, width * 2);
      _tile_dpbf16ps(2, 5, 7);
    }
    _tile_stored(0, dots[0], 64);
    _tile_stored(2, dots[16], 64);
  }

  // Columns r to r + 3 of a tile as vectors of its 16 rows.
  template <class Number>
  static void columns(const Number (*tile)[16], int r, F* v) {
    for (int i = 0; i < 4; ++i) v[i] = four_rows(reinterpret_cast<const float*>(&tile[i][r]));
    transpose(v);
  }

  // Four columns of rows 0, 4, 8 and 12 of a tile.
  static F four_rows(const float* tile) {
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(tile));
    v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps(tile + 4 * 16));
    v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps(tile + 8 * 16));
    return _mm512_mask_broadcast_f32x4(v, 0xf000, _mm_loadu_ps(tile + 12 * 16));
  }

  // The 4 x 4 numbers in each quarter, transposed: rows of tokens become rows of queries.
  static void transpose(F* v) {
    const __m512 a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]);
    const __m512 c = _mm512_unpacklo_ps(v[2], v[3]), d = _mm512_unpackhi_ps(v[2], v[3]);
    v[0] = _mm512_shuffle_ps(a, c, 0x44), v[1] = _mm512_shuffle_ps(a, c, 0xee);
    v[2] = _mm512_shuffle_ps(b, d, 0x44), v[3] = _mm512_shuffle_ps(b, d, 0xee);
  }

  // One value, 32 channels after the other; zeros for a token that is not there.
  struct ValueRow {
    ValueRow(const Problem& p, const Block& block, int t) {
      if (t >= block.count) return;
      const int64_t token = block.value_row + t;
      row = p.values.at<V>(block.batch, block.head, token), end = p.values.end;
      channels_stored = int(p.kept_values);
      if (!p.value_scale.data) return;
      const bf16* scale = p.value_scale.at<bf16>(block.batch, block.head, token);
      if (std::is_same_v<V, int8_t>) {
        step = to_float(scale[p.value_entries - 1]);
        if (step == 0) step = 1.0f;
      }
      if (p.value_bits.data) {
        keep = p.value_bits.at<uint8_t>(block.batch, block.head, token);
        fill = _mm512_set1_epi16(from_float<bf16>(to_float(scale[0]) / step).bits);
      }
    }

    __m512i next(int64_t j, int64_t channels) {
      if (!row) return _mm512_setzero_si512();
      if (!keep) return load_words(row + j, channels - j);
      const uint32_t kept = plane_word(keep, j, (channels + 7) / 8);
      const int count = std::min(__builtin_popcount(kept), channels_stored - rank);
      const __m512i stored = load_words_guarded(row + rank, count, end);
      rank += count;
      return expand_words(fill, stored, kept);
    }

    const V* row = nullptr;
    const char* end = nullptr;
    const uint8_t* keep = nullptr;
    float step = 1.0f;  // the row's numbers are in units of it; the weights carry it
    __m512i fill = {};
    int channels_stored = 0, rank = 0;
  };

  const Problem& p_;
  const int64_t key_width_, value_width_, room_width_, groups_;
  Scratch<bf16> keys_, room_, values_, queries_;
  Scratch<float> weights_;
  alignas(64) float key_steps_[BLOCK], steps_[BLOCK];
};

}  // namespace spark
