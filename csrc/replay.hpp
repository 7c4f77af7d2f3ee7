// A whole replay: arrivals, routing, modelled engines and the news that they send to the router, in one loop.
// Twin of mulsched/replay/_replay_py.py, which drives the production Router; the results are the same to
// the last bit.
#pragma once

#include <algorithm>
#include <deque>
#include <limits>
#include <memory>
#include <queue>
#include <vector>

#include "engine.hpp"
#include "failure.hpp"
#include "step_time.hpp"
#include "trace_blocks.hpp"

namespace mulsched {

struct ReplayOptions {
  std::int64_t block_size;
  std::int64_t prefill_instances;  // 0: every instance does both phases
  std::int64_t decode_instances;   // all instances, if every one does both
  bool predicted;                  // the router predicts caches instead of hearing of them
  bool in_flight;                  // prefixes count as cached from their dispatch on
  double state_delay_s, event_loss_ratio, transfer_s_per_token;
  std::uint64_t seed;
};

// Arrays of n entries.
struct ReplayRecords {
  double *arrival_s, *first_token_s, *finish_s;
  std::int64_t *instance, *decode_instance, *cached_tokens, *hit_tokens;
};

// A request whose prefix is in flight.
struct Coming {
  std::int64_t request;
  std::vector<Key> keys;
};

// A failure detector that asks nobody; see mulsched.failure.FailureDetector.
struct Guard {
  Occupancy occupancy;
  Mitigation mitigation;
  bool by_tokens;
  std::vector<std::size_t> slots;  // by request

  Guard(double confidence, double horizon, Mitigation what, bool weighs_tokens)
      : occupancy(confidence, horizon), mitigation(what), by_tokens(weighs_tokens) {}
};

// Instances of one kind and the router's view of them.
struct Pool {
  std::int64_t first;  // number of its first instance
  FusedScore score;    // without columns: ask the policy
  Ties ties;
  bool tells = false;            // the policy keeps account of requests
  std::unique_ptr<Guard> guard;  // in place of the policy's own account
  PrefixIndex index;
  HolderMasks masks;  // in place of the index, if the replay is masked
  PrefixIndex in_flight;  // prefixes of requests without a first token, if they count
  std::vector<std::vector<Coming>> coming;  // those requests by row
  std::vector<Engine> engines;
  std::vector<std::int64_t> load, rows, table;
  std::vector<double> scores;
  std::int64_t decisions = 0;
  std::vector<std::int64_t> booked_new;  // by request
  std::vector<std::int64_t> messages;    // of KV events, by row

  LoadView view() const noexcept { return {load.data(), engines.size()}; }
  std::int64_t& at(LoadColumn column, std::size_t row) noexcept { return load[column * engines.size() + row]; }
};

// What the loop asks of Python: the choice of policies that the core cannot compute, and whether to go on.
class ReplayHost {
 public:
  virtual ~ReplayHost() = default;
  // The position of the chosen row of a filled table, or a negative number if the policy raised an error.
  virtual std::int64_t choose(std::size_t pool, std::int64_t request, double now, const Key* keys,
                              std::size_t n_keys, const Pool& state) = 0;
  virtual bool go_on(std::int64_t finished) = 0;
  // The router hears of a request's first token and its end; asked only of pools that want to know.
  virtual void first_token(std::size_t pool, std::int64_t request) = 0;
  virtual void ended(std::size_t pool, std::int64_t request) = 0;
};

class Replay {
 public:
  Replay(const TraceView& trace, const ReplayOptions& options, const EngineLimits& limits, const StepTime& step_time,
         const ReplayRecords& records, ReplayHost& host)
      : trace_(trace), options_(options), step_time_(step_time), records_(records), host_(host) {
    // Without these an engine hears of nothing but arrivals, and nothing but arrivals hears of it.
    run_ahead_ = options.prefill_instances == 0 && options.state_delay_s == 0 &&
                 std::all_of(trace.follows, trace.follows + trace.n, [](std::int64_t i) { return i < 0; });
    // What is told comes at once and whole, so what the router knows is what engines held at their last end of a step.
    masked_ = !options.predicted && options.state_delay_s == 0 && options.event_loss_ratio == 0 &&
              std::max(options.prefill_instances, options.decode_instances) <= static_cast<std::int64_t>(HolderMasks::kMaxRows) &&
              shared_.number(trace, options.block_size);
    if (options.prefill_instances > 0) add_pool(options.prefill_instances, limits);
    add_pool(options.decode_instances, limits);
    const auto n = static_cast<std::size_t>(trace.n);
    followed_by_.assign(n, kNobody);
    next_sibling_.assign(n, kNobody);
    for (std::int64_t i = trace.n; i-- > 0;) {  // so that siblings are met in the order of the trace
      const std::int64_t before = trace.follows[i];
      if (before < 0) continue;
      next_sibling_[static_cast<std::size_t>(i)] = followed_by_[static_cast<std::size_t>(before)];
      followed_by_[static_cast<std::size_t>(before)] = i;
    }
  }

