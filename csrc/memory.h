// Many tensors as one range of elements, so that one parallel region covers all of them.
#pragma once

#include "checks.h"

#include <array>
#include <vector>

namespace metta_fastagent {

// Whether the elements fill their memory without gaps or overlaps, in any order.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  constexpr int64_t MAX_DIMS = 8;
  const int64_t dims = tensor.dim();
  if (dims > MAX_DIMS) return false;
  std::array<int64_t, MAX_DIMS> order;
  for (int64_t d = 0; d < dims; ++d) order[d] = d;
  const auto closer = [&](int64_t a, int64_t b) { return tensor.stride(a) < tensor.stride(b); };
  std::sort(order.begin(), order.begin() + dims, closer);
  int64_t step = 1;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t size = tensor.size(order[i]);
    if (size == 1) continue;
    if (tensor.stride(order[i]) != step) return false;
    step *= size;
  }
  return true;
}

// Positions of tensors in that range: starts[i] is where tensor i begins, starts.back() the length.
class Run {
 public:
  explicit Run(const std::vector<Tensor>& tensors) : starts_(1, 0) {
    starts_.reserve(tensors.size() + 1);
    for (const Tensor& tensor : tensors) starts_.push_back(starts_.back() + tensor.numel());
  }
  int64_t length() const { return starts_.back(); }

  // f(tensor, first element, one past the last) for the parts of [begin, end).
  template <class F>
  void each(int64_t begin, int64_t end, const F& f) const {
    size_t tensor = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
    for (; begin < end; ++tensor) {
      const int64_t stop = std::min(end, starts_[tensor + 1]);
      if (stop > begin) f(tensor, begin - starts_[tensor], stop - starts_[tensor]);
      begin = stop;
    }
  }

 private:
  std::vector<int64_t> starts_;
};

}  // namespace metta_fastagent
