// How long a step of a modelled engine takes. The arithmetic is that of mulsched/replay/profile.py, operation
// for operation, so that the result is the same to the last bit (compiled with -ffp-contract=off).
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "engine.hpp"

namespace mulsched {

class StepTime {
 public:
  virtual ~StepTime() = default;
  virtual double operator()(const StepLoad& load) const = 0;  // seconds
};

class Roofline final : public StepTime {
 public:
  double parameters, kv_bytes, attention_flops, compute, bandwidth, overhead_s;

  double operator()(const StepLoad& load) const override {
    const auto new_tokens = static_cast<double>(load.new_tokens);
    const auto batch = static_cast<double>(load.decode_batch);
    const double dense = std::max(2 * parameters / bandwidth, 2 * parameters * (new_tokens + batch) / compute);
    const double decode = batch * load.decode_context * kv_bytes / bandwidth;
    const double prefill = attention_flops * new_tokens * (load.prefix_tokens + new_tokens / 2) / compute;
    return overhead_s + dense + decode + prefill;
  }
};

}  // namespace mulsched
