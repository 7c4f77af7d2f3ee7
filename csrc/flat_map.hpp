// A small open-addressing map from 64-bit keys to 32-bit values.
//
// One allocation holds the keys and then the values: 12 bytes a slot where a std::unordered_map spends
// about 40, and most nodes of the tree have one child or none. Linear probing with backward-shift deletion
// needs no tombstones, so a map that is written for ever does not decay.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

namespace mulsched {

class FlatMap {
 public:
  static constexpr std::uint32_t kAbsent = UINT32_MAX;  // marks an empty slot: not a value one can store

  FlatMap() = default;
  FlatMap(const FlatMap&) = delete;
  FlatMap& operator=(const FlatMap&) = delete;
  FlatMap(FlatMap&& other) noexcept
      : slots_(std::move(other.slots_)),
        size_(std::exchange(other.size_, 0)),
        capacity_(std::exchange(other.capacity_, 0)) {}
  FlatMap& operator=(FlatMap&& other) noexcept {
    slots_ = std::move(other.slots_);
    size_ = std::exchange(other.size_, 0);
    capacity_ = std::exchange(other.capacity_, 0);
    return *this;
  }

  std::size_t size() const noexcept { return size_; }
  std::size_t bytes() const noexcept { return std::size_t{capacity_} * kSlotBytes; }

  std::uint32_t find(std::uint64_t key) const noexcept {
    if (size_ == 0) return kAbsent;
    const std::uint32_t slot = probe(key);
    return value(slot);
  }

  // Asks the processor for the key's slot, so that the misses of a batch overlap.
  void prefetch(std::uint64_t key) const noexcept {
    if (capacity_ == 0) return;
    const std::uint32_t slot = home(key);
    __builtin_prefetch(keys() + slot);
    __builtin_prefetch(values() + slot);
  }

  // Adds the key, or overwrites its value. Returns the old value, or kAbsent.
  std::uint32_t set(std::uint64_t key, std::uint32_t new_value) {
    if (capacity_ == 0) rehash(2);
    std::uint32_t slot = probe(key);
    const std::uint32_t old = value(slot);
    if (old == kAbsent) {
      // beyond a load of 13/16 a search for what is not there would pass some 15 slots and more
      if ((std::uint64_t{size_} + 1) * 16 > std::uint64_t{capacity_} * 13 || size_ + 1 == capacity_) {
        rehash(capacity_ + capacity_ / (capacity_ < 64 ? 2 : 4) + 1);
        slot = probe(key);
      }
      keys()[slot] = key;
      ++size_;
    }
    values()[slot] = new_value;
    return old;
  }

  // Removes the key. Returns its value, or kAbsent.
  std::uint32_t erase(std::uint64_t key) {
    if (size_ == 0) return kAbsent;
    std::uint32_t hole = probe(key);
    const std::uint32_t old = value(hole);
    if (old == kAbsent) return kAbsent;
    for (std::uint32_t slot = next(hole); value(slot) != kAbsent; slot = next(slot)) {
      const std::uint32_t home_slot = home(keys()[slot]);
      // the entry may move back only if its home does not lie in (hole, slot], cyclically
      const bool stays = hole <= slot ? (hole < home_slot && home_slot <= slot)
                                      : (hole < home_slot || home_slot <= slot);
      if (stays) continue;
      keys()[hole] = keys()[slot];
      values()[hole] = values()[slot];
      hole = slot;
    }
    values()[hole] = kAbsent;
    --size_;
    if (size_ == 0) {
      clear();
    } else if (capacity_ > 8 && std::uint64_t{size_} * 4 < capacity_) {
      rehash(size_ * 2);
    }
    return old;
  }

  void clear() noexcept {
    slots_.reset();
    size_ = capacity_ = 0;
  }

  // Calls visit(key, value) for every entry, in no order that means anything.
  template <class Visit>
  void for_each(Visit&& visit) const {
    for (std::uint32_t slot = 0; slot < capacity_; ++slot)
      if (value(slot) != kAbsent) visit(keys()[slot], value(slot));
  }

 private:
  static constexpr std::size_t kSlotBytes = sizeof(std::uint64_t) + sizeof(std::uint32_t);

  // Engine hashes may be small counters: mix before taking the high bits.
  static std::uint64_t mix(std::uint64_t x) noexcept {
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93;
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93;
    return x ^ (x >> 32);
  }

  std::uint32_t home(std::uint64_t key) const noexcept {
    return static_cast<std::uint32_t>(((mix(key) >> 32) * capacity_) >> 32);
  }
  std::uint32_t next(std::uint32_t slot) const noexcept { return slot + 1 == capacity_ ? 0 : slot + 1; }

  // The slot of the key, or the empty slot where it would go; there is always an empty one.
  std::uint32_t probe(std::uint64_t key) const noexcept {
    std::uint32_t slot = home(key);
    while (value(slot) != kAbsent && keys()[slot] != key) slot = next(slot);
    return slot;
  }

  std::uint64_t* keys() const noexcept { return reinterpret_cast<std::uint64_t*>(slots_.get()); }
  std::uint32_t* values() const noexcept { return reinterpret_cast<std::uint32_t*>(keys() + capacity_); }
  std::uint32_t value(std::uint32_t slot) const noexcept { return values()[slot]; }

  void rehash(std::uint32_t new_capacity) {
    FlatMap bigger;
    // operator new[] of unsigned char aligns for any fundamental type
    bigger.slots_.reset(new unsigned char[new_capacity * kSlotBytes]);
    bigger.capacity_ = new_capacity;
    std::memset(bigger.values(), 0xFF, new_capacity * sizeof(std::uint32_t));
    for_each([&bigger](std::uint64_t key, std::uint32_t v) {
      const std::uint32_t slot = bigger.probe(key);
      bigger.keys()[slot] = key;
      bigger.values()[slot] = v;
      ++bigger.size_;
    });
    *this = std::move(bigger);
  }

  std::unique_ptr<unsigned char[]> slots_;
  std::uint32_t size_ = 0;
  std::uint32_t capacity_ = 0;
};

}  // namespace mulsched
