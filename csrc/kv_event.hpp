// A KV event without its blocks: those of a run of events lie in flat arrays, one event's after the other's.
#pragma once

#include <cstdint>

namespace mulsched {

// Blocks stored at a prompt's start, stored after a parent, or removed.
enum class KvKind : std::uint64_t { kStart, kAfterParent, kRemoved };

struct KvEvent {
  KvKind kind;
  std::uint64_t n_blocks;
  std::uint64_t parent;  // of kAfterParent, else 0
};

}  // namespace mulsched