  std::deque<Pool>& pools() noexcept { return pools_; }
  void guard(std::size_t p, double confidence, double horizon, Mitigation mitigation, bool by_tokens) {
    pools_[p].guard = std::make_unique<Guard>(confidence, horizon, mitigation, by_tokens);
    pools_[p].guard->slots.resize(static_cast<std::size_t>(trace_.n));
  }
  // Alarms of a pool with a guard.
  std::int64_t alarms(std::size_t p) const noexcept { return pools_[p].guard->occupancy.raised(); }
  std::int64_t orphans() const noexcept { return orphans_; }
  std::int64_t lost_messages() const noexcept { return lost_; }
  std::int64_t preemptions() const noexcept {
    std::int64_t all = 0;
    for (const Pool& pool : pools_)
      for (const Engine& engine : pool.engines) all += engine.preemptions();
    return all;
  }

  // Runs to the end; false if the host stopped it.
  bool run() {
    std::int64_t next = next_arrival(0), told = 0;
    const std::int64_t every = std::max<std::int64_t>(1, trace_.n / 100);
    planned_ = trace_.n;  // arrivals by the clock are planned before all else
    while (next < trace_.n || !events_.empty()) {
      Event event{0.0, kArrival, next, next, 0};
      if (next < trace_.n) event.time = trace_.arrival_s[next];
      if (next >= trace_.n || (!events_.empty() && event > events_.top())) {
        event = events_.top();
        events_.pop();
      } else {
        next = next_arrival(next + 1);
      }
      horizon_ = next < trace_.n ? trace_.arrival_s[next] : std::numeric_limits<double>::infinity();
      if (!handle(event)) return false;
      if (finished_ >= told + every) {
        told = finished_;
        if (!host_.go_on(told)) return false;
      }
    }
    return host_.go_on(finished_);
  }

 private:
  static constexpr std::int64_t kNobody = -1;
  enum Kind : int { kStepEnd, kArrival, kHandOver };
  struct Event {
    double time;
    int kind;  // at one time, ends of steps come first
    std::int64_t number, subject;
    std::size_t pool;
    bool operator>(const Event& other) const noexcept {
      if (time != other.time) return time > other.time;
      if (kind != other.kind) return kind > other.kind;
      return number > other.number;
    }
  };
  // What an engine tells its router: changes of its cache, a first token or an end.
  struct News {
    enum What { kStored, kEvicted, kFirstToken, kFinished } what;
    double time;
    std::size_t pool, row;
    std::int64_t request = 0;
    bool has_parent = false;
    Key parent = 0;
    std::vector<Key> keys;
  };

  void add_pool(std::int64_t n, const EngineLimits& limits) {
    Pool& pool = pools_.emplace_back();
    pool.first = pools_.size() == 1 ? 0 : options_.prefill_instances;
    const auto size = static_cast<std::size_t>(n);
    pool.engines.reserve(size);
    pool.load.assign(kLoadColumns * size, 0);
    pool.table.resize(kColumns * size);
    pool.scores.resize(size);
    pool.messages.assign(size, 0);
    pool.coming.resize(size);
    pool.booked_new.resize(static_cast<std::size_t>(trace_.n));
    if (masked_) pool.masks.resize(shared_.size(trace_), size);
    for (std::size_t row = 0; row < size; ++row) {
      pool.engines.emplace_back(limits, !masked_);
      pool.rows.push_back(static_cast<std::int64_t>(row));
      pool.index.add_row(static_cast<Row>(row), options_.predicted ? limits.kv_blocks : kUnbounded, !options_.predicted);
      if (options_.in_flight) pool.in_flight.add_row(static_cast<Row>(row), kUnbounded, false);
    }
    for (std::size_t row = 0; row < size; ++row) pool.at(kLoadLastChosen, row) = -1;
  }

  std::int64_t next_arrival(std::int64_t i) const noexcept {
    while (i < trace_.n && trace_.follows[i] >= 0) ++i;
    return i;
  }

