// The loss of proximal policy optimization and its gradients. The formulas are in ops/ppo/loss.py.

#include "checks.h"

#include <tuple>
#include <vector>

#include "categorical.h"

namespace metta_fastagent {
namespace {

// Groups of W rows whose terms are summed lane by lane; these sums are added in float64, in order, so that the results
// do not depend on how the rows are split over threads.
constexpr int64_t PART = 32;
// The means in the order of the statistics, then the number of rows that count.
constexpr int64_t SUMS = 6;

// The numbers per row, and the coefficients of the formulas.
template <class T>
struct Samples {
  const T *value, *old_log_prob, *old_value, *advantages, *returns;
  const bool* valid;
  const int64_t* index;
  T low, high, clip, vf_clip, vf_coef;
};

// r - 1 - log r, by its series near 0, where the difference would lose precision.
template <class T>
METTA_INLINE Vec<T> kl(Vec<T> log_ratio, Vec<T> ratio) {
  Vec<T> series = splat(T(1));
#pragma GCC unroll 13
  for (int k = 15; k > 2; --k) series = T(1) + series * log_ratio * (T(1) / T(k));
  const typename Lanes<T>::I near = (log_ratio < T(0.5)) & (log_ratio > T(-0.5));
  return near ? T(0.5) * log_ratio * log_ratio * series : ratio - T(1) - log_ratio;
}

// Adds the terms of the rows that count to `sums`, and stores each row's slopes and index.
template <class T>
METTA_INLINE void add_rows(const Samples<T>& samples, int64_t row, int64_t live, Vec<T> log_prob, Vec<T> entropy,
                           Vec<T>* sums, int64_t* index, T* slopes, int64_t N) {
  using I = typename Lanes<T>::I;
  I counts{};
  for (int64_t l = 0; l < live; ++l) counts[l] = samples.valid == nullptr || samples.valid[row + l] ? -1 : 0;
  const Vec<T> zero{}, advantage = load_live(samples.advantages + row, live);
  const Vec<T> log_ratio = log_prob - load_live(samples.old_log_prob + row, live);
  const Vec<T> ratio = exp<T>(log_ratio);
  // min(r A, clip(r) A), but 0 for A = 0 and r = inf. NaN stays NaN.
  const Vec<T> at_most = ratio > samples.high ? splat(samples.high) : ratio;
  const Vec<T> at_least = ratio < samples.low ? splat(samples.low) : ratio;
  const Vec<T> bounded = advantage >= T(0) ? at_most : at_least;
  const Vec<T> surrogate = bounded * advantage;
  const Vec<T> value = load_live(samples.value + row, live), returns = load_live(samples.returns + row, live);
  Vec<T> difference = value - returns, error = difference * difference;
  if (samples.vf_clip > 0) {
    const Vec<T> old_value = load_live(samples.old_value + row, live), change = value - old_value;
    const Vec<T> clipped = old_value + (change > T(0) ? splat(samples.vf_clip) : splat(-samples.vf_clip)) - returns;
    const I worse = ((change > samples.vf_clip) | (change < -samples.vf_clip)) & (clipped * clipped > error);
    error = worse ? clipped * clipped : error;
    difference = worse ? zero : difference;
  }
  const I clips = (ratio - T(1) > samples.clip) | (ratio - T(1) < -samples.clip);
  const Vec<T> one = splat(T(1));
  const Vec<T> terms[SUMS] = {-surrogate, T(0.5) * error, entropy, kl<T>(log_ratio, ratio), clips ? one : zero, one};
  for (int64_t k = 0; k < SUMS; ++k) sums[k] += counts ? terms[k] : zero;
  store_live<T>(slopes + row, counts & (bounded == ratio) ? -surrogate : zero, live);
  store_live<T>(slopes + N + row, counts ? samples.vf_coef * difference : zero, live);
  for (int64_t l = 0; l < live; ++l) index[row + l] = counts[l] ? samples.index[row + l] : -1;
}

// Adds the sums over all rows to `totals`. Returns the first row whose logits do not form a distribution, or -1.
template <class T>
int64_t forward_rows(const T* logits, const Condition& condition, const Samples<T>& samples, int64_t* index, T* slopes,
                     double* totals, int64_t N, int64_t A) {
  constexpr int64_t W = Lanes<T>::W;
  const int64_t groups = (N + W - 1) / W, parts = (groups + PART - 1) / PART;
  std::vector<double> partial(parts * SUMS);
  FirstBad bad;
  parallel(parts, PART * W * A, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> columns(new T[A * W]);
    for (int64_t part = begin; part < end; ++part) {
      Vec<T> sums[SUMS] = {};
      const auto rows_from = [&](int64_t row, int64_t live) METTA_LAMBDA {
        const Vec<T> top = load_conditioned(logits, condition, row, live, A, columns.get());
        const Sums<T> exponentials = shift_and_sum<T>(columns.get(), top, nullptr, A);
        const Vec<T> log_s = log<T>(exponentials.s);
        Vec<T> log_prob{};
        for (int64_t l = 0; l < live; ++l) {
          log_prob[l] = columns[samples.index[row + l] * W + l] - log_s[l];
          if (!(exponentials.s[l] > 0)) bad.report(row + l);
        }
        const Vec<T> entropy = log_s - exponentials.w / exponentials.s;
        add_rows<T>(samples, row, live, log_prob, entropy, sums, index, slopes, N);
      };
      const int64_t stop = std::min(N, (part + 1) * PART * W);
      int64_t row = part * PART * W;
      for (; row + W <= stop; row += W) rows_from(row, W);
      if (row < stop) rows_from(row, stop - row);
      for (int64_t k = 0; k < SUMS; ++k)
        for (int64_t l = 0; l < W; ++l) partial[part * SUMS + k] += sums[k][l];
    }
  });
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t k = 0; k < SUMS; ++k) totals[k] += partial[part * SUMS + k];
  return bad.row();
}

