// Sums over W rows of logits held as columns, for evaluate_actions and sample_actions.
//
//   e_j = exp(x_j - top)     s = sum e_j     w = sum e_j (x_j - top), a term with e_j = 0 counting 0
//   log_prob_j = x_j - top - log s           entropy = log s - w / s
//
// With a mask or a temperature, x_j is the logit divided by the temperature, -inf if the mask is false.
// A lane is a row. Its arithmetic does not depend on the other lanes, nor on how rows are split over threads.
#pragma once

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

// load_columns of the rows from `row` on, under the condition. Returns the largest element of each row, ignoring NaN.
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

// Subtracts `top`, their maximum, from the columns; their exponentials go to `exponentials` unless that is null.
template <class T>
METTA_INLINE Sums<T> shift_and_sum(T* columns, Vec<T> top, T* exponentials, int64_t A) {
  constexpr int64_t W = Lanes<T>::W;
  // Sums of parts first: rounding grows with the longest chain of additions.
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

}  // namespace metta_fastagent
