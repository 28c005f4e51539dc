// Queries as whole numbers for integer products with levels.
#pragma once

#include <cmath>
#include <vector>

#include "problem.h"

namespace spark {

// Channels of the keys by rank, and where they begin in a row of levels; or the signs of pruned ones.
struct Columns {
int64_t first, channels, column;
bool signs = false;
};

inline std::vector<Columns> columns_of(const Format& f) {
  if (f.kind == Kind::spark && f.recovers) return {{0, f.dim, 0}, {0, f.dim, round_up(f.dim, 64), true}};
  if (f.kind != Kind::quantized) return {{0, f.dim, 0}};
  std::vector<Columns> parts;
  int64_t column = 0;
  for (int p = 0; p < f.part_count; ++p) {
    parts.push_back({f.parts[p].first, f.parts[p].channels, column});
    column += round_up(f.parts[p].channels, 64);
  }
  return parts;
}

// x = unit * (128 * high + low) for each part of each query, 15 bits of the largest one. MOST: so many queries go into
// a product, 8 for VNNI, whose levels have no sign, or 4 for NEON.
template <int MOST>
class QueryDigits {
  static constexpr float DIGITS = 127 * 128 + 63;  // low digits are -64 to 63

 public:
  static constexpr int OFFSET = MOST == 8 ? 128 : 0;  // of levels

  // width: channels of a row of levels.
  QueryDigits(int64_t rows, size_t parts, int64_t width)
      : rows_(rows), width_(width), parts_(parts), digits_(scratch<int8_t>((rows + MOST - 1) / MOST * 2 * MOST * width)),
        corrections_(scratch<int32_t>((rows + MOST - 1) / MOST * MOST * int64_t(parts))),
        units_(scratch<float>((rows + MOST - 1) / MOST * MOST * int64_t(parts))) {}

  // How many of MOST rows of queries from a multiple of MOST on a product has columns for, high digits and
  // then low ones: MOST, half or a quarter of it.
  int columns(int64_t row) const {
    const int64_t count = rows_ - row / MOST * MOST;
    return count <= MOST / 4 ? MOST / 4 : count <= MOST / 2 ? MOST / 2 : MOST;
  }
  // Of so many columns, how many words of four channels each has next to each other: what is left of VNNI's 16
  // columns is for further ones. A single query of NEON has whole registers of channels.
  static constexpr int words(int columns) { return MOST == 8 ? 8 / columns : columns == 1 ? 4 : 1; }
  // Bytes of all columns for words().
  static constexpr int bytes(int columns) { return MOST == 8 ? 64 : 8 * columns * words(columns); }
  const int8_t* at(int64_t row) const { return &digits_[row / MOST * 2 * MOST * width_]; }
  float unit(int64_t row, size_t part) const { return units_[place(row, part)]; }
  // 128 * (128 * the sum of the high digits + that of the low ones), as 32 bits have it.
  int32_t correction(int64_t row, size_t part) const { return corrections_[place(row, part)]; }

  // query: the channels of a part, whose first one is in a column.
  void split(int64_t row, size_t part, const Columns& own, const float* query) {
    float largest = 0;
    bool nan = false;  // no digits are worth it
    for (int64_t j = 0; j < own.channels; ++j) largest = std::max(largest, std::fabs(query[j])), nan |= std::isnan(query[j]);
    const float inverse = largest > 0 && !nan ? DIGITS / largest : 0.0f;
    units_[place(row, part)] = nan ? NAN : largest / DIGITS;
    const int rows = columns(row), span = words(rows), r = int(row % MOST);
    int8_t* digits = &digits_[row / MOST * 2 * MOST * width_];
    uint32_t total = 0;
    for (int64_t j = 0; j < own.channels; ++j) {
      const int whole = nan ? 0 : int(std::lrint(query[j] * inverse)), high = (whole + 64) >> 7;
      const int8_t both[2] = {int8_t(high), int8_t(whole - 128 * high)};
      total += uint32_t(whole);
      const int64_t word = (own.column + j) / 4;
      for (int d = 0; d < 2; ++d) {
        digits[word / span * bytes(rows) + ((d * rows + r) * span + word % span) * 4 + j % 4] = both[d];
      }
    }
    corrections_[place(row, part)] = int32_t(128 * total);
  }

 private:
  int64_t place(int64_t row, size_t part) const { return (row / MOST * int64_t(parts_) + int64_t(part)) * MOST + row % MOST; }

  const int64_t rows_, width_;
  const size_t parts_;
  Scratch<int8_t> digits_;
  Scratch<int32_t> corrections_;
  Scratch<float> units_;
};

// x = unit * whole for each part of each query, 16 bits of the largest one: rows of `width` numbers, of each 32
// the even ones in front of the odd ones.
class QueryWords {
 public:
  static constexpr int OFFSET = 128;  // of levels

  QueryWords(int64_t rows, size_t parts, int64_t width)
      : width_(width), parts_(parts), words_(scratch<int16_t>(rows * width)), corrections_(scratch<int32_t>(rows * int64_t(parts))),
        units_(scratch<float>(rows * int64_t(parts))) {}

  const int16_t* at(int64_t row) const { return &words_[row * width_]; }
  float unit(int64_t row, size_t part) const { return units_[place(row, part)]; }
  // 128 * (sum of the numbers), in 32 bits as the products are.
  int32_t correction(int64_t row, size_t part) const { return corrections_[place(row, part)]; }

  void split(int64_t row, size_t part, const Columns& own, const float* query) {
    float largest = 0;
    bool nan = false;  // no number is worth it
    for (int64_t j = 0; j < own.channels; ++j) largest = std::max(largest, std::fabs(query[j])), nan |= std::isnan(query[j]);
    // A product with levels of -128 has to fit 32 bits.
    const float limit = std::min(32767.0f, float((1 << 24) / own.channels - 1)), inverse = largest > 0 && !nan ? limit / largest : 0.0f;
    units_[place(row, part)] = nan ? NAN : largest / limit;
    uint32_t total = 0;
    for (int64_t j = 0; j < own.channels; ++j) {
      const int32_t whole = nan ? 0 : int32_t(std::lrint(query[j] * inverse));
      const int64_t column = own.column + j;
      words_[row * width_ + column / 32 * 32 + column % 2 * 16 + column % 32 / 2] = int16_t(whole);
      total += uint32_t(whole);
    }
    corrections_[place(row, part)] = int32_t(128 * total);
  }

 private:
  int64_t place(int64_t row, size_t part) const { return row * int64_t(parts_) + int64_t(part); }

  const int64_t width_;
  const size_t parts_;
  Scratch<int16_t> words_;
  Scratch<int32_t> corrections_;
  Scratch<float> units_;
};

}  // namespace spark
