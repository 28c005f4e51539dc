// Appending tokens to a side: query statistics, packing of the pages that are full, the new tail.
#pragma once

#include <span>

#include "encode.h"
#include "encode_quantized.h"
#include "threads.h"

namespace spark {

// Queries [B, Hq, L, D] in the side's dtype.
struct Queries {
  Rows rows;
  int64_t heads, count;
};

// Adds the sum over the last `window` queries of the squared mean query of the group, or of the mean of the
// squared ones.
template <class T>
void add_stats(const Queries& queries, const Side& side, int64_t b, int64_t h, float* stats) {
  const int64_t channels = side.format->dim, group = queries.heads / side.heads;
  const bool each = side.format->kind == Kind::quantized;  // kernels/formats/base.py: EACH_QUERY
  const Scratch<float> sums = scratch<float>(channels), mean = uncleared_scratch<float>(channels);
  for (int64_t i = std::max<int64_t>(queries.count - side.spec->window, 0); i < queries.count; ++i) {
    std::fill_n(mean.get(), channels, 0.0f);
    for (int64_t g = 0; g < group; ++g) {
      const T* row = queries.rows.at<T>(b, h * group + g, i);
      for (int64_t j = 0; j < channels; ++j) mean[j] += each ? to_float(row[j]) * to_float(row[j]) : to_float(row[j]);
    }
    for (int64_t j = 0; j < channels; ++j) sums[j] += each ? mean[j] / group : (mean[j] / group) * (mean[j] / group);
  }
  for (int64_t j = 0; j < channels; ++j) stats[j] += sums[j];
}

// Calls f(b, h) for all heads; each moves about `bytes`, and few of them are sooner done here.
template <class Function>
void for_heads(const Side& side, int64_t bytes, const Function& f) {
  const int64_t grain = std::max<int64_t>((int64_t(1) << 16) / std::max<int64_t>(bytes, 1), 1);
  const int64_t count = side.batch * side.heads;
  const auto range = [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) f(at / side.heads, at % side.heads);
  };
  if (count <= grain) return range(0, count);
  parallel(0, count, grain, range);
}

// Adds queries to the statistics that the next append will find.
template <class T>
void observe(const Side& side, std::span<const Queries> all) {
  if (!side.format->uses_queries()) return;
  for (const Queries& queries : all) {
    const int64_t rows = std::min(queries.count, side.spec->window) * (queries.heads / side.heads);
    for_heads(side, rows * side.format->row_bytes(), [&](int64_t b, int64_t h) {
      add_stats<T>(queries, side, b, h, side.stats(b, h, side.step));
    });
  }
}

// The tail of a head, and the new tokens after it.
template <class T>
struct Pending {
  Pending(const Side& side, int64_t b, int64_t h)
      : tail(side.tail(b, h)), fresh(side.fresh.at(b, h, 0)), fresh_step(side.fresh.token),
        row_bytes(side.format->row_bytes()), tail_count(side.length - side.packed) {}

  const T* operator[](int64_t i) const {
    const char* row = i < tail_count ? tail + i * row_bytes : fresh + (i - tail_count) * fresh_step;
    return reinterpret_cast<const T*>(row);
  }

  char *tail, *fresh;
  int64_t fresh_step, row_bytes, tail_count;
};

// Biases of pruned values: kernels/formats/pruned.py. rows(s): token s.
template <class Rows>
void value_bias(const Rows& rows, int64_t count, int64_t channels, float* bias) {
  const Scratch<double> mean = scratch<double>(channels), variance = scratch<double>(channels);
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t j = 0; j < channels; ++j) mean[j] += to_float(rows(s)[j]);
  }
  for (int64_t j = 0; j < channels; ++j) mean[j] /= double(count);
  double most_of_tokens = 0, most_of_channels = 0;
  const auto larger = [](double a, double b) { return b > a || b != b ? b : a; };  // NaN is the largest
  for (int64_t s = 0; s < count; ++s) {
    const auto* row = rows(s);
    double middle = 0, squares = 0;
    for (int64_t j = 0; j < channels; ++j) middle += to_float(row[j]);
    middle /= double(channels);
    for (int64_t j = 0; j < channels; ++j) {
      const double x = to_float(row[j]), centered = x - mean[j];
      variance[j] += centered * centered;
      squares += (x - middle) * (x - middle);
    }
    most_of_tokens = larger(most_of_tokens, squares / double(std::max<int64_t>(channels - 1, 1)));
  }
  for (int64_t j = 0; j < channels; ++j) {
    variance[j] /= double(std::max<int64_t>(count - 1, 1));
    most_of_channels = larger(most_of_channels, variance[j]);
  }
  const double largest = most_of_channels + most_of_tokens + 2e-8;
  for (int64_t j = 0; j < channels; ++j) bias[j] = float(0.3 / 0.7 * variance[j] / largest);
}

