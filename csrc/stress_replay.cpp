// Stress test of the native simulation core without Python: engines that run out of memory, checked after
// every call, and whole replays. Built by CI with -fsanitize=address,undefined.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "replay.hpp"

namespace {

using mulsched::Engine;
using mulsched::Key;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "stress_replay: %s\n", what);
  std::exit(1);
}

void require_whole(const Engine& engine) {
  const std::string wrong = engine.check();
  require(wrong.empty(), wrong.c_str());
}

// Every request submitted must end once, with memory for a few of them only.
void engine_alone(std::uint64_t seed) {
  std::mt19937_64 rng(seed);
  const auto block_size = static_cast<std::int64_t>(1 + rng() % 4);
  const auto budget = static_cast<std::int64_t>(4 + rng() % 20);
  Engine engine({block_size, 24, budget, 4, static_cast<std::int64_t>(rng() % 3), seed % 2 == 0});
  std::vector<Engine::FirstToken> first_tokens;
  std::vector<std::int64_t> ended;
  std::int64_t submitted = 0;
  for (int step = 0; step < 30000 && (step < 3000 || submitted > static_cast<std::int64_t>(ended.size())); ++step) {
    if (submitted < 300 && rng() % 3 == 0) {
      const auto prompt = static_cast<std::int64_t>(1 + rng() % static_cast<std::uint64_t>(10 * block_size));
      const auto output = static_cast<std::int64_t>(1 + rng() % static_cast<std::uint64_t>(10 * block_size));
      std::vector<Key> keys(static_cast<std::size_t>(rng() % static_cast<std::uint64_t>((prompt + output) / block_size + 1)));
      Key chain = 0;
      for (Key& key : keys) key = chain = chain * 31 + rng() % 2;
      engine.submit(submitted++, keys.data(), keys.size(), keys.size(), prompt, output, rng() % 4 == 0 ? prompt : 0);
    }
    mulsched::StepLoad load;
    if (!engine.start_step(load)) continue;
    require_whole(engine);
    require(load.new_tokens + load.decode_batch <= budget, "a step over its budget");
    engine.end_step(first_tokens, ended);
    require_whole(engine);
    for (const Engine::Change& change : engine.changes()) require(change.begin < change.end, "an empty change");
    if (rng() % 2 == 0) engine.clear_changes();
  }
  std::sort(ended.begin(), ended.end());
  require(static_cast<std::int64_t>(ended.size()) == submitted, "a request is lost");
  require(std::adjacent_find(ended.begin(), ended.end()) == ended.end(), "a request ended twice");
  require(first_tokens.size() == ended.size(), "first tokens are miscounted");
}

class Host final : public mulsched::ReplayHost {
 public:
  std::int64_t choose(std::size_t, std::int64_t request, double, const Key*, std::size_t,
                      const mulsched::Pool& pool) override {
    return request % static_cast<std::int64_t>(pool.rows.size());
  }
  bool go_on(std::int64_t) override { return true; }
  void first_token(std::size_t, std::int64_t) override {}
  void ended(std::size_t, std::int64_t) override {}
};

void whole_replay(std::uint64_t seed) {
  std::mt19937_64 rng(seed);
  constexpr std::int64_t n = 400;
  std::vector<double> arrival, think(n, 0.001);
  std::vector<std::int64_t> prompt, output, start, length(n, 6), offset{0}, follows;
  double now = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    arrival.push_back(now += static_cast<double>(rng() % 100) / 1e4);
    prompt.push_back(static_cast<std::int64_t>(1 + rng() % 60));
    output.push_back(static_cast<std::int64_t>(1 + rng() % 40));
    start.push_back(static_cast<std::int64_t>(rng() % 5 * 100));
    offset.push_back(i + 1);
    follows.push_back(seed % 2 == 0 && i > 0 && rng() % 3 == 0 ? static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(i)) : -1);
  }
  const mulsched::TraceView trace{n, 2, arrival.data(), think.data(), prompt.data(), output.data(),
                                  start.data(), length.data(), offset.data(), follows.data()};
  const std::int64_t prefill = seed % 3 == 0 ? 1 : 0;
  const mulsched::ReplayOptions options{4, prefill, 3, seed % 5 == 0, seed % 2 == 0, seed % 4 == 0 ? 0.01 : 0.0, seed % 7 == 0 ? 0.2 : 0.0, 1e-5, seed};
  std::vector<double> arrived(n), first(n), finish(n);
  std::vector<std::int64_t> instance(n), decode(n), cached(n), hits(n);
  mulsched::Roofline step_time;
  step_time.active_parameters = step_time.shared_parameters = 8e9;
  step_time.compute = 7e14;
  step_time.bandwidth = 2.5e12;
  Host host;
  mulsched::Replay replay(trace, options, {4, 40, 32, 8, 0, seed % 4 < 2}, step_time,
                          {arrived.data(), first.data(), finish.data(), instance.data(), decode.data(), cached.data(), hits.data()},
                          host);
  for (mulsched::Pool& pool : replay.pools()) {
    pool.ties = seed % 2 == 0 ? mulsched::Ties::kLeastRecent : mulsched::Ties::kRandom;
    if (seed % 6 != 0) pool.score = {{mulsched::kPTokens, mulsched::kBatchSize}, {}, {}};
    if (seed % 6 == 1) {
      pool.score.weights = {0.7, 0.3};
      pool.score.divisors = {mulsched::Divisor::kPrompt, mulsched::Divisor::kMax};
    }
  }
  for (std::size_t p = 0; p < replay.pools().size(); ++p) {
    if (!replay.pools()[p].score.columns.empty() && seed % 4 < 3)
      replay.guard(p, 0.3, 2, static_cast<mulsched::Mitigation>(seed % 4), seed % 2 == 0);
  }
  require(replay.run(), "stopped");
  for (std::size_t i = 0; i < n; ++i) require(arrived[i] < first[i] && first[i] <= finish[i], "times out of order");
  for (mulsched::Pool& pool : replay.pools()) {
    require(pool.index.check().empty(), "the index is broken");
    for (const Engine& engine : pool.engines) require_whole(engine);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 40;
  for (int round = 0; round < rounds; ++round) engine_alone(static_cast<std::uint64_t>(round));
  for (int round = 0; round < rounds; ++round) whole_replay(static_cast<std::uint64_t>(round));
  std::printf("stress_replay: %d engines and %d replays are whole\n", rounds, rounds);
}
