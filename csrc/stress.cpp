// Stress test of the native core without Python: random operations against sets of prefixes, readers beside
// a writer, broken messages, and allocations that fail. Built by CI with -fsanitize=address,undefined and with -fsanitize=thread.
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <new>
#include <random>
#include <set>
#include <string>
#include <thread>

#include "kv_apply.hpp"
#include "kv_events.hpp"
#include "select.hpp"
#include "xxh3.hpp"

// How many allocations of this thread succeed before one fails; negative: all.
static thread_local long allocations_left = -1;

// noinline: GCC warns of a mismatch where it inlines one side of the pair
[[gnu::noinline]] void* operator new(std::size_t size) {
  if (allocations_left >= 0 && allocations_left-- == 0) throw std::bad_alloc();
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using mulsched::Key;
using mulsched::PrefixIndex;
using Path = std::vector<Key>;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "stress: %s\n", what);
  std::exit(1);
}

// What a row must hold, without a tree.
struct Model {
  bool named = false;
  std::int64_t capacity = -1;
  std::vector<Path> order;               // bounded and unbounded rows: the next to leave first
  std::map<std::uint64_t, std::vector<Path>> names;  // named rows: once for each copy

  std::set<Path> held() const {
    std::set<Path> all(order.begin(), order.end());
    for (const auto& [hash, copies] : names) all.insert(copies.begin(), copies.end());
    return all;
  }
  // How far the path goes on from its first `from` blocks over blocks that are held.
  std::int64_t reach(const Path& path, std::int64_t from) const {
    const std::set<Path> all = held();
    while (from < static_cast<std::int64_t>(path.size()) && all.count(Path(path.begin(), path.begin() + from + 1)) > 0)
      ++from;
    return from;
  }
  // Names blocks after `prefix`.
  void name(Path prefix, const std::vector<std::uint64_t>& hashes, const Path& path) {
    for (std::size_t i = 0; i < path.size(); ++i) {
      prefix.push_back(path[i]);
      std::vector<Path>& copies = names[hashes[i]];
      if (!copies.empty() && copies.front() != prefix) copies.clear();
      copies.push_back(prefix);
    }
  }
  void drop(const Path& path) { order.erase(std::remove(order.begin(), order.end(), path), order.end()); }
  void store(const Path& path) {
    for (std::size_t n = path.size(); n > 0; --n) {
      const Path prefix(path.begin(), path.begin() + static_cast<std::ptrdiff_t>(n));
      drop(prefix);
      order.push_back(prefix);
    }
    while (capacity >= 0 && static_cast<std::int64_t>(order.size()) > capacity) order.erase(order.begin());
  }
};

Path random_path(std::mt19937_64& rng, std::size_t longest) {
  Path path(rng() % (longest + 1));
  for (Key& key : path) key = rng() % 3;
  return path;
}

void compare(const PrefixIndex& index, const std::vector<Model>& models, const Path& path,
             const std::vector<std::int64_t>& from) {
  std::vector<std::int64_t> matched(models.size()), reached = from;
  index.match(path.data(), path.size(), matched.data(), matched.size());
  index.match_from(path.data(), path.size(), reached.data(), reached.size());
  std::set<Path> anywhere;
  for (std::size_t row = 0; row < models.size(); ++row) {
    const std::set<Path> held = models[row].held();
    anywhere.insert(held.begin(), held.end());
    require(matched[row] == models[row].reach(path, 0), "match differs from the model");
    require(reached[row] == models[row].reach(path, from[row]), "match from a block differs from the model");
    for (std::uint64_t hash = 0; hash < 12; ++hash) {
      const auto named = models[row].names.find(hash);
      const Path expected = named == models[row].names.end() ? Path() : named->second.front();
      require(index.path(static_cast<mulsched::Row>(row), hash) == expected, "path differs from the model");
    }
    require(index.blocks(static_cast<mulsched::Row>(row)) == static_cast<std::int64_t>(held.size()),
            "block count differs from the model");
  }
  require(index.unique_blocks() == static_cast<std::int64_t>(anywhere.size()), "unique blocks differ");
  const std::string broken = index.check();
  require(broken.empty(), broken.c_str());
}