// The constants of all heads, from all tokens of a cache that has no page yet but the dense sinks.
template <class T>
void write_constants(const Side& side) {
  const Format& f = *side.format;
  if (!f.has_planes() && f.kind != Kind::quantized) return;
  const int64_t first = side.spec->sinks, count = side.length + side.fresh_tokens - first;
  for_heads(side, f.kind == Kind::spark ? 4 * f.dim : count * f.row_bytes(), [&](int64_t b, int64_t h) {
    const Pending<T> pending(side, b, h);
    const auto rows = [&](int64_t s) { return pending[first + s]; };
    if (f.kind == Kind::pruned) return value_bias(rows, count, f.dim, side.constant(b, h));
    const float* stats = f.uses_queries() ? side.stats(b, h, side.step) : nullptr;
    if (f.kind == Kind::quantized) return quantized_constants(f, rows, count, stats, side.head.at(b, h, 0));
    for (int64_t j = 0; j < f.dim; ++j) side.constant(b, h)[j] = std::sqrt(stats[j]);
  });
}

// Packs `pages` pages from the tail and the new tokens.
template <class T, class Encoder>
void pack(const Side& side, int64_t pages) {
  const Format& f = *side.format;
  const int64_t window = side.spec->window, heads = side.heads;
  // More of them than there is room for: the first ones would be written over at once.
  const int64_t skipped = std::max<int64_t>(pages - side.slots, 0), count = pages - skipped;
  // Grain: a range shares the powers of the norms, so it should be more than a few tokens.
  parallel(0, side.batch * heads * count, std::max<int64_t>(64 / window, 1), [&](int64_t first, int64_t last) {
    Encoder encoder(f);
    int64_t known = -1;
    for (int64_t at = first; at < last; ++at) {
      const int64_t head = at / count, b = head / heads, h = head % heads, page = skipped + at % count;
      if (head != known) encoder.start(side, b, h);
      known = head;
      const Pending<T> rows(side, b, h);
      Place place{side.page(b, h, side.packed / window + page), 0};
      if (f.has_gaps) std::memset(place.page, 0, f.page_bytes);
      const int64_t row = side.spec->sinks + page * window;
      for (; place.token < window; place = place + Encoder::TOGETHER) {
        const T* together[Encoder::TOGETHER] = {};
        const int some = int(std::min<int64_t>(window - place.token, Encoder::TOGETHER));
        for (int k = 0; k < some; ++k) together[k] = rows[row + place.token + k];
        encoder.encode(together, place, some);
      }
      for (place.token = 0; f.position.bytes && place.token < window; ++place.token) {
        *place.at<int32_t>(f.position) = int32_t(side.position_of(b, h, side.packed + row + place.token));
      }
    }
  });
}

// What stays dense becomes the tail.
template <class T>
void move_tail(const Side& side, int64_t b, int64_t h, int64_t packed) {
  const Pending<T> rows(side, b, h);
  const int64_t bytes = rows.row_bytes, total = rows.tail_count + side.fresh_tokens;
  const int64_t sinks = packed ? side.spec->sinks : rows.tail_count;
  // Sinks may still be among the new tokens; what follows them moves up by the packed ones.
  for (int64_t i = rows.tail_count; i < std::min(sinks, total); ++i) std::memcpy(rows.tail + i * bytes, rows[i], bytes);
  const int64_t from = sinks + packed, old = std::max<int64_t>(rows.tail_count - from, 0);
  if (packed) std::memmove(rows.tail + sinks * bytes, rows.tail + from * bytes, old * bytes);
  for (int64_t i = from + old; i < total; ++i) std::memcpy(rows.tail + (i - packed) * bytes, rows[i], bytes);
}

// Appends the new tokens, packs `pages` pages (due()), evicts all but the latest `keep` tokens.
template <class T>
void append(Side& side, int64_t pages, int64_t keep, std::span<const Queries> queries) {
  const Format& f = *side.format;
  const int64_t packed = pages * side.spec->window;
  if (f.uses_queries()) {
    for_heads(side, 8 * f.dim, [&](int64_t b, int64_t h) {
      std::memcpy(side.stats(b, h, side.step + 1), side.stats(b, h, side.step), 4 * f.dim);
    });
  }
  side.step = int64_t(uint64_t(side.step) + 1);
  observe<T>(side, queries);
  if (pages) {
    if (side.packed == 0) write_constants<T>(side);
    f.kind == Kind::quantized ? pack<T, QuantizedEncoder<T>>(side, pages) : pack<T, Encoder<T>>(side, pages);
    if (f.uses_queries()) {
      for_heads(side, 4 * f.dim, [&](int64_t b, int64_t h) {
        std::fill_n(side.stats(b, h, side.step), f.dim, 0.0f);
      });
    }
  }
  const int64_t rows = side.fresh_tokens + (pages ? side.length - side.packed : 0);
  for_heads(side, rows * f.row_bytes(), [&](int64_t b, int64_t h) { move_tail<T>(side, b, h, packed); });
  side.length += side.fresh_tokens;
  side.packed += packed;
  side.first = std::max(side.first, side.length - keep);
  side.write_counters();
}

}  // namespace spark
