// Element-wise activations: tanh, and the last pass of a linear layer, which adds the bias in place too.

#include "checks.h"

#if defined(__AVX512F__)
#define METTA_VECTOR_BYTES 64
#endif
#include "vec.h"

namespace metta_fastagent {
namespace {

// out = f(x + bias) for rows of `width` elements; the bias may be null.
template <class T, class F>
void activate(const T* x, const T* bias, T* out, int64_t rows, int64_t width, const F& f) {
  parallel(rows, width, [=](int64_t begin, int64_t end) {
    // Rows without a bias are one long row.
    const int64_t length = bias == nullptr ? (end - begin) * width : width;
    for (int64_t first = begin * width; first < end * width; first += length) {
      each_vector<T>(length, [&](int64_t i, int64_t live) METTA_LAMBDA {
        const Vec<T> v = load_live(x + first + i, live);
        store_live<T>(out + first + i, f(bias == nullptr ? v : v + load_live(bias + i, live)), live);
      });
    }
  });
}

void activate_into(const Tensor& x, const std::optional<Tensor>& bias, bool relu, const Tensor& out) {
  const ScalarType dtype = require_floating_point(x, "x");
  require_dense(x, "x", dtype);
  const int64_t width = bias.has_value() ? bias->numel() : 1;
  if (bias.has_value()) {
    STD_TORCH_CHECK(x.dim() >= 1, "x: wrong shape");
    require(*bias, "bias", dtype, {x.size(-1)});
  }
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto with = [&](const auto& f) {
      activate<T>(data_of<T>(x), bias.has_value() ? data_of<T>(*bias) : nullptr, mutable_data_of<T>(out),
                  width == 0 ? 0 : x.numel() / width, width, f);
    };
    // NaN stays NaN.
    if (relu)
      with([](Vec<T> v) METTA_LAMBDA { return v < T(0) ? Vec<T>{} : v; });
    else
      with([](Vec<T> v) METTA_LAMBDA { return tanh<T>(v); });
  };
  dtype == ScalarType::Float ? run(float{}) : run(double{});
}

Tensor tanh_of(const Tensor& x) {
  const Tensor out = torch::stable::empty_like(x);
  activate_into(x, std::nullopt, false, out);
  return out;
}

void activate_in_place(const Tensor& x, const std::optional<Tensor>& bias, bool relu) {
  activate_into(x, bias, relu, x);
}

}  // namespace
}  // namespace metta_fastagent

STABLE_TORCH_LIBRARY_FRAGMENT(metta_fastagent_native, m) {
  m.def("tanh(Tensor x) -> Tensor");
  m.def("activate_(Tensor(a!) x, Tensor? bias, bool relu) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(metta_fastagent_native, CPU, m) {
  m.impl("tanh", TORCH_BOX(&metta_fastagent::tanh_of));
  m.impl("activate_", TORCH_BOX(&metta_fastagent::activate_in_place));
}
