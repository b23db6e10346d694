// Sums over W rows of logits held as columns, for evaluate_actions, sample_actions and ppo_loss; and their gradient.
//
//   e_j = exp(x_j - top)     s = sum e_j     w = sum e_j (x_j - top), where a term with e_j = 0 counts as 0
//   log_prob_j = x_j - top - log s           entropy = log s - w / s
//
// With a mask or a temperature, x_j is the logit divided by the temperature, -inf if the mask is false.
// A lane is a row. Its arithmetic does not depend on the other lanes, nor on how rows are split over threads.
#pragma once

#include <memory>

#include "vec.h"

namespace metta_fastagent {

struct Condition {
  const bool* mask = nullptr;
  double temperature = 1;

  Condition(const std::optional<Tensor>& allowed, double divisor, int64_t N, int64_t A) : temperature(divisor) {
    if (!allowed.has_value()) return;
    require(*allowed, "mask", ScalarType::Bool, {N, A});
    mask = data_of<bool>(*allowed);
  }

  bool empty() const { return mask == nullptr && temperature == 1; }
};

// load_columns for the rows from `row` on, with the conditions applied. Returns each row's largest element, ignoring
// NaN.
template <class T>
METTA_INLINE Vec<T> load_conditioned(const T* logits, const Condition& c, int64_t row, int64_t live, int64_t A,
                                     T* columns) {
  constexpr int64_t W = Lanes<T>::W;
  Vec<T> top = load_columns(logits + row * A, live, A, columns);
  if (c.empty()) return top;
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  const T temperature = static_cast<T>(c.temperature);
  top = splat(lowest);
  for (int64_t j = 0; j < A; ++j) {
    Vec<T> x = load(columns + j * W) / temperature;
    if (c.mask != nullptr)
      for (int64_t l = 0; l < live; ++l) x[l] = c.mask[(row + l) * A + j] ? x[l] : lowest;
    top = larger<T>(top, x);
    store(columns + j * W, x);
  }
  return top;
}

template <class T>
struct Sums {
  Vec<T> s, w;
};

// Subtracts the maximum `top` from the columns; writes their exponentials to `exponentials` unless that is null.
template <class T>
METTA_INLINE Sums<T> shift_and_sum(T* columns, Vec<T> top, T* exponentials, int64_t A) {
  constexpr int64_t W = Lanes<T>::W;
  // Sums of parts come first: rounding error grows with the longest chain of additions.
  constexpr int64_t PART = 32;
  Sums<T> total{};
  for (int64_t first = 0; first < A; first += PART) {
    const int64_t end = first + PART < A ? first + PART : A;
    Sums<T> part{};
    for (int64_t j = first; j < end; ++j) {
      const Vec<T> shifted = load(columns + j * W) - top;
      // Finite, so that its product with e = 0 is 0.
      const Vec<T> bounded = above_lowest<T>(shifted);
      const Vec<T> e = exp_above_lowest<T>(bounded);
      part.s += e;
      part.w += e * bounded;
      store(columns + j * W, shifted);
      if (exponentials != nullptr) store(exponentials + j * W, e);
    }
    total.s += part.s;
    total.w += part.w;
  }
  return total;
}

// Reports the first of the rows [begin, end) whose entropy is NaN, if a lane of `known` is 0: its row holds NaN or +inf,
// or only -inf.
template <class T>
METTA_INLINE void report_unknown(typename Lanes<T>::I known, const T* entropy, int64_t begin, int64_t end,
                                 FirstBad& bad) {
  bool all = true;
  for (int64_t l = 0; l < Lanes<T>::W; ++l) all = all && known[l] != 0;
  for (int64_t row = begin; !all && row < end; ++row) {
    if (entropy[row] != entropy[row]) return bad.report(row);
  }
}

// The index of each row's action, -1 if out of range; returns the first such row, or -1.
inline int64_t read_actions(const Tensor& actions, const std::optional<Tensor>& table, int64_t N, int64_t A,
                            int64_t* index) {
  const Integers values(actions, "actions");
  FirstBad bad;
  const auto write = [&](int64_t row, int64_t wanted) {
    const bool legal = wanted >= 0 && wanted < A;
    if (!legal) bad.report(row);
    index[row] = legal ? wanted : -1;
  };
  if (table.has_value()) {
    require_shape(actions, "actions", {N, 2});
    const ActionTable pairs(*table);
    const int64_t step = actions.stride(0), next = actions.stride(1);
    values.visit([&](const auto* from) {
      parallel(N, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t type = from[row * step], param = from[row * step + next];
          write(row, pairs.legal(type, param) ? pairs.index(type, param) : -1);
        }
      });
    });
  } else {
    require_shape(actions, "actions", {N});
    const int64_t step = actions.stride(0);
    parallel(N, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) write(row, values.at(row * step));
    });
  }
  return bad.row();
}

// The gradient of the logits, given the gradients of each row's log-probability and entropy, whose `read` returns W
// rows, and of all log-probabilities, unless that is null. A row with a negative index gets 0.
template <class T, class LogProb, class Entropy>
void gradient_rows(const T* logits, const Condition& condition, const int64_t* index, LogProb grad_log_prob,
                   Entropy grad_entropy, const T* grad_full, T* grad_logits, int64_t N, int64_t A) {
  constexpr int64_t W = Lanes<T>::W;
  const T temperature = static_cast<T>(condition.temperature);
  parallel((N + W - 1) / W, W * A, [=](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[3 * A * W]);
    T *columns = scratch.get(), *e = columns + A * W, *f = e + A * W;
    const auto rows_from = [&](int64_t row, int64_t live) METTA_LAMBDA {
      const Vec<T> top = load_conditioned(logits, condition, row, live, A, columns);
      const Sums<T> sums = shift_and_sum<T>(columns, top, e, A);
      const Vec<T> inverse = T(1) / sums.s, mean = sums.w / sums.s;
      const Vec<T> g = grad_log_prob.read(row, live), h = grad_entropy.read(row, live);
      Vec<T> total = g;
      if (grad_full != nullptr) {
        load_columns(grad_full + row * A, live, A, f);
        Vec<T> sum{};
        for (int64_t j = 0; j < A; ++j) sum += load(f + j * W);
        total += sum;
      }
      const auto gradient = [&](int64_t j) METTA_LAMBDA {
        // As in the sums: finite where p = 0.
        const Vec<T> information = above_lowest<T>(load(columns + j * W)) - mean;
        const Vec<T> p = load(e + j * W) * inverse;
        const Vec<T> grad = -p * (total + h * information);
        return grad_full == nullptr ? grad : grad + load(f + j * W);
      };
      store_columns<T>(live, A, grad_logits + row * A, gradient);
      for (int64_t l = 0; l < live; ++l) {
        T* const grads = grad_logits + (row + l) * A;
        const int64_t chosen = index[row + l];
        if (chosen < 0) {
          std::fill(grads, grads + A, T(0));
        } else {
          grads[std::min(chosen, A - 1)] += g[l];
        }
      }
      if (condition.empty()) return;
      for (int64_t at = row * A; at < (row + live) * A; ++at)
        grad_logits[at] = condition.mask == nullptr || condition.mask[at] ? grad_logits[at] / temperature : T(0);
    };
    for (int64_t row = begin * W; row < std::min(end * W, N); row += W)
      row + W <= N ? rows_from(row, W) : rows_from(row, N - row);
  });
}

}  // namespace metta_fastagent
