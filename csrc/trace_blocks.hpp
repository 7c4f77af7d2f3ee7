// The blocks of a trace: their keys, and numbers for those that more than one request asks for.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "select.hpp"

namespace mulsched {

// Columns of a trace of n requests; see mulsched.replay.Trace. Each block is cut into `parts`.
struct TraceView {
  std::int64_t n, parts;
  const double *arrival_s, *think_s;
  const std::int64_t *prompt_tokens, *output_tokens, *run_start, *run_length, *run_offset;
  const std::int64_t* follows;  // -1, or in a closed loop the request whose end this one waits for
};

// A request's full blocks: n_prompt of its prompt and, as far as it goes, of its answer. Only the first
// n_shared can be those of another request.
struct RequestBlocks {
  std::size_t n_prompt, n_all, n_shared;
};

inline RequestBlocks count_blocks(const TraceView& trace, std::int64_t i, std::int64_t block_size) noexcept {
  const std::int64_t prompt = trace.prompt_tokens[i];
  const auto n_prompt = static_cast<std::size_t>(prompt / block_size);
  const auto n_all = std::max(n_prompt, static_cast<std::size_t>((prompt + trace.output_tokens[i] - 1) / block_size));
  return {n_prompt, n_all, n_all};
}

// Writes the keys of request i's full blocks.
inline RequestBlocks request_keys(const TraceView& trace, std::int64_t i, std::int64_t block_size, std::vector<Key>& keys) {
  constexpr Key kPrivate = Key{1} << 63, kAnswer = Key{3} << 62;
  const RequestBlocks blocks = count_blocks(trace, i, block_size);
  keys.resize(blocks.n_all);
  std::size_t at = 0;
  for (std::int64_t run = trace.run_offset[i]; run < trace.run_offset[i + 1]; ++run) {
    auto id = static_cast<Key>(trace.run_start[run] * trace.parts);
    for (std::int64_t left = trace.run_length[run] * trace.parts; left > 0 && at < blocks.n_prompt; --left) keys[at++] = id++;
  }
  const Key owner = static_cast<Key>(i) << 24;
  for (Key next = 0; at < blocks.n_prompt; ++at, ++next) keys[at] = kPrivate | owner | next;
  for (; at < blocks.n_all; ++at) keys[at] = kAnswer | owner | at;
  for (Key& key : keys) key = split_mix(key);
  return blocks;
}

// Numbers from 0 on for the blocks that more than one request asks for, neighbours in a prompt side by side.
//
// Ids being chained, the blocks that a request shares with any other are the first of its prompt. It takes
// each id to have one parent, which number() verifies: Trace demands it and does not check it.
class SharedBlocks {
 public:
  // False, and of no use, if ids are not chained or too many. O(blocks + runs log runs).
  bool number(const TraceView& trace, std::int64_t block_size) {
    const std::size_t n_ids = place_runs(trace, block_size);
    if (n_ids >= kPrivate) return false;
    std::vector<std::uint8_t> asked(n_ids, 0);  // by how many requests: 0, 1, or 2 for more
    number_.assign(n_ids, kPrivate);            // at first: the parent
    for (std::int64_t i = 0; i < trace.n; ++i) {
      std::uint32_t parent = kPrivate;
      for (std::int64_t run = trace.run_offset[i]; run < trace.run_offset[i + 1]; ++run) {
        const auto [first, length] = places_[static_cast<std::size_t>(run)];
        for (std::uint32_t id = first; id < first + length; parent = id++) {
          if (asked[id] == 0) {
            asked[id] = 1;
            number_[id] = parent;
          } else if (number_[id] == parent) {
            asked[id] = 2;  // not by one request twice: that would give some id two parents
          } else {
            return false;
          }
        }
      }
    }
    for (std::size_t id = 0; id < n_ids; ++id) number_[id] = asked[id] == 2 ? n_++ : kPrivate;
    return true;
  }

  // Blocks of the engine, each one of `parts` of the trace's.
  std::size_t size(const TraceView& trace) const noexcept { return std::size_t{n_} * static_cast<std::size_t>(trace.parts); }

  // request_keys with the numbers of shared blocks as keys, and others for the rest.
  RequestBlocks keys(const TraceView& trace, std::int64_t i, std::int64_t block_size, std::vector<Key>& keys) const {
    RequestBlocks blocks = count_blocks(trace, i, block_size);
    keys.resize(blocks.n_all);
    const std::size_t at = blocks.n_shared = write_shared(trace, i, blocks.n_prompt, keys.data());
    const Key owner = Key{1} << 63 | static_cast<Key>(i) << 24;
    std::iota(keys.begin() + static_cast<std::ptrdiff_t>(at), keys.end(), owner | at);
    return blocks;
  }