std::int64_t store_by_run(PrefixIndex& index, mulsched::Row row, bool has_parent, std::uint64_t parent,
                          const std::vector<std::uint64_t>& hashes, const Path& path) {
  using mulsched::KvKind;
  const mulsched::KvEvent event{has_parent ? KvKind::kAfterParent : KvKind::kStart, path.size(), parent};
  const PrefixIndex::Applied applied = index.apply_run(row, &event, 1, hashes.data(), path.data(), true);
  return applied.stores_refused == 1 ? PrefixIndex::kUnknownParent : applied.blocks_stored;
}

void against_model(std::uint64_t seed, int steps) {
  std::mt19937_64 rng(seed);
  PrefixIndex index;
  std::vector<Model> models(6);
  for (std::size_t row = 0; row < models.size(); ++row) {
    models[row].named = row >= 4;
    models[row].capacity = row < 2 ? static_cast<std::int64_t>(1 + rng() % 8) : -1;
    index.add_row(static_cast<mulsched::Row>(row), models[row].capacity, models[row].named);
  }
  for (int step = 0; step < steps; ++step) {
    const std::size_t at = rng() % models.size();
    const auto row = static_cast<mulsched::Row>(at);
    Model& model = models[at];
    const Path path = random_path(rng, 7);
    switch (rng() % 8) {
      case 0:
      case 1:
      case 2:
        if (model.named) {
          std::vector<std::uint64_t> hashes(path.size());
          for (std::uint64_t& hash : hashes) hash = rng() % 12;
          if (rng() % 3 == 0) {
            const Path after = random_path(rng, 5);
            const auto before = static_cast<std::int64_t>(model.held().size());
            const std::int64_t newly = index.store_named_after(row, after.data(), after.size(), hashes.data(),
                                                               path.data(), path.size());
            model.name(after, hashes, path);
            require(newly >= static_cast<std::int64_t>(model.held().size()) - before, "blocks stored after a path");
            break;
          }
          const std::uint64_t parent = rng() % 12;
          const bool has_parent = rng() % 2 == 0;
          const auto found = model.names.find(parent);
          const std::int64_t stored = rng() % 2 == 0
              ? index.store_named(row, has_parent, parent, hashes.data(), path.data(), path.size())
              : store_by_run(index, row, has_parent, parent, hashes, path);
          require((stored == PrefixIndex::kUnknownParent) == (has_parent && found == model.names.end()),
                  "parent");
          if (stored == PrefixIndex::kUnknownParent) break;
          model.name(has_parent ? found->second.front() : Path(), hashes, path);
        } else {
          index.store(row, path.data(), path.size());
          model.store(path);
        }
        break;
      case 3:
      case 4:
        if (model.named) {
          const std::uint64_t hash = rng() % 12;
          const auto found = model.names.find(hash);
          require(index.remove_named(row, &hash, 1) == (found != model.names.end()), "known names");
          if (found == model.names.end()) break;
          found->second.pop_back();
          if (found->second.empty()) model.names.erase(found);
        } else {
          const std::size_t start = path.empty() ? 0 : rng() % path.size();
          index.discard(row, path.data(), path.size(), start);
          for (std::size_t n = start + 1; n <= path.size(); ++n)
            model.drop(Path(path.begin(), path.begin() + static_cast<std::ptrdiff_t>(n)));
        }
        break;
      case 5:
        if (model.capacity < 0) break;
        model.capacity = static_cast<std::int64_t>(1 + rng() % 8);
        index.resize(row, model.capacity);
        model.store({});
        break;
      case 6:
        if (rng() % 8 != 0) break;
        index.clear(row);
        model.order.clear();
        model.names.clear();
        break;
      default:
        if (rng() % 16 != 0) break;
        index.remove_row(row);
        index.add_row(row, model.capacity, model.named);
        model.order.clear();
        model.names.clear();
    }
    std::vector<std::int64_t> from(models.size());
    for (std::int64_t& blocks : from) blocks = static_cast<std::int64_t>(rng() % 10);
    compare(index, models, random_path(rng, 8), from);
  }
  for (std::size_t row = 0; row < models.size(); ++row) index.remove_row(static_cast<mulsched::Row>(row));
  require(index.nodes() == 0 && index.unique_blocks() == 0, "an empty index has nodes");
}

