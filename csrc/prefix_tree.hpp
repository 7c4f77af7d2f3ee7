// The tree under the prefix index: nodes, edges, holders, and the canonical form.
//
// Invariants, checked under these numbers by prefix_tree_check.hpp:
//   1. Every node but the root has a non-empty edge, its first key is its key in the parent's child map,
//      and it starts where its parent ends.
//   2. A node's holders are sorted by row, without duplicates; every block of an edge has exactly the
//      node's holders. A node is split wherever holdings differ.
//   3. A node without holders has children (it is kept only while some descendant is held).
//   4. No node could be merged with its parent: see mergeable().
//   5. Each row's list links exactly the nodes that it holds; its block count is the sum of their edges
//      and does not exceed its capacity.
//   6. In a bounded row's list a node stands before every ancestor, so the tail leaves before its prefix.
//   7. Nodes have block ids for all blocks or for none; an id leads back to its node and depth.
//   8. A named row holds exactly the blocks that its names name; copies beyond the first are counted of bound
//      names only, at least one each.
//   9. unique_blocks is the number of blocks with a holder.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "flat_map.hpp"

namespace mulsched {

using Key = std::uint64_t;
using Row = std::uint32_t;
using NodeId = std::uint32_t;
using BlockId = std::uint32_t;

inline constexpr std::uint32_t kNone = UINT32_MAX;
inline constexpr NodeId kRoot = 0;
inline constexpr std::int64_t kUnbounded = -1;

// That a row holds a node, and the node's neighbours in the row's list.
struct Holder {
  Row row;
  NodeId prev, next;
};

struct Node {
  NodeId parent = kNone;
  std::uint32_t start = 0;  // depth of the first block, in blocks
  std::vector<Key> keys;
  std::vector<BlockId> ids;  // empty until a named row holds a block of the node
  std::vector<Holder> holders;
  FlatMap children;  // first key of the child's edge -> child

  std::uint32_t length() const noexcept { return static_cast<std::uint32_t>(keys.size()); }
  std::uint32_t end() const noexcept { return start + length(); }
};

struct RowState {
  bool used = false;
  bool named = false;
  std::int64_t capacity = kUnbounded;
  std::int64_t blocks = 0;
  NodeId head = kNone, tail = kNone;  // head leaves next
  FlatMap names;                      // engine hash -> block id
  FlatMap extra_names;                // block id -> names beyond the first; rarely used
  FlatMap extra_copies;               // engine hash -> copies beyond the first; few names have any

  bool bounded() const noexcept { return capacity >= 0; }
};

// Counts in a FlatMap, where what is not there counts 0.
inline void add_one(FlatMap& counts, std::uint64_t key) {
  const std::uint32_t count = counts.find(key);
  if (count == FlatMap::kAbsent - 1) throw std::length_error("more than 2^32 copies or names of a block");
  counts.set(key, count == FlatMap::kAbsent ? 1 : count + 1);
}

// False if the count was 0.
inline bool take_one(FlatMap& counts, std::uint64_t key) {
  const std::uint32_t count = counts.find(key);
  if (count == FlatMap::kAbsent) return false;
  if (count == 1) {
    counts.erase(key);
  } else {
    counts.set(key, count - 1);
  }
  return true;
}

// Grows by a sixteenth: edges are appended to by event, and doubling would cost up to twice their size.
template <class T>
void append(std::vector<T>& to, const T* from, std::size_t n) {
  if (to.size() + n > to.capacity()) to.reserve(to.size() + n + to.size() / 16);
  to.insert(to.end(), from, from + n);
}

// Cuts a vector down, and gives memory back that it will hardly need again.
template <class T>
void cut(std::vector<T>& v, std::size_t n) {
  v.resize(n);
  if (v.capacity() > 2 * n) v.shrink_to_fit();
}

inline std::uint32_t common_prefix(const Key* a, std::size_t n_a, const Key* b, std::size_t n_b) noexcept {
  const std::size_t n = std::min(n_a, n_b);
  std::size_t i = 0;
  while (i < n && a[i] == b[i]) ++i;
  return static_cast<std::uint32_t>(i);
}

// The larger of `least` and the common prefix, which one look tells where it is not longer.
inline std::uint32_t common_prefix_or(std::uint32_t least, const Key* a, std::size_t n_a, const Key* b,
                                      std::size_t n_b) noexcept {
  if (std::min(n_a, n_b) <= least || a[least] != b[least]) return least;
  // keys are not chained: one may be equal further on, after a difference
  return std::max(least, common_prefix(a, n_a, b, n_b));
}

class PrefixTree {
 public:
  PrefixTree() { new_node(); }

