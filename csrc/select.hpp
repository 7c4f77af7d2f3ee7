// Columns of the candidates, and the fused pick for scores that are a product or a weighted sum of them.
//
// The arithmetic is that of mulsched/scorers.py, operation for operation and in the same order, so that the
// result is the same to the last bit (compiled with -ffp-contract=off).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "prefix_index.hpp"

namespace mulsched {

// Order of mulsched.indicators.COLUMNS.
enum Column : std::size_t {
  kMatchedBlocks,
  kHitTokens,
  kNewPrefillTokens,
  kQueuedPrefillTokens,
  kPTokens,
  kRunning,
  kWaiting,
  kBatchSize,
  kContextTokens,
  kCachedBlocks,
  kLastChosen,
  kLowerTierTokens,
  kColumns,
};

// Order of mulsched.load.LOAD_COLUMNS.
enum LoadColumn : std::size_t { kLoadQueued, kLoadRunning, kLoadWaiting, kLoadContext, kLoadLastChosen, kLoadColumns };

// Row-aligned columns, column after column.
struct LoadView {
  const std::int64_t* data;
  std::size_t n_rows;
  const std::int64_t* column(LoadColumn c) const noexcept { return data + c * n_rows; }
};

// Fills out, kColumns columns of n entries, for the candidate rows (each < load.n_rows). in_flight, if there
// is one, holds the prefixes of requests without a first token; they count as cached. Index: a PrefixIndex, or
// what answers match_and_count like one.
template <class Index>
void fill_columns(const Index& index, const PrefixIndex* in_flight, const Key* keys,
                         std::size_t n_keys, std::int64_t prompt_tokens, std::int64_t block_size,
                         const std::int64_t* rows, std::size_t n, const LoadView& load, std::int64_t* out) {
  thread_local std::vector<std::int64_t> scratch;  // spares an allocation per decision
  scratch.resize(3 * load.n_rows);
  std::int64_t* matched = scratch.data();
  std::int64_t* blocks = matched + load.n_rows;
  index.match_and_count(keys, n_keys, matched, blocks, load.n_rows);
  if (in_flight != nullptr) {
    std::int64_t* coming = blocks + load.n_rows;
    in_flight->match(keys, n_keys, coming, load.n_rows);
    for (std::size_t row = 0; row < load.n_rows; ++row) matched[row] = std::max(matched[row], coming[row]);
  }
  // the engine computes the last token again, whatever it has cached
  const std::int64_t most = (prompt_tokens - 1) / block_size * block_size;
  for (std::size_t i = 0; i < n; ++i) {
    const auto row = static_cast<std::size_t>(rows[i]);
    const std::int64_t hit = std::min(matched[row] * block_size, most);
    const std::int64_t queued = load.column(kLoadQueued)[row];
    const std::int64_t running = load.column(kLoadRunning)[row], waiting = load.column(kLoadWaiting)[row];
    out[kMatchedBlocks * n + i] = matched[row];
    out[kHitTokens * n + i] = hit;
    out[kNewPrefillTokens * n + i] = prompt_tokens - hit;
    out[kQueuedPrefillTokens * n + i] = queued;
    out[kPTokens * n + i] = queued + prompt_tokens - hit;
    out[kRunning * n + i] = running;
    out[kWaiting * n + i] = waiting;
    out[kBatchSize * n + i] = running + waiting + 1;
    out[kContextTokens * n + i] = load.column(kLoadContext)[row];
    out[kCachedBlocks * n + i] = blocks[row];
    out[kLastChosen * n + i] = load.column(kLoadLastChosen)[row];
    out[kLowerTierTokens * n + i] = 0;  // mulsched.lower_tiers counts them, where there are tiers
  }
}

// A storage tier below the GPU; its rows are those of the GPU's index.
struct Tier {
  const PrefixIndex* index;
  double cost_ratio;
};

// Brings filled columns up to date with what tiers hold after each candidate's match, asked in their order; the
// formulas are in mulsched/lower_tiers.py. rows ascend.
inline void charge_tiers(const std::vector<Tier>& tiers, const Key* keys, std::size_t n_keys,
                         std::int64_t prompt_tokens, std::int64_t block_size, const std::int64_t* rows,
                         std::size_t n, std::int64_t* out) {
  thread_local std::vector<std::int64_t> reached;
  thread_local std::vector<double> cost;
  reached.assign(static_cast<std::size_t>(rows[n - 1]) + 1, 0);
  cost.assign(n, 0.0);
  const std::int64_t* hit = out + kHitTokens * n;
  std::int64_t* loaded = out + kLowerTierTokens * n;  // 0 so far
  for (std::size_t i = 0; i < n; ++i) reached[static_cast<std::size_t>(rows[i])] = out[kMatchedBlocks * n + i];
  const std::int64_t most = (prompt_tokens - 1) / block_size * block_size;
  for (const Tier& tier : tiers) {
    tier.index->match_from(keys, n_keys, reached.data(), reached.size());
    for (std::size_t i = 0; i < n; ++i) {
      const std::int64_t end = std::min(reached[static_cast<std::size_t>(rows[i])] * block_size, most) - hit[i];
      cost[i] += tier.cost_ratio * static_cast<double>(end - loaded[i]);
      loaded[i] = end;
    }
  }
  for (std::size_t i = 0; i < n; ++i) {
    const std::int64_t work = prompt_tokens - hit[i] - loaded[i] + static_cast<std::int64_t>(std::ceil(cost[i]));
    out[kNewPrefillTokens * n + i] = work;
    out[kPTokens * n + i] = out[kQueuedPrefillTokens * n + i] + work;
  }
}

// What the values of a column are divided by: nothing, the largest of them, or the prompt's tokens.
enum class Divisor { kNone, kMax, kPrompt };

// A score that the native core can compute: a product of columns (no weights), or a weighted sum of columns,
// each over its divisor.
struct FusedScore {
  std::vector<std::size_t> columns;
  std::vector<double> weights;
  std::vector<Divisor> divisors;  // as many as weights
};

// Who wins among equal scores; see mulsched.policies.Policy.
enum class Ties { kLeastRecent, kRandom, kFirst };

// Finalizer of SplitMix64 (Steele, Lea, Flood 2014).
inline std::uint64_t split_mix(std::uint64_t x) noexcept {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// mulsched.indicators.uniform_draws for one row.
inline double uniform(std::uint64_t seed, std::int64_t decision, std::int64_t row) noexcept {
  constexpr std::uint64_t kGamma = 0x9E3779B97F4A7C15;
  const std::uint64_t start = split_mix(seed + kGamma * (static_cast<std::uint64_t>(decision) + 1));
  const std::uint64_t bits = split_mix(split_mix(start + kGamma * (static_cast<std::uint64_t>(row) + 1)));
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

inline constexpr std::ptrdiff_t kNotFinite = -1;
inline constexpr std::uint64_t kTieSalt = 0x74696573;  // "ties", as in mulsched/policies/_policy.py

// By column. Over infinity all is 0: where the largest is 0, it normalises to that.
inline std::array<double, kColumns> divisors(const FusedScore& score, std::int64_t prompt_tokens,
                                             const std::int64_t* table, std::size_t n) noexcept {
  std::array<double, kColumns> values;
  values.fill(1.0);
  for (std::size_t k = 0; k < score.weights.size(); ++k) {
    const std::size_t column = score.columns[k];
    if (score.divisors[k] == Divisor::kMax) {
      const std::int64_t largest = *std::max_element(table + column * n, table + (column + 1) * n);
      values[column] = largest > 0 ? static_cast<double>(largest) : std::numeric_limits<double>::infinity();
    } else if (score.divisors[k] == Divisor::kPrompt) {
      values[column] = static_cast<double>(prompt_tokens);
    }
  }
  return values;
}

// Scores the n candidates of a filled table and returns the position of the smallest score, or kNotFinite.
// Equal scores go to the first candidate, or else to the smallest batch and then to the least recently
// chosen or the smallest draw.
inline std::ptrdiff_t score_and_pick(const FusedScore& score, Ties ties, std::uint64_t seed, std::int64_t decision,
                                     std::int64_t prompt_tokens, const std::int64_t* rows, const std::int64_t* table,
                                     std::size_t n, double* scores) noexcept {
  const std::int64_t* batch = table + kBatchSize * n;
  const std::int64_t* last_chosen = table + kLastChosen * n;
  const auto before = [&](std::size_t a, std::size_t b) {
    if (batch[a] != batch[b]) return batch[a] < batch[b];
    if (ties == Ties::kLeastRecent) return last_chosen[a] < last_chosen[b];
    return uniform(seed ^ kTieSalt, decision, rows[a]) < uniform(seed ^ kTieSalt, decision, rows[b]);
  };
  const std::array<double, kColumns> divisor = divisors(score, prompt_tokens, table, n);
  std::size_t best = 0;
  for (std::size_t i = 0; i < n; ++i) {
    double value;
    if (score.weights.empty()) {
      value = static_cast<double>(table[score.columns[0] * n + i]);
      for (std::size_t k = 1; k < score.columns.size(); ++k)
        value *= static_cast<double>(table[score.columns[k] * n + i]);
    } else {
      value = 0.0;
      for (std::size_t k = 0; k < score.columns.size(); ++k)
        value += score.weights[k] * (static_cast<double>(table[score.columns[k] * n + i]) / divisor[score.columns[k]]);
    }
    if (!std::isfinite(value)) return kNotFinite;
    scores[i] = value;
    if (value < scores[best] || (value == scores[best] && ties != Ties::kFirst && before(i, best))) best = i;
  }
  return static_cast<std::ptrdiff_t>(best);
}

}  // namespace mulsched