// Random tiers, and what they cost counted row by row.
void tiers_against_model(std::uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::array<PrefixIndex, 2> indexes;
  std::array<std::vector<Model>, 2> models;
  const std::vector<mulsched::Tier> tiers{{&indexes[0], 0.25}, {&indexes[1], 0.5}};
  for (std::size_t tier = 0; tier < tiers.size(); ++tier) {
    models[tier].resize(6);
    for (mulsched::Row row = 0; row < 6; ++row) indexes[tier].add_row(row, -1, true);
    for (int stores = 0; stores < 20; ++stores) {
      const std::size_t row = rng() % 6;
      const Path after = random_path(rng, 4), path = random_path(rng, 4);
      std::vector<std::uint64_t> hashes(path.size());
      for (std::uint64_t& hash : hashes) hash = rng() % 30;
      indexes[tier].store_named_after(static_cast<mulsched::Row>(row), after.data(), after.size(), hashes.data(),
                                      path.data(), path.size());
      models[tier][row].name(after, hashes, path);
    }
  }
  const Path prompt = random_path(rng, 8);
  const auto block_size = static_cast<std::int64_t>(1 + rng() % 4);
  const std::int64_t prompt_tokens = static_cast<std::int64_t>(prompt.size()) * block_size + (prompt.empty() ? 1 : 0);
  const std::int64_t most = (prompt_tokens - 1) / block_size * block_size;
  std::vector<std::int64_t> rows;
  for (std::int64_t row = 0; row < 6; ++row)
    if (rng() % 2 == 0 || row == 5) rows.push_back(row);
  const std::size_t n = rows.size();
  std::vector<std::int64_t> table(mulsched::kColumns * n);
  const auto column = [&](mulsched::Column c) { return table.data() + c * n; };
  for (std::size_t i = 0; i < n; ++i) {
    column(mulsched::kMatchedBlocks)[i] = static_cast<std::int64_t>(rng() % (prompt.size() + 1));
    column(mulsched::kHitTokens)[i] = std::min(column(mulsched::kMatchedBlocks)[i] * block_size, most);
    column(mulsched::kQueuedPrefillTokens)[i] = static_cast<std::int64_t>(rng() % 100);
    column(mulsched::kRunning)[i] = static_cast<std::int64_t>(rng() % 3);
  }
  mulsched::charge_tiers(tiers, prompt.data(), prompt.size(), prompt_tokens, block_size, rows.data(), n, table.data());
  const mulsched::FusedScore sum{
      {mulsched::kNewPrefillTokens, mulsched::kRunning}, {0.7, 0.3}, {mulsched::Divisor::kPrompt, mulsched::Divisor::kMax}};
  std::vector<double> scores(n);
  const std::ptrdiff_t best = mulsched::score_and_pick(sum, mulsched::Ties::kFirst, 0, 0, prompt_tokens, rows.data(),
                                                       table.data(), n, scores.data());
  require(best == std::min_element(scores.begin(), scores.end()) - scores.begin(), "the pick is not the smallest");
  const std::int64_t most_running = *std::max_element(column(mulsched::kRunning), column(mulsched::kRunning) + n);
  for (std::size_t i = 0; i < n; ++i) {
    std::int64_t reached = column(mulsched::kMatchedBlocks)[i], end = column(mulsched::kHitTokens)[i];
    double cost = 0;
    for (std::size_t tier = 0; tier < tiers.size(); ++tier) {
      reached = models[tier][static_cast<std::size_t>(rows[i])].reach(prompt, reached);
      cost += tiers[tier].cost_ratio * static_cast<double>(std::min(reached * block_size, most) - end);
      end = std::min(reached * block_size, most);
    }
    const std::int64_t work = prompt_tokens - end + static_cast<std::int64_t>(std::ceil(cost));
    require(column(mulsched::kLowerTierTokens)[i] == end - column(mulsched::kHitTokens)[i], "tokens of lower tiers");
    require(column(mulsched::kNewPrefillTokens)[i] == work, "new tokens beside lower tiers");
    require(column(mulsched::kPTokens)[i] == column(mulsched::kQueuedPrefillTokens)[i] + work, "p-tokens");
    const double busy = most_running == 0 ? 0 : static_cast<double>(column(mulsched::kRunning)[i]) / static_cast<double>(most_running);
    const double expected = 0.7 * static_cast<double>(work) / static_cast<double>(prompt_tokens) + 0.3 * busy;
    require(std::abs(scores[i] - expected) < 1e-12, "a normalised sum differs");
  }
}

