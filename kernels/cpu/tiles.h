// The tile registers (AMX): eight matrices of 16 rows of 64 bytes, and their products.
//
// Macros, because the number of a tile is part of the instruction. With -DSPARK_EMULATED_TILES, FOR
// TESTS ALONE, plain C++ stands in for the registers, so that a machine without them runs the same
// engines; it is many times slower.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace spark {

// Shapes of the tiles, as the processor reads them.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace spark

#if !defined(SPARK_EMULATED_TILES)

// GCC's headers do not say what these two instructions read: of the configuration the first 8 bytes, of
// a tile's rows nothing. It then leaves out stores to the rest, or makes them afterwards.
#define TILE_CONFIGURE(config) asm volatile("ldtilecfg %0" ::"m"(*(config)))
#define TILE_LOAD(tile, from, step_bytes) \
  do { \
    asm volatile("" ::: "memory"); \
    _tile_loadd(tile, from, step_bytes); \
  } while (0)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_STORE(tile, to, step_bytes) _tile_stored(tile, to, step_bytes)
// Adds the product of bfloat16 tiles, pairs of whose numbers meet, to a tile of floats.
#define TILE_ADD_BF16(sums, left, right) _tile_dpbf16ps(sums, left, right)
// The same with int8, four of which meet, and int32.
#define TILE_ADD_INT8(sums, left, right) _tile_dpbssd(sums, left, right)
// After 0.2 us without a product the multiplier sleeps, and wakes up in 0.3 us. A product that nobody reads,
// of a tile of few rows that is about to be loaded anyway, keeps it awake.
#define TILE_STAY_AWAKE() _tile_dpbssd(6, 1, 7)

#else

namespace spark::emulated {

struct Tile {
  int rows = 0, row_bytes = 0;
  alignas(64) uint8_t bytes[16][64] = {};

  template <class Number>
  Number& at(int row, int column) {
    return reinterpret_cast<Number*>(bytes[row])[column];
  }
};

inline Tile& tile(int number) {
  static thread_local Tile tiles[8];
  return tiles[number];
}

inline void configure(const TileConfig* config) {
  for (int i = 0; i < 8; ++i) {
    tile(i) = Tile{};
    if (config) tile(i).rows = config->rows[i], tile(i).row_bytes = config->row_bytes[i];
  }
}

inline void zero(int number) { std::memset(tile(number).bytes, 0, sizeof(Tile::bytes)); }

inline void load(int number, const void* from, int64_t step_bytes) {
  zero(number);
  Tile& to = tile(number);
  for (int r = 0; r < to.rows; ++r) std::memcpy(to.bytes[r], static_cast<const char*>(from) + r * step_bytes, to.row_bytes);
}

inline void store(int number, void* to, int64_t step_bytes) {
  Tile& from = tile(number);
  for (int r = 0; r < from.rows; ++r) std::memcpy(static_cast<char*>(to) + r * step_bytes, from.bytes[r], from.row_bytes);
}

// Number: of the factors, as many of which meet as are in four bytes; Sum: what they are added to.
template <class Number, class Sum, class Value>
void add_product(int sums, int left, int right, Value value) {
  constexpr int MEET = 4 / sizeof(Number);
  Tile &to = tile(sums), &a = tile(left), &b = tile(right);
  for (int r = 0; r < to.rows; ++r) {
    for (int k = 0; k < a.row_bytes / 4; ++k) {
      for (int c = 0; c < to.row_bytes / 4; ++c) {
        for (int i = 0; i < MEET; ++i) {
          to.at<Sum>(r, c) += value(a.at<Number>(r, MEET * k + i)) * value(b.at<Number>(k, MEET * c + i));
        }
      }
    }
  }
}

}  // namespace spark::emulated

#define TILE_CONFIGURE(config) spark::emulated::configure(config)
#define TILE_RELEASE() spark::emulated::configure(nullptr)
#define TILE_ZERO(tile) spark::emulated::zero(tile)
#define TILE_LOAD(tile, from, step_bytes) spark::emulated::load(tile, from, step_bytes)
#define TILE_STORE(tile, to, step_bytes) spark::emulated::store(tile, to, step_bytes)
#define TILE_ADD_BF16(sums, left, right) \
  spark::emulated::add_product<spark::bf16, float>(sums, left, right, [](spark::bf16 x) { return spark::to_float(x); })
#define TILE_ADD_INT8(sums, left, right) \
  spark::emulated::add_product<int8_t, int32_t>(sums, left, right, [](int8_t x) { return int32_t(x); })
#define TILE_STAY_AWAKE() void()

#endif
