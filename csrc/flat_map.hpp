// A small open-addressing map from 64-bit keys to 32-bit values.
//
// A slot is 12 bytes, key and value side by side, so that a search that misses the processor's cache misses
// it once; a std::unordered_map spends about 40, and most nodes of the tree have one child or none. Linear
// probing with backward-shift deletion needs no tombstones, so a map that is written for ever does not decay.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

namespace mulsched {

// It grows when more than kFullSixteenths of 16 slots are taken.
template <unsigned kFullSixteenths>
class FlatMapOf {
 public:
  static constexpr std::uint32_t kAbsent = UINT32_MAX;  // marks an empty slot: not a value one can store

  FlatMapOf() = default;
  FlatMapOf(const FlatMapOf&) = delete;
  FlatMapOf& operator=(const FlatMapOf&) = delete;
  FlatMapOf(FlatMapOf&& other) noexcept
      : slots_(std::move(other.slots_)),
        size_(std::exchange(other.size_, 0)),
        capacity_(std::exchange(other.capacity_, 0)) {}
  FlatMapOf& operator=(FlatMapOf&& other) noexcept {
    slots_ = std::move(other.slots_);
    size_ = std::exchange(other.size_, 0);
    capacity_ = std::exchange(other.capacity_, 0);
    return *this;
  }

  std::size_t size() const noexcept { return size_; }
  std::size_t bytes() const noexcept { return std::size_t{capacity_} * sizeof(Slot); }

  std::uint32_t find(std::uint64_t key) const noexcept {
    if (size_ == 0) return kAbsent;
    return slots_[probe(key)].value;
  }

  // Asks the processor for the key's slot, so that the misses of a batch overlap.
  void prefetch(std::uint64_t key) const noexcept {
    if (capacity_ > 0) __builtin_prefetch(&slots_[home(key)]);
  }

  // Adds the key, or overwrites its value. Returns the old value, or kAbsent.
  std::uint32_t set(std::uint64_t key, std::uint32_t new_value) {
    if (capacity_ == 0) rehash(2);
    std::uint32_t slot = probe(key);
    const std::uint32_t old = slots_[slot].value;
    if (old == kAbsent) {
      if ((std::uint64_t{size_} + 1) * 16 > std::uint64_t{capacity_} * kFullSixteenths || size_ + 1 == capacity_) {
        rehash(capacity_ + capacity_ / (capacity_ < 64 ? 2 : 4) + 1);
        slot = probe(key);
      }
      slots_[slot].key = key;
      ++size_;
    }
    slots_[slot].value = new_value;
    return old;
  }

  // Removes the key. Returns its value, or kAbsent.
  std::uint32_t erase(std::uint64_t key) {
    if (size_ == 0) return kAbsent;
    std::uint32_t hole = probe(key);
    const std::uint32_t old = slots_[hole].value;
    if (old == kAbsent) return kAbsent;
    for (std::uint32_t slot = next(hole); slots_[slot].value != kAbsent; slot = next(slot)) {
      const std::uint32_t home_slot = home(slots_[slot].key);
      // the entry may move back only if its home does not lie in (hole, slot], cyclically
      const bool stays = hole <= slot ? (hole < home_slot && home_slot <= slot)
                                      : (hole < home_slot || home_slot <= slot);
      if (stays) continue;
      slots_[hole] = slots_[slot];
      hole = slot;
    }
    slots_[hole].value = kAbsent;
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
      if (slots_[slot].value != kAbsent) visit(slots_[slot].key, slots_[slot].value);
  }

 private:
  struct [[gnu::packed]] Slot {
    std::uint64_t key;
    std::uint32_t value;
  };

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
    while (slots_[slot].value != kAbsent && slots_[slot].key != key) slot = next(slot);
    return slot;
  }

  void rehash(std::uint32_t new_capacity) {
    FlatMapOf bigger;
    bigger.slots_.reset(new Slot[new_capacity]);
    bigger.capacity_ = new_capacity;
    std::memset(static_cast<void*>(bigger.slots_.get()), 0xFF, new_capacity * sizeof(Slot));  // all kAbsent
    for_each([&bigger](std::uint64_t key, std::uint32_t v) {
      const std::uint32_t slot = bigger.probe(key);
      bigger.slots_[slot].key = key;
      bigger.slots_[slot].value = v;
      ++bigger.size_;
    });
    *this = std::move(bigger);
  }

  std::unique_ptr<Slot[]> slots_;
  std::uint32_t size_ = 0;
  std::uint32_t capacity_ = 0;
};

// For what must be small: beyond this load a search for what is not there would pass some 15 slots and more.
using FlatMap = FlatMapOf<13>;

}  // namespace mulsched
