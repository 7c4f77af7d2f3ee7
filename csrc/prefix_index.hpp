// The prefix index: which rows hold which prefix. One writer or many readers at a time.
//
// D: blocks in the argument, W: rows that hold a part of the path, N: nodes of the tree.
#pragma once

#include <exception>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>

#include "kv_event.hpp"
#include "prefix_tree.hpp"
#include "prefix_tree_check.hpp"

namespace mulsched {

class PrefixIndex {
 public:
  static constexpr std::int64_t kUnknownParent = -1;

  void add_row(Row row, std::int64_t capacity, bool named) {
    const std::unique_lock lock(mutex_);
    if (row == kNone) throw std::out_of_range("no such row");
    if (row >= tree_.rows().size()) tree_.rows().resize(std::size_t{row} + 1);
    RowState& added = tree_.rows()[row];
    added.used = true;
    added.named = named;
    added.capacity = capacity;
  }

  void remove_row(Row row) {
    const std::unique_lock lock(mutex_);
    state(row);
    Change change(broken_);
    drop_everything(row);
    state(row) = RowState();
    std::vector<RowState>& rows = tree_.rows();
    while (!rows.empty() && !rows.back().used) rows.pop_back();
    if (rows.size() * 4 < rows.capacity()) rows.shrink_to_fit();
  }

  void clear(Row row) {
    const std::unique_lock lock(mutex_);
    state(row);
    Change change(broken_);
    drop_everything(row);
  }

  void resize(Row row, std::int64_t capacity) {
    const std::unique_lock lock(mutex_);
    if (capacity < 0) throw std::out_of_range("a capacity must not be negative");
    state(row).capacity = capacity;
    Change change(broken_);
    evict(row);
    tree_.settle();
  }

  // O(D + W) amortised.
  std::int64_t store(Row row, const Key* keys, std::size_t n_keys) {
    const std::unique_lock lock(mutex_);
    const bool bounded = state(row).bounded();
    Change change(broken_);
    segments_.clear();
    const std::int64_t newly = hold(row, kRoot, 0, keys, n_keys);
    if (bounded) {
      // deepest first, so that the tail of the path leaves before its head
      for (auto segment = segments_.rbegin(); segment != segments_.rend(); ++segment)
        tree_.move_to_newest(segment->node, row);
      evict(row);
    }
    tree_.settle();
    return newly;
  }

  // has_parent false: the blocks start the prompt. A hash that names the very block already names a copy more,
  // unless counts_copies is false.
  // O(D + W) amortised.
  std::int64_t store_named(Row row, bool has_parent, std::uint64_t parent, const std::uint64_t* hashes,
                           const Key* keys, std::size_t n_keys, bool counts_copies = true) {
    const std::unique_lock lock(mutex_);
    state(row);
    Change change(broken_);
    return store_names(row, has_parent, parent, hashes, keys, n_keys, counts_copies);
  }

  // As store_named for blocks that follow `path`, of which the row need not hold anything, and for this holds
  // no more than before. O(n_path + D + W) amortised.
  std::int64_t store_named_after(Row row, const Key* path, std::size_t n_path, const std::uint64_t* hashes,
                                 const Key* keys, std::size_t n_keys, bool counts_copies = true) {
    const std::unique_lock lock(mutex_);
    state(row);
    Change change(broken_);
    NodeId node = kRoot;
    std::uint32_t offset = 0;
    std::vector<BlockId> borrowed;  // held until the blocks below them keep their place in the tree
    segments_.clear();
    hold(row, kRoot, 0, path, n_path);
    for (const Segment& segment : segments_) {
      tree_.give_ids(segment.node);
      const auto first = tree_.node(segment.node).ids.begin() + segment.from;
      if (!segment.held_before) borrowed.insert(borrowed.end(), first, first + segment.count);
      node = segment.node;
      offset = segment.from + segment.count;
    }
    const std::int64_t newly = append_named(row, node, offset, hashes, keys, n_keys, counts_copies);
    drop_blocks(row, std::move(borrowed));
    tree_.settle();
    return newly;
  }

  // The keys from the prompt's start to the block that the row knows by this name; none if it knows none.
  std::vector<Key> path(Row row, std::uint64_t name) const {
    const std::shared_lock lock(mutex_);
    const BlockId block = state(row).names.find(name);
    if (block == FlatMap::kAbsent) return {};
    NodeId node = tree_.block_node(block);
    std::uint32_t length = tree_.block_offset(block) + 1;
    std::vector<Key> keys(tree_.node(node).start + length);
    for (; node != kRoot; node = tree_.node(node).parent, length = tree_.node(node).length())
      std::copy_n(tree_.node(node).keys.begin(), length, keys.begin() + tree_.node(node).start);
    return keys;
  }

