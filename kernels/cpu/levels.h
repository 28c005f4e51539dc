// Stored levels as bytes, as integer products want them.
#pragma once

#include "bytes.h"
#include "problem.h"

namespace spark {

// The levels of codes whose bits are alone in their bytes, plus OFFSET.
template <int BITS, int OFFSET = 0>
inline Bytes level_bytes(Bytes codes) {
  if constexpr (BITS == 8) {
    return OFFSET ? sum_of_bytes(codes, splat_byte(OFFSET)) : codes;
  } else if constexpr (BITS >= 5) {
    return sum_of_bytes(sum_of_bytes(codes, codes), splat_byte(OFFSET + 1 - (1 << BITS)));
  } else {
    return look_up(load<Sixteen>(grid_of(BITS).bytes) + uint8_t(OFFSET), codes);
  }
}

// By how much words are shifted where a plane's BYTES repeat, each time WIDTH bits further. WORDS neighbours of them
// lie in the same 2 WORDS bytes of the plane. A table: GCC 12 would make the vector anew for each token.
template <int WIDTH, int BYTES, int WORDS = 1>
struct Shifts {
  alignas(WIDE) static constexpr std::array<uint16_t, WIDE / 2> TABLE = [] {
    std::array<uint16_t, WIDE / 2> made{};
    for (int w = 0; w < WIDE / 2; ++w) made[w] = uint16_t(w / WORDS * WORDS * 2 / BYTES * WIDTH);
    return made;
  }();

  // From channel `first` on, a multiple of BYTES.
  static Words from(int64_t first) {
    const uint16_t more = uint16_t(first / BYTES * WIDTH);
    return load<Words>(TABLE.data()) + more;
  }
};

// Codes of WIDE channels from `first` on, alone in their bytes, from a plane of WIDTH bits. CHANNELS: of the
// part, a power of two; bytes behind the last one mean nothing, and nothing after the plane is read.
template <int WIDTH, int CHANNELS>
inline Bytes codes_of(const uint8_t* plane, int64_t first) {
  constexpr int BYTES = CHANNELS * WIDTH / 8;  // which repeat, each time shifted by WIDTH more
  const Bytes ones = splat_byte((1 << WIDTH) - 1);
  if constexpr (BYTES >= WIDE) return right(load<Bytes>(plane + first % BYTES), int(first / BYTES * WIDTH)) & ones;
  else {
    return right(repeated<BYTES>(plane), Shifts<WIDTH, BYTES>::from(first)) & ones;
  }
}

// As each_code() in codes.h for WIDE channels, whose parts of codes are alone in their bytes; nothing after
// the plane is read.
template <int WIDTH, class Function>
inline void each_byte(const uint8_t* plane, int64_t channels, const Function& f) {
  const int64_t bytes = plane_bytes(channels, WIDTH);
  const Bytes ones = splat_byte((1 << WIDTH) - 1);
  for (int s = 0; s < 8 / WIDTH; ++s) {
    for (int64_t i = 0; i < bytes && s * bytes + i < channels; i += WIDE) {
      const Bytes codes = some_bytes(reinterpret_cast<const int8_t*>(plane + i), bytes - i);
      f(s * bytes + i, right(codes, WIDTH * s) & ones);
    }
  }
}

// The levels of a part of any number of channels, and nothing after them.
template <int BITS, int OFFSET>
inline void expand_levels(const uint8_t* codes, int64_t channels, int8_t* out) {
  constexpr int LOW = low_width(BITS), HIGH = high_width(BITS);
  uint8_t low[MAX_HEAD + WIDE];
  const auto put = [&](int64_t j, Bytes code) { store_some(out + j, channels - j, level_bytes<BITS, OFFSET>(code)); };
  each_byte<LOW>(codes, channels, [&](int64_t j, Bytes code) {
    if constexpr (HIGH == 0) put(j, code);
    else store_bytes(low + j, code);
  });
  if constexpr (HIGH > 0) {
    each_byte<HIGH>(codes + plane_bytes(channels, LOW), channels, [&](int64_t j, Bytes code) {
      put(j, load<Bytes>(low + j) | left<LOW>(code));
    });
  }
}

// WIDE levels, plus OFFSET, of a part of CHANNELS from channel `first` on.
template <int BITS, int OFFSET, int CHANNELS>
inline Bytes levels_of(const uint8_t* codes, int64_t first) {
  constexpr int LOW = low_width(BITS), HIGH = high_width(BITS);
  Bytes code = codes_of<LOW, CHANNELS>(codes, first);
  if constexpr (HIGH > 0) code |= left<LOW>(codes_of<HIGH, CHANNELS>(codes + CHANNELS * LOW / 8, first));
  return level_bytes<BITS, OFFSET>(code);
}

// The levels of one part, plus OFFSET, of `count` tokens, whose codes are `step` bytes apart, as rows of `width` bytes.
// CHANNELS: of the part, whose row then has room for multiples of 64; or 0 for any number.
template <int BITS, int OFFSET, int CHANNELS, class Each>
[[gnu::noinline]] void expand_tokens(const uint8_t* codes, int64_t step, int count, int64_t channels, int8_t* out, int64_t width,
                                     const Each* ahead) {
  for (int t = 0; t < count; ++t, codes += step, out += width) {
    if (ahead) (*ahead)(t);
    if constexpr (CHANNELS == 0) {
      expand_levels<BITS, OFFSET>(codes, channels, out);
      continue;
    } else {
      for (int j = 0; j < CHANNELS; j += WIDE) store_bytes(out + j, levels_of<BITS, OFFSET, CHANNELS>(codes, j));
    }
  }
}

// ahead: called for each token, if there is one.
template <int OFFSET, class Each>
inline void expand_part(const Part& part, const Tokens& rows, int count, int8_t* out, int64_t width, const Each* ahead) {
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(rows.data + part.codes);
  with_bits(part.bits, [&](auto bits) {
    switch (part.channels) {
      case 16: return expand_tokens<bits, OFFSET, 16>(codes, rows.step, count, 16, out, width, ahead);
      case 32: return expand_tokens<bits, OFFSET, 32>(codes, rows.step, count, 32, out, width, ahead);
      case 64: return expand_tokens<bits, OFFSET, 64>(codes, rows.step, count, 64, out, width, ahead);
      case 128: return expand_tokens<bits, OFFSET, 128>(codes, rows.step, count, 128, out, width, ahead);
      default: expand_tokens<bits, OFFSET, 0>(codes, rows.step, count, part.channels, out, width, ahead);
    }
  });
}

}  // namespace spark
