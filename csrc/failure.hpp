// Load in flight by prefix class, and the classes in alarm. Twin of mulsched/_failure_py.py, operation for
// operation; what it computes is written down in mulsched/failure.py.
//
// Invariants:
//
// 1. A node is there exactly while a request in flight passes through it, and its prefixes' nodes are then too.
// 2. A node's load is the sum of the weights of those requests, and its squares the sum of their squares.
// 3. Only nodes that are there are in alarm.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "flat_map.hpp"
#include "select.hpp"

namespace mulsched {

// What a class in alarm may not choose; see mulsched.failure.Mitigation.
enum class Mitigation { kSpread, kExclude, kLoadOnly };

// Fills kept with the positions of the candidates that are left; matched, batch: n candidates.
inline void keep_candidates(Mitigation mitigation, std::int64_t depth, const std::int64_t* matched,
                            const std::int64_t* batch, std::size_t n, std::vector<std::int64_t>& kept) {
  std::int64_t all = 0, fewest = batch[0];
  for (std::size_t i = 0; i < n; ++i) {
    all += batch[i];
    fewest = std::min(fewest, batch[i]);
  }
  kept.clear();
  for (std::size_t i = 0; i < n; ++i) {
    const bool held = matched[i] >= depth;
    const bool out = mitigation == Mitigation::kExclude    ? held
                     : mitigation == Mitigation::kLoadOnly ? batch[i] != fewest
                                                           : held && batch[i] * static_cast<std::int64_t>(n) > all;
    if (!out) kept.push_back(static_cast<std::int64_t>(i));
  }
}

// The class in alarm on a path; depth 0: none.
struct ClassFound {
  std::int64_t depth = 0;
  std::uint64_t hash = 0;
  double load = 0;
  std::int64_t holders = 0;
};

// Columns of n candidates, in the order of mulsched.indicators.COLUMNS; loads: which of them is their load.
struct Candidates {
  const std::int64_t* table;
  std::size_t loads, n;
  const std::int64_t* column(std::size_t c) const noexcept { return table + c * n; }
};

class Occupancy {
 public:
  Occupancy(double confidence, double horizon) noexcept : confidence_(confidence), horizon_(horizon) {}

  double load() const noexcept { return load_; }
  std::size_t nodes() const noexcept { return index_.size(); }
  std::int64_t raised() const noexcept { return raised_; }  // alarms

  // The arrays examined last may be gone.
  void forget() noexcept { last_ = {}; }

  // keys: n_keys of the prompt. Changes no state that can be seen, and keeps what it found for the dispatch that
  // follows. The caller keeps both arrays until it examines others.
  ClassFound examine(const std::uint64_t* keys, std::size_t n_keys, const Candidates& candidates) {
    last_ = {changes_, keys, candidates.table, n_keys, candidates.n, {}};
    const std::size_t n = candidates.n;
    const std::int64_t *matched = candidates.column(kMatchedBlocks), *loads = candidates.column(candidates.loads);
    // a class that nobody holds cannot herd
    hash_classes(keys, std::min(n_keys, static_cast<std::size_t>(*std::max_element(matched, matched + n))));
    path_.clear();
    in_excess_.clear();
    double widest = 0;
    std::int64_t everywhere = 0, holders = 0, on_holders = 0;
    std::int64_t least = 0;  // match of those holders: deeper classes up to there have the same
    for (std::size_t i = 0; i < n; ++i) everywhere += loads[i];
    for (std::size_t c = 0; c < hashes_.size(); ++c) {
      const std::uint32_t at = index_.find(hashes_[c]);
      if (at == FlatMap::kAbsent) break;
      path_.push_back(at);
      const Node& node = nodes_[at];
      const auto depth = static_cast<std::int64_t>(depths_[c]);
      if (depth > least) {
        holders = on_holders = 0;
        least = std::numeric_limits<std::int64_t>::max();
        for (std::size_t i = 0; i < n; ++i) {  // integers, which add up in any order
          const bool held = matched[i] >= depth;
          holders += held;
          on_holders += held ? loads[i] : 0;
          least = std::min(least, held ? matched[i] : least);
        }
      }
      const double excess = excess_of(node, holders, static_cast<std::int64_t>(n), static_cast<double>(on_holders),
                                      static_cast<double>(everywhere));
      if (excess <= 0) continue;
      in_excess_.push_back({at, static_cast<double>(holders) / static_cast<double>(n)});
      if (excess < widest || node.copies > 0 || !copy_pays(node, depth, holders, candidates)) continue;
      widest = excess;
      last_.found = {depth, hashes_[c], node.load, holders};
    }
    return last_.found;
  }