  // How many names were known. Takes a copy of each, and with the last copy the name. O(1) a block, and the
  // blocks that follow it on its edge.
  std::int64_t remove_named(Row row, const std::uint64_t* hashes, std::size_t n_hashes) {
    const std::unique_lock lock(mutex_);
    state(row);
    Change change(broken_);
    return remove_names(row, hashes, n_hashes);
  }

  // What became of a run of events.
  struct Applied {
    std::int64_t blocks_stored = 0, stores_refused = 0, blocks_removed = 0, blocks_known = 0;
  };

  // store_named and remove_named for one event after the other; a store whose parent is unknown is refused, and
  // the next go on. hashes: of all events in order; keys: of the stores. O(D + W) amortised.
  Applied apply_run(Row row, const KvEvent* events, std::size_t n_events, const std::uint64_t* hashes,
                    const Key* keys, bool counts_copies) {
    const std::unique_lock lock(mutex_);
    state(row);
    Change change(broken_);
    Applied applied;
    for (const KvEvent* event = events; event != events + n_events; hashes += event->n_blocks, ++event) {
      const auto n_blocks = static_cast<std::int64_t>(event->n_blocks);
      if (event->kind == KvKind::kRemoved) {
        applied.blocks_removed += n_blocks;
        applied.blocks_known += remove_names(row, hashes, event->n_blocks);
        continue;
      }
      const bool has_parent = event->kind == KvKind::kAfterParent;
      if (store_names(row, has_parent, event->parent, hashes, keys, event->n_blocks, counts_copies) == kUnknownParent) {
        ++applied.stores_refused;
      } else {
        applied.blocks_stored += n_blocks;
      }
      keys += event->n_blocks;
    }
    return applied;
  }

  std::int64_t discard(Row row, const Key* keys, std::size_t n_keys, std::size_t start) {
    const std::unique_lock lock(mutex_);
    const std::int64_t before = state(row).blocks;
    Change change(broken_);
    NodeId node = kRoot;
    for (std::size_t at = 0; at < n_keys;) {
      node = tree_.child(node, keys[at]);
      if (node == kNone) break;
      const std::vector<Key>& edge = tree_.node(node).keys;
      const std::uint32_t length = tree_.node(node).length();
      const std::uint32_t matched = common_prefix(edge.data(), length, keys + at, n_keys - at);
      const std::size_t next = at + matched;
      if (next > start && tree_.holds(node, row)) {
        if (matched < length) tree_.split(node, matched);
        if (at < start) node = tree_.split(node, static_cast<std::uint32_t>(start - at));
        tree_.drop_holder(node, row);
      }
      if (matched < length) break;
      at = next;
    }
    tree_.settle();
    return before - state(row).blocks;
  }

  // out[row] = leading blocks of keys that the row holds, for n_out rows. O(D + W * nodes on the path).
  void match(const Key* keys, std::size_t n_keys, std::int64_t* out, std::size_t n_out) const noexcept {
    const std::shared_lock lock(mutex_);
    match_unlocked(keys, n_keys, out, n_out);
  }

  // Moves out[row] on over the blocks of keys that the row holds from there, for n_out rows; what is before it
  // need not be held. O(D + W * nodes on the path).
  void match_from(const Key* keys, std::size_t n_keys, std::int64_t* out, std::size_t n_out) const noexcept {
    const std::shared_lock lock(mutex_);
    if (n_out > 0) extend_unlocked(keys, n_keys, out, n_out, *std::max_element(out, out + n_out));
  }

  // match, and the block count of every row, from the same state.
  void match_and_count(const Key* keys, std::size_t n_keys, std::int64_t* matched, std::int64_t* blocks,
                       std::size_t n_out) const noexcept {
    const std::shared_lock lock(mutex_);
    match_unlocked(keys, n_keys, matched, n_out);
    for (std::size_t row = 0; row < n_out; ++row)
      blocks[row] = row < tree_.rows().size() ? tree_.rows()[row].blocks : 0;
  }

  std::int64_t blocks(Row row) const {
    const std::shared_lock lock(mutex_);
    return state(row).blocks;
  }

