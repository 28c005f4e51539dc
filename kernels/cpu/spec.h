// The spec text of a cache (kernels/spec.py), read once for each distinct text.
#pragma once

#include <charconv>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>

#include "format.h"

namespace spark {

constexpr std::string_view LAYOUT_VERSION = "4";  // VERSION in kernels/layout.py
constexpr int64_t TAIL_STEP = 8;  // as in kernels/spec.py

struct Spec {
  Format key, value;
  int64_t window = 0, recent = 0, sinks = 0, min_tokens = 0;
  float scale = 1.0f, softcap = 0.0f;
  int64_t rolls = 0;  // latest tokens that stay visible to new ones; 0: all
  int64_t evict_tokens = 0;  // of a prompt that a scorer leaves; 0: all

  int64_t stored_tokens(int64_t tokens) const { return evict_tokens ? std::min(tokens, evict_tokens) : tokens; }
  // The stored tokens of an evicted prompt in front of its latest ones, none of which is evicted.
  int64_t chosen_end() const { return sinks + pages_due(evict_tokens, 0, 0) * window; }
  // Number of pages that are full; `stored` since the first page, `visible` part of the cache.
  int64_t pages_due(int64_t stored, int64_t visible, int64_t packed) const {
    if (min_tokens && visible < min_tokens) return 0;
    return std::max<int64_t>(stored - packed - sinks - recent, 0) / window;
  }
  int64_t page_room(int64_t tokens, std::optional<int64_t> capacity) const {
    if (capacity) return std::max<int64_t>(*capacity - sinks - recent, 0) / window + 1;
    return std::max<int64_t>(pages_due(tokens, tokens, 0), 2);
  }
  int64_t tail_rows(int64_t tokens, std::optional<int64_t> capacity) const {
    if (!capacity) return round_up(tokens - pages_due(tokens, tokens, 0) * window, TAIL_STEP);
    const int64_t rows = sinks + recent + window;
    return min_tokens ? std::max(rows, std::min(*capacity, min_tokens)) : rows;
  }
};

namespace text {

using View = std::string_view;

inline View trimmed(View text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  return text;
}

// What is in front of the first separator; `rest` becomes what is after it.
inline View next(View& rest, char separator) {
  const size_t end = std::min(rest.find(separator), rest.size());
  const View part = rest.substr(0, end);
  rest.remove_prefix(std::min(end + 1, rest.size()));
  return part;
}

template <class Number>
std::optional<Number> number(View text) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

inline std::optional<bool> truth(View text) {
  if (text == "True") return true;
  if (text == "False") return false;
  return std::nullopt;
}

// Reads "4" or, for equal shares of the channels, "4-2-2-1".
inline bool read_parts(View text, Format& f) {
  const int64_t words = 1 + std::count(text.begin(), text.end(), '-');
  f.part_count = 0;
  if (f.dim < 1 || f.dim % words) return false;
  for (int64_t i = 0; i < words; ++i) {
    const int bits = number<int>(next(text, '-')).value_or(0);
    if (bits < 1 || bits == 7 || bits > 8) return false;
    if (f.part_count == 0 || f.parts[f.part_count - 1].bits != bits) {
      if (f.part_count == MAX_PARTS) return false;
      f.parts[f.part_count++] = {i * (f.dim / words), 0, bits};
    }
    f.parts[f.part_count - 1].channels += f.dim / words;
  }
  return true;
}

// Sets an option of a format; false if native code does not know it.
inline bool set_option(Format& format, View name, View value) {
  const bool is_spark = format.kind == Kind::spark;
  if (format.has_planes() && name == "kept") {
    format.kept = number<int64_t>(value).value_or(0);
    return true;
  }
  if (format.has_planes() && name == "stored") {
    format.int8 = value == "int8";
    return format.int8 || value == "model";
  }
  if (is_spark && name == "recovery") {  // draws from a distribution are the reference's alone
    format.recovers = value == "degenerate";
    return format.recovers || value == "none";
  }
  if (is_spark && name == "saliency") {
    format.squared = value == "squared";
    return format.squared || value == "absolute";
  }
  if (format.kind == Kind::quantized && name == "bits") return read_parts(value, format);
  if (format.kind == Kind::quantized && (name == "scaled" || name == "rotated")) {
    (name == "scaled" ? format.scaled : format.rotated) = truth(value).value_or(false);
    return truth(value).has_value();
  }
  return false;
}

// Reads "name(options):dim:dtype"; false if native code does not do that.
inline bool read_format(View text, Format& f) {
  const size_t last = text.rfind(':'), middle = last == View::npos ? last : text.rfind(':', last - 1);
  if (middle == View::npos) return false;
  f.dim = number<int64_t>(text.substr(middle + 1, last - middle - 1)).value_or(0);
  const View dtype = text.substr(last + 1);
  if (dtype == "float32") f.dtype = ScalarType::Float;
  else if (dtype == "bfloat16") f.dtype = ScalarType::BFloat16;
  else if (dtype == "float16") f.dtype = ScalarType::Half;
  else return false;
  f.itemsize = f.dtype == ScalarType::Float ? 4 : 2;
  View options = trimmed(text.substr(0, middle));
  const View name = next(options, '(');
  if (name == "dense") f.kind = Kind::dense;
  else if (name == "int8") f.kind = Kind::int8;
  else if (name == "spark") f.kind = Kind::spark;
  else if (name == "pruned") f.kind = Kind::pruned;
  else if (name == "quantized") f.kind = Kind::quantized;
  else return false;
  if (f.kind == Kind::quantized && !read_parts("4", f)) return false;
  f.int8 = f.kind == Kind::int8;
  f.kept = f.has_planes() ? 0 : f.dim;
  if (!options.empty() && options.back() != ')') return false;
  if (!options.empty()) options.remove_suffix(1);
  while (!options.empty()) {
    View value = next(options, ',');
    const View option = trimmed(next(value, '='));
    if (!set_option(f, option, trimmed(value))) return false;
  }
  if (f.part_count > 1 && !f.scaled) return false;
  return f.dim >= 1 && f.dim <= MAX_HEAD && f.kept >= 1 && f.kept <= f.dim;
}

inline bool read_count(View text, int64_t& count) {
  count = number<int64_t>(text).value_or(-1);
  return count >= 0 && count < int64_t(1) << 32;  // sums of a few of them never overflow
}

// Of a scorer, "name(tokens=128,...)", only the number of tokens that it leaves.
inline bool read_scorer(View text, int64_t& tokens) {
  next(text, '(');
  View value = next(text, ',');
  const bool is_number = next(value, '=') == "tokens" && read_count(next(value, ')'), tokens);
  return is_number && tokens >= 1;
}

inline bool read_float(View text, float& number_) {
  const auto value = number<double>(text);
  number_ = float(value.value_or(0));
  return std::isfinite(number_) && value.has_value();
}

// Nothing if native code does not do what the text asks for, or the text cannot be read.
inline std::unique_ptr<const Spec> read_spec(View rest) {
  auto spec = std::make_unique<Spec>();
  int seen = 0;
  while (!rest.empty()) {
    View value = next(rest, ';');
    const View name = next(value, '=');
    bool done = false;
    if (name == "key") done = read_format(value, spec->key), seen |= 1;
    else if (name == "value") done = read_format(value, spec->value), seen |= 2;
    else if (name == "window") done = read_count(value, spec->window), seen |= 4;
    else if (name == "recent") done = read_count(value, spec->recent), seen |= 8;
    else if (name == "sinks") done = read_count(value, spec->sinks), seen |= 16;
    else if (name == "min_tokens") done = read_count(value, spec->min_tokens), seen |= 32;
    else if (name == "scale") done = read_float(value, spec->scale);
    else if (name == "softcap") done = read_float(value, spec->softcap);
    else if (name == "layout") done = value == LAYOUT_VERSION, seen |= 64;
    else if (name == "rolls") done = read_count(value, spec->rolls);
    else if (name == "evict") done = read_scorer(value, spec->evict_tokens);
    if (!done) return nullptr;
  }
  if (seen != 127 || spec->window < 1 || spec->key.dtype != spec->value.dtype) return nullptr;
  lay_out_page(spec->key, spec->window, spec->evict_tokens > 0);
  lay_out_page(spec->value, spec->window, false);
  for (Format* format : {&spec->key, &spec->value}) lay_out_head(*format);
  return spec;
}

}  // namespace text

// The spec of a text, or null if native code does not do what it asks for. Never forgotten: a
// process has as many texts as its models have kinds of layers.
inline const Spec* spec_of(std::string_view text) {
  struct Hash : std::hash<std::string_view> {
    using is_transparent = void;
  };
  using Known = std::unordered_map<std::string, std::unique_ptr<const Spec>, Hash, std::equal_to<>>;
  static Known& known = *new Known;
  static std::shared_mutex& mutex = *new std::shared_mutex;
  {
    const std::shared_lock lock(mutex);
    if (const auto found = known.find(text); found != known.end()) return found->second.get();
  }
  const std::unique_lock lock(mutex);
  return known.try_emplace(std::string(text), text::read_spec(text)).first->second.get();
}

}  // namespace spark
