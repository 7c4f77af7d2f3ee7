// A model of one serving engine: continuous batching with chunked prefill over a paged prefix cache.
// Twin of mulsched/replay/_engine_py.py, whose docstring states the rules and their source.
//
// Decoding is accounted lazily: all decoding requests gain a token per tick, so a step costs O(1) and a
// block in block_size steps for each of them, not O(running).
#pragma once

#include <algorithm>
#include <deque>
#include <queue>
#include <string>
#include <utility>
#include <vector>

#include "block_pool.hpp"

namespace mulsched {

struct EngineLimits {
  std::int64_t block_size, kv_blocks, max_batched_tokens, max_num_seqs, watermark_blocks;
  bool schedules_ahead;  // a step is planned when the one before it starts, not when that has ended
};

// What a step computes: the arguments of a step time.
struct StepLoad {
  std::int64_t new_tokens;
  double prefix_tokens;  // mean context before new tokens
  std::int64_t decode_batch;
  double decode_context;  // mean
  double pair_prefix_tokens;  // one prompt with it attends to as many pairs: new * (prefix + new / 2)
};

class Engine {
 public:
  using Key = BlockPool::Key;

  struct FirstToken {
    std::int64_t request, cached_tokens;
  };
  // Keys change_keys()[begin, end), stored after parent or evicted.
  struct Change {
    std::size_t begin, end;
    bool stored, has_parent;
    Key parent;
  };

  // every_copy: changes() tell of every copy that is cached or evicted, as KV events do, or else only of the
  // first and the last of a key.
  explicit Engine(const EngineLimits& limits, bool every_copy = true)
      : limits_(limits),
        pool_(static_cast<BlockPool::Id>(limits.kv_blocks), every_copy),
        due_(static_cast<std::size_t>(limits.block_size)) {}

  bool stepping() const noexcept { return stepping_; }
  std::int64_t preemptions() const noexcept { return preemptions_; }
  std::int64_t n_cached() const noexcept { return pool_.n_cached(); }  // by key
  std::vector<Key> cached_keys() const {
    std::vector<Key> keys;
    pool_.for_each_key([&keys](Key key) { keys.push_back(key); });
    return keys;
  }

  // keys: of the prompt's full blocks and, as far as known, of those that the answer fills. Only the first
  // n_shared may be those of another request too, and only these are told in changes(). KV of the first
  // transferred tokens comes from elsewhere.
  void submit(std::int64_t request, const Key* keys, std::size_t n_keys, std::size_t n_shared,
              std::int64_t prompt_tokens, std::int64_t output_tokens, std::int64_t transferred_tokens) {
    Sequence* added = nullptr;
    if (unused_.empty()) {
      added = &sequences_.emplace_back();
    } else {
      added = unused_.back();
      unused_.pop_back();
    }
    Sequence& s = *added;
    s.request = request;
    s.keys.assign(keys, keys + n_keys);
    s.shared = n_shared;
    s.prompt = s.target = prompt_tokens;
    s.output = output_tokens;
    s.transferred = transferred_tokens;
    s.computed = s.generated = 0;
    s.cached = s.joined = -1;
    s.registered = 0;
    waiting_.push_back(added);
  }

  // Starts a step; false if there is nothing to do.
  bool start_step(StepLoad& load) {
    if (!limits_.schedules_ahead) return stepping_ = plan(load);
    stepping_ = planned_ || plan(next_);
    if (!stepping_) return false;
    load = next_;
    advance();
    planned_ = plan(next_);
    return true;
  }

  // Ends the step: appends first tokens and ends of requests.
  void end_step(std::vector<FirstToken>& first_tokens, std::vector<std::int64_t>& finished) {
    if (!limits_.schedules_ahead) advance();
    first_tokens.insert(first_tokens.end(), made_.begin(), made_.end());
    made_.clear();
    for (Sequence* s : ending_) {
      finished.push_back(s->request);
      if (!s->blocks.empty()) {  // not preempted since
        register_full(*s, s->computed);
        leave_running(*s);
      }
      unused_.push_back(s);
    }
    ending_.clear();
    stepping_ = false;
  }

  // What changed in the cache since clear_changes(), in order.
  const std::vector<Change>& changes() {
    flush_evicted();
    return changes_;
  }
  const Key* change_keys() const noexcept { return change_keys_.data(); }
  void clear_changes() noexcept {
    changes_.clear();
    change_keys_.clear();
  }