  // Counts a request in that goes to candidate number chosen, and returns its slot; released gets the classes that
  // left alarm.
  std::size_t dispatch(const std::uint64_t* keys, std::size_t n_keys, const Candidates& candidates, std::size_t chosen,
                       double weight, ClassFound& found, std::vector<std::uint64_t>& released) {
    // The caller keeps the arrays examined last, so the same addresses mean the same values.
    if (last_.changes != changes_ || last_.keys != keys || last_.table != candidates.table || last_.n_keys != n_keys ||
        last_.n != candidates.n)
      examine(keys, n_keys, candidates);
    ++changes_;
    found = last_.found;
    const bool copy = found.depth > 0 && candidates.column(kMatchedBlocks)[chosen] < found.depth;
    const std::size_t copied =
        copy ? 1 + static_cast<std::size_t>(std::find(hashes_.begin(), hashes_.end(), found.hash) - hashes_.begin()) : 0;
    for (std::size_t c = path_.size(); c < hashes_.size(); ++c) path_.push_back(new_node(hashes_[c]));
    for (const std::uint32_t at : path_) {
      Node& node = nodes_[at];
      if (node.alarm || (found.depth > 0 && found.hash == node.hash)) {  // what is found is in excess
        const auto excess =
            std::find_if(in_excess_.begin(), in_excess_.end(), [at](const Excess& e) { return e.at == at; });
        if (excess == in_excess_.end()) {
          release(node, released);
        } else {
          raised_ += !node.alarm;
          node.alarm = true;
          node.part = excess->part;
        }
      }
      ++node.requests;
      node.load += weight;
      node.squares += weight * weight;
    }
    for (std::size_t c = 0; c < copied; ++c) ++nodes_[path_[c]].copies;
    load_ += weight;
    squares_ += weight * weight;
    std::size_t slot = slots_.size();
    if (free_.empty()) {
      slots_.emplace_back();
    } else {
      slot = free_.back();
      free_.pop_back();
    }
    Slot& own = slots_[slot];
    own.path = path_;  // in the memory that the slot has already
    own.weight = weight;
    own.copied = copied;
    own.taken = true;
    return slot;
  }

  // The request's prefix is there: a copy that it was sent for is made.
  bool first_token(std::size_t slot) {
    if (slot >= slots_.size() || !slots_[slot].taken) return false;
    Slot& own = slots_[slot];
    for (std::size_t c = 0; c < own.copied; ++c) --nodes_[own.path[c]].copies;
    own.copied = 0;
    ++changes_;
    return true;
  }

  // Counts a request out; released gets the classes that left alarm: those that nobody in flight has, and those
  // that are within the part of their last holders and too few to be evidence. What is on the holders in all is not
  // known here. False, and nothing happens, if there is none in the slot.
  bool end(std::size_t slot, std::vector<std::uint64_t>& released) {
    if (!first_token(slot)) return false;
    Slot& own = slots_[slot];
    load_ -= own.weight;
    squares_ -= own.weight * own.weight;
    ++changes_;
    for (const std::uint32_t at : own.path) {
      Node& node = nodes_[at];
      node.load -= own.weight;
      node.squares -= own.weight * own.weight;
      const bool gone = --node.requests == 0;
      if (node.alarm && (gone || (node.load <= node.part * load_ && !is_evidence(node)))) release(node, released);
      if (!gone) continue;
      index_.erase(node.hash);
      free_nodes_.push_back(at);
    }
    own.taken = false;
    free_.push_back(slot);
    return true;
  }

 private:
  struct Node {
    std::uint64_t hash = 0;
    std::int64_t requests = 0, copies = 0;  // copies: those on their way
    double load = 0, squares = 0;
    bool alarm = false;
    double part = 0;  // of the instances, its holders when it was last seen in excess; of classes in alarm
  };
  struct Excess {
    std::uint32_t at;  // of its node
    double part;
  };
  struct Slot {
    std::vector<std::uint32_t> path;
    std::size_t copied = 0;  // of how many classes on the path the request makes a copy
    double weight = 0;
    bool taken = false;
  };

  // What examine was asked last, and found.
  struct Last {
    std::uint64_t changes = 0;
    const std::uint64_t* keys = nullptr;
    const std::int64_t* table = nullptr;
    std::size_t n_keys = 0, n = 0;
    ClassFound found;
  };

