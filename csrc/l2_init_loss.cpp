// Scaled sum of squared differences between weights and their initial values, and its gradient.

#include "memory.h"

#include "vec.h"

namespace metta_fastagent {
namespace {

// Elements per chunk: a chunk's squares are summed in the weights' dtype, lane by lane; chunks are added in float64, in
// order.
constexpr int64_t CHUNK = 256;

template <class T>
double squared_distance(const T* a, const T* b, int64_t count) {
  constexpr int64_t W = Lanes<T>::W;
  Vec<T> sum{};
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const Vec<T> difference = load(a + i) - load(b + i);
    sum += difference * difference;
  }
  double total = 0.0;
  for (int64_t l = 0; l < W; ++l) total += sum[l];
  for (; i < count; ++i) {
    const T difference = a[i] - b[i];
    total += static_cast<double>(difference) * difference;
  }
  return total;
}

ScalarType require_alike(const std::vector<Tensor>& params, const std::vector<Tensor>& initial) {
  STD_TORCH_CHECK(!params.empty() && params.size() == initial.size(), "initial: expected one for each of params");
  const ScalarType dtype = require_floating_point(params[0], "params");
  for (size_t i = 0; i < params.size(); ++i) {
    bool alike = params[i].scalar_type() == dtype && initial[i].scalar_type() == dtype && params[i].is_cpu() &&
                 initial[i].is_cpu() && params[i].dim() == initial[i].dim() && is_dense(params[i]);
    for (int64_t d = 0; alike && d < params[i].dim(); ++d)
      alike = params[i].size(d) == initial[i].size(d) && params[i].stride(d) == initial[i].stride(d);
    STD_TORCH_CHECK(alike, "params, initial: expected one dtype, and pairs of dense tensors of one layout");
  }
  return dtype;
}

template <class T>
double loss_of(const std::vector<Tensor>& params, const std::vector<Tensor>& initial) {
  // The chunks, and therefore the sum, do not depend on the number of threads.
  struct Part {
    const T *a, *b;
    int64_t count;
  };
  std::vector<Part> parts;
  for (size_t i = 0; i < params.size(); ++i) {
    const T* a = data_of<T>(params[i]);
    const T* b = data_of<T>(initial[i]);
    const int64_t numel = params[i].numel();
    for (int64_t first = 0; first < numel; first += CHUNK)
      parts.push_back({a + first, b + first, std::min(CHUNK, numel - first)});
  }
  std::vector<double> sums(parts.size());
  parallel(static_cast<int64_t>(parts.size()), CHUNK, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = squared_distance(parts[i].a, parts[i].b, parts[i].count);
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

Tensor l2_forward(const std::vector<Tensor>& params, const std::vector<Tensor>& initial, double scale) {
  const ScalarType dtype = require_alike(params, initial);
  const double total = dtype == ScalarType::Float ? loss_of<float>(params, initial) : loss_of<double>(params, initial);
  const Tensor loss = empty({}, ScalarType::Float);
  *mutable_data_of<float>(loss) = static_cast<float>(total * scale);
  return loss;
}

template <class T>
void gradient(const T* a, const T* b, T* out, int64_t count, T factor) {
  constexpr int64_t W = Lanes<T>::W;
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, (load(a + i) - load(b + i)) * factor);
  for (; i < count; ++i) out[i] = (a[i] - b[i]) * factor;
}

std::vector<Tensor> l2_backward(const std::vector<Tensor>& params, const std::vector<Tensor>& initial, double scale,
                             const Tensor& grad) {
  const ScalarType dtype = require_alike(params, initial);
  require(grad, "grad", ScalarType::Float, {});
  const double factor = 2.0 * scale * *data_of<float>(grad);
  std::vector<Tensor> grads;
  grads.reserve(params.size());
  for (const Tensor& param : params) grads.push_back(torch::stable::empty_like(param));
  const Run run(params);
  parallel(run.length(), 1, [&](int64_t begin, int64_t end) {
    run.each(begin, end, [&](size_t i, int64_t first, int64_t stop) {
      const auto apply = [&](auto zero) {
        using T = decltype(zero);
        gradient<T>(data_of<T>(params[i]) + first, data_of<T>(initial[i]) + first,
                    mutable_data_of<T>(grads[i]) + first, stop - first, static_cast<T>(factor));
      };
      dtype == ScalarType::Float ? apply(float{}) : apply(double{});
    });
  });
  return grads;
}

}  // namespace
}  // namespace metta_fastagent

STABLE_TORCH_LIBRARY_FRAGMENT(metta_fastagent_native, m) {
  m.def("l2_init_loss_forward(Tensor[] params, Tensor[] initial, float scale) -> Tensor");
  m.def("l2_init_loss_backward(Tensor[] params, Tensor[] initial, float scale, Tensor grad) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(metta_fastagent_native, CPU, m) {
  m.impl("l2_init_loss_forward", TORCH_BOX(&metta_fastagent::l2_forward));
  m.impl("l2_init_loss_backward", TORCH_BOX(&metta_fastagent::l2_backward));
}