  void plan(double time, Kind kind, std::int64_t subject, std::size_t pool) {
    events_.push({time, kind, planned_++, subject, pool});
  }

  bool handle(const Event& event) {
    if (event.kind == kStepEnd) {
      end_steps(event.pool, static_cast<std::size_t>(event.subject), event.time);
      return true;
    }
    hear(event.time);
    if (event.kind == kArrival) records_.arrival_s[event.subject] = event.time;
    return route(event.pool, event.subject, event.time);
  }

  bool route(std::size_t p, std::int64_t i, double now) {
    Pool& pool = pools_[p];
    const std::int64_t prompt = trace_.prompt_tokens[i];
    const RequestBlocks blocks = masked_ ? shared_.keys(trace_, i, options_.block_size, keys_)
                                         : request_keys(trace_, i, options_.block_size, keys_);
    const auto fill = [&](const auto& index, std::size_t n_keys) {
      fill_columns(index, options_.in_flight ? &pool.in_flight : nullptr, keys_.data(), n_keys, prompt, options_.block_size, pool.rows.data(),
                   pool.rows.size(), pool.view(), pool.table.data());
    };
    if (masked_) {
      fill(pool.masks, blocks.n_shared);
    } else {
      fill(pool.index, blocks.n_prompt);
    }
    std::int64_t chosen = kNotFinite;
    if (!pool.score.columns.empty())
      chosen = score_and_pick(pool.score, pool.ties, options_.seed, pool.decisions, prompt, pool.rows.data(),
                              pool.table.data(), pool.rows.size(), pool.scores.data());
    if (pool.guard != nullptr && chosen >= 0) chosen = guarded(pool, i, blocks.n_prompt, chosen);
    if (chosen < 0) chosen = ask(p, i, blocks.n_prompt, now);
    if (chosen < 0) return false;
    const auto row = static_cast<std::size_t>(chosen);
    const std::int64_t fresh = pool.table[kNewPrefillTokens * pool.rows.size() + row];
    pool.booked_new[static_cast<std::size_t>(i)] = fresh;
    pool.at(kLoadQueued, row) += fresh;
    pool.at(kLoadWaiting, row) += 1;
    pool.at(kLoadContext, row) += prompt;
    pool.at(kLoadLastChosen, row) = pool.decisions++;
    // others can ask for no more of it
    if (options_.in_flight) announce(pool, row, i, std::min(blocks.n_prompt, blocks.n_shared));
    const bool last = p + 1 == pools_.size();
    if (p == 0) {
      records_.instance[i] = pool.first + chosen;
      records_.hit_tokens[i] = pool.table[kHitTokens * pool.rows.size() + row];
    }
    if (last) records_.decode_instance[i] = pool.first + chosen;
    Engine& engine = pool.engines[row];
    // the prefill side makes one token and keeps the prompt's blocks only
    const std::size_t n_keys = last ? blocks.n_all : blocks.n_prompt;
    engine.submit(i, keys_.data(), n_keys, std::min(n_keys, blocks.n_shared), prompt,
                  last ? trace_.output_tokens[i] : 1, p > 0 ? prompt : 0);
    if (!engine.stepping()) start_step(p, row, now);
    return true;
  }

  // The first n keys of a request are on their way to a row.
  void announce(Pool& pool, std::size_t row, std::int64_t i, std::size_t n) {
    pool.in_flight.store(static_cast<Row>(row), keys_.data(), n);
    pool.coming[row].push_back({i, std::vector<Key>(keys_.begin(), keys_.begin() + static_cast<std::ptrdiff_t>(n))});
  }

  // They are there, except for what other requests on their way share with them.
  void arrive(Pool& pool, std::size_t row, std::int64_t i) {
    std::vector<Coming>& coming = pool.coming[row];
    const auto at = std::find_if(coming.begin(), coming.end(), [i](const Coming& each) { return each.request == i; });
    const std::vector<Key> keys = std::move(at->keys);
    coming.erase(at);
    std::size_t shared = 0;
    for (const Coming& other : coming) {
      if (shared == keys.size()) break;
      if (other.keys.size() <= shared || other.keys[shared] != keys[shared]) continue;  // then it shares no more
      const auto differs = std::mismatch(keys.begin(), keys.end(), other.keys.begin(), other.keys.end()).first;
      shared = std::max(shared, static_cast<std::size_t>(differs - keys.begin()));
    }
    pool.in_flight.discard(static_cast<Row>(row), keys.data(), keys.size(), shared);
  }