  Node& node(NodeId id) noexcept { return chunks_[id / kChunk][id % kChunk]; }
  const Node& node(NodeId id) const noexcept { return chunks_[id / kChunk][id % kChunk]; }

  std::vector<RowState>& rows() noexcept { return rows_; }
  const std::vector<RowState>& rows() const noexcept { return rows_; }

  std::size_t live_nodes() const noexcept { return live_nodes_ - 1; }
  std::int64_t unique_blocks() const noexcept { return unique_blocks_; }

  NodeId child(NodeId id, Key key) const noexcept { return node(id).children.find(key); }

  bool holds(NodeId id, Row row) const noexcept { return find_holder(node(id), row) != nullptr; }

  NodeId block_node(BlockId id) const noexcept { return block(id).node; }
  std::uint32_t block_offset(BlockId id) const noexcept {
    return block(id).depth - node(block(id).node).start;
  }

  void give_ids(NodeId id) {
    Node& n = node(id);
    if (!n.ids.empty() || n.keys.empty()) return;
    n.ids.reserve(n.keys.size());
    for (std::uint32_t i = 0; i < n.length(); ++i) n.ids.push_back(new_block(id, n.start + i));
  }

  NodeId add_leaf(NodeId parent, const Key* keys, std::size_t n_keys) {
    const NodeId id = new_node();
    Node& leaf = node(id);
    leaf.parent = parent;
    leaf.start = node(parent).end();
    leaf.keys.assign(keys, keys + n_keys);
    node(parent).children.set(leaf.keys[0], id);
    touch(id);
    return id;
  }

  // Whether new blocks after the node's last can lengthen its edge: nobody else holds it and nothing follows.
  // Most of an engine's events are of this kind, a block of an answer after the block before it.
  bool extensible(NodeId id, Row row) const noexcept {
    const Node& n = node(id);
    return n.holders.size() == 1 && n.holders[0].row == row && n.children.size() == 0 && !rows_[row].bounded();
  }

  void extend(NodeId id, Row row, const Key* keys, std::size_t n_keys) {
    Node& n = node(id);
    const std::uint32_t end = n.end();
    append(n.keys, keys, n_keys);
    if (!n.ids.empty()) {
      if (n.ids.size() + n_keys > n.ids.capacity()) n.ids.reserve(n.keys.capacity());
      for (std::size_t i = 0; i < n_keys; ++i) n.ids.push_back(new_block(id, end + static_cast<std::uint32_t>(i)));
    }
    unique_blocks_ += static_cast<std::int64_t>(n_keys);
    rows_[row].blocks += static_cast<std::int64_t>(n_keys);
  }

  // Cuts the edge after `at` blocks, 0 < at < length. The upper part keeps the id; returns the lower part,
  // which in every row's list comes right before it.
  NodeId split(NodeId id, std::uint32_t at) {
    const NodeId lower_id = new_node();
    Node& upper = node(id);
    Node& lower = node(lower_id);
    lower.parent = id;
    lower.start = upper.start + at;
    lower.keys.assign(upper.keys.begin() + at, upper.keys.end());
    cut(upper.keys, at);
    if (!upper.ids.empty()) {
      lower.ids.assign(upper.ids.begin() + at, upper.ids.end());
      cut(upper.ids, at);
      for (const BlockId id_below : lower.ids) block(id_below).node = lower_id;
    }
    lower.children = std::move(upper.children);
    lower.children.for_each([&](Key, NodeId grandchild) { node(grandchild).parent = lower_id; });
    upper.children.set(lower.keys[0], lower_id);
    lower.holders.reserve(upper.holders.size());
    for (Holder& holder : upper.holders) {
      lower.holders.push_back({holder.row, holder.prev, id});
      if (holder.prev == kNone) {
        rows_[holder.row].head = lower_id;
      } else {
        find_holder(node(holder.prev), holder.row)->next = lower_id;
      }
      holder.prev = lower_id;
    }
    touch(lower_id);
    return lower_id;
  }

  // Makes the row hold the node, as the newest in its list.
  void add_holder(NodeId id, Row row) {
    Node& n = node(id);
    const auto place = std::lower_bound(n.holders.begin(), n.holders.end(), row,
                                        [](const Holder& h, Row r) { return h.row < r; });
    if (n.holders.empty()) unique_blocks_ += n.length();
    link_last(*n.holders.insert(place, {row, kNone, kNone}), id);
    rows_[row].blocks += n.length();
    touch(id);
  }

  void drop_holder(NodeId id, Row row) {
    Node& n = node(id);
    Holder* holder = find_holder(n, row);
    unlink(*holder);
    n.holders.erase(n.holders.begin() + (holder - n.holders.data()));
    if (n.holders.empty()) {
      unique_blocks_ -= n.length();
      std::vector<Holder>().swap(n.holders);
    }
    rows_[row].blocks -= n.length();
    touch(id);
  }

