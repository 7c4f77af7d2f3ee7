// Load in flight by prefix class, and the classes in alarm. Twin of mulsched/_failure_py.py, operation for
// operation; what it computes is written down in mulsched/failure.py.
//
// Invariants:
//
// 1. A node is there exactly while a request in flight passes through it.
// 2. A node's load is the sum of the weights of those requests, and its squares the sum of their squares.
// 3. Only nodes that are there are in alarm.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace mulsched {

// The class in alarm on a path; depth 0: none.
struct ClassFound {
  std::int64_t depth = 0;
  std::uint64_t hash = 0;
  double load = 0;
  std::int64_t holders = 0;
};

class Occupancy {
 public:
  explicit Occupancy(double confidence) noexcept : confidence_(confidence) {}

  double load() const noexcept { return load_; }
  std::size_t nodes() const noexcept { return nodes_.size(); }

  // keys: n_keys of the prompt; matched, loads: n candidates. Changes no state that can be seen.
  ClassFound examine(const std::uint64_t* keys, std::size_t n_keys, const std::int64_t* matched,
                     const std::int64_t* loads, std::size_t n) {
    ClassFound best;
    double widest = 0, everywhere = 0;
    std::int64_t longest = 0;
    for (std::size_t i = 0; i < n; ++i) {
      everywhere += static_cast<double>(loads[i]);
      longest = std::max(longest, matched[i]);
    }
    over_.clear();
    Path path(keys, n_keys);
    // a class that nobody holds cannot herd, nor can a deeper one
    while (path.next() && static_cast<std::int64_t>(path.depth()) <= longest) {
      const auto found = nodes_.find(path.hash());
      if (found == nodes_.end()) break;
      std::int64_t holders = 0;
      double on_holders = 0;
      for (std::size_t i = 0; i < n; ++i) {
        if (matched[i] < static_cast<std::int64_t>(path.depth())) continue;
        ++holders;
        on_holders += static_cast<double>(loads[i]);
      }
      const Node& node = found->second;
      const double excess = excess_of(node, holders, static_cast<std::int64_t>(n), on_holders, everywhere);
      if (excess <= 0) continue;
      over_.push_back(path.hash());
      if (excess < widest) continue;
      widest = excess;
      best = {static_cast<std::int64_t>(path.depth()), path.hash(), node.load, holders};
    }
    return best;
  }

  // Counts a request in and returns its slot; released gets the classes that left alarm.
  std::size_t dispatch(const std::uint64_t* keys, std::size_t n_keys, const std::int64_t* matched,
                       const std::int64_t* loads, std::size_t n, double weight, ClassFound& found,
                       std::vector<std::uint64_t>& released) {
    found = examine(keys, n_keys, matched, loads, n);
    std::size_t slot = slots_.size();
    if (free_.empty()) {
      slots_.emplace_back();
    } else {
      slot = free_.back();
      free_.pop_back();
    }
    Slot& own = slots_[slot];
    own.weight = weight;
    Path path(keys, n_keys);
    while (path.next()) {
      Node& node = nodes_[path.hash()];
      if (node.alarm && std::find(over_.begin(), over_.end(), path.hash()) == over_.end()) {
        node.alarm = false;
        released.push_back(path.hash());
      }
      if (found.depth == static_cast<std::int64_t>(path.depth())) node.alarm = true;
      ++node.requests;
      node.load += weight;
      node.squares += weight * weight;
      own.hashes.push_back(path.hash());
    }
    load_ += weight;
    squares_ += weight * weight;
    return slot;
  }

  // Counts a request out; released gets the classes in alarm that have nobody in flight any more.
  void end(std::size_t slot, std::vector<std::uint64_t>& released) {
    Slot& own = slots_[slot];
    load_ -= own.weight;
    squares_ -= own.weight * own.weight;
    for (const std::uint64_t hash : own.hashes) {
      const auto found = nodes_.find(hash);
      Node& node = found->second;
      node.load -= own.weight;
      node.squares -= own.weight * own.weight;
      if (--node.requests > 0) continue;
      if (node.alarm) released.push_back(hash);
      nodes_.erase(found);
    }
    own.hashes.clear();  // keeps its memory for the next request
    free_.push_back(slot);
  }

 private:
  struct Node {
    std::int64_t requests = 0;
    double load = 0, squares = 0;
    bool alarm = false;
  };
  struct Slot {
    std::vector<std::uint64_t> hashes;
    double weight = 0;
  };

  // Walks the classes of a path: prefixes of 1, 2, 3, 4, 6, 8, 12, ... blocks. The hash is a polynomial in the
  // keys, which are hashes already, each position with its own odd factor.
  class Path {
   public:
    Path(const std::uint64_t* keys, std::size_t n) noexcept : keys_(keys), n_(n) {}
    bool next() noexcept {
      const std::size_t to = depth_ < 3 ? depth_ + 1 : depth_ + step();
      if (to > n_) return false;
      for (; depth_ < to; ++depth_) {
        power_ *= kFactor;
        sum_ += keys_[depth_] * power_;
      }
      return true;
    }
    std::size_t depth() const noexcept { return depth_; }
    std::uint64_t hash() const noexcept { return sum_ ^ depth_; }

   private:
    static constexpr std::uint64_t kFactor = 0x9E3779B97F4A7C15;
    // half of a power of two from it to three halves of it, and from there to the next power
    std::size_t step() const noexcept {
      std::size_t power = 1;
      while (power * 2 <= depth_) power *= 2;
      return power / 2;
    }
    const std::uint64_t* keys_;
    std::size_t n_, depth_ = 0;
    std::uint64_t sum_ = 0, power_ = 1;
  };

  // By how much the holders carry more than their share; 0 if that may be chance.
  double excess_of(const Node& node, std::int64_t holders, std::int64_t n, double on_holders,
                   double everywhere) const noexcept {
    if (holders == n) return 0;
    const double part = static_cast<double>(holders) / static_cast<double>(n);
    const double alone = node.load - part * load_, together = on_holders - part * everywhere;
    if (node.alarm) return std::max(std::max(alone, together), 0.0);
    const double spread = confidence_ * std::sqrt(node.squares);
    if (node.load <= spread) return 0;
    if (alone > spread) return alone;
    if (everywhere > 0 && together > confidence_ * std::sqrt(squares_ * (on_holders / everywhere))) return together;
    return 0;
  }

  double confidence_;
  double load_ = 0, squares_ = 0;
  std::unordered_map<std::uint64_t, Node> nodes_;
  std::vector<Slot> slots_;
  std::vector<std::size_t> free_;
  std::vector<std::uint64_t> over_;  // classes over their share on the path examined last
};

}  // namespace mulsched