  // What the detector makes of a choice, and its account of the request.
  std::int64_t guarded(Pool& pool, std::int64_t i, std::size_t n_prompt, std::int64_t chosen) {
    const std::vector<Key>& keys = real_keys(i);
    const std::size_t n = pool.rows.size();
    const std::int64_t* matched = pool.table.data() + kMatchedBlocks * n;
    const Candidates candidates{pool.table.data(), pool.guard->by_tokens ? kContextTokens : kBatchSize, n};
    Occupancy& occupancy = pool.guard->occupancy;
    ClassFound found = occupancy.examine(keys.data(), n_prompt, candidates);
    if (found.depth > 0) {
      keep_candidates(pool.guard->mitigation, found.depth, matched, pool.table.data() + kBatchSize * n, n, kept_);
      kept_table_.resize(kColumns * kept_.size());
      for (std::size_t column = 0, at = 0; column < kColumns; ++column)
        for (const std::int64_t row : kept_) kept_table_[at++] = pool.table[column * n + static_cast<std::size_t>(row)];
      const std::int64_t best = score_and_pick(pool.score, pool.ties, options_.seed, pool.decisions, trace_.prompt_tokens[i],
                                               kept_.data(), kept_table_.data(), kept_.size(), pool.scores.data());
      chosen = best < 0 ? best : kept_[static_cast<std::size_t>(best)];
    }
    if (chosen < 0) return chosen;
    const double weight = pool.guard->by_tokens ? static_cast<double>(trace_.prompt_tokens[i]) : 1.0;
    released_.clear();
    pool.guard->slots[static_cast<std::size_t>(i)] =
        occupancy.dispatch(keys.data(), n_prompt, candidates, static_cast<std::size_t>(chosen), weight, found, released_);
    return chosen;
  }

  // The keys that a router would be given.
  const std::vector<Key>& real_keys(std::int64_t i) {
    if (masked_) request_keys(trace_, i, options_.block_size, asked_keys_);
    return masked_ ? asked_keys_ : keys_;
  }

  std::int64_t ask(std::size_t p, std::int64_t i, std::size_t n_prompt, double now) {
    return host_.choose(p, i, now, real_keys(i).data(), n_prompt, pools_[p]);
  }

  // Starts a step and plans its end.
  void start_step(std::size_t p, std::size_t row, double now) {
    StepLoad load;
    if (pools_[p].engines[row].start_step(load)) plan(now + step_time_(load), kStepEnd, static_cast<std::int64_t>(row), p);
  }

  // Ends a step and starts the next, and so on up to the next arrival if the engine may run ahead.
  void end_steps(std::size_t p, std::size_t row, double now) {
    StepLoad load;
    for (;;) {
      end_step(p, row, now);
      if (!pools_[p].engines[row].start_step(load)) return;
      now += step_time_(load);
      if (!run_ahead_ || now > horizon_) break;
    }
    plan(now, kStepEnd, static_cast<std::int64_t>(row), p);
  }

  void end_step(std::size_t p, std::size_t row, double now) {
    Engine& engine = pools_[p].engines[row];
    first_tokens_.clear();
    ended_.clear();
    engine.end_step(first_tokens_, ended_);
    if (masked_) {
      mark_changes(pools_[p].masks, row, engine);
    } else if (!options_.predicted) {
      tell_changes(p, row, now, engine);
    }
    engine.clear_changes();
    const bool last = p + 1 == pools_.size();
    for (const Engine::FirstToken& first : first_tokens_) {
      if (p == 0) records_.cached_tokens[first.request] = first.cached_tokens;
      if (last) records_.first_token_s[first.request] = now;
      tell({News::kFirstToken, now, p, row, first.request, false, 0, {}});
    }
    for (const std::int64_t i : ended_) {
      tell({News::kFinished, now, p, row, i, false, 0, {}});
      if (!last) {
        plan(now + static_cast<double>(trace_.prompt_tokens[i]) * options_.transfer_s_per_token, kHandOver, i, p + 1);
        continue;
      }
      records_.finish_s[i] = now;
      ++finished_;
      for (std::int64_t f = followed_by_[static_cast<std::size_t>(i)]; f != kNobody; f = next_sibling_[static_cast<std::size_t>(f)])
        plan(now + trace_.think_s[f], kArrival, f, 0);
    }
  }

  void mark_changes(HolderMasks& masks, std::size_t row, Engine& engine) {
    for (const Engine::Change& change : engine.changes()) {
      for (const Key* key = engine.change_keys() + change.begin; key != engine.change_keys() + change.end; ++key) {
        if (change.stored) {
          masks.set(row, *key);
        } else {
          masks.unset(row, *key);
        }
      }
    }
    masks.count(row, engine.n_cached());
  }