  void move_to_newest(NodeId id, Row row) {
    Holder& holder = *find_holder(node(id), row);
    if (holder.next == kNone) return;
    unlink(holder);
    link_last(holder, id);
    touch(id);
  }

  // Brings the touched part of the tree back into canonical form (invariants 3 and 4).
  void settle() {
    // from the root down: a long chain of single blocks then grows at its end, in linear time
    std::sort(touched_.begin(), touched_.end(),
              [this](NodeId a, NodeId b) { return node(a).start < node(b).start; });
    for (std::size_t i = 0; i < touched_.size(); ++i) settle_node(touched_[i]);  // grows meanwhile
    touched_.clear();
    if (live_nodes_ == 1 && (chunks_.size() > 1 || !block_chunks_.empty())) release_all();
  }

  // True when the only child of a node can be joined to it: the same holders, and for each bounded one
  // nothing between the two in its order of eviction. So the nodes are a function of the content.
  bool mergeable(NodeId parent_id, NodeId child_id) const noexcept {
    const Node& parent = node(parent_id);
    const Node& lower = node(child_id);
    if (parent_id == kRoot || parent.children.size() != 1 || parent.holders.size() != lower.holders.size())
      return false;
    for (std::size_t i = 0; i < parent.holders.size(); ++i) {
      if (parent.holders[i].row != lower.holders[i].row) return false;
      if (rows_[parent.holders[i].row].bounded() && lower.holders[i].next != parent_id) return false;
    }
    return true;
  }

  // Bytes allocated, by part.
  struct Memory {
    std::size_t nodes = 0, edges = 0, holders = 0, blocks = 0, names = 0;
  };

  Memory memory() const {
    Memory m;
    m.nodes = chunks_.size() * kChunk * sizeof(Node) + free_nodes_.capacity() * sizeof(NodeId) +
              rows_.capacity() * sizeof(RowState);
    m.blocks = block_chunks_.size() * kChunk * sizeof(Block);
    for_each_node([&](NodeId, const Node& n) {
      m.edges += n.keys.capacity() * sizeof(Key) + n.ids.capacity() * sizeof(BlockId) + n.children.bytes();
      m.holders += n.holders.capacity() * sizeof(Holder);
    });
    for (const RowState& row : rows_)
      m.names += row.names.bytes() + row.extra_names.bytes() + row.extra_copies.bytes();
    return m;
  }

  // Depth first, children in the order of their first keys. The root is left out.
  template <class Visit>
  void for_each_node(Visit&& visit) const {
    std::vector<NodeId> stack{kRoot};
    std::vector<std::pair<Key, NodeId>> children;
    while (!stack.empty()) {
      const NodeId id = stack.back();
      stack.pop_back();
      if (id != kRoot) visit(id, node(id));
      children.clear();
      node(id).children.for_each([&](Key key, NodeId c) { children.emplace_back(key, c); });
      std::sort(children.begin(), children.end(), std::greater<>());
      for (const auto& [key, c] : children) stack.push_back(c);
    }
  }

  // The nodes that a row holds, in the order of its list.
  template <class Visit>
  void for_each_held(Row row, Visit&& visit) const {
    for (NodeId id = rows_[row].head; id != kNone; id = find_holder(node(id), row)->next) visit(id);
  }

  // Forgets that a block is named once more than another; true if that was its last name.
  bool drop_name(Row row, BlockId block) { return !take_one(rows_[row].extra_names, block); }

 private:
  friend class PrefixTreeCheck;

  static constexpr std::size_t kChunk = 256;  // nodes must not move while they are being changed

  // Where a block with an engine hash is. Of a free id, `node` is the next free id.
  struct Block {
    NodeId node = kNone;
    std::uint32_t depth = 0;
  };

  Block& block(BlockId id) noexcept { return block_chunks_[id / kChunk][id % kChunk]; }
  const Block& block(BlockId id) const noexcept { return block_chunks_[id / kChunk][id % kChunk]; }

  static const Holder* find_holder(const Node& n, Row row) noexcept {
    const auto place = std::lower_bound(n.holders.begin(), n.holders.end(), row,
                                        [](const Holder& h, Row r) { return h.row < r; });
    return place != n.holders.end() && place->row == row ? &*place : nullptr;
  }
  static Holder* find_holder(Node& n, Row row) noexcept {
    return const_cast<Holder*>(find_holder(static_cast<const Node&>(n), row));
  }

