// One action per row by the inverse of the cumulative distribution, with its log-probability and the entropy.

#include "checks.h"

#include <memory>
#include <tuple>

#include "categorical.h"

namespace metta_fastagent {
namespace {

template <class T>
struct Draw {
  const T* logits;
  Condition condition;
  // null: the most likely action, the first on a tie
  const T* uniform;
  int64_t* index;
  T *log_prob, *entropy, *full;
  int64_t N, A;
};

// The column of each row at which the running sum of e first exceeds u times the total. Running sums never fall and u
// is below 1, so there is such a column, and its e > 0. `e` is overwritten with its running sums.
template <class T>
METTA_INLINE typename Lanes<T>::I first_above(T* e, Vec<T> u, int64_t A) {
  constexpr int64_t W = Lanes<T>::W;
  Vec<T> running{};
  for (int64_t j = 0; j < A; ++j) {
    running += load(e + j * W);
    store(e + j * W, running);
  }
  const Vec<T> threshold = u * running;
  typename Lanes<T>::I count{};
  // A vector comparison is -1 if true.
  for (int64_t j = 0; j < A; ++j) count -= load(e + j * W) <= threshold;
  return count;
}

// The first column of each row that is 0: the row's largest logits are 0 after shifting.
template <class T>
METTA_INLINE typename Lanes<T>::I first_zero(const T* shifted, int64_t A) {
  constexpr int64_t W = Lanes<T>::W;
  typename Lanes<T>::I first{};
  for (int64_t j = A - 1; j >= 0; --j) {
    const typename Lanes<T>::I here = load(shifted + j * W) == Vec<T>{};
    first = (first & ~here) | (here & static_cast<typename Lanes<T>::Integer>(j));
  }
  return first;
}

template <class T>
void draw_rows(const Draw<T>& d, FirstBad& bad) {
  using I = typename Lanes<T>::I;
  constexpr int64_t W = Lanes<T>::W;
  const int64_t N = d.N, A = d.A;
  parallel((N + W - 1) / W, W * A, [=, &bad](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[2 * A * W]);
    T *columns = scratch.get(), *e = columns + A * W;
    I known = ~I{};
    for (int64_t group = begin; group < end; ++group) {
      const int64_t row = group * W, live = std::min(W, N - row);
      const Vec<T> top = load_conditioned(d.logits, d.condition, row, live, A, columns);
      const Sums<T> sums = shift_and_sum<T>(columns, top, e, A);
      const Vec<T> log_s = log<T>(sums.s);
      const auto value = [&](int64_t j) METTA_LAMBDA { return load(columns + j * W) - log_s; };
      store_columns<T>(live, A, d.full + row * A, value);
      store_live<T>(d.entropy + row, log_s - sums.w / sums.s, live);
      Vec<T> u{};
      if (d.uniform != nullptr)
        for (int64_t l = 0; l < live; ++l) u[l] = d.uniform[row + l];
      // The sum is NaN if the row holds NaN or +inf, or only -inf: then the action is 0.
      const I positive = sums.s > Vec<T>{};
      const I drawn = positive & (d.uniform == nullptr ? first_zero<T>(columns, A) : first_above<T>(e, u, A));
      known &= positive;
      for (int64_t l = 0; l < live; ++l) {
        const int64_t chosen = std::min<int64_t>(drawn[l], A - 1);
        d.index[row + l] = chosen;
        d.log_prob[row + l] = columns[chosen * W + l] - log_s[l];
      }
    }
    report_unknown<T>(known, d.entropy, begin * W, std::min(end * W, N), bad);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, int64_t> sample(const Tensor& logits,
                                                                   const std::optional<Tensor>& uniform,
                                                                   const std::optional<Tensor>& table,
                                                                   const std::optional<Tensor>& mask,
                                                                   double temperature) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1, "logits: expected a matrix");
  const int64_t N = logits.size(0), A = logits.size(1);
  const ScalarType dtype = require_floating_point(logits, "logits");
  require_dense(logits, "logits", dtype);
  if (uniform.has_value()) require(*uniform, "uniform", dtype, {N});
  const Condition condition(mask, temperature, N, A);
  const Tensor index = empty({N}, ScalarType::Long), pair = empty({table.has_value() ? N : 0, 2}, ScalarType::Int);
  const Tensor log_prob = empty({N}, dtype), entropy = empty({N}, dtype), full = empty({N, A}, dtype);
  int64_t* chosen = mutable_data_of<int64_t>(index);
  FirstBad bad;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    draw_rows<T>({data_of<T>(logits), condition, uniform.has_value() ? data_of<T>(*uniform) : nullptr, chosen,
                  mutable_data_of<T>(log_prob), mutable_data_of<T>(entropy), mutable_data_of<T>(full), N, A},
                 bad);
  };
  dtype == ScalarType::Float ? run(float{}) : run(double{});
  if (table.has_value()) {
    const Integers pairs(*table, "action_index_tensor");
    require_shape(*table, "action_index_tensor", {A, 2});
    const int64_t step = table->stride(0), next = table->stride(1);
    int32_t* out = mutable_data_of<int32_t>(pair);
    for (int64_t row = 0; row < N; ++row) {
      out[2 * row] = static_cast<int32_t>(pairs.at(chosen[row] * step));
      out[2 * row + 1] = static_cast<int32_t>(pairs.at(chosen[row] * step + next));
    }
  }
  return {index, log_prob, entropy, full, pair, bad.row()};
}

}  // namespace
}  // namespace metta_fastagent

STABLE_TORCH_LIBRARY_FRAGMENT(metta_fastagent_native, m) {
  m.def(
      "sample_actions(Tensor logits, Tensor? uniform, Tensor? action_index_tensor, Tensor? mask=None,"
      " float temperature=1.0)"
      " -> (Tensor index, Tensor log_prob, Tensor entropy, Tensor full_log_probs, Tensor pair, int bad_row)");
}

STABLE_TORCH_LIBRARY_IMPL(metta_fastagent_native, CPU, m) {
  m.impl("sample_actions", TORCH_BOX(&metta_fastagent::sample));
}
