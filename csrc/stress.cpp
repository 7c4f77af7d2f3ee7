// Stress test of the native core without Python: random operations against sets of prefixes, readers beside
// a writer, broken messages, and allocations that fail. Built by CI with -fsanitize=address,undefined and with -fsanitize=thread.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <new>
#include <random>
#include <set>
#include <string>
#include <thread>

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

void compare(const PrefixIndex& index, const std::vector<Model>& models, const Path& path) {
  std::vector<std::int64_t> matched(models.size());
  index.match(path.data(), path.size(), matched.data(), matched.size());
  std::set<Path> anywhere;
  for (std::size_t row = 0; row < models.size(); ++row) {
    const std::set<Path> held = models[row].held();
    anywhere.insert(held.begin(), held.end());
    std::int64_t expected = 0;
    for (std::size_t n = 1; n <= path.size(); ++n, ++expected)
      if (held.count(Path(path.begin(), path.begin() + static_cast<std::ptrdiff_t>(n))) == 0) break;
    require(matched[row] == expected, "match differs from the model");
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
          const std::uint64_t parent = rng() % 12;
          const bool has_parent = rng() % 2 == 0;
          const auto found = model.names.find(parent);
          const std::int64_t stored = rng() % 2 == 0
              ? index.store_named(row, has_parent, parent, hashes.data(), path.data(), path.size())
              : store_by_run(index, row, has_parent, parent, hashes, path);
          require((stored == PrefixIndex::kUnknownParent) == (has_parent && found == model.names.end()),
                  "parent");
          if (stored == PrefixIndex::kUnknownParent) break;
          Path prefix = has_parent ? found->second.front() : Path();
          for (std::size_t i = 0; i < path.size(); ++i) {
            prefix.push_back(path[i]);
            std::vector<Path>& copies = model.names[hashes[i]];
            if (!copies.empty() && copies.front() != prefix) copies.clear();
            copies.push_back(prefix);
          }
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
    compare(index, models, random_path(rng, 8));
  }
  for (std::size_t row = 0; row < models.size(); ++row) index.remove_row(static_cast<mulsched::Row>(row));
  require(index.nodes() == 0 && index.unique_blocks() == 0, "an empty index has nodes");
}

// Many readers beside a writer; each answer must be one that some state of the index gives.
void readers_and_a_writer() {
  PrefixIndex index;
  constexpr std::size_t n_rows = 65, n_keys = 200;
  Path path(n_keys);
  for (std::size_t i = 0; i < n_keys; ++i) path[i] = i * 0x9E3779B97F4A7C15;
  for (mulsched::Row row = 0; row < n_rows; ++row) index.add_row(row, 150, false);
  std::atomic<bool> done{false};
  std::vector<std::thread> readers;
  for (int reader = 0; reader < 3; ++reader)
    readers.emplace_back([&] {
      const std::vector<std::int64_t> load(mulsched::kLoadColumns * n_rows, 1);
      std::vector<std::int64_t> rows(n_rows), table(mulsched::kColumns * n_rows);
      std::vector<double> scores(n_rows);
      for (std::size_t row = 0; row < n_rows; ++row) rows[row] = static_cast<std::int64_t>(row);
      const mulsched::FusedScore product{{mulsched::kPTokens, mulsched::kBatchSize}, {}};
      while (!done) {
        mulsched::fill_columns(index, nullptr, path.data(), n_keys, 3201, 16, rows.data(), n_rows,
                               {load.data(), n_rows}, table.data());
        for (std::size_t row = 0; row < n_rows; ++row)
          require(table[row] <= 150 && table[mulsched::kNewPrefillTokens * n_rows + row] >= 1, "a torn read");
        require(mulsched::score_and_pick(product, mulsched::Ties::kRandom, 1, 0, rows.data(), table.data(), n_rows, scores.data()) >= 0, "no pick");
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
  }
  done = true;
  for (std::thread& reader : readers) reader.join();
  require(index.check().empty(), "broken after readers and a writer");
}

// Lets the nth allocation of a change fail, for every n: the index must be whole, or say that it is not and
// do no harm. Returns how many changes failed.
int failing_allocations() {
  int failed = 0;
  for (long n = 0; n < 60; ++n) {
    PrefixIndex index;
    index.add_row(0, -1, true);
    index.add_row(1, 40, false);
    Path path(50);
    for (std::size_t i = 0; i < path.size(); ++i) path[i] = i;
    Path other = path;
    for (std::size_t i = 20; i < path.size(); ++i) other[i] = 100 + i;
    index.store_named(0, false, 0, path.data(), path.data(), path.size());
    index.store(1, other.data(), other.size());
    allocations_left = n;
    try {
      index.store_named(0, false, 0, path.data(), path.data(), 10);
      index.store_named(0, true, 9, other.data() + 20, other.data() + 20, 30);
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
}

// Messages with bytes changed anywhere, each in a buffer that ends where it ends.
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
  for (int round = 0; round < rounds; ++round) {
    std::string message = whole;
    for (std::uint64_t n = rng() % 3; n > 0; --n) message[rng() % message.size()] = static_cast<char>(rng());
    if (rng() % 4 == 0) message.resize(rng() % message.size());
    const std::vector<std::uint8_t> exact(message.begin(), message.end());
    mulsched::KvBatch batch;
    if (!batch.split(exact.data(), exact.size(), 0)) continue;
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
  }
  return split;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 40;
  hash_all_lengths();
  for (int round = 0; round < rounds; ++round) against_model(static_cast<std::uint64_t>(round), 400);
  readers_and_a_writer();
  const std::size_t split = broken_messages(2000 * rounds);
  require(split > 0, "no message is split");
  const int failed = failing_allocations();
  require(failed > 10, "no allocation failed");
  std::printf("stress: %d rounds agree with the model, %d failed changes did no harm\n", rounds, failed);
}