// Many readers beside a writer; each answer must be one that some state of the index gives.
void readers_and_a_writer() {
  PrefixIndex index, lower;  // lower: engine's name of block i is i
  constexpr std::size_t n_rows = 65, n_keys = 200;
  Path path(n_keys);
  for (std::size_t i = 0; i < n_keys; ++i) path[i] = i * 0x9E3779B97F4A7C15;
  std::vector<std::uint64_t> names(n_keys);
  for (std::size_t i = 0; i < n_keys; ++i) names[i] = i;
  for (mulsched::Row row = 0; row < n_rows; ++row) {
    index.add_row(row, 150, false);
    lower.add_row(row, -1, true);
  }
  std::atomic<bool> done{false};
  std::vector<std::thread> readers;
  for (int reader = 0; reader < 3; ++reader)
    readers.emplace_back([&] {
      const std::vector<std::int64_t> load(mulsched::kLoadColumns * n_rows, 1);
      std::vector<std::int64_t> rows(n_rows), table(mulsched::kColumns * n_rows);
      std::vector<double> scores(n_rows);
      for (std::size_t row = 0; row < n_rows; ++row) rows[row] = static_cast<std::int64_t>(row);
      const mulsched::FusedScore product{{mulsched::kPTokens, mulsched::kBatchSize}, {}, {}};
      const std::vector<mulsched::Tier> tiers{{&lower, 0.5}};
      while (!done) {
        mulsched::fill_columns(index, nullptr, path.data(), n_keys, 3201, 16, rows.data(), n_rows,
                               {load.data(), n_rows}, table.data());
        for (std::size_t row = 0; row < n_rows; ++row)
          require(table[row] <= 150 && table[mulsched::kNewPrefillTokens * n_rows + row] >= 1, "a torn read");
        mulsched::charge_tiers(tiers, path.data(), n_keys, 3201, 16, rows.data(), n_rows, table.data());
        for (std::size_t row = 0; row < n_rows; ++row) {
          const std::int64_t hit = table[mulsched::kHitTokens * n_rows + row];
          const std::int64_t loaded = table[mulsched::kLowerTierTokens * n_rows + row];
          require(loaded >= 0 && hit + loaded <= 3200, "a torn read of a tier");
          const std::uint64_t name = row * 3;
          const Path up_to = lower.path(static_cast<mulsched::Row>(row), name);
          require(up_to.empty() || up_to == Path(path.begin(), path.begin() + static_cast<std::ptrdiff_t>(name) + 1), "a torn path");
        }
        require(mulsched::score_and_pick(product, mulsched::Ties::kRandom, 1, 0, 3201, rows.data(), table.data(), n_rows,
                                         scores.data()) >= 0, "no pick");
      }
    });
  std::mt19937_64 rng(7);
  for (int step = 0; step < 2000; ++step) {
    const auto row = static_cast<mulsched::Row>(rng() % n_rows);
    if (rng() % 8 == 0) {
      index.clear(row);
    } else {
      index.store(row, path.data(), rng() % n_keys);
    }
    const std::size_t from = rng() % n_keys, count = rng() % (n_keys - from);
    if (rng() % 4 == 0) {
      lower.remove_named(row, names.data() + from, count);
    } else {
      lower.store_named_after(row, path.data(), from, names.data() + from, path.data() + from, count, false);
    }
  }
  done = true;
  for (std::thread& reader : readers) reader.join();
  require(index.check().empty() && lower.check().empty(), "broken after readers and a writer");
}

