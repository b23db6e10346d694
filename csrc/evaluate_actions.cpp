// Log-probability, entropy and all log-probabilities of given actions, and the gradient of the logits.
// The formulas are in ops/categorical/reference.py.

#include "checks.h"

#include <tuple>

#include "categorical.h"

namespace metta_fastagent {
namespace {

// Every index is within [0, A). Returns the first row whose logits do not form a distribution, or -1.
template <class T>
int64_t forward_rows(const T* logits, const Condition& condition, const int64_t* index, T* log_prob, T* entropy,
                     T* full, int64_t N, int64_t A) {
  constexpr int64_t W = Lanes<T>::W;
  FirstBad bad;
  parallel((N + W - 1) / W, W * A, [=, &bad](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> columns(new T[A * W]);
    typename Lanes<T>::I known = ~typename Lanes<T>::I{};
    for (int64_t group = begin; group < end; ++group) {
      const int64_t row = group * W, live = std::min(W, N - row);
      const Vec<T> top = load_conditioned(logits, condition, row, live, A, columns.get());
      const Sums<T> sums = shift_and_sum<T>(columns.get(), top, nullptr, A);
      known &= sums.s > Vec<T>{};
      const Vec<T> log_s = log<T>(sums.s);
      const auto value = [&](int64_t j) METTA_LAMBDA { return load(columns.get() + j * W) - log_s; };
      store_columns<T>(live, A, full + row * A, value);
      store_live<T>(entropy + row, log_s - sums.w / sums.s, live);
      for (int64_t l = 0; l < live; ++l) log_prob[row + l] = columns[index[row + l] * W + l] - log_s[l];
    }
    report_unknown<T>(known, entropy, begin * W, std::min(end * W, N), bad);
  });
  return bad.row();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, int64_t> evaluate_forward(const Tensor& logits,
                                                                           const Tensor& actions,
                                                                           const std::optional<Tensor>& table,
                                                                           const std::optional<Tensor>& mask,
                                                                           double temperature) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1, "logits: expected a matrix");
  const int64_t N = logits.size(0), A = logits.size(1);
  const ScalarType dtype = require_floating_point(logits, "logits");
  require_dense(logits, "logits", dtype);
  const Tensor log_prob = empty({N}, dtype), entropy = empty({N}, dtype), full = empty({N, A}, dtype);
  const Tensor index = empty({N}, ScalarType::Long);
  int64_t* chosen = mutable_data_of<int64_t>(index);
  const Condition condition(mask, temperature, N, A);
  const int64_t bad = read_actions(actions, table, N, A, chosen);
  int64_t bad_logits = -1;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    bad_logits = forward_rows<T>(data_of<T>(logits), condition, chosen, mutable_data_of<T>(log_prob),
                                 mutable_data_of<T>(entropy), mutable_data_of<T>(full), N, A);
  };
  if (bad < 0) dtype == ScalarType::Float ? run(float{}) : run(double{});
  return {log_prob, entropy, full, index, bad, bad_logits};
}

// One value per row, with any stride; without a tensor, 0 for every row.
template <class T>
struct PerRow {
  const T* data = nullptr;
  int64_t step = 0;

  PerRow(const std::optional<Tensor>& tensor, const char* name, int64_t N, ScalarType dtype) {
    if (!tensor.has_value()) return;
    require_shape(*tensor, name, {N});
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == dtype, name, ": expected the dtype of logits");
    data = data_of<T>(*tensor);
    step = tensor->stride(0);
  }

  METTA_INLINE Vec<T> read(int64_t row, int64_t live) const {
    Vec<T> v{};
    if (data != nullptr)
      for (int64_t l = 0; l < Lanes<T>::W; ++l) v[l] = data[(row + std::min(l, live - 1)) * step];
    return v;
  }
};

Tensor evaluate_backward(const Tensor& logits, const Tensor& index, const std::optional<Tensor>& grad_log_prob,
                const std::optional<Tensor>& grad_entropy, const std::optional<Tensor>& grad_full,
                const std::optional<Tensor>& mask, double temperature) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1, "logits: expected a matrix");
  const int64_t N = logits.size(0), A = logits.size(1);
  const ScalarType dtype = require_floating_point(logits, "logits");
  require_dense(logits, "logits", dtype);
  require(index, "index", ScalarType::Long, {N});
  if (grad_full.has_value()) {
    require(*grad_full, "grad_full_log_probs", dtype, {N, A});
  }
  const Condition condition(mask, temperature, N, A);
  const Tensor grad = empty({N, A}, dtype);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    gradient_rows<T>(data_of<T>(logits), condition, data_of<int64_t>(index),
                     PerRow<T>(grad_log_prob, "grad_log_prob", N, dtype),
                     PerRow<T>(grad_entropy, "grad_entropy", N, dtype),
                     grad_full.has_value() ? data_of<T>(*grad_full) : nullptr, mutable_data_of<T>(grad), N, A);
  };
  dtype == ScalarType::Float ? run(float{}) : run(double{});
  return grad;
}

}  // namespace
}  // namespace metta_fastagent

STABLE_TORCH_LIBRARY_FRAGMENT(metta_fastagent_native, m) {
  m.def(
      "evaluate_actions_forward(Tensor logits, Tensor actions, Tensor? cum_action_max_params, Tensor? mask=None,"
      " float temperature=1.0) -> (Tensor log_prob, Tensor entropy, Tensor full_log_probs, Tensor index, int bad_row,"
      " int bad_logits)");
  m.def(
      "evaluate_actions_backward(Tensor logits, Tensor index, Tensor? grad_log_prob, Tensor? grad_entropy,"
      " Tensor? grad_full_log_probs, Tensor? mask=None, float temperature=1.0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(metta_fastagent_native, CPU, m) {
  m.impl("evaluate_actions_forward", TORCH_BOX(&metta_fastagent::evaluate_forward));
  m.impl("evaluate_actions_backward", TORCH_BOX(&metta_fastagent::evaluate_backward));
}
