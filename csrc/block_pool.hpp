// The paged KV cache of a modelled engine: blocks, the keys they are cached under, and the free queue.
//
// As vLLM v1 does it: a block that nobody uses waits in the free queue, still under its key; the front of
// the queue is taken next, and only then does its key go. Blocks without a key are at the front, so which of
// them is taken makes no difference. Two blocks may be cached under one key, each computed by a request
// that could not use the other; lookups find the older one.
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

  explicit BlockPool(Id n_blocks) : n_blocks_(n_blocks), free_(n_blocks) {}

  Id n_free() const noexcept { return free_; }
  bool idle(Id id) const noexcept { return blocks_[id].uses == 0; }

  // The oldest block under this key, or kNoBlock.
  Id find(Key key) const noexcept { return by_key_.find(key); }

  // Ask the processor for what a find, or a use, of these will touch.
  void prefetch(Key key) const noexcept { by_key_.prefetch(key); }
  void prefetch(Id id) const noexcept { __builtin_prefetch(&blocks_[id]); }

  // Another request uses the block.
  void use(Id id) {
    if (blocks_[id].uses++ == 0) {
      unlink(id);
      --free_;
    }
  }

  // The next block of the free queue, which must not be empty; a key that goes with it is appended to evicted.
  Id take(std::vector<Key>& evicted) {
    Id id = head_;
    if (!blank_.empty()) {
      id = blank_.back();
      blank_.pop_back();
    } else if (blocks_.size() < n_blocks_) {
      id = static_cast<Id>(blocks_.size());
      blocks_.emplace_back();
    } else {
      unlink(id);
      if (head_ != kNoBlock) {  // it will be taken next
        prefetch(blocks_[head_].key);
        if (blocks_[head_].next != kNoBlock) prefetch(blocks_[head_].next);
      }
      evicted.push_back(blocks_[id].key);
      forget(id);
    }
    blocks_[id].uses = 1;
    --free_;
    return id;
  }

  void release(Id id) {
    Block& block = blocks_[id];
    if (--block.uses > 0) return;
    ++free_;
    if (!block.cached) {
      blank_.push_back(id);
      return;
    }
    block.prev = tail_;
    block.next = kNoBlock;
    (tail_ == kNoBlock ? head_ : blocks_[tail_].next) = id;
    tail_ = id;
  }

  void cache(Id id, Key key) {
    Block& block = blocks_[id];
    block.key = key;
    block.cached = true;
    block.next_copy = kNoBlock;
    const Id first = by_key_.find(key);
    if (first == kNoBlock) {
      by_key_.set(key, id);
      block.prev_copy = id;
      return;
    }
    block.prev_copy = blocks_[first].prev_copy;
    blocks_[block.prev_copy].next_copy = id;
    blocks_[first].prev_copy = id;
  }

  template <class Visit>
  void for_each_key(Visit&& visit) const {
    by_key_.for_each([&visit](Key key, Id) { visit(key); });
  }

  // Verifies queue, counts and copies against the uses that requests hold; an empty string if all is well.
  std::string check(const std::vector<std::uint32_t>& uses) const {
    std::size_t waiting = n_blocks_ - blocks_.size() + blank_.size();
    Id before = kNoBlock;
    for (Id id = head_; id != kNoBlock; before = id, id = blocks_[id].next, ++waiting)
      if (blocks_[id].uses != 0 || !blocks_[id].cached || blocks_[id].prev != before)
        return "the free queue is out of order";
    for (const Id id : blank_)
      if (blocks_[id].uses != 0 || blocks_[id].cached) return "a blank block is in use or has a key";
    if (before != tail_ || waiting != free_) return "free blocks are miscounted";
    for (Id id = 0; id < blocks_.size(); ++id)
      if (blocks_[id].uses != uses[id]) return "uses differ from what running requests hold";
    std::size_t cached = 0, listed = 0;
    for (const Block& block : blocks_) cached += block.cached;
    bool right = true;
    by_key_.for_each([&](Key key, Id first) {
      Id last = kNoBlock;
      for (Id id = first; id != kNoBlock; last = id, id = blocks_[id].next_copy, ++listed)
        right = right && blocks_[id].cached && blocks_[id].key == key;
      right = right && blocks_[first].prev_copy == last;
    });
    return right && listed == cached ? "" : "keys and blocks differ";
  }

  std::size_t n_used_ever() const noexcept { return blocks_.size(); }

 private:
  struct Block {
    Key key = 0;
    std::uint32_t uses = 0;
    Id prev = kNoBlock, next = kNoBlock;  // in the free queue, of blocks with a key
    // Copies under one key, oldest first; the oldest one's prev_copy is the newest.
    Id prev_copy = kNoBlock, next_copy = kNoBlock;
    bool cached = false;
  };

  void unlink(Id id) {
    const Block& block = blocks_[id];
    (block.prev == kNoBlock ? head_ : blocks_[block.prev].next) = block.next;
    (block.next == kNoBlock ? tail_ : blocks_[block.next].prev) = block.prev;
  }

  void forget(Id id) {
    Block& block = blocks_[id];
    block.cached = false;
    const Id first = by_key_.find(block.key);
    if (first != id) {
      blocks_[block.prev_copy].next_copy = block.next_copy;
      blocks_[block.next_copy == kNoBlock ? first : block.next_copy].prev_copy = block.prev_copy;
    } else if (block.next_copy == kNoBlock) {
      by_key_.erase(block.key);
    } else {
      by_key_.set(block.key, block.next_copy);
      blocks_[block.next_copy].prev_copy = block.prev_copy;
    }
  }

  Id n_blocks_, free_;
  std::vector<Block> blocks_;  // those that were used ever
  std::vector<Id> blank_;      // used before, free now, without a key
  Id head_ = kNoBlock, tail_ = kNoBlock;
  FlatMapOf<8> by_key_;  // key -> oldest copy; nobody counts an engine model's memory, so it may be quick
};

}  // namespace mulsched