  std::int64_t unique_blocks() const {
    const std::shared_lock lock(mutex_);
    return tree_.unique_blocks();
  }

  std::size_t nodes() const {
    const std::shared_lock lock(mutex_);
    return tree_.live_nodes();
  }

  PrefixTree::Memory memory() const {
    const std::shared_lock lock(mutex_);
    return tree_.memory();
  }

  std::string check() const {
    const std::shared_lock lock(mutex_);
    return broken_ ? kBroken : PrefixTreeCheck::run(tree_);
  }

  struct Edge {
    std::uint32_t start;
    std::vector<Key> keys;
    std::vector<Row> rows;
  };

  std::vector<Edge> edges() const {
    const std::shared_lock lock(mutex_);
    std::vector<Edge> all;
    tree_.for_each_node([&all](NodeId, const Node& n) {
      Edge edge{n.start, n.keys, {}};
      for (const Holder& holder : n.holders) edge.rows.push_back(holder.row);
      all.push_back(std::move(edge));
    });
    return all;
  }

  // Key paths of the nodes that the row holds; for a bounded row the next to leave comes first, for others
  // they are sorted.
  std::vector<std::vector<Key>> lru(Row row) const {
    const std::shared_lock lock(mutex_);
    std::vector<std::vector<Key>> paths;
    const bool bounded = state(row).bounded();
    tree_.for_each_held(row, [&](NodeId id) {
      std::vector<Key> path;
      for (NodeId up = id; up != kRoot; up = tree_.node(up).parent)
        path.insert(path.begin(), tree_.node(up).keys.begin(), tree_.node(up).keys.end());
      paths.push_back(std::move(path));
    });
    if (!bounded) std::sort(paths.begin(), paths.end());
    return paths;
  }

 private:
  // Rows are checked here, before anything changes: a row that has just been removed by another thread must
  // not be touched.
  RowState& state(Row row) {
    if (broken_) throw std::runtime_error(kBroken);
    if (row >= tree_.rows().size() || !tree_.rows()[row].used) throw std::out_of_range("no such row");
    return tree_.rows()[row];
  }
  const RowState& state(Row row) const { return const_cast<PrefixIndex*>(this)->state(row); }

  static constexpr const char* kBroken = "the index is unusable after a failed allocation: make a new one";

  // Marks the index as broken if an exception leaves the change half done, so that nothing walks the pieces.
  class Change {
   public:
    explicit Change(bool& broken) noexcept : broken_(broken), before_(std::uncaught_exceptions()) {}
    Change(const Change&) = delete;
    Change& operator=(const Change&) = delete;
    ~Change() {
      if (std::uncaught_exceptions() > before_) broken_ = true;
    }

   private:
    bool& broken_;
    int before_;
  };

  // A stretch of a stored path: `count` blocks of `node` from `from` on.
  struct Segment {
    NodeId node;
    std::uint32_t from, count;
    bool held_before;
  };

  void match_unlocked(const Key* keys, std::size_t n_keys, std::int64_t* out, std::size_t n_out) const noexcept {
    std::fill(out, out + n_out, 0);
    extend_unlocked(keys, n_keys, out, n_out, 0);
  }

  // furthest: the largest of out.
  void extend_unlocked(const Key* keys, std::size_t n_keys, std::int64_t* out, std::size_t n_out,
                       std::int64_t furthest) const noexcept {
    if (broken_) return;
    NodeId id = kRoot;
    for (std::size_t at = 0; at < n_keys;) {
      id = tree_.child(id, keys[at]);
      if (id == kNone) return;
      const Node& node = tree_.node(id);
      const std::uint32_t matched = common_prefix(node.keys.data(), node.length(), keys + at, n_keys - at);
      const auto start = static_cast<std::int64_t>(at), reached = start + matched;
      bool anyone = furthest >= reached;
      for (const Holder& holder : node.holders) {
        // start <= out < reached in one comparison; a row that missed an earlier block stays where it stopped
        if (holder.row < n_out && static_cast<std::uint64_t>(out[holder.row]) - at < matched) {
          out[holder.row] = reached;
          anyone = true;
        }
      }
      if (!anyone || matched < node.length()) return;
      at += matched;
    }
  }