  // Verifies that no block is lost or shared wrongly and that counts are right; empty if all is well.
  std::string check() const {
    std::vector<std::uint32_t> uses(pool_.n_used_ever(), 0);
    std::int64_t running = 0, decoding = 0, context = 0;
    for (const Sequence* s = first_; s != nullptr; s = s->next, ++running) {
      for (const BlockPool::Id block : s->blocks) ++uses[block];
      if (s->joined < 0) continue;
      ++decoding;
      const std::int64_t tokens = s->computed + tick_ - s->joined;
      context += tokens;
      if (static_cast<std::int64_t>(s->blocks.size()) * limits_.block_size < tokens)
        return "a decoding request lacks a block";
    }
    if (running != n_running_ || decoding != decoding_) return "running requests are miscounted";
    if (context != decode_context_) return "context is miscounted";
    return pool_.check(uses);
  }

 private:
  static constexpr std::size_t kAhead = 8;  // keys to ask memory for in advance

  struct Sequence {
    std::int64_t request = 0, prompt = 0, output = 0, transferred = 0;
    std::int64_t computed = 0;   // tokens with KV, as of the last step that was not decode
    std::int64_t target = 0;     // tokens to prefill: the prompt, and after a preemption what was generated
    std::int64_t generated = 0;
    std::int64_t cached = -1;    // tokens found at the first admission
    std::int64_t joined = -1;    // tick at which decoding began, -1 while not decoding
    std::int64_t join = 0;       // number of that beginning: in the order of admission
    std::size_t registered = 0;  // leading blocks that are cached under their keys
    std::size_t shared = 0;      // leading keys under which other blocks may be found
    std::vector<Key> keys;
    std::vector<BlockPool::Id> blocks;
    Sequence *prev = nullptr, *next = nullptr;  // in the order of admission
  };
  struct End {
    std::int64_t tick, join;
    Sequence* sequence;
    bool operator>(const End& other) const noexcept {
      return tick != other.tick ? tick > other.tick : join > other.join;
    }
  };

  // Plans a step; false if there is nothing to do.
  bool plan(StepLoad& load) {
    bool preempted = schedule_decode();
    std::int64_t budget = limits_.max_batched_tokens - decoding_;
    load = {0, 0.0, decoding_, 0.0, 0.0};
    std::int64_t prefix_sum = 0, twice_pairs = 0;
    const auto compute = [&](Sequence& s, std::int64_t tokens) {
      load.new_tokens += tokens;
      prefix_sum += tokens * s.computed;
      twice_pairs += tokens * (2 * s.computed + tokens);
      budget -= tokens;
    };
    if (partial_ != nullptr) {
      const std::int64_t tokens = std::min(budget, partial_->target - partial_->computed);
      if (extend(*partial_, tokens)) {
        compute(*partial_, tokens);
      } else {
        preempt(partial_);  // it is the last one admitted
        preempted = true;
      }
    }
    while (!preempted && budget > 0 && !waiting_.empty() && n_running_ < limits_.max_num_seqs) {
      Sequence& s = *waiting_.front();
      const std::int64_t tokens = admit(s, budget);
      if (tokens == 0) break;
      compute(s, tokens);
    }
    if (load.new_tokens > 0) {
      const auto fresh = static_cast<double>(load.new_tokens);
      load.prefix_tokens = static_cast<double>(prefix_sum) / fresh;
      load.pair_prefix_tokens = static_cast<double>(twice_pairs) / (2 * fresh) - fresh / 2;
    }
    if (decoding_ > 0) load.decode_context = static_cast<double>(decode_context_) / static_cast<double>(decoding_);
    decoded_ = decoding_ > 0;
    return decoded_ || load.new_tokens > 0;
  }

  // Counts what the planned step computes. What ends with it keeps its blocks until the step has ended.
  void advance() {
    if (decoded_) {
      ++tick_;
      decode_context_ += decoding_;
      while (!ends_.empty() && ends_.top().tick <= tick_) {
        const End end = ends_.top();
        ends_.pop();
        if (end.sequence->join != end.join || end.sequence->joined < 0) continue;  // preempted meanwhile
        leave_decode(*end.sequence);
        ending_.push_back(end.sequence);
      }
    }
    for (const auto& [s, tokens] : chunks_) {
      s->computed += tokens;
      if (s->computed < s->target) continue;
      if (partial_ == s) partial_ = nullptr;
      if (s->generated == 0) made_.push_back({s->request, s->cached});
      if (++s->generated >= s->output) {
        ending_.push_back(s);
      } else {
        join_decode(s);
      }
    }
    chunks_.clear();
    decoded_ = false;
  }

