// XXH3-64 for every input length, and the keys of a prompt's blocks.
//
// Written from the published algorithm (Yann Collet, xxHash specification, XXH3 64-bit); the tests compare
// it with the xxhash package for every length that takes another path.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mulsched {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "block keys hash tokens as little-endian uint32 in place");

namespace xxh3 {

inline constexpr std::uint64_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
inline constexpr std::uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F,
                               kPrime64_3 = 0x165667B19E3779F9, kPrime64_4 = 0x85EBCA77C2B2AE63,
                               kPrime64_5 = 0x27D4EB2F165667C5;
inline constexpr std::uint64_t kPrimeMix1 = 0x165667919E3779F9, kPrimeMix2 = 0x9FB21C651E98DF25;

inline constexpr std::size_t kSecretBytes = 192;
inline constexpr unsigned char kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

inline std::uint64_t read64(const unsigned char* p) noexcept {
  std::uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline std::uint64_t read32(const unsigned char* p) noexcept {
  std::uint32_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline std::uint64_t rotate_left(std::uint64_t x, int bits) noexcept { return (x << bits) | (x >> (64 - bits)); }

inline std::uint64_t fold(std::uint64_t a, std::uint64_t b) noexcept {
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

inline std::uint64_t avalanche(std::uint64_t h) noexcept {
  h = (h ^ (h >> 37)) * kPrimeMix1;
  return h ^ (h >> 32);
}

inline std::uint64_t avalanche_xxh64(std::uint64_t h) noexcept {
  h = (h ^ (h >> 33)) * kPrime64_2;
  h = (h ^ (h >> 29)) * kPrime64_3;
  return h ^ (h >> 32);
}

inline std::uint64_t mix16(const unsigned char* in, const unsigned char* secret, std::uint64_t seed) noexcept {
  return fold(read64(in) ^ (read64(secret) + seed), read64(in + 8) ^ (read64(secret + 8) - seed));
}

inline std::uint64_t hash_0_to_16(const unsigned char* in, std::size_t len, std::uint64_t seed) noexcept {
  if (len == 0) return avalanche_xxh64(seed ^ read64(kSecret + 56) ^ read64(kSecret + 64));
  if (len < 4) {
    const std::uint64_t combined = (std::uint64_t{in[0]} << 16) | (std::uint64_t{in[len >> 1]} << 24) |
                                   std::uint64_t{in[len - 1]} | (static_cast<std::uint64_t>(len) << 8);
    return avalanche_xxh64(combined ^ ((read32(kSecret) ^ read32(kSecret + 4)) + seed));
  }
  if (len <= 8) {
    seed ^= static_cast<std::uint64_t>(__builtin_bswap32(static_cast<std::uint32_t>(seed))) << 32;
    const std::uint64_t word = read32(in + len - 4) + (read32(in) << 32);
    std::uint64_t h = word ^ ((read64(kSecret + 8) ^ read64(kSecret + 16)) - seed);
    h ^= rotate_left(h, 49) ^ rotate_left(h, 24);
    h *= kPrimeMix2;
    h = (h ^ ((h >> 35) + len)) * kPrimeMix2;
    return h ^ (h >> 28);
  }
  const std::uint64_t low = read64(in) ^ ((read64(kSecret + 24) ^ read64(kSecret + 32)) + seed);
  const std::uint64_t high = read64(in + len - 8) ^ ((read64(kSecret + 40) ^ read64(kSecret + 48)) - seed);
  return avalanche(len + __builtin_bswap64(low) + high + fold(low, high));
}

inline std::uint64_t hash_17_to_128(const unsigned char* in, std::size_t len, std::uint64_t seed) noexcept {
  std::uint64_t acc = len * kPrime64_1;
  // pairs of 16 bytes from both ends towards the middle
  for (std::size_t pair = (len - 1) / 32 + 1; pair-- > 0;) {
    acc += mix16(in + 16 * pair, kSecret + 32 * pair, seed);
    acc += mix16(in + len - 16 * (pair + 1), kSecret + 32 * pair + 16, seed);
  }
  return avalanche(acc);
}

inline std::uint64_t hash_129_to_240(const unsigned char* in, std::size_t len, std::uint64_t seed) noexcept {
  std::uint64_t acc = len * kPrime64_1;
  for (std::size_t i = 0; i < 8; ++i) acc += mix16(in + 16 * i, kSecret + 16 * i, seed);
  acc = avalanche(acc);
  for (std::size_t i = 8; i < len / 16; ++i) acc += mix16(in + 16 * i, kSecret + 16 * (i - 8) + 3, seed);
  return avalanche(acc + mix16(in + len - 16, kSecret + 136 - 17, seed));
}

inline void accumulate(std::uint64_t* acc, const unsigned char* in, const unsigned char* secret) noexcept {
  for (std::size_t lane = 0; lane < 8; ++lane) {
    const std::uint64_t data = read64(in + 8 * lane);
    const std::uint64_t keyed = data ^ read64(secret + 8 * lane);
    acc[lane ^ 1] += data;
    acc[lane] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
  }
}

inline std::uint64_t hash_over_240(const unsigned char* in, std::size_t len, std::uint64_t seed) noexcept {
  unsigned char secret[kSecretBytes];
  for (std::size_t i = 0; i < kSecretBytes; i += 16) {
    const std::uint64_t low = read64(kSecret + i) + seed, high = read64(kSecret + i + 8) - seed;
    std::memcpy(secret + i, &low, 8);
    std::memcpy(secret + i + 8, &high, 8);
  }
  std::uint64_t acc[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                          kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
  constexpr std::size_t stripe_bytes = 64, stripes = (kSecretBytes - stripe_bytes) / 8,
                        block_bytes = stripe_bytes * stripes;
  const std::size_t blocks = (len - 1) / block_bytes;
  for (std::size_t block = 0; block < blocks; ++block) {
    for (std::size_t s = 0; s < stripes; ++s)
      accumulate(acc, in + block * block_bytes + s * stripe_bytes, secret + 8 * s);
    for (std::size_t lane = 0; lane < 8; ++lane) {
      const std::uint64_t key = read64(secret + kSecretBytes - stripe_bytes + 8 * lane);
      acc[lane] = ((acc[lane] ^ (acc[lane] >> 47)) ^ key) * kPrime32_1;
    }
  }
  const unsigned char* rest = in + blocks * block_bytes;
  for (std::size_t s = 0; s < (len - 1 - blocks * block_bytes) / stripe_bytes; ++s)
    accumulate(acc, rest + s * stripe_bytes, secret + 8 * s);
  accumulate(acc, in + len - stripe_bytes, secret + kSecretBytes - stripe_bytes - 7);
  std::uint64_t h = len * kPrime64_1;
  for (std::size_t i = 0; i < 4; ++i)
    h += fold(acc[2 * i] ^ read64(secret + 11 + 16 * i), acc[2 * i + 1] ^ read64(secret + 11 + 16 * i + 8));
  return avalanche(h);
}

}  // namespace xxh3

inline std::uint64_t xxh3_64(const void* data, std::size_t len, std::uint64_t seed) noexcept {
  const auto* in = static_cast<const unsigned char*>(data);
  if (len <= 16) return xxh3::hash_0_to_16(in, len, seed);
  if (len <= 128) return xxh3::hash_17_to_128(in, len, seed);
  if (len <= 240) return xxh3::hash_129_to_240(in, len, seed);
  return xxh3::hash_over_240(in, len, seed);
}

// Keys of the n_blocks whole blocks at tokens.
inline void hash_blocks(const std::uint32_t* tokens, std::size_t n_blocks, std::size_t block_size,
                        std::uint64_t seed, std::uint64_t* keys) noexcept {
  const std::size_t bytes = block_size * sizeof(std::uint32_t);
  if (bytes == 64) {  // 16 tokens, the most common: with the length known, the keyed secret stays in registers
    const auto* in = reinterpret_cast<const unsigned char*>(tokens);
    for (std::size_t i = 0; i < n_blocks; ++i) keys[i] = xxh3::hash_17_to_128(in + 64 * i, 64, seed);
    return;
  }
  for (std::size_t i = 0; i < n_blocks; ++i) keys[i] = xxh3_64(tokens + i * block_size, bytes, seed);
}

// Position of the first token outside 0..2^32-1, or n. Token is (u)int32 or (u)int64.
template <class Token>
std::size_t first_invalid(const Token* tokens, std::size_t n) noexcept {
  // OR of all words first: a prompt is valid nearly always, and this loop vectorises
  std::uint64_t seen = 0;
  for (std::size_t i = 0; i < n; ++i) seen |= static_cast<std::uint64_t>(tokens[i]);
  if ((seen >> 32) == 0) return n;
  for (std::size_t i = 0; i < n; ++i)
    if ((static_cast<std::uint64_t>(tokens[i]) >> 32) != 0) return i;
  return n;
}

}  // namespace mulsched
