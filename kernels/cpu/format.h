// The formats that native code knows, and where their fields lie: kernels/layout.py.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <numeric>

#include "codes.h"

namespace spark {

using torch::headeronly::ScalarType;

constexpr int MAX_HEAD = 1024;  // channels
constexpr int MAX_PARTS = 8;    // of a quantized format
constexpr int64_t COUNTER_BYTES = 40, ALIGNMENT = 16;

enum class Kind { dense, int8, spark, pruned, quantized };

// A field per token: where its rows, one for each token of a page, begin in the page, and the bytes of one.
struct Field {
  int64_t first = 0, bytes = 0;
};

// Channels of consecutive ranks with equal bits, and where their codes begin in a row of codes.
struct Part {
  int64_t first = 0, channels = 0;
  int bits = 0;
  int64_t codes = 0;
};

// How the tokens of one side are stored. Offsets are bytes.
struct Format {
  Kind kind = Kind::dense;
  bool int8 = false;                      // stored channels are int8, with a step
  bool recovers = true, squared = true;   // of spark
  bool scaled = false, rotated = true;    // of quantized
  Part parts[MAX_PARTS];                  // of quantized: by falling rank
  int part_count = 0;
  int64_t dim = 0, kept = 0;              // channels of a token, and those of them that are stored
  ScalarType dtype = ScalarType::Float;
  int64_t itemsize = 0;
  // In a page: `scale` is the amplitude (spark), its codes (quantized) or the fill (pruned), `channels` are
  // the codes of all parts (quantized), `position` is there for keys where a scorer may evict.
  Field scale, step, channels, keep, negative, position;
  int64_t token_bytes = 0, page_bytes = 0;  // of all rows of a token; of a page
  bool has_gaps = false;                    // bytes of a page that belong to no field
  // In a head: `constant` are the norms (spark) or the bias (pruned).
  int64_t constant = 0, stats = 0, tail = 0;
  int64_t gain = 0, center = 0, factor = 0, order = 0;  // quantized; all but the first with query scaling

  bool has_planes() const { return kind == Kind::spark || kind == Kind::pruned; }
  bool uses_queries() const { return kind == Kind::spark || (kind == Kind::quantized && scaled); }
  int64_t plane() const { return (dim + 7) / 8; }
  int64_t row_bytes() const { return dim * itemsize; }
};

inline void lay_out_page(Format& f, int64_t tokens, bool has_position) {
  int64_t end = 0;
  const auto field = [&](int64_t row_bytes) {
    const int64_t bytes = row_bytes * tokens, first = round_up(end, std::gcd(bytes, ALIGNMENT));
    end = first + bytes, f.token_bytes += row_bytes;
    return Field{first, row_bytes};
  };
  const bool is_quantized = f.kind == Kind::quantized;
  int64_t codes = 0;
  for (int i = 0; i < f.part_count; ++i) f.parts[i].codes = codes, codes += code_bytes(f.parts[i].channels, f.parts[i].bits);
  if (f.has_planes() || is_quantized) f.scale = field(is_quantized ? f.part_count : f.itemsize);
  if (f.int8) f.step = field(f.itemsize);
  f.channels = field(is_quantized ? codes : f.kept * (f.int8 ? 1 : f.itemsize));
  if (f.has_planes()) f.keep = field(f.plane());
  if (f.kind == Kind::spark) f.negative = field(f.plane());
  if (has_position) f.position = field(4);
  f.page_bytes = round_up(end, 8);
  f.has_gaps = f.page_bytes > f.token_bytes * tokens;
}

inline void lay_out_head(Format& f) {
  auto field = [end = COUNTER_BYTES](int64_t itemsize, int64_t width) mutable {
    const int64_t first = round_up(end, itemsize);
    end = first + itemsize * width;
    return first;
  };
  const bool is_quantized = f.kind == Kind::quantized;
  if (f.has_planes()) f.constant = field(4, f.dim);
  if (is_quantized) f.gain = field(2, f.part_count);
  if (is_quantized && f.scaled) f.center = field(2, f.dim), f.factor = field(2, f.dim), f.order = field(2, f.dim);
  if (f.uses_queries()) f.stats = field(4, 2 * f.dim);
  f.tail = field(ALIGNMENT, 0);
}

}  // namespace spark