// Lets the nth allocation of a change fail, for every n: the index must be whole, or say that it is not and
// do no harm. Returns how many changes failed.
int failing_allocations() {
  int failed = 0;
  for (long n = 0; n < 150; ++n) {
    PrefixIndex index;
    index.add_row(0, -1, true);
    index.add_row(1, 40, false);
    Path path(50);
    for (std::size_t i = 0; i < path.size(); ++i) path[i] = i;
    Path other = path;
    for (std::size_t i = 20; i < path.size(); ++i) other[i] = 100 + i;
    Path fresh = path;  // names
    for (Key& name : fresh) name += 1000;
    const mulsched::KvEvent run[] = {{mulsched::KvKind::kAfterParent, 5, 1020}, {mulsched::KvKind::kRemoved, 10, 0}};
    index.store_named(0, false, 0, path.data(), path.data(), path.size());
    index.store(1, other.data(), other.size());
    allocations_left = n;
    try {
      index.store_named_after(0, other.data(), 30, fresh.data() + 20, other.data() + 30, 10);
      index.apply_run(0, run, 2, fresh.data() + 15, path.data(), true);
      index.store_named(0, false, 0, path.data(), path.data(), 10);
      index.store_named(0, true, 9, other.data() + 20, other.data() + 20, 30);
      index.store_named(0, false, 0, path.data() + 30, other.data() + 20, 20);  // names that move
      index.remove_named(0, path.data() + 15, 10);
      index.store(1, path.data(), path.size());
      index.discard(1, path.data(), path.size(), 5);
    } catch (const std::bad_alloc&) {
      ++failed;
    }
    allocations_left = -1;
    std::int64_t matched[2];
    index.match(path.data(), path.size(), matched, 2);
    if (index.check().empty()) continue;
    require(matched[0] == 0 && matched[1] == 0, "a broken index matches");
    try {
      index.store(1, path.data(), path.size());
      require(false, "a broken index takes changes");
    } catch (const std::runtime_error&) {
    }
  }
  return failed;
}

// Reads every length that takes another path through the hash, at odd addresses.
void hash_all_lengths() {
  std::vector<unsigned char> bytes(2200, 0x5A);
  std::uint64_t sum = 0;
  for (std::size_t length = 0; length <= 1100; ++length) {
    // an exact copy, so that reading past the end is seen
    const std::vector<unsigned char> exact(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(length));
    sum ^= mulsched::xxh3_64(exact.data(), length, length) + mulsched::xxh3_64(bytes.data() + 1, length, 1);
  }
  require(sum != 0, "hash");
  for (std::size_t size = 1; size <= 40; ++size) {
    std::vector<std::uint32_t> tokens(3 * size);
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::uint32_t>(i);
    std::vector<std::uint64_t> keys(3);
    mulsched::hash_blocks(tokens.data(), 3, size, 7, keys.data());
    for (std::size_t i = 0; i < 3; ++i)
      require(keys[i] == mulsched::xxh3_64(tokens.data() + i * size, 4 * size, 7), "keys of blocks");
  }
}

// Names that all move to other blocks, and blocks of which another row holds all: neither may cut an edge once for
// each block, which would allocate as often.
void long_paths_of_used_names() {
  constexpr std::size_t n = 4096;
  Path names(n), path(n), other(n);
  for (std::size_t i = 0; i < n; ++i) {
    names[i] = i;
    path[i] = n + i;
    other[i] = 2 * n + i;
  }
  PrefixIndex index;
  for (mulsched::Row row = 0; row < 2; ++row) index.add_row(row, -1, true);
  index.store_named(0, false, 0, names.data(), path.data(), n);
  index.store_named(1, false, 0, names.data(), other.data(), 1);
  allocations_left = n / 8;
  index.store_named(0, false, 0, names.data(), other.data(), n);
  index.store_named(1, false, 0, names.data(), other.data(), n);
  // not by what is thrown: shrink_to_fit catches it
  require(allocations_left > 0, "an edge is cut once for each block");
  allocations_left = -1;
  require(index.check().empty() && index.blocks(0) == n && index.blocks(1) == n && index.nodes() == 1, "moved names");
}