  std::int64_t blocks_for(std::int64_t tokens) const noexcept {
    return (tokens + limits_.block_size - 1) / limits_.block_size;
  }

  // Gives a block to every decoding request that needs one and caches every block that this step fills, both
  // in the order of admission; whether any request was preempted for it.
  bool schedule_decode() {
    bool preempted = false;
    const std::vector<Sequence*>& due = due_[phase(tick_)];
    // ahead, the token that the next step starts from is not known, so a block is cached a step later
    static const std::vector<Sequence*> none;
    const std::vector<Sequence*>& full = limits_.schedules_ahead ? none : due_[phase(tick_ + 1)];
    for (std::size_t i = 0, j = 0; i < due.size() || j < full.size();) {
      if (i == due.size() || (j < full.size() && full[j]->join < due[i]->join)) {
        Sequence& s = *full[j++];
        register_full(s, s.computed + tick_ - s.joined + 1);
        continue;
      }
      Sequence& s = *due[i++];
      while (pool_.n_free() == 0 && s.joined >= 0) {
        preempt(last_);
        preempted = true;
      }
      if (s.joined < 0) break;  // it was the last one itself
      s.blocks.push_back(pool_.take(evicted_));
      register_full(s, s.computed + tick_ - s.joined);  // only ahead is there anything left to cache
    }
    return preempted;
  }

  // Admits the head of the waiting queue with its cached prefix; its first chunk, 0 if there is no room.
  std::int64_t admit(Sequence& s, std::int64_t budget) {
    const auto most = std::min(s.shared, static_cast<std::size_t>((s.target - 1) / limits_.block_size));
    hits_.clear();
    std::int64_t idle = 0;
    while (hits_.size() < most) {
      if (hits_.size() + kAhead < most) pool_.prefetch(s.keys[hits_.size() + kAhead]);
      const BlockPool::Id block = pool_.find(s.keys[hits_.size()]);
      if (block == BlockPool::kNoBlock) break;
      pool_.prefetch(block);
      hits_.push_back(block);
    }
    for (const BlockPool::Id block : hits_) idle += pool_.idle(block);
    const auto n_hits = static_cast<std::int64_t>(hits_.size());
    const std::int64_t cached = n_hits * limits_.block_size;
    const std::int64_t computed = std::max(cached, std::min(s.transferred, s.target - 1));
    const std::int64_t tokens = std::min(budget, s.target - computed);
    // room for the whole prompt is asked for, though only the chunk's blocks are taken
    const std::int64_t spared = n_running_ > 0 ? limits_.watermark_blocks : 0;
    if (blocks_for(s.target) - n_hits + idle + spared > pool_.n_free()) return 0;
    for (const BlockPool::Id block : hits_) pool_.use(block);
    waiting_.pop_front();
    s.blocks.assign(hits_.begin(), hits_.end());
    s.registered = hits_.size();
    s.computed = computed;
    if (s.cached < 0) s.cached = cached;
    s.prev = last_;
    s.next = nullptr;
    (last_ == nullptr ? first_ : last_->next) = &s;
    last_ = &s;
    ++n_running_;
    if (computed + tokens < s.target) partial_ = &s;
    extend(s, tokens);
    return tokens;
  }

  // Plans a chunk and gives it blocks; false, and nothing changed, if there are too few.
  bool extend(Sequence& s, std::int64_t tokens) {
    const std::int64_t needed = blocks_for(s.computed + tokens) - static_cast<std::int64_t>(s.blocks.size());
    if (needed > pool_.n_free()) return false;
    for (std::int64_t i = 0; i < needed; ++i) s.blocks.push_back(pool_.take(evicted_));
    register_full(s, s.computed + tokens);
    chunks_.push_back({&s, tokens});
    return true;
  }

  void join_decode(Sequence* s) {
    s->joined = tick_;
    s->join = ++joins_;
    ++decoding_;
    decode_context_ += s->computed;
    ends_.push({tick_ + s->output - s->generated, s->join, s});
    due_[phase(tick_ - s->computed)].push_back(s);
  }