  // Makes the row hold the path `keys` that goes on after `offset` blocks of `id`; appends the path to
  // segments_ and returns how many blocks are new to the row. Splits where holdings, or for a bounded row
  // recency, come to differ.
  std::int64_t hold(Row row, NodeId id, std::uint32_t offset, const Key* keys, std::size_t n_keys) {
    const bool bounded = state(row).bounded();
    std::int64_t newly = 0;
    for (std::size_t at = 0; at < n_keys;) {
      if (offset == tree_.node(id).length()) {
        const NodeId next = tree_.child(id, keys[at]);
        if (next == kNone && tree_.extensible(id, row)) {
          tree_.extend(id, row, keys + at, n_keys - at);
          segments_.push_back({id, offset, static_cast<std::uint32_t>(n_keys - at), false});
          return newly + static_cast<std::int64_t>(n_keys - at);
        }
        if (next == kNone) {
          id = tree_.add_leaf(id, keys + at, n_keys - at);
          tree_.add_holder(id, row);
          segments_.push_back({id, 0, tree_.node(id).length(), false});
          return newly + static_cast<std::int64_t>(n_keys - at);
        }
        id = next;
        offset = 0;
      }
      const std::uint32_t length = tree_.node(id).length();
      const std::uint32_t matched =
          common_prefix(tree_.node(id).keys.data() + offset, length - offset, keys + at, n_keys - at);
      if (matched == 0) {  // only inside an edge: the path leaves it right here
        tree_.split(id, offset);
        continue;
      }
      const bool held = tree_.holds(id, row);
      const bool leaves_edge = offset + matched < length && at + matched < n_keys;
      if (offset + matched < length && (!held || bounded || leaves_edge)) tree_.split(id, offset + matched);
      if (!held) {
        if (offset > 0) {
          id = tree_.split(id, offset);
          offset = 0;
        }
        tree_.add_holder(id, row);
        newly += matched;
      }
      segments_.push_back({id, offset, matched, held});
      at += matched;
      offset += matched;
    }
    return newly;
  }

  void evict(Row row) {
    const RowState& full = state(row);
    while (full.blocks > full.capacity) {
      const std::int64_t excess = full.blocks - full.capacity;
      NodeId oldest = full.head;
      const std::uint32_t length = tree_.node(oldest).length();
      if (excess < length) oldest = tree_.split(oldest, length - static_cast<std::uint32_t>(excess));
      tree_.drop_holder(oldest, row);
    }
  }

  void drop_everything(Row row) {
    RowState& emptied = state(row);
    while (emptied.head != kNone) tree_.drop_holder(emptied.head, row);
    emptied.names.clear();
    emptied.extra_names.clear();
    emptied.extra_copies.clear();
    tree_.settle();
  }

  std::int64_t store_names(Row row, bool has_parent, std::uint64_t parent, const std::uint64_t* hashes,
                           const Key* keys, std::size_t n_keys, bool counts_copies) {
    NodeId node = kRoot;
    std::uint32_t offset = 0;
    if (has_parent) {
      const BlockId block = state(row).names.find(parent);
      if (block == FlatMap::kAbsent) return kUnknownParent;
      node = tree_.block_node(block);
      offset = tree_.block_offset(block) + 1;
    }
    const std::int64_t newly = append_named(row, node, offset, hashes, keys, n_keys, counts_copies);
    tree_.settle();
    return newly;
  }

  std::int64_t remove_names(Row row, const std::uint64_t* hashes, std::size_t n_hashes) {
    std::int64_t known = 0;
    std::vector<BlockId> dropped;
    for (std::size_t i = 0; i < n_hashes; ++i) state(row).names.prefetch(hashes[i]);
    for (std::size_t i = 0; i < n_hashes; ++i) {
      if (take_one(state(row).extra_copies, hashes[i])) {
        ++known;
        continue;
      }
      const BlockId block = state(row).names.erase(hashes[i]);
      if (block == FlatMap::kAbsent) continue;
      ++known;
      if (tree_.drop_name(row, block)) dropped.push_back(block);
    }
    drop_blocks(row, std::move(dropped));
    tree_.settle();
    return known;
  }

  // Enters hashes that are all unknown to the row and all different, without a block yet. False, and
  // nothing changed, if some is known or occurs twice.
  bool claim_names(Row row, const std::uint64_t* hashes, std::size_t n_hashes) {
    FlatMap& names = state(row).names;
    for (std::size_t i = 0; i < n_hashes; ++i) names.prefetch(hashes[i]);
    for (std::size_t i = 0; i < n_hashes; ++i) {
      const BlockId old = names.set(hashes[i], kClaimed);
      if (old == FlatMap::kAbsent) continue;
      if (old != kClaimed) names.set(hashes[i], old);
      for (std::size_t j = 0; j < i; ++j) names.erase(hashes[j]);
      return false;
    }
    return true;
  }

