// Products of a few rows with a matrix that is packed once, for recurrences whose single products are too small for a
// library call.
//
// A panel is [K][4][W]: for each of K factors, four vectors of the matrix side by side. A tile of rows keeps its sums in
// registers while it reads a panel once.
#pragma once

#include <algorithm>
#include <memory>

#include "vec.h"

namespace metta_fastagent {
inline namespace METTA_NAME(vectors_of_bytes_, METTA_VECTOR_BYTES) {

// Sums, a panel's vectors and a factor fit into 32 registers with AVX-512, into 16 otherwise.
constexpr int TILE_ROWS = METTA_VECTOR_BYTES == 64 ? 6 : 3;

// Uninitialised panels of `length` factors, aligned to the vector length.
template <class T>
class Panels {
 public:
  Panels(int64_t count, int64_t length)
      : size_(length * 4 * Lanes<T>::W), storage_(new T[count * size_ + Lanes<T>::W]), first_(storage_.get()) {
    const auto past = reinterpret_cast<uintptr_t>(first_) % METTA_VECTOR_BYTES;
    if (past != 0) first_ += (METTA_VECTOR_BYTES - past) / sizeof(T);
  }

  T* at(int64_t panel) { return first_ + panel * size_; }
  const T* at(int64_t panel) const { return first_ + panel * size_; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> storage_;
  T* first_;
};

// sums[r][v] = sum over k of x[r][k] panel[k][v] for R rows of K factors, `stride` apart. The order of summation does
// not depend on R.
template <class T, int R>
METTA_INLINE void multiply_tile(const T* x, int64_t stride, const T* panel, int64_t K, Vec<T> (*sums)[4]) {
  constexpr int64_t W = Lanes<T>::W;
  Vec<T> local[R][4] = {};
  for (int64_t k = 0; k < K; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Vec<T> column = load(panel + (k * 4 + v) * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) local[r][v] += x[r * stride + k] * column;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[r][v] = local[r][v];
}

// f(first row, number of rows as a constant) over tiles of [begin, end).
template <int R = TILE_ROWS, class F>
METTA_INLINE void each_tile(int64_t begin, int64_t end, const F& f) {
  for (; begin + R <= end; begin += R) f(begin, std::integral_constant<int, R>{});
  if constexpr (R > 1) {
    if (begin < end) each_tile<(R > 3 ? R - 2 : R - 1)>(begin, end, f);
  }
}

}  // namespace
}  // namespace metta_fastagent