  NodeId new_node() {
    if (free_nodes_.empty()) {
      if ((chunks_.size() + 1) * kChunk >= kNone) throw std::length_error("more than 2^32 nodes");
      const auto first = static_cast<NodeId>(chunks_.size() * kChunk);
      chunks_.push_back(std::make_unique<Node[]>(kChunk));
      for (std::size_t i = kChunk; i-- > 0;) free_nodes_.push_back(first + static_cast<NodeId>(i));
    }
    const NodeId id = free_nodes_.back();
    free_nodes_.pop_back();
    ++live_nodes_;
    return id;
  }

  void free_node(NodeId id) {
    Node& n = node(id);
    for (const BlockId freed : n.ids) {
      block(freed).node = free_block_;
      free_block_ = freed;
      --live_blocks_;
    }
    n = Node();
    free_nodes_.push_back(id);
    --live_nodes_;
  }

  BlockId new_block(NodeId id, std::uint32_t depth) {
    ++live_blocks_;
    if (free_block_ == kNone) {
      if ((block_chunks_.size() + 1) * kChunk >= kNone - 1) throw std::length_error("more than 2^32 blocks");
      const auto first = static_cast<BlockId>(block_chunks_.size() * kChunk);
      block_chunks_.push_back(std::make_unique<Block[]>(kChunk));
      for (std::size_t i = kChunk; i-- > 0; free_block_ = first + static_cast<BlockId>(i))
        block(first + static_cast<BlockId>(i)).node = free_block_;
    }
    const BlockId taken = free_block_;
    free_block_ = block(taken).node;
    block(taken) = {id, depth};
    return taken;
  }

  // Nothing is left but the root: give everything back.
  void release_all() {
    chunks_.clear();
    std::vector<NodeId>().swap(free_nodes_);
    std::vector<NodeId>().swap(touched_);
    block_chunks_.clear();
    block_chunks_.shrink_to_fit();
    free_block_ = kNone;
    live_nodes_ = 0;
    new_node();
  }

  void touch(NodeId id) { touched_.push_back(id); }

  void link_last(Holder& holder, NodeId id) {
    RowState& row = rows_[holder.row];
    holder.prev = row.tail;
    holder.next = kNone;
    if (row.tail == kNone) {
      row.head = id;
    } else {
      find_holder(node(row.tail), holder.row)->next = id;
    }
    row.tail = id;
  }

  void unlink(const Holder& holder) {
    RowState& row = rows_[holder.row];
    if (holder.prev == kNone) {
      row.head = holder.next;
    } else {
      find_holder(node(holder.prev), holder.row)->next = holder.next;
      touch(holder.prev);  // it may have become the neighbour of its parent
    }
    if (holder.next == kNone) {
      row.tail = holder.prev;
    } else {
      find_holder(node(holder.next), holder.row)->prev = holder.prev;
    }
  }

  void settle_node(NodeId id) {
    // ids of nodes freed since they were touched, or used again, need no care: a look at a node is harmless
    if (id == kRoot || node(id).parent == kNone) return;
    const NodeId parent = node(id).parent;
    if (node(id).holders.empty() && node(id).children.size() == 0) {
      node(parent).children.erase(node(id).keys[0]);
      free_node(id);
      touch(parent);
      return;
    }
    if (mergeable(parent, id)) {
      merge(parent, id);
      touch(parent);
      return;
    }
    if (node(id).children.size() != 1) return;
    NodeId only = kNone;
    node(id).children.for_each([&only](Key, NodeId c) { only = c; });
    if (mergeable(id, only)) {
      merge(id, only);
      touch(id);
    }
  }

  void merge(NodeId upper_id, NodeId lower_id) {
    Node& upper = node(upper_id);
    Node& lower = node(lower_id);
    if (!upper.ids.empty() || !lower.ids.empty()) {
      give_ids(upper_id);
      give_ids(lower_id);
      for (const BlockId id : lower.ids) block(id).node = upper_id;
      append(upper.ids, lower.ids.data(), lower.ids.size());
      lower.ids.clear();
    }
    append(upper.keys, lower.keys.data(), lower.keys.size());
    for (const Holder& holder : lower.holders) unlink(holder);
    upper.children = std::move(lower.children);
    upper.children.for_each([&](Key, NodeId grandchild) { node(grandchild).parent = upper_id; });
    free_node(lower_id);
  }

  std::vector<std::unique_ptr<Node[]>> chunks_;
  std::vector<NodeId> free_nodes_, touched_;
  std::vector<std::unique_ptr<Block[]>> block_chunks_;
  BlockId free_block_ = kNone;
  std::size_t live_nodes_ = 0, live_blocks_ = 0;
  std::int64_t unique_blocks_ = 0;
  std::vector<RowState> rows_;
};

}  // namespace mulsched