// Removals from two media by turns become a run each: a message of them is given up at the limit.
void too_many_parts() {
  std::string message("\x92\xcb\0\0\0\0\0\0\0\0\xdc\3\xe8", 13);
  for (int i = 0; i < 500; ++i)
    message += std::string("\x93\xac" "BlockRemoved\x91\1\xc0\x93\xac" "BlockRemoved\x91\1\xa3" "CPU");
  const auto* data = reinterpret_cast<const std::uint8_t*>(message.data());
  mulsched::KvBatch within, beyond;
  require(within.split(data, message.size(), 0, 1000) && within.parts.size() == 1000, "as many parts as the limit");
  require(!beyond.split(data, message.size(), 0, 100) && beyond.parts.size() == 100, "more parts than the limit");
  require(within.plain_within(1500) && !within.plain_within(1499), "the events of other media count too");
}

// Messages with bytes changed anywhere, each in a buffer that ends where it ends; what is read of them is applied.
std::size_t broken_messages(int rounds) {
  const std::string head("\x93\xcb\0\0\0\0\0\0\0\0\xdc\0\3", 13);
  const std::string stored =
      "\x89\xa4type\xab" "BlockStored\xac" "block_hashes\x92\x07\xcf\1\2\3\4\5\6\7\x08\xb1parent_block_hash\xd0\xff"
      "\xa9token_ids\x98\1\2\xcd\1\1\xce\1\1\1\1\5\6\7\x08\xaa" "block_size\4\xa6medium\xa3" "CPU\xa9lora_name\xa1l"
      "\xaa" "extra_keys\x92\xc0\xc0\xa5later\x81\xa1" "a\x91\xca\1\2\3\4";
  const std::string removed = "\x93\xac" "BlockRemoved\x92\x07\xe0\xc0";
  const std::string whole = head + stored + removed + "\x92\xa5Other\xc4\2\1\2" + "\xc0";
  std::mt19937_64 rng(11);
  std::size_t split = 0;
  PrefixIndex index;
  index.add_row(0, -1, true);
  for (int round = 0; round < rounds; ++round) {
    std::string message = whole;
    if (rng() % 2 == 0) message.replace(message.find("CPU"), 3, "GPU");
    for (std::uint64_t n = rng() % 3; n > 0; --n) message[rng() % message.size()] = static_cast<char>(rng());
    if (rng() % 4 == 0) message.resize(rng() % message.size());
    const std::vector<std::uint8_t> exact(message.begin(), message.end());
    mulsched::KvBatch batch;
    if (!batch.split(exact.data(), exact.size(), 0, 8)) continue;
    ++split;
    std::size_t end = 0, events = 0, hashes = 0;
    std::uint64_t blocks = 0;
    for (const mulsched::KvPart& part : batch.parts) {
      require(part.begin >= end && part.end > part.begin && part.end <= exact.size(), "a part's place");
      end = part.end;
      events += part.n_events;
      hashes += part.n_hashes;
    }
    for (const mulsched::KvEvent& event : batch.events) blocks += event.n_blocks;
    require(events == batch.events.size() && hashes == blocks, "a run's arrays");
    PrefixIndex::Applied applied;
    std::size_t at = 0;
    for (; at < batch.parts.size(); ++at)
      at = mulsched::apply_parts(index, 0, batch, at, 4, 1337, true, applied);
    require(static_cast<std::uint64_t>(applied.blocks_stored + applied.blocks_removed) <= blocks, "blocks applied");
    require(index.check().empty(), "broken by a message");
  }
  return split;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 40;
  hash_all_lengths();
  for (int round = 0; round < rounds; ++round) against_model(static_cast<std::uint64_t>(round), 400);
  for (int round = 0; round < 100 * rounds; ++round) tiers_against_model(static_cast<std::uint64_t>(round));
  readers_and_a_writer();
  long_paths_of_used_names();
  too_many_parts();
  const std::size_t split = broken_messages(2000 * rounds);
  require(split > 0, "no message is split");
  const int failed = failing_allocations();
  require(failed > 10, "no allocation failed");
  std::printf("stress: %d rounds agree with the model, %d failed changes did no harm\n", rounds, failed);
}
