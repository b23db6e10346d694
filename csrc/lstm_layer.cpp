// The recurrence of one LSTM layer over a segment, its rows reset where an episode starts, and its gradient.
// The formulas are in ops/_lstm_layer.py.
//
// Each step is one matrix product by PyTorch, followed by one pass over the rows.

#include "checks.h"

#include <array>
#include <tuple>

#include "vec.h"

namespace metta_fastagent {
namespace {

struct Sizes {
  int64_t T, B, H;
};

// out = a @ b
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  // The result is another handle to `out`, which has to be released.
  torch::stable::detail::to<Tensor>(stack[0]);
}

// Rows that are reset before a step.
class Resets {
 public:
  Resets(const std::optional<Tensor>& resets, const Sizes& sizes) : data_(nullptr), rows_(sizes.B) {
    if (!resets.has_value()) return;
    require(*resets, "resets", ScalarType::Bool, {sizes.T, sizes.B});
    data_ = data_of<bool>(*resets);
  }
  bool at(int64_t step, int64_t row) const { return data_ != nullptr && data_[step * rows_ + row]; }

 private:
  const bool* data_;
  int64_t rows_;
};

// f(first, live) for each vector of a row of H elements.
template <class T, class F>
METTA_INLINE void each_vector(int64_t H, const F& f) {
  constexpr int64_t W = Lanes<T>::W;
  int64_t j = 0;
  for (; j + W <= H; j += W) f(j, W);
  if (j < H) f(j, H - j);
}

// One step of one row. `gates` holds h W_hh^T and becomes the activated gates; `state_h` is the next
// step's factor, zero if that step resets the row.
template <class T>
void forward_row(const T* projected, const T* previous_c, bool reset, bool reset_next, T* gates, T* cell, T* output,
                 T* state_h, int64_t H) {
  each_vector<T>(H, [&](int64_t j, int64_t live) METTA_LAMBDA {
    const auto preactivation = [&](int64_t gate) METTA_LAMBDA {
      return load_live(gates + gate * H + j, live) + load_live(projected + gate * H + j, live);
    };
    const Vec<T> i = sigmoid<T>(preactivation(0)), f = sigmoid<T>(preactivation(1));
    const Vec<T> g = tanh<T>(preactivation(2)), o = sigmoid<T>(preactivation(3));
    const Vec<T> kept = reset ? Vec<T>{} : f * load_live(previous_c + j, live);
    const Vec<T> c = kept + i * g;
    const Vec<T> h = o * tanh<T>(c);
    store_live<T>(gates + j, i, live);
    store_live<T>(gates + H + j, f, live);
    store_live<T>(gates + 2 * H + j, g, live);
    store_live<T>(gates + 3 * H + j, o, live);
    store_live<T>(cell + j, c, live);
    store_live<T>(output + j, h, live);
    store_live<T>(state_h + j, reset_next ? Vec<T>{} : h, live);
  });
}

template <class T>
void forward_steps(const Tensor& projected, const Tensor& weight_hh, const Tensor& h, const Tensor& c, Resets resets,
                   const Tensor& output, const Tensor& cells, const Tensor& gates, Sizes sizes) {
  const int64_t steps = sizes.T, B = sizes.B, H = sizes.H;
  const Tensor weight = torch::stable::contiguous(torch::stable::transpose(weight_hh, 0, 1));
  const Tensor state = empty({B, H}, h.scalar_type());
  T* state_h = mutable_data_of<T>(state);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t j = 0; j < H; ++j) state_h[b * H + j] = resets.at(0, b) ? T(0) : data_of<T>(h)[b * H + j];
  for (int64_t t = 0; t < steps; ++t) {
    multiply(state, weight, torch::stable::select(gates, 0, t));
    const T* projected_t = data_of<T>(projected) + t * B * 4 * H;
    const T* previous_c = t == 0 ? data_of<T>(c) : data_of<T>(cells) + (t - 1) * B * H;
    T* gates_t = mutable_data_of<T>(gates) + t * B * 4 * H;
    T* cells_t = mutable_data_of<T>(cells) + t * B * H;
    T* output_t = mutable_data_of<T>(output) + t * B * H;
    parallel(B, 4 * H, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        forward_row<T>(projected_t + b * 4 * H, previous_c + b * H, resets.at(t, b),
                       t + 1 < steps && resets.at(t + 1, b), gates_t + b * 4 * H, cells_t + b * H, output_t + b * H,
                       state_h + b * H, H);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> lstm_forward(const Tensor& projected, const Tensor& weight_hh, const Tensor& h,
                                                const Tensor& c, const std::optional<Tensor>& resets) {
  const ScalarType dtype = require_floating_point(projected, "projected");
  STD_TORCH_CHECK(projected.dim() == 3 && weight_hh.dim() == 2, "projected, weight_hh: wrong shape");
  const Sizes sizes{projected.size(0), projected.size(1), weight_hh.size(1)};
  const int64_t T = sizes.T, B = sizes.B, H = sizes.H;
  require(projected, "projected", dtype, {T, B, 4 * H});
  require(weight_hh, "weight_hh", dtype, {4 * H, H});
  require(h, "h", dtype, {B, H});
  require(c, "c", dtype, {B, H});
  const Tensor output = empty({T, B, H}, dtype), cells = empty({T, B, H}, dtype), gates = empty({T, B, 4 * H}, dtype);
  const Resets starts(resets, sizes);
  const auto run = dtype == ScalarType::Float ? forward_steps<float> : forward_steps<double>;
  run(projected, weight_hh, h, c, starts, output, cells, gates, sizes);
  return {output, cells, gates};
}

// Backward of one step of one row. `dh` and `dc` are the gradients of the state after the step; `dc` becomes the
// gradient of the cell before it. A null pointer means zeros.
template <class T>
void backward_row(const T* gates, const T* cell, const T* previous_c, const T* grad_output, const T* dh, bool reset,
                  T* dc, T* grad_projected, int64_t H) {
  each_vector<T>(H, [&](int64_t j, int64_t live) METTA_LAMBDA {
    const Vec<T> i = load_live(gates + j, live), f = load_live(gates + H + j, live);
    const Vec<T> g = load_live(gates + 2 * H + j, live), o = load_live(gates + 3 * H + j, live);
    const Vec<T> tanh_c = tanh<T>(load_live(cell + j, live));
    const Vec<T> previous = reset ? Vec<T>{} : load_live(previous_c + j, live);
    Vec<T> d_output = dh == nullptr ? Vec<T>{} : load_live(dh + j, live);
    if (grad_output != nullptr) d_output += load_live(grad_output + j, live);
    const Vec<T> d_cell = load_live(dc + j, live) + d_output * o * (T(1) - tanh_c * tanh_c);
    store_live<T>(grad_projected + j, d_cell * g * i * (T(1) - i), live);
    store_live<T>(grad_projected + H + j, d_cell * previous * f * (T(1) - f), live);
    store_live<T>(grad_projected + 2 * H + j, d_cell * i * (T(1) - g * g), live);
    store_live<T>(grad_projected + 3 * H + j, d_output * tanh_c * o * (T(1) - o), live);
    store_live<T>(dc + j, reset ? Vec<T>{} : d_cell * f, live);
  });
}

struct Upstream {
  const Tensor *output, *last_h;
};

template <class T>
void backward_steps(const Tensor& weight_hh, const Tensor& c, Resets resets, const Tensor& cells, const Tensor& gates,
                    Upstream upstream, const Tensor& grad_projected, const Tensor& grad_h, const Tensor& grad_c,
                    Sizes sizes) {
  const int64_t steps = sizes.T, B = sizes.B, H = sizes.H;
  T* dc = mutable_data_of<T>(grad_c);
  T* dh_storage = mutable_data_of<T>(grad_h);
  for (int64_t t = steps - 1; t >= 0; --t) {
    const T* dh = dh_storage;
    if (t == steps - 1) dh = upstream.last_h == nullptr ? nullptr : data_of<T>(*upstream.last_h);
    const T* grad_output = upstream.output == nullptr ? nullptr : data_of<T>(*upstream.output) + t * B * H;
    const T* previous_c = t == 0 ? data_of<T>(c) : data_of<T>(cells) + (t - 1) * B * H;
    const T* gates_t = data_of<T>(gates) + t * B * 4 * H;
    const T* cells_t = data_of<T>(cells) + t * B * H;
    T* grad_t = mutable_data_of<T>(grad_projected) + t * B * 4 * H;
    parallel(B, 4 * H, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        // A row that the next step resets receives no gradient from it.
        const bool reached = t == steps - 1 || !resets.at(t + 1, b);
        backward_row<T>(gates_t + b * 4 * H, cells_t + b * H, previous_c + b * H,
                        grad_output == nullptr ? nullptr : grad_output + b * H,
                        dh == nullptr || !reached ? nullptr : dh + b * H, resets.at(t, b), dc + b * H,
                        grad_t + b * 4 * H, H);
      }
    });
    multiply(torch::stable::select(grad_projected, 0, t), weight_hh, grad_h);
  }
  for (int64_t b = 0; b < B; ++b)
    if (resets.at(0, b)) std::fill_n(dh_storage + b * H, H, T(0));
}

std::tuple<Tensor, Tensor, Tensor> lstm_backward(const Tensor& weight_hh, const Tensor& c,
                                                 const std::optional<Tensor>& resets, const Tensor& cells,
                                                 const Tensor& gates, const std::optional<Tensor>& grad_output,
                                                 const std::optional<Tensor>& grad_last_h,
                                                 const std::optional<Tensor>& grad_last_c) {
  const ScalarType dtype = require_floating_point(gates, "gates");
  STD_TORCH_CHECK(gates.dim() == 3 && weight_hh.dim() == 2, "gates, weight_hh: wrong shape");
  const Sizes sizes{gates.size(0), gates.size(1), weight_hh.size(1)};
  const int64_t T = sizes.T, B = sizes.B, H = sizes.H;
  STD_TORCH_CHECK(T >= 1, "gates: expected at least one step");
  require(weight_hh, "weight_hh", dtype, {4 * H, H});
  require(c, "c", dtype, {B, H});
  require(cells, "cells", dtype, {T, B, H});
  require(gates, "gates", dtype, {T, B, 4 * H});
  if (grad_output.has_value()) require(*grad_output, "grad_output", dtype, {T, B, H});
  if (grad_last_h.has_value()) require(*grad_last_h, "grad_last_h", dtype, {B, H});
  if (grad_last_c.has_value()) require(*grad_last_c, "grad_last_c", dtype, {B, H});
  const Tensor grad_projected = empty({T, B, 4 * H}, dtype), grad_h = empty({B, H}, dtype);
  const Tensor grad_c = grad_last_c.has_value() ? torch::stable::clone(*grad_last_c) : empty({B, H}, dtype);
  if (!grad_last_c.has_value()) torch::stable::fill_(grad_c, 0.0);
  const Upstream upstream{grad_output.has_value() ? &*grad_output : nullptr,
                          grad_last_h.has_value() ? &*grad_last_h : nullptr};
  const Resets starts(resets, sizes);
  const auto run = dtype == ScalarType::Float ? backward_steps<float> : backward_steps<double>;
  run(weight_hh, c, starts, cells, gates, upstream, grad_projected, grad_h, grad_c, sizes);
  return {grad_projected, grad_h, grad_c};
}

}  // namespace
}  // namespace metta_fastagent

STABLE_TORCH_LIBRARY_FRAGMENT(metta_fastagent_native, m) {
  m.def(
      "lstm_layer_forward(Tensor projected, Tensor weight_hh, Tensor h, Tensor c, Tensor? resets)"
      " -> (Tensor output, Tensor cells, Tensor gates)");
  m.def(
      "lstm_layer_backward(Tensor weight_hh, Tensor c, Tensor? resets, Tensor cells, Tensor gates, Tensor? grad_output,"
      " Tensor? grad_last_h, Tensor? grad_last_c) -> (Tensor grad_projected, Tensor grad_h, Tensor grad_c)");
}

STABLE_TORCH_LIBRARY_IMPL(metta_fastagent_native, CPU, m) {
  m.impl("lstm_layer_forward", TORCH_BOX(&metta_fastagent::lstm_forward));
  m.impl("lstm_layer_backward", TORCH_BOX(&metta_fastagent::lstm_backward));
}