  std::uint32_t new_node(std::uint64_t hash) {
    auto at = static_cast<std::uint32_t>(nodes_.size());
    if (free_nodes_.empty()) {
      nodes_.emplace_back();
    } else {
      at = free_nodes_.back();
      free_nodes_.pop_back();
    }
    nodes_[at] = {hash, 0, 0, 0, 0, false, 0};
    index_.set(hash, at);
    return at;
  }

  // Fills depths_ and hashes_ with the classes of a path: prefixes of 1, 2, 3, 4, 6, 8, 12, ... blocks. A hash
  // is a polynomial in the keys, which are hashes already, so that each position has its own odd factor.
  void hash_classes(const std::uint64_t* keys, std::size_t n) {
    constexpr std::uint64_t k1 = 0x9E3779B97F4A7C15, k2 = k1 * k1, k3 = k2 * k1, k4 = k3 * k1;
    depths_.clear();
    hashes_.clear();
    std::uint64_t sum = 0, power = 1;
    std::size_t at = 0;
    for (std::size_t to = 1, next = 2; to <= n;) {
      for (; at + 4 <= to; at += 4) {  // four at a time: their products do not wait for each other
        sum += power * (keys[at] * k1 + keys[at + 1] * k2 + keys[at + 2] * k3 + keys[at + 3] * k4);
        power *= k4;
      }
      for (; at < to; ++at) {
        power *= k1;
        sum += keys[at] * power;
      }
      depths_.push_back(to);
      hashes_.push_back(sum ^ to);
      const std::size_t after = to < 3 ? to + 2 : 2 * to;  // two depths an octave
      to = next;
      next = after;
    }
  }

  static void release(Node& node, std::vector<std::uint64_t>& released) {
    node.alarm = false;
    released.push_back(node.hash);
  }

  // Whether the class has more in flight than chance makes of a few requests.
  bool is_evidence(const Node& node) const noexcept { return node.load > confidence_ * std::sqrt(node.squares); }

  // By how much the holders carry more than their share; 0 if that may be chance.
  double excess_of(const Node& node, std::int64_t holders, std::int64_t n, double on_holders,
                   double everywhere) const noexcept {
    if (holders == n) return 0;
    const double part = static_cast<double>(holders) / static_cast<double>(n);
    const double alone = node.load - part * load_, together = on_holders - part * everywhere;
    if (node.alarm || (alone <= 0 && together <= 0)) return std::max(std::max(alone, together), 0.0);
    if (!is_evidence(node)) return 0;
    if (alone > confidence_ * std::sqrt(node.squares)) return alone;
    if (everywhere > 0 && together > confidence_ * std::sqrt(squares_ * (on_holders / everywhere))) return together;
    return 0;
  }

  // Whether a copy of the class somewhere else is worth its prefill by LMetric's score. On one holder more, each
  // has holders / (holders + 1) of the requests in flight, and all the others come there.
  bool copy_pays(const Node& node, std::int64_t depth, std::int64_t holders, const Candidates& candidates) const noexcept {
    const std::int64_t *matched = candidates.column(kMatchedBlocks), *p_tokens = candidates.column(kPTokens);
    const std::int64_t* batch = candidates.column(kBatchSize);
    double stay = std::numeric_limits<double>::infinity(), move = stay;
    for (std::size_t i = 0; i < candidates.n; ++i) {
      double& least = matched[i] >= depth ? stay : move;
      least = std::min(least, static_cast<double>(p_tokens[i]) * static_cast<double>(batch[i]));
    }
    return horizon_ * static_cast<double>(node.requests) * stay > static_cast<double>(holders + 1) * move;
  }

  double confidence_, horizon_;
  double load_ = 0, squares_ = 0;
  std::int64_t raised_ = 0;
  std::uint64_t changes_ = 1;  // dispatches and ends
  FlatMapOf<8> index_;         // from hash to node; sparse, as it is erased from all the time
  std::vector<Node> nodes_;
  std::vector<std::uint32_t> free_nodes_;
  std::vector<Slot> slots_;
  std::vector<std::size_t> free_;
  // Of what was examined last: classes that somebody holds, nodes of those that are there, and those in excess.
  Last last_;
  std::vector<std::size_t> depths_;
  std::vector<std::uint64_t> hashes_;
  std::vector<std::uint32_t> path_;
  std::vector<Excess> in_excess_;
};

}  // namespace mulsched