  // A step's changes travel in one message, which may be lost.
  void tell_changes(std::size_t p, std::size_t row, double now, Engine& engine) {
    const std::vector<Engine::Change>& changes = engine.changes();
    if (changes.empty()) return;
    if (options_.event_loss_ratio > 0 && is_lost(pools_[p], row)) {
      ++lost_;
      return;
    }
    for (const Engine::Change& change : changes) {
      const Key* keys = engine.change_keys() + change.begin;
      const std::size_t n = change.end - change.begin;
      if (options_.state_delay_s == 0) {
        hear_change(p, row, change.stored, change.has_parent, change.parent, keys, n);
      } else {
        tell({change.stored ? News::kStored : News::kEvicted, now, p, row, 0, change.has_parent, change.parent,
              std::vector<Key>(keys, keys + n)});
      }
    }
  }

  bool is_lost(Pool& pool, std::size_t row) {
    const std::int64_t instance = pool.first + static_cast<std::int64_t>(row);
    return uniform(options_.seed ^ kLossSalt, pool.messages[row]++, instance) < options_.event_loss_ratio;
  }

  void tell(News news) {
    if (options_.state_delay_s == 0) {
      hear_one(news);
    } else {
      news_.push_back(std::move(news));
    }
  }

  // The router hears what is old enough.
  void hear(double now) {
    while (!news_.empty() && news_.front().time + options_.state_delay_s <= now) {
      hear_one(news_.front());
      news_.pop_front();
    }
  }

  void hear_one(const News& news) {
    if (news.what == News::kStored || news.what == News::kEvicted) {
      hear_change(news.pool, news.row, news.what == News::kStored, news.has_parent, news.parent, news.keys.data(),
                  news.keys.size());
      return;
    }
    Pool& pool = pools_[news.pool];
    if (news.what == News::kFirstToken) {
      pool.at(kLoadQueued, news.row) -= pool.booked_new[static_cast<std::size_t>(news.request)];
      pool.at(kLoadWaiting, news.row) -= 1;
      pool.at(kLoadRunning, news.row) += 1;
      if (options_.in_flight) arrive(pool, news.row, news.request);
      if (pool.guard != nullptr) {
        pool.guard->occupancy.first_token(pool.guard->slots[static_cast<std::size_t>(news.request)]);
      } else if (pool.tells) {
        host_.first_token(news.pool, news.request);
      }
    } else {
      pool.at(kLoadRunning, news.row) -= 1;
      pool.at(kLoadContext, news.row) -= trace_.prompt_tokens[news.request];
      if (pool.guard != nullptr) {
        pool.guard->occupancy.end(pool.guard->slots[static_cast<std::size_t>(news.request)], released_);
      } else if (pool.tells) {
        host_.ended(news.pool, news.request);
      }
    }
    if (!options_.predicted) return;
    const std::size_t n_prompt = request_keys(trace_, news.request, options_.block_size, keys_).n_prompt;
    pool.index.store(static_cast<Row>(news.row), keys_.data(), n_prompt);
  }

  void hear_change(std::size_t p, std::size_t row, bool stored, bool has_parent, Key parent, const Key* keys, std::size_t n) {
    PrefixIndex& index = pools_[p].index;
    if (!stored) {
      index.remove_named(static_cast<Row>(row), keys, n);
    } else if (index.store_named(static_cast<Row>(row), has_parent, parent, keys, keys, n) == PrefixIndex::kUnknownParent) {
      ++orphans_;
    }
  }

  static constexpr std::uint64_t kLossSalt = 0x6c6f7373;  // "loss"

  TraceView trace_;
  ReplayOptions options_;
  const StepTime& step_time_;
  ReplayRecords records_;
  ReplayHost& host_;
  std::deque<Pool> pools_;  // prefill, then decode; or the only one
  std::vector<std::int64_t> followed_by_, next_sibling_;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
  std::deque<News> news_;
  SharedBlocks shared_;
  bool run_ahead_ = false, masked_ = false;
  double horizon_ = 0;  // when the next arrival by the clock is due
  std::int64_t planned_ = 0, finished_ = 0, lost_ = 0, orphans_ = 0;
  std::vector<Key> keys_, asked_keys_;
  std::vector<std::int64_t> kept_, kept_table_;
  std::vector<std::uint64_t> released_;
  std::vector<Engine::FirstToken> first_tokens_;
  std::vector<std::int64_t> ended_;
};

}  // namespace mulsched