const Tensor& require_rows(const Tensor& tensor, const char* name, ScalarType dtype, int64_t N) {
  require_dense(tensor, name, dtype);
  STD_TORCH_CHECK(tensor.numel() == N, name, ": wrong shape");
  return tensor;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, int64_t, int64_t> ppo_loss_forward(
    const Tensor& logits, const Tensor& actions, const Tensor& value, const Tensor& old_log_prob,
    const Tensor& old_value, const Tensor& advantages, const Tensor& returns, const std::optional<Tensor>& table,
    const std::optional<Tensor>& valid, const std::optional<Tensor>& count, const std::optional<Tensor>& mask,
    double temperature, double clip_coef, double vf_clip_coef, double vf_coef, double ent_coef) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1, "logits: expected a matrix");
  const int64_t N = logits.size(0), A = logits.size(1);
  const ScalarType dtype = require_floating_point(logits, "logits");
  require_dense(logits, "logits", dtype);
  if (valid.has_value()) require_rows(*valid, "valid", ScalarType::Bool, N);
  if (count.has_value()) require_rows(*count, "count", dtype, 1);
  const Condition condition(mask, temperature, N, A);
  const Tensor loss = empty({}, dtype), statistics = empty({SUMS - 1}, dtype), divisor = empty({}, dtype);
  const Tensor index = empty({N}, ScalarType::Long), slopes = empty({2, N}, dtype);
  int64_t* chosen = mutable_data_of<int64_t>(index);
  const int64_t bad = read_actions(actions, table, N, A, chosen);
  int64_t bad_logits = -1;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto rows_of = [&](const Tensor& tensor, const char* name) {
      return data_of<T>(require_rows(tensor, name, dtype, N));
    };
    const Samples<T> samples{rows_of(value, "value"),
                             rows_of(old_log_prob, "old_log_prob"),
                             rows_of(old_value, "old_value"),
                             rows_of(advantages, "advantages"),
                             rows_of(returns, "returns"),
                             valid.has_value() ? data_of<bool>(*valid) : nullptr,
                             chosen,
                             static_cast<T>(1 - clip_coef),
                             static_cast<T>(1 + clip_coef),
                             static_cast<T>(clip_coef),
                             static_cast<T>(vf_clip_coef),
                             static_cast<T>(vf_coef)};
    double totals[SUMS] = {};
    bad_logits = forward_rows<T>(data_of<T>(logits), condition, samples, chosen, mutable_data_of<T>(slopes), totals, N,
                                 A);
    double rows = count.has_value() ? static_cast<double>(*data_of<T>(*count)) : totals[SUMS - 1];
    rows = rows > 0 ? rows : 1;
    *mutable_data_of<T>(divisor) = static_cast<T>(rows);
    for (int64_t k = 0; k < SUMS - 1; ++k) mutable_data_of<T>(statistics)[k] = static_cast<T>(totals[k] / rows);
    *mutable_data_of<T>(loss) = static_cast<T>((totals[0] + vf_coef * totals[1] - ent_coef * totals[2]) / rows);
  };
  if (bad < 0) dtype == ScalarType::Float ? run(float{}) : run(double{});
  return {loss, statistics, divisor, index, slopes, bad, bad_logits};
}