 private:
  static constexpr std::uint32_t kPrivate = UINT32_MAX;

  struct Place {
    std::uint32_t first, length;
  };

  // Places the ids that prompts use side by side, gaps left out; returns how many they are.
  std::size_t place_runs(const TraceView& trace, std::int64_t block_size) {
    const auto n_runs = static_cast<std::size_t>(trace.run_offset[trace.n]);
    std::vector<std::int64_t> length(n_runs);
    for (std::int64_t i = 0; i < trace.n; ++i) {
      std::int64_t left = (trace.prompt_tokens[i] / block_size + trace.parts - 1) / trace.parts;
      for (auto run = static_cast<std::size_t>(trace.run_offset[i]); run < static_cast<std::size_t>(trace.run_offset[i + 1]); ++run)
        left -= length[run] = std::min(left, trace.run_length[run]);
    }
    std::vector<std::size_t> order(n_runs);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return trace.run_start[a] < trace.run_start[b]; });
    places_.resize(n_runs);
    std::int64_t next = 0, n_ids = 0;  // an id, and its place
    for (const std::size_t run : order) {
      const std::int64_t start = trace.run_start[run], end = start + length[run];
      next = std::max(next, start);
      places_[run] = {static_cast<std::uint32_t>(n_ids - (next - start)), static_cast<std::uint32_t>(length[run])};
      n_ids += std::max<std::int64_t>(0, end - next);
      next = std::max(next, end);
    }
    return static_cast<std::size_t>(n_ids);
  }

  std::size_t write_shared(const TraceView& trace, std::int64_t i, std::size_t n_prompt, Key* keys) const {
    const auto parts = static_cast<Key>(trace.parts);
    std::size_t at = 0;
    for (std::int64_t run = trace.run_offset[i]; run < trace.run_offset[i + 1]; ++run) {
      const auto [first, length] = places_[static_cast<std::size_t>(run)];
      for (std::uint32_t id = first; id < first + length; ++id) {
        if (number_[id] == kPrivate) return at;
        for (Key part = 0; part < parts; ++part, ++at) {
          if (at == n_prompt) return at;
          keys[at] = number_[id] * parts + part;
        }
      }
    }
    return at;
  }

  std::vector<Place> places_;          // by run: of its first id
  std::vector<std::uint32_t> number_;  // by place
  std::uint32_t n_ = 0;
};

// Which of up to 64 rows hold which shared blocks, a bit for each: what a PrefixIndex would answer a router
// that hears of every change, for a tenth of its time.
class HolderMasks {
 public:
  static constexpr std::size_t kMaxRows = 64;

  void resize(std::size_t n_blocks, std::size_t n_rows) {
    masks_.assign(n_blocks, 0);
    blocks_.assign(n_rows, 0);
  }

  void set(std::size_t row, Key block) noexcept {
    if (block < masks_.size()) masks_[block] |= std::uint64_t{1} << row;
  }
  void unset(std::size_t row, Key block) noexcept {
    if (block < masks_.size()) masks_[block] &= ~(std::uint64_t{1} << row);
  }
  void count(std::size_t row, std::int64_t blocks) noexcept { blocks_[row] = blocks; }

  // As PrefixIndex::match_and_count, for keys that SharedBlocks gave.
  void match_and_count(const Key* keys, std::size_t n_keys, std::int64_t* matched, std::int64_t* blocks,
                       std::size_t n_rows) const noexcept {
    std::uint64_t all = n_rows == kMaxRows ? ~std::uint64_t{0} : (std::uint64_t{1} << n_rows) - 1;
    std::size_t at = 0;
    for (; at < n_keys && keys[at] < masks_.size() && all != 0; ++at) {
      const std::uint64_t still = all & masks_[keys[at]];
      for (std::uint64_t gone = all ^ still; gone != 0; gone &= gone - 1) matched[__builtin_ctzll(gone)] = static_cast<std::int64_t>(at);
      all = still;
    }
    for (; all != 0; all &= all - 1) matched[__builtin_ctzll(all)] = static_cast<std::int64_t>(at);
    std::copy(blocks_.begin(), blocks_.end(), blocks);
  }

 private:
  std::vector<std::uint64_t> masks_;  // by block
  std::vector<std::int64_t> blocks_;  // by row: all that it holds
};

}  // namespace mulsched
