// Arrays of integers in msgpack: the token ids and block hashes that are the bulk of an engine's events.
// The bytes come from outside: nothing is believed before it is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

namespace mulsched {

// Whether an array begins here that can be as long as it says. If so, `count` is how many elements it says
// it has, at least a byte each, and `begin` where they begin.
inline bool read_array_header(const std::uint8_t* data, std::size_t size, std::size_t& count,
                              std::size_t& begin) noexcept {
  if (size == 0) return false;
  std::size_t width = 0;
  if ((data[0] & 0xf0) == 0x90) {
    count = data[0] & 0x0f;
  } else if (data[0] == 0xdc) {
    width = 2;
  } else if (data[0] == 0xdd) {
    width = 4;
  } else {
    return false;
  }
  begin = 1 + width;
  if (size < begin) return false;
  if (width != 0) count = 0;
  for (std::size_t i = 1; i < begin; ++i) count = count << 8 | data[i];
  return count <= size - begin;
}

inline constexpr std::size_t kNoIntegers = std::numeric_limits<std::size_t>::max();

// Reads `count` integers from data[begin, size); returns where they end, or kNoIntegers if something else is
// there, or does not fit. A 64-bit word also takes a negative number, as its two's complement; a 32-bit word
// takes 0..2**32-1.
template <typename Word>
std::size_t read_integers(const std::uint8_t* data, std::size_t size, std::size_t begin, std::size_t count,
                          Word* out) noexcept {
  constexpr bool kTakesNegative = sizeof(Word) == 8;
  std::size_t at = begin;
  for (std::size_t i = 0; i < count; ++i) {
    if (at >= size) return kNoIntegers;
    const std::uint8_t tag = data[at++];
    if (tag < 0x80) {
      out[i] = tag;
      continue;
    }
    if (tag >= 0xe0) {
      if (!kTakesNegative) return kNoIntegers;
      out[i] = static_cast<Word>(static_cast<std::int64_t>(static_cast<std::int8_t>(tag)));
      continue;
    }
    if (tag < 0xcc || tag > 0xd3) return kNoIntegers;
    // the widths of token ids follow no pattern that a branch could learn: read eight bytes and shift
    const std::size_t width = std::size_t{1} << (tag & 3), unused_bits = 64 - 8 * width;
    if (size - at < width) return kNoIntegers;
    std::uint64_t bytes = 0;
    std::memcpy(&bytes, data + at, size - at >= sizeof bytes ? sizeof bytes : width);
    bytes = __builtin_bswap64(bytes);  // the build insists on little-endian
    at += width;
    const bool negative = tag >= 0xd0 && bytes >> 63 != 0;
    std::uint64_t value = bytes >> unused_bits;
    if (negative) {
      if (!kTakesNegative) return kNoIntegers;
      if (unused_bits != 0) value |= std::numeric_limits<std::uint64_t>::max() << (8 * width);
    } else if (value > std::numeric_limits<Word>::max()) {
      return kNoIntegers;
    }
    out[i] = static_cast<Word>(value);
  }
  return at;
}

}  // namespace mulsched
