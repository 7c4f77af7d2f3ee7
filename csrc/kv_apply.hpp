// A split message onto the prefix index: its runs of plain events, without arrays of their own in between.
#pragma once

#include <charconv>
#include <vector>

#include "kv_events.hpp"
#include "prefix_index.hpp"
#include "xxh3.hpp"

namespace mulsched {

// The seed of the keys under the part's adapter; mulsched.block_keys.namespace_seed says the same.
inline std::uint64_t adapter_seed(const KvPart& part, std::uint64_t seed) noexcept {
  if (!part.lora_name.empty()) return seed + xxh3_64(part.lora_name.data(), part.lora_name.size(), 0);
  if (part.lora_id == KvPart::kNoId) return seed;
  char digits[20];
  const char* const end = std::to_chars(digits, digits + sizeof digits, part.lora_id).ptr;
  return seed + xxh3_64(digits, static_cast<std::size_t>(end - digits), 0);
}

// Applies the parts from `begin` on, each as PrefixIndex::apply_run, up to the first that is not a run of blocks of
// block_size tokens on the GPU. Adds to `applied`; returns which part that is. O(D + W) amortised.
inline std::size_t apply_parts(PrefixIndex& index, Row row, const KvBatch& batch, std::size_t begin,
                               std::size_t block_size, std::uint64_t seed, bool counts_copies,
                               PrefixIndex::Applied& applied) {
  std::vector<Key> keys;
  for (; begin < batch.parts.size(); ++begin) {
    const KvPart& part = batch.parts[begin];
    if (!part.plain || !part.medium.empty() || (part.n_tokens > 0 && part.block_size != block_size)) break;
    keys.resize(part.n_tokens / block_size);
    hash_blocks(batch.tokens() + part.first_token, keys.size(), block_size, adapter_seed(part, seed), keys.data());
    const PrefixIndex::Applied run =
        index.apply_run(row, batch.events.data() + part.first_event, part.n_events,
                        batch.hashes() + part.first_hash, keys.data(), counts_copies);
    applied.blocks_stored += run.blocks_stored;
    applied.stores_refused += run.stores_refused;
    applied.blocks_removed += run.blocks_removed;
    applied.blocks_known += run.blocks_known;
  }
  return begin;
}

}  // namespace mulsched