template <class T>
struct Scaled {
  const T* data;
  T factor;

  METTA_INLINE Vec<T> read(int64_t row, int64_t live) const { return load_live(data + row, live) * factor; }
};

template <class T>
struct Same {
  T number;

  METTA_INLINE Vec<T> read(int64_t, int64_t) const { return splat(number); }
};

std::tuple<Tensor, Tensor> ppo_loss_backward(const Tensor& grad, const Tensor& logits, const Tensor& index,
                                             const Tensor& slopes, const Tensor& divisor,
                                             const std::optional<Tensor>& mask, double temperature, double ent_coef) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1, "logits: expected a matrix");
  const int64_t N = logits.size(0), A = logits.size(1);
  const ScalarType dtype = require_floating_point(logits, "logits");
  require_dense(logits, "logits", dtype);
  require(grad, "grad", dtype, {});
  require(index, "index", ScalarType::Long, {N});
  require(slopes, "slopes", dtype, {2, N});
  require(divisor, "divisor", dtype, {});
  const Condition condition(mask, temperature, N, A);
  const Tensor grad_logits = empty({N, A}, dtype), grad_value = empty({N}, dtype);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T scale = *data_of<T>(grad) / *data_of<T>(divisor);
    const T* slope = data_of<T>(slopes);
    T* values = mutable_data_of<T>(grad_value);
    gradient_rows<T>(data_of<T>(logits), condition, data_of<int64_t>(index), Scaled<T>{slope, scale},
                     Same<T>{static_cast<T>(-ent_coef) * scale}, nullptr, mutable_data_of<T>(grad_logits), N, A);
    for (int64_t row = 0; row < N; ++row) values[row] = slope[N + row] * scale;
  };
  dtype == ScalarType::Float ? run(float{}) : run(double{});
  return {grad_logits, grad_value};
}

}  // namespace
}  // namespace metta_fastagent

STABLE_TORCH_LIBRARY_FRAGMENT(metta_fastagent_native, m) {
  m.def(
      "ppo_loss_forward(Tensor logits, Tensor actions, Tensor value, Tensor old_log_prob, Tensor old_value,"
      " Tensor advantages, Tensor returns, Tensor? cum_action_max_params, Tensor? valid, Tensor? count, Tensor? mask,"
      " float temperature, float clip_coef, float vf_clip_coef, float vf_coef, float ent_coef) -> (Tensor loss,"
      " Tensor statistics, Tensor divisor, Tensor index, Tensor slopes, int bad_row, int bad_logits)");
  m.def(
      "ppo_loss_backward(Tensor grad, Tensor logits, Tensor index, Tensor slopes, Tensor divisor, Tensor? mask,"
      " float temperature, float ent_coef) -> (Tensor grad_logits, Tensor grad_value)");
}

STABLE_TORCH_LIBRARY_IMPL(metta_fastagent_native, CPU, m) {
  m.impl("ppo_loss_forward", TORCH_BOX(&metta_fastagent::ppo_loss_forward));
  m.impl("ppo_loss_backward", TORCH_BOX(&metta_fastagent::ppo_loss_backward));
}
