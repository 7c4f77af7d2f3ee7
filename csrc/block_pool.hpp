// The paged KV cache of a modelled engine: blocks, the keys they are cached under, and the free queue.
//
// As vLLM v1 does it: a block that nobody uses waits in the free queue, still under its key; the front of
// the queue is taken next, and only then does its key go. Blocks without a key are at the front, so which of
// them is taken makes no difference. Two blocks may be cached under one key, each computed by a request
// that could not use the other; lookups find the older one. A block that only one request could ever use needs
// no entry among the keys: it is cached alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "flat_map.hpp"

namespace mulsched {

class BlockPool {
 public:
  using Key = std::uint64_t;
  using Id = std::uint32_t;
  static constexpr Id kNoBlock = UINT32_MAX;

  // every_copy: tell of each copy of a key that is evicted or cached, or else of the last and the first only.
  BlockPool(Id n_blocks, bool every_copy) : n_blocks_(n_blocks), free_(n_blocks), every_copy_(every_copy) {}

  Id n_free() const noexcept { return free_; }
  std::int64_t n_cached() const noexcept { return alone_ + static_cast<std::int64_t>(by_key_.size()); }
  bool idle(Id id) const noexcept { return blocks_[id].uses == 0; }

  // The oldest block under this key, or kNoBlock.
  Id find(Key key) const noexcept { return by_key_.find(key); }

  // Ask the processor for what a find, or a use, of these will touch.
  void prefetch(Key key) const noexcept { by_key_.prefetch(key); }
  void prefetch(Id id) const noexcept { __builtin_prefetch(&blocks_[id]); }

  // Another request uses the block.
  void use(Id id) {
    Block& block = blocks_[id];
    if (block.uses++ > 0) return;
    block.place = kNoPlace;
    --free_;
  }

  // The next block of the free queue, which must not be empty; a key that goes with it, if it is to be told, is
  // appended to evicted.
  Id take(std::vector<Key>& evicted) {
    Id id;
    if (!blank_.empty()) {
      id = blank_.back();
      blank_.pop_back();
    } else if (blocks_.size() < n_blocks_) {
      id = static_cast<Id>(blocks_.size());
      blocks_.emplace_back();
    } else {
      id = pop_queue();
      Block& block = blocks_[id];
      block.place = kNoPlace;
      if (block.state == kAlone) {
        --alone_;
      } else if (forget(id) || every_copy_) {
        evicted.push_back(block.key);
      }
      block.state = kBlank;
    }
    blocks_[id].uses = 1;
    --free_;
    return id;
  }

  void release(Id id) {
    Block& block = blocks_[id];
    if (--block.uses > 0) return;
    ++free_;
    if (block.state == kBlank) {
      blank_.push_back(id);
      return;
    }
    if (queue_.size() >= 2 * blocks_.size()) drop_left();
    block.place = static_cast<std::uint32_t>(queue_.size());
    queue_.push_back(id);
  }

  // Whether it is to be told.
  bool cache(Id id, Key key) {
    Block& block = blocks_[id];
    alone_ -= block.state == kAlone;
    block.key = key;
    block.state = kKeyed;
    block.next_copy = kNoBlock;
    const Id first = by_key_.find(key);
    if (first == kNoBlock) {
      by_key_.set(key, id);
      block.prev_copy = id;
      return true;
    }
    block.prev_copy = blocks_[first].prev_copy;
    blocks_[block.prev_copy].next_copy = id;
    blocks_[first].prev_copy = id;
    return every_copy_;
  }

  void cache_alone(Id id) noexcept {
    blocks_[id].state = kAlone;
    ++alone_;
  }

  // Of the blocks that have one.
  template <class Visit>
  void for_each_key(Visit&& visit) const {
    by_key_.for_each([&visit](Key key, Id) { visit(key); });
  }

