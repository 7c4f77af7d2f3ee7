// Whether a prefix tree keeps its invariants, which prefix_tree.hpp numbers. For tests: it walks the whole tree.
#pragma once

#include <string>

#include "prefix_tree.hpp"

namespace mulsched {

class PrefixTreeCheck {
 public:
  // Empty if every invariant holds, else the number of the first broken one and where.
  static std::string run(const PrefixTree& tree) {
    PrefixTreeCheck check(tree);
    tree.for_each_node([&check](NodeId id, const Node& n) { check.check_node(id, n); });
    for (Row row = 0; row < tree.rows_.size() && check.broken_.empty(); ++row) check.check_row(row);
    if (check.nodes_ != tree.live_nodes()) check.fail(1, "nodes out of reach");
    if (check.ids_ != tree.live_blocks_) check.fail(7, "block ids out of reach");
    if (check.unique_blocks_ != tree.unique_blocks_) check.fail(9, "count of unique blocks");
    return check.broken_;
  }

 private:
  // What the walk over the nodes found that a row holds.
  struct Held {
    std::int64_t nodes = 0, blocks = 0;
  };

  explicit PrefixTreeCheck(const PrefixTree& tree) : tree_(tree), held_(tree.rows_.size()) {}

  void fail(int invariant, const std::string& where) {
    if (broken_.empty()) broken_ = "invariant " + std::to_string(invariant) + ": " + where;
  }

  void check_node(NodeId id, const Node& n) {
    const std::string where = "node " + std::to_string(id);
    ++nodes_;
    if (n.keys.empty() || tree_.child(n.parent, n.keys[0]) != id || n.start != tree_.node(n.parent).end())
      fail(1, where);
    for (std::size_t i = 0; i < n.holders.size(); ++i) {
      const Row row = n.holders[i].row;
      if (row >= held_.size() || !tree_.rows_[row].used || (i > 0 && n.holders[i - 1].row >= row))
        return fail(2, where);
      held_[row].blocks += n.length();
      ++held_[row].nodes;
    }
    if (n.holders.empty() && n.children.size() == 0) fail(3, where);
    if (tree_.mergeable(n.parent, id)) fail(4, where);
    if (!n.ids.empty() && n.ids.size() != n.keys.size()) fail(7, where);
    for (std::size_t i = 0; i < n.ids.size(); ++i)
      if (tree_.block(n.ids[i]).node != id || tree_.block(n.ids[i]).depth != n.start + i) fail(7, where);
    ids_ += n.ids.size();
    if (!n.holders.empty()) unique_blocks_ += n.length();
  }

  void check_row(Row row) {
    const RowState& state = tree_.rows_[row];
    const std::string where = "row " + std::to_string(row);
    std::vector<char> seen(tree_.chunks_.size() * PrefixTree::kChunk, 0);
    NodeId prev = kNone;
    std::int64_t listed = 0;
    for (NodeId id = state.head; id != kNone;) {
      const Holder* holder = PrefixTree::find_holder(tree_.node(id), row);
      if (holder == nullptr || holder->prev != prev || seen[id]) return fail(5, where);
      if (state.bounded())
        for (NodeId up = tree_.node(id).parent; up != kRoot; up = tree_.node(up).parent)
          if (seen[up]) return fail(6, where);
      seen[id] = 1;
      ++listed;
      prev = id;
      id = holder->next;
    }
    if (state.tail != prev || listed != held_[row].nodes || state.blocks != held_[row].blocks ||
        (state.bounded() && state.blocks > state.capacity))
      fail(5, where);
    if (state.named) check_names(row, where);
  }

  void check_names(Row row, const std::string& where) {
    const RowState& state = tree_.rows_[row];
    std::int64_t names = 0, extra = 0;
    bool held = true;
    state.names.for_each([&](std::uint64_t, BlockId id) {
      ++names;
      if (id >= tree_.block_chunks_.size() * PrefixTree::kChunk || !tree_.holds(tree_.block_node(id), row))
        held = false;
    });
    state.extra_names.for_each([&extra](std::uint64_t, std::uint32_t more) { extra += more; });
    state.extra_copies.for_each([&](std::uint64_t hash, std::uint32_t more) {
      if (more == 0 || state.names.find(hash) == FlatMap::kAbsent) held = false;
    });
    if (!held || names - extra != state.blocks) fail(8, where);
  }

  const PrefixTree& tree_;
  std::vector<Held> held_;  // by row
  std::size_t nodes_ = 0, ids_ = 0;
  std::int64_t unique_blocks_ = 0;
  std::string broken_;
};

}  // namespace mulsched
