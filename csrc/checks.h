// Argument checks, allocation and threads, shared by the operators.
//
// The Python side raises the errors that users see; these checks protect memory when an operator is called directly.
#pragma once

#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0x020a000000000000
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

// PyTorch 2.10 and 2.11 only have the older macro; the newer one, from 2.14 on, keeps the error's text.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>

namespace metta_fastagent {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many elements another thread costs more than it saves.
constexpr int64_t ELEMENTS_PER_THREAD = 16384;

inline void require_dense(const Tensor& tensor, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous(), name,
                  ": expected a contiguous CPU tensor of the expected dtype");
}

inline void require_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) same = same && tensor.size(d++) == size;
  STD_TORCH_CHECK(same, name, ": wrong shape");
}

inline void require(const Tensor& tensor, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
  require_dense(tensor, name, dtype);
  require_shape(tensor, name, shape);
}

// The tensor's dtype: float32 or float64.
inline ScalarType require_floating_point(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name, ": expected float32 or float64");
  return dtype;
}

template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// An uninitialised contiguous CPU tensor.
inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype) {
  int64_t strides[4], step = 1;
  const int64_t dims = static_cast<int64_t>(shape.size());
  STD_TORCH_CHECK(dims <= 4, "empty: at most four dimensions");
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= shape.begin()[d];
  }
  AtenTensorHandle handle;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, shape.begin(), strides, code,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Integers of any width, read as int64.
struct Integers {
  const char* data;
  ScalarType dtype;

  Integers(const Tensor& tensor, const char* name) : data(nullptr), dtype(tensor.scalar_type()) {
    STD_TORCH_CHECK(tensor.is_cpu() && (dtype == ScalarType::Long || dtype == ScalarType::Int ||
                                        dtype == ScalarType::Short || dtype == ScalarType::Char ||
                                        dtype == ScalarType::Byte),
                    name, ": expected integers on the CPU");
    data = data_of<char>(tensor);
  }

  // f(pointer to the integers in their own type).
  template <class F>
  auto visit(const F& f) const {
    switch (dtype) {
      case ScalarType::Long:
        return f(reinterpret_cast<const int64_t*>(data));
      case ScalarType::Int:
        return f(reinterpret_cast<const int32_t*>(data));
      case ScalarType::Short:
        return f(reinterpret_cast<const int16_t*>(data));
      case ScalarType::Char:
        return f(reinterpret_cast<const int8_t*>(data));
      default:
        return f(reinterpret_cast<const uint8_t*>(data));
    }
  }

  int64_t at(int64_t position) const {
    return visit([&](const auto* values) { return static_cast<int64_t>(values[position]); });
  }
};

// cum_action_max_params: the logit index of a (type, parameter) pair.
struct ActionTable {
  const int64_t* data;
  int64_t types;

  explicit ActionTable(const Tensor& table)
      : data((require_dense(table, "cum_action_max_params", ScalarType::Long), data_of<int64_t>(table))),
        types(table.numel() - 1) {
    STD_TORCH_CHECK(table.dim() == 1 && types >= 1, "cum_action_max_params: wrong shape");
  }

  bool legal(int64_t type, int64_t param) const {
    return type >= 0 && type < types && param >= 0 && param <= data[type + 1] - data[type];
  }
  // The pair must be legal.
  int64_t index(int64_t type, int64_t param) const { return type + data[type] + param; }
};

// The first bad row over all threads, or -1.
class FirstBad {
 public:
  void report(int64_t row) {
    int64_t known = row_.load(std::memory_order_relaxed);
    while (row < known && !row_.compare_exchange_weak(known, row, std::memory_order_relaxed)) {
    }
  }
  int64_t row() const {
    const int64_t row = row_.load(std::memory_order_relaxed);
    return row == NONE ? -1 : row;
  }

 private:
  static constexpr int64_t NONE = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> row_{NONE};
};

// f(begin, end) over parts of [0, count) on PyTorch's threads; each item stands for `elements` elements.
template <class F>
void parallel(int64_t count, int64_t elements, const F& f) {
  if (count > 0) {
    const int64_t grain = std::max<int64_t>(1, ELEMENTS_PER_THREAD / std::max<int64_t>(1, elements));
    torch::stable::parallel_for(0, count, grain, f);
  }
}

}  // namespace metta_fastagent