  // Verifies queue, counts and copies against the uses that requests hold; an empty string if all is well.
  std::string check(const std::vector<std::uint32_t>& uses) const {
    std::size_t waiting = n_blocks_ - blocks_.size() + blank_.size();
    for (std::size_t i = front_; i < queue_.size(); ++i) {
      const Block& block = blocks_[queue_[i]];
      if (block.place != i) continue;
      ++waiting;
      if (block.uses != 0 || block.state == kBlank) return "the free queue has a block that is not free, or blank";
    }
    for (const Id id : blank_)
      if (blocks_[id].uses != 0 || blocks_[id].state != kBlank) return "a blank block is in use or has a key";
    if (waiting != free_) return "free blocks are miscounted";
    for (Id id = 0; id < blocks_.size(); ++id)
      if (blocks_[id].uses != uses[id]) return "uses differ from what running requests hold";
    std::size_t keyed = 0, listed = 0;
    std::int64_t alone = 0;
    for (const Block& block : blocks_) {
      keyed += block.state == kKeyed;
      alone += block.state == kAlone;
    }
    if (alone != alone_) return "blocks that are cached alone are miscounted";
    bool right = true;
    by_key_.for_each([&](Key key, Id first) {
      Id last = kNoBlock;
      for (Id id = first; id != kNoBlock; last = id, id = blocks_[id].next_copy, ++listed)
        right = right && blocks_[id].state == kKeyed && blocks_[id].key == key;
      right = right && blocks_[first].prev_copy == last;
    });
    return right && listed == keyed ? "" : "keys and blocks differ";
  }

  std::size_t n_used_ever() const noexcept { return blocks_.size(); }

 private:
  static constexpr std::uint32_t kNoPlace = UINT32_MAX;
  static constexpr std::size_t kAhead = 8;  // blocks of the queue to ask memory for in advance

  enum State : std::uint8_t { kBlank, kAlone, kKeyed };  // the latter two are cached
  struct Block {
    Key key = 0;
    std::uint32_t uses : 30, state : 2;
    std::uint32_t place = kNoPlace;  // in queue_, while it waits there
    // Copies under one key, oldest first; the oldest one's prev_copy is the newest.
    Id prev_copy = kNoBlock, next_copy = kNoBlock;

    Block() noexcept : uses(0), state(kBlank) {}
  };

  Id pop_queue() noexcept {
    for (;; ++front_) {
      if (front_ + 2 * kAhead < queue_.size()) {
        prefetch(queue_[front_ + 2 * kAhead]);
        prefetch(blocks_[queue_[front_ + kAhead]].key);
      }
      if (blocks_[queue_[front_]].place == front_) return queue_[front_++];
    }
  }

  // Drops entries of blocks that have left the queue. O(1) amortised, since at least half of them have.
  void drop_left() noexcept {
    std::uint32_t kept = 0;
    for (; front_ < queue_.size(); ++front_) {
      Block& block = blocks_[queue_[front_]];
      if (block.place != front_) continue;
      block.place = kept;
      queue_[kept++] = queue_[front_];
    }
    queue_.resize(kept);
    front_ = 0;
  }

  // Whether it was the last copy.
  bool forget(Id id) {
    const Block& block = blocks_[id];
    const Id first = by_key_.find(block.key);
    if (first != id) {
      blocks_[block.prev_copy].next_copy = block.next_copy;
      blocks_[block.next_copy == kNoBlock ? first : block.next_copy].prev_copy = block.prev_copy;
    } else if (block.next_copy == kNoBlock) {
      by_key_.erase(block.key);
      return true;
    } else {
      by_key_.set(block.key, block.next_copy);
      blocks_[block.next_copy].prev_copy = block.prev_copy;
    }
    return false;
  }

  Id n_blocks_, free_;
  std::int64_t alone_ = 0;
  bool every_copy_;
  std::vector<Block> blocks_;  // those that were used ever
  std::vector<Id> blank_;      // used before, free now, without a key
  std::vector<Id> queue_;      // from front_ on the free queue, and blocks that have left it: they have another place
  std::size_t front_ = 0;
  FlatMapOf<8> by_key_;  // key -> oldest copy; nobody counts an engine model's memory, so it may be quick
};

}  // namespace mulsched
