// Sums over W rows of logits held as columns, for evaluate_actions and sample_actions.
//
//   e_j = exp(x_j - top)     s = sum e_j     w = sum e_j (x_j - top), a term with e_j = 0 counting 0
//   log_prob_j = x_j - top - log s           entropy = log s - w / s
//
// A lane is a row. Its arithmetic does not depend on the other lanes, nor on how rows are split over threads.
#pragma once

#include "vec.h"

namespace metta_fastagent {

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

}  // namespace metta_fastagent
