// The hyperbolic tangent of each element.

#include "checks.h"
#include "vec.h"

namespace metta_fastagent {
namespace {

template <class T>
void tanh_elements(const T* x, T* out, int64_t count) {
  constexpr int64_t W = Lanes<T>::W;
  parallel(count, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += W) {
      const int64_t live = std::min(W, end - i);
      store_live<T>(out + i, tanh<T>(load_live(x + i, live)), live);
    }
  });
}

void tanh_into(const Tensor& x, const Tensor& out) {
  const ScalarType dtype = require_floating_point(x, "x");
  require_dense(x, "x", dtype);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    tanh_elements<T>(data_of<T>(x), mutable_data_of<T>(out), x.numel());
  };
  dtype == ScalarType::Float ? run(float{}) : run(double{});
}

Tensor tanh_of(const Tensor& x) {
  const Tensor out = torch::stable::empty_like(x);
  tanh_into(x, out);
  return out;
}

void tanh_in_place(const Tensor& x) { tanh_into(x, x); }

}  // namespace
}  // namespace metta_fastagent

STABLE_TORCH_LIBRARY_FRAGMENT(metta_fastagent_native, m) {
  m.def("tanh(Tensor x) -> Tensor");
  m.def("tanh_(Tensor(a!) x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(metta_fastagent_native, CPU, m) {
  m.impl("tanh", TORCH_BOX(&metta_fastagent::tanh_of));
  m.impl("tanh_", TORCH_BOX(&metta_fastagent::tanh_in_place));
}