  void leave_decode(Sequence& s) {
    std::vector<Sequence*>& due = due_[phase(s.joined - s.computed)];
    due.erase(std::find(due.begin(), due.end(), &s));
    const std::int64_t gained = tick_ - s.joined;
    --decoding_;
    s.computed += gained;
    decode_context_ -= s.computed;
    s.generated += gained;
    s.joined = -1;
  }

  // A tick modulo block size: a request needs its next block at ticks of one phase.
  std::size_t phase(std::int64_t tick) const noexcept {
    const std::int64_t rest = tick % limits_.block_size;
    return static_cast<std::size_t>(rest < 0 ? rest + limits_.block_size : rest);
  }

  void preempt(Sequence* s) {
    ++preemptions_;
    if (s->joined >= 0) leave_decode(*s);
    if (partial_ == s) partial_ = nullptr;
    for (; s->shared < s->registered; ++s->shared) pool_.cache(s->blocks[s->shared], s->keys[s->shared]);
    s->shared = s->keys.size();  // it may come back to all that it has computed
    leave_running(*s);
    s->target = s->prompt + s->generated;
    s->computed = s->transferred = 0;
    s->registered = 0;
    if (s->generated < s->output) waiting_.push_front(s);  // else it ends with the step under way
  }

  void leave_running(Sequence& s) {
    (s.prev == nullptr ? first_ : s.prev->next) = s.next;
    (s.next == nullptr ? last_ : s.next->prev) = s.prev;
    --n_running_;
    // the tail first, so that it is evicted before what others may share
    for (std::size_t i = s.blocks.size(); i-- > 0;) {
      if (i >= kAhead) pool_.prefetch(s.blocks[i - kAhead]);
      pool_.release(s.blocks[i]);
    }
    s.blocks.clear();
  }

  // Caches the blocks that the first tokens fill, under their keys.
  void register_full(Sequence& s, std::int64_t tokens) {
    const auto full = std::min(static_cast<std::size_t>(tokens / limits_.block_size), s.keys.size());
    if (full <= s.registered) return;
    flush_evicted();
    const std::size_t begin = change_keys_.size(), shared = std::min(full, s.shared);
    const bool has_parent = s.registered > 0;
    const Key parent = has_parent ? s.keys[s.registered - 1] : 0;
    for (; s.registered < shared; ++s.registered) {
      if (s.registered + kAhead < shared) pool_.prefetch(s.keys[s.registered + kAhead]);
      if (pool_.cache(s.blocks[s.registered], s.keys[s.registered])) change_keys_.push_back(s.keys[s.registered]);
    }
    for (; s.registered < full; ++s.registered) pool_.cache_alone(s.blocks[s.registered]);
    add_change(begin, true, has_parent, parent);
  }

  void flush_evicted() {
    if (evicted_.empty()) return;
    const std::size_t begin = change_keys_.size();
    change_keys_.insert(change_keys_.end(), evicted_.begin(), evicted_.end());
    evicted_.clear();
    add_change(begin, false, false, 0);
  }

  void add_change(std::size_t begin, bool stored, bool has_parent, Key parent) {
    if (change_keys_.size() > begin) changes_.push_back({begin, change_keys_.size(), stored, has_parent, parent});
  }

  EngineLimits limits_;
  BlockPool pool_;
  std::deque<Sequence> sequences_;
  std::vector<Sequence*> unused_;
  std::deque<Sequence*> waiting_;
  Sequence *first_ = nullptr, *last_ = nullptr;  // running
  Sequence* partial_ = nullptr;                  // whose prompt is not computed yet: at most one, the last
  std::int64_t n_running_ = 0, tick_ = 0, decoding_ = 0, decode_context_ = 0, joins_ = 0, preemptions_ = 0;
  std::priority_queue<End, std::vector<End>, std::greater<>> ends_;
  std::vector<std::vector<Sequence*>> due_;  // decoding requests by the phase at which they need a block
  std::vector<std::pair<Sequence*, std::int64_t>> chunks_;
  std::vector<FirstToken> made_;    // by the step under way
  std::vector<Sequence*> ending_;   // with it
  StepLoad next_{};                 // planned while another runs
  std::vector<BlockPool::Id> hits_;
  std::vector<Key> evicted_, change_keys_;
  std::vector<Change> changes_;
  bool decoded_ = false, stepping_ = false, planned_ = false;
};

}  // namespace mulsched
