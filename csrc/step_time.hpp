// How long a step of a modelled engine takes. The arithmetic is that of mulsched/replay/step_time.py and
// step_table.py, operation for operation, so that the result is the same to the last bit (compiled with
// -ffp-contract=off). What the constants mean is said there.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "engine.hpp"

namespace mulsched {

class StepTime {
 public:
  virtual ~StepTime() = default;
  virtual double operator()(const StepLoad& load) const = 0;  // seconds
};

// Roofline, and MoeRoofline with a share of the experts by the number of tokens.
struct Roofline final : StepTime {
  double active_parameters = 0, shared_parameters = 0, expert_parameters = 0;
  std::vector<double> expert_share;
  double kv_bytes = 0, attention_flops = 0, compute = 0, bandwidth = 0, overhead_s = 0;

  double operator()(const StepLoad& load) const override {
    const auto new_tokens = static_cast<double>(load.new_tokens), batch = static_cast<double>(load.decode_batch);
    const auto tokens = static_cast<std::size_t>(load.new_tokens + load.decode_batch);
    const double share = tokens < expert_share.size() ? expert_share[tokens] : 1.0;
    const double weights = shared_parameters + share * expert_parameters;
    const double dense =
        std::max(2 * weights / bandwidth, 2 * active_parameters * static_cast<double>(tokens) / compute);
    const double decode = batch * load.decode_context * kv_bytes / bandwidth;
    const double prefill = attention_flops * new_tokens * (load.pair_prefix_tokens + new_tokens / 2) / compute;
    return overhead_s + dense + decode + prefill;
  }
};

struct FittedStep final : StepTime {
  double step_s = 0, decode_s = 0, context_s = 0, prefill_s = 0, new_token_s = 0, attention_s = 0, mixed_decode_s = 0;

  double operator()(const StepLoad& load) const override {
    const auto new_tokens = static_cast<double>(load.new_tokens), batch = static_cast<double>(load.decode_batch);
    const double decode = decode_s * batch + context_s * (batch * load.decode_context);
    if (load.new_tokens == 0) return step_s + decode;
    const double pairs = new_tokens * (load.pair_prefix_tokens + new_tokens / 2);
    const double prefill = prefill_s + new_token_s * new_tokens + attention_s * pairs;
    return step_s + decode + prefill + mixed_decode_s * batch;
  }
};

struct StepTable final : StepTime {
  using Grid = std::vector<double>;
  Grid new_grid, prefix_grid, prefill_s, batch_grid, context_grid, decode_s, decode_floor_s;
  Grid mixed_new_grid, mixed_batch_grid, mixed_context_grid, mixed_ratio;

  double operator()(const StepLoad& load) const override {
    const auto new_tokens = static_cast<double>(load.new_tokens), batch = static_cast<double>(load.decode_batch);
    if (load.new_tokens == 0) return decode(batch, load.decode_context);
    if (load.decode_batch == 0) return prefill(new_tokens, load.prefix_tokens);
    const double together = prefill(new_tokens + batch, load.prefix_tokens);
    const double both = together + marginal(batch, load.decode_context);
    const double seconds = ratio(new_tokens, batch, load.decode_context) * both;
    const double alone = std::max(prefill(new_tokens, load.prefix_tokens), decode(batch, load.decode_context));
    return std::max(seconds, alone);
  }

 private:
  struct Place {
    std::size_t i;
    double u;
  };
  struct Clipped {
    std::size_t i0, i1;
    double u;
  };

  static std::size_t cell(const Grid& grid, double x) noexcept {
    const auto above = static_cast<std::size_t>(std::upper_bound(grid.begin(), grid.end(), x) - grid.begin());
    return std::min(above == 0 ? 0 : above - 1, grid.size() - 2);
  }

  static Place place(const Grid& grid, double x) noexcept {
    const std::size_t i = cell(grid, x);
    return {i, std::max(0.0, (x - grid[i]) / (grid[i + 1] - grid[i]))};
  }

  static double between(double low, double high, double u) noexcept {
    if (u <= 1.0) return low + u * (high - low);
    return high + (u - 1.0) * std::max(0.0, high - low);
  }

  static Clipped clipped(const Grid& grid, double x) noexcept {
    if (x <= grid.front()) return {0, 0, 0.0};
    if (x >= grid.back()) return {grid.size() - 1, grid.size() - 1, 0.0};
    const std::size_t i = cell(grid, x);
    return {i, i + 1, (x - grid[i]) / (grid[i + 1] - grid[i])};
  }

  static double bilinear(const Grid& xs, const Grid& ys, const Grid& values, double x, double y) noexcept {
    const Place a = place(xs, x), b = place(ys, y);
    const double* low = values.data() + a.i * ys.size() + b.i;
    const double* high = low + ys.size();
    return between(between(low[0], low[1], b.u), between(high[0], high[1], b.u), a.u);
  }

  double prefill(double tokens, double prefix) const noexcept {
    return bilinear(new_grid, prefix_grid, prefill_s, tokens, prefix);
  }
  double decode(double batch, double context) const noexcept {
    return bilinear(batch_grid, context_grid, decode_s, batch, context);
  }

  double marginal(double batch, double context) const noexcept {
    const Place at = place(batch_grid, batch);
    return decode(batch, context) - between(decode_floor_s[at.i], decode_floor_s[at.i + 1], at.u);
  }

  double ratio(double tokens, double batch, double context) const noexcept {
    const Clipped a = clipped(mixed_new_grid, tokens), b = clipped(mixed_batch_grid, batch),
                  c = clipped(mixed_context_grid, context);
    const auto line = [&](std::size_t i, std::size_t j) {
      const double* row = mixed_ratio.data() + (i * mixed_batch_grid.size() + j) * mixed_context_grid.size();
      return row[c.i0] + c.u * (row[c.i1] - row[c.i0]);
    };
    const double low = line(a.i0, b.i0) + b.u * (line(a.i0, b.i1) - line(a.i0, b.i0));
    const double high = line(a.i1, b.i0) + b.u * (line(a.i1, b.i1) - line(a.i1, b.i0));
    return low + a.u * (high - low);
  }
};

}  // namespace mulsched