  // Stores named blocks after `offset` blocks of `node`.
  std::int64_t append_named(Row row, NodeId node, std::uint32_t offset, const std::uint64_t* hashes,
                            const Key* keys, std::size_t n_keys, bool counts_copies) {
    return claim_names(row, hashes, n_keys) ? store_new_names(row, node, offset, hashes, keys, n_keys)
                                            : store_any_names(row, node, offset, hashes, keys, n_keys, counts_copies);
  }

  std::int64_t store_new_names(Row row, NodeId node, std::uint32_t offset, const std::uint64_t* hashes,
                               const Key* keys, std::size_t n_keys) {
    segments_.clear();
    const std::int64_t newly = hold(row, node, offset, keys, n_keys);
    for (const Segment& segment : segments_) {
      tree_.give_ids(segment.node);
      for (std::uint32_t i = 0; i < segment.count; ++i, ++hashes)
        name(row, *hashes, tree_.node(segment.node).ids[segment.from + i], segment.held_before);
    }
    return newly;
  }

  // The general case: a name may be here already, or move here from another block, even one of this path. Blocks
  // that lose their last name are let go together at the end: to cut each out of its edge by itself would copy the
  // rest of the edge for each.
  std::int64_t store_any_names(Row row, NodeId node, std::uint32_t offset, const std::uint64_t* hashes,
                               const Key* keys, std::size_t n_keys, bool counts_copies) {
    segments_.clear();
    const std::int64_t newly = hold(row, node, offset, keys, n_keys);
    FlatMap nameless;  // blocks that are held and have no name any more
    for (const Segment& segment : segments_) {
      tree_.give_ids(segment.node);
      for (std::uint32_t i = 0; i < segment.count; ++i, ++hashes) {
        const BlockId block = tree_.node(segment.node).ids[segment.from + i];
        const BlockId old = state(row).names.find(*hashes);
        if (old == block) {
          if (counts_copies) add_one(state(row).extra_copies, *hashes);
          continue;
        }
        name(row, *hashes, block, segment.held_before && nameless.erase(block) == FlatMap::kAbsent);
        if (old == FlatMap::kAbsent) continue;
        state(row).extra_copies.erase(*hashes);
        if (tree_.drop_name(row, old)) nameless.set(old, 0);
      }
    }
    std::vector<BlockId> dropped;
    nameless.for_each([&dropped](std::uint64_t block, std::uint32_t) { dropped.push_back(static_cast<BlockId>(block)); });
    drop_blocks(row, std::move(dropped));
    return newly;
  }

  void name(Row row, std::uint64_t hash, BlockId block, bool has_names) {
    RowState& named = state(row);
    named.names.set(hash, block);
    if (has_names) add_one(named.extra_names, block);
  }

  // The row stops holding these blocks. Runs of neighbours go together, the deepest first, so that
  // cutting an edge leaves the offsets above the cut as they are.
  void drop_blocks(Row row, std::vector<BlockId> blocks) {
    std::sort(blocks.begin(), blocks.end(), [this](BlockId a, BlockId b) {
      const NodeId node_a = tree_.block_node(a), node_b = tree_.block_node(b);
      return node_a != node_b ? node_a < node_b : tree_.block_offset(a) > tree_.block_offset(b);
    });
    for (std::size_t i = 0; i < blocks.size();) {
      NodeId node = tree_.block_node(blocks[i]);
      const std::uint32_t last = tree_.block_offset(blocks[i]);
      std::uint32_t first = last;
      for (++i; i < blocks.size() && tree_.block_node(blocks[i]) == node &&
                tree_.block_offset(blocks[i]) + 1 == first; ++i)
        --first;
      if (last + 1 < tree_.node(node).length()) tree_.split(node, last + 1);
      if (first > 0) node = tree_.split(node, first);
      tree_.drop_holder(node, row);
    }
  }

  static constexpr BlockId kClaimed = kNone - 1;

  mutable std::shared_mutex mutex_;
  PrefixTree tree_;
  bool broken_ = false;
  std::vector<Segment> segments_;  // of the path being stored; kept to spare the allocation
};

}  // namespace mulsched
