// The recurrence of one LSTM layer over a segment, with rows reset where an episode starts, and its gradient; and all
// layers of an nn.LSTM in one call. The formulas are in ops/lstm/reference.py.
//
// Rows do not depend on each other: each thread takes some of them through all steps. A layer's weights are packed
// once.

#include "checks.h"

#include <tuple>
#include <vector>

#if defined(__AVX512F__)
#define METTA_VECTOR_BYTES 64
#endif
#include "panels.h"

namespace metta_fastagent {
namespace {

// Rows whose factors a thread gathers before it multiplies them by each panel; a multiple of every tile's rows.
constexpr int64_t BLOCK_ROWS = 96;

struct Sizes {
  int64_t T, B, H;
};

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

// The four gates of W hidden columns in a panel, of weights [4H, K]:
// panel[first + k][g][l] = weight[g H + column + l][k].
template <class T>
void pack_gates(const T* weight, int64_t H, int64_t K, int64_t first, Panels<T>& panels) {
  constexpr int64_t W = Lanes<T>::W;
  for (int64_t column = 0; column < H; column += W) {
    T* panel = panels.at(column / W) + first * 4 * W;
    const int64_t columns = std::min(W, H - column);
    for (int64_t g = 0; g < 4; ++g) {
      each_vector<T>(K, [&](int64_t k, int64_t live) METTA_LAMBDA {
        Vec<T> v[W] = {};
        for (int64_t l = 0; l < columns; ++l) v[l] = load_live(weight + (g * H + column + l) * K + k, live);
        transpose<T>(v);
        for (int64_t i = 0; i < live; ++i) store<T>(panel + ((k + i) * 4 + g) * W, v[i]);
      });
    }
  }
}

template <class T>
Panels<T> gate_panels(const Sizes& sizes, int64_t inputs) {
  return Panels<T>((sizes.H + Lanes<T>::W - 1) / Lanes<T>::W, inputs + sizes.H);
}

template <class T>
struct Forward {
  const T* input;  // [T, B, I] where the panels project it too
  int64_t I;
  const T* addend;  // what the gates' products are added to: projected [T, B, 4H], or a bias [4H]
  int64_t addend_stride;
  const T *h, *c;
  Resets resets;
  T* output;
  T* cells;              // [T, B, H], or only the newest [B, H], which may be `c`
  int64_t cells_stride;  // from one step to the next
  T* gates;              // may be null
  Sizes sizes;

  // One step of `rows` rows from b on and W hidden columns from j on, given their products.
  void activate(int64_t t, int64_t b, int64_t j, int64_t rows, Vec<T> (*sums)[4]) const {
    const int64_t H = sizes.H, live = std::min(Lanes<T>::W, H - j);
    const T* previous = t == 0 ? c : cells + (t - 1) * cells_stride;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = t * sizes.B + b + r, state = (b + r) * H + j;
      const T* addend_row = addend + row * addend_stride + j;
      const auto preactivation = [&](int64_t gate) METTA_LAMBDA {
        return sums[r][gate] + load_live(addend_row + gate * H, live);
      };
      const Vec<T> i = sigmoid<T>(preactivation(0)), f = sigmoid<T>(preactivation(1));
      const Vec<T> g = tanh<T>(preactivation(2)), o = sigmoid<T>(preactivation(3));
      const Vec<T> kept = resets.at(t, b + r) ? Vec<T>{} : f * load_live(previous + state, live);
      const Vec<T> cell = kept + i * g;
      store_live<T>(cells + t * cells_stride + state, cell, live);
      if (gates != nullptr) {
        T* gates_row = gates + row * 4 * H + j;
        store_live<T>(gates_row, i, live);
        store_live<T>(gates_row + H, f, live);
        store_live<T>(gates_row + 2 * H, g, live);
        store_live<T>(gates_row + 3 * H, o, live);
      }
      sums[r][0] = cell;
      sums[r][1] = o;
    }
    // A loop of its own, so that the rows' tanh overlap instead of each waiting for its cell.
    for (int64_t r = 0; r < rows; ++r)
      store_live<T>(output + (t * sizes.B + b + r) * H + j, sums[r][1] * tanh<T>(sums[r][0]), live);
  }

  // What the panels are multiplied by at step t: the input and the kept hidden state of row b.
  void gather(int64_t t, int64_t b, T* factors) const {
    const int64_t H = sizes.H;
    T* state = std::copy_n(input + (t * sizes.B + b) * I, I, factors);
    if (resets.at(t, b))
      std::fill_n(state, H, T(0));
    else
      std::copy_n(t == 0 ? h + b * H : output + ((t - 1) * sizes.B + b) * H, H, state);
  }

  // All steps of the rows [begin, end).
  void run(const Panels<T>& panels, int64_t begin, int64_t end) const {
    constexpr int64_t W = Lanes<T>::W;
    const int64_t H = sizes.H, K = I + H;
    std::vector<T> factors(std::min(BLOCK_ROWS, end - begin) * K);
    for (int64_t t = 0; t < sizes.T; ++t) {
      for (int64_t first = begin; first < end; first += BLOCK_ROWS) {
        const int64_t past = std::min(end, first + BLOCK_ROWS);
        for (int64_t b = first; b < past; ++b) gather(t, b, &factors[(b - first) * K]);
        for (int64_t j = 0; j < H; j += W) {
          each_tile(first, past, [&](int64_t b, auto rows) METTA_LAMBDA {
            // The hardware prefetcher does not detect these short reads, a row apart, as a stream.
            if (addend_stride != 0)
              for (int64_t r = 0; r < rows; ++r)
                for (int64_t g = 0; g < 4; ++g)
                  __builtin_prefetch(addend + (t * sizes.B + b + r) * addend_stride + g * H + j);
            Vec<T> sums[rows][4];
            multiply_tile<T, rows>(&factors[(b - first) * K], K, panels.at(j / W), K, sums);
            activate(t, b, j, rows, sums);
          });
        }
      }
    }
  }
};

// Work per row for `parallel`, in elements: the products count as a share of the gates.
int64_t work_of_row(const Sizes& sizes) { return sizes.T * 4 * sizes.H * std::max<int64_t>(1, sizes.H / 32); }

std::tuple<Tensor, Tensor, Tensor> lstm_forward(const Tensor& projected, const Tensor& weight_hh, const Tensor& h,
                                                const Tensor& c, const std::optional<Tensor>& resets,
                                                bool keep_gates) {
  const ScalarType dtype = require_floating_point(projected, "projected");
  STD_TORCH_CHECK(projected.dim() == 3 && weight_hh.dim() == 2, "projected, weight_hh: wrong shape");
  const Sizes sizes{projected.size(0), projected.size(1), weight_hh.size(1)};
  const int64_t T = sizes.T, B = sizes.B, H = sizes.H;
  require(projected, "projected", dtype, {T, B, 4 * H});
  require(weight_hh, "weight_hh", dtype, {4 * H, H});
  require(h, "h", dtype, {B, H});
  require(c, "c", dtype, {B, H});
  const Tensor output = empty({T, B, H}, dtype), cells = empty({T, B, H}, dtype);
  const Tensor gates = keep_gates ? empty({T, B, 4 * H}, dtype) : empty({0}, dtype);
  const Resets starts(resets, sizes);
  const auto run = [&](auto zero) {
    using Real = decltype(zero);
    Panels<Real> panels = gate_panels<Real>(sizes, 0);
    pack_gates(data_of<Real>(weight_hh), H, H, 0, panels);
    const Forward<Real> forward{nullptr,
                                0,
                                data_of<Real>(projected),
                                4 * H,
                                data_of<Real>(h),
                                data_of<Real>(c),
                                starts,
                                mutable_data_of<Real>(output),
                                mutable_data_of<Real>(cells),
                                B * H,
                                keep_gates ? mutable_data_of<Real>(gates) : nullptr,
                                sizes};
    parallel(B, work_of_row(sizes), [&](int64_t begin, int64_t end) { forward.run(panels, begin, end); });
  };
  dtype == ScalarType::Float ? run(float{}) : run(double{});
  return {output, cells, gates};
}

// All layers of an nn.LSTM over a segment; returns the last layer's output [T, B, H]. `weights` holds weight_ih,
// weight_hh and, with biases, bias_ih and bias_hh of each layer; h and c are [layers, B, H]. The state after the last
// step goes to `next_h` and `next_c`, which may be `h` and `c`: a row is read before it is written.
Tensor lstm_segment(const Tensor& input, const std::vector<Tensor>& weights, const Tensor& h, const Tensor& c,
                    const std::optional<Tensor>& resets, const Tensor& next_h, const Tensor& next_c) {
  const ScalarType dtype = require_floating_point(h, "h");
  STD_TORCH_CHECK(input.dim() == 3 && input.size(0) >= 1 && h.dim() == 3, "input, h: wrong shape");
  const int64_t layers = h.size(0), T = input.size(0), B = h.size(1), H = h.size(2);
  STD_TORCH_CHECK(layers >= 1 && weights.size() % layers == 0, "weights: wrong number");
  const int64_t each = static_cast<int64_t>(weights.size()) / layers;
  STD_TORCH_CHECK(each == 2 || each == 4, "weights: wrong number");
  require(input, "input", dtype, {T, B, input.size(2)});
  require(h, "h", dtype, {layers, B, H});
  require(c, "c", dtype, {layers, B, H});
  require(next_h, "next_h", dtype, {layers, B, H});
  require(next_c, "next_c", dtype, {layers, B, H});
  const Sizes sizes{T, B, H};
  const auto inputs_of = [&](int64_t layer) { return layer == 0 ? input.size(2) : H; };
  for (int64_t layer = 0; layer < layers; ++layer) {
    const Tensor* own = &weights[layer * each];
    require(own[0], "weight_ih", dtype, {4 * H, inputs_of(layer)});
    require(own[1], "weight_hh", dtype, {4 * H, H});
    for (int64_t i = 2; i < each; ++i) require(own[i], "bias", dtype, {4 * H});
  }
  const Resets starts(resets, sizes);
  Tensor sequence = input;
  const auto run = [&](auto zero) {
    using Real = decltype(zero);
    std::vector<Real> bias(4 * H);
    for (int64_t layer = 0; layer < layers; ++layer) {
      const Tensor* own = &weights[layer * each];
      const int64_t I = inputs_of(layer), before = layer * B * H;
      for (int64_t i = 0; each == 4 && i < 4 * H; ++i) bias[i] = data_of<Real>(own[2])[i] + data_of<Real>(own[3])[i];
      Panels<Real> panels = gate_panels<Real>(sizes, I);
      pack_gates(data_of<Real>(own[0]), H, I, 0, panels);
      pack_gates(data_of<Real>(own[1]), H, H, I, panels);
      const Tensor output = empty({T, B, H}, dtype);
      const Forward<Real> forward{data_of<Real>(sequence),
                                  I,
                                  bias.data(),
                                  0,
                                  data_of<Real>(h) + before,
                                  data_of<Real>(c) + before,
                                  starts,
                                  mutable_data_of<Real>(output),
                                  mutable_data_of<Real>(next_c) + before,
                                  0,
                                  nullptr,
                                  sizes};
      parallel(B, 2 * work_of_row(sizes), [&](int64_t begin, int64_t end) { forward.run(panels, begin, end); });
      std::copy_n(data_of<Real>(output) + (T - 1) * B * H, B * H, mutable_data_of<Real>(next_h) + before);
      sequence = output;
    }
  };
  dtype == ScalarType::Float ? run(float{}) : run(double{});
  return sequence;
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

// 4 W columns of W_hh in a panel: panel[k][v][l] = weight_hh[k][first + v W + l].
template <class T>
void pack_columns(const T* weight_hh, int64_t H, Panels<T>& panels) {
  constexpr int64_t W = Lanes<T>::W;
  for (int64_t first = 0; first < H; first += 4 * W) {
    for (int64_t v = 0; v < 4; ++v) {
      const int64_t j = first + v * W, live = std::clamp<int64_t>(H - j, 0, W);
      T* panel = panels.at(first / (4 * W)) + v * W;
      for (int64_t k = 0; k < 4 * H; ++k)
        store<T>(panel + k * 4 * W, live > 0 ? load_live(weight_hh + k * H + j, live) : Vec<T>{});
    }
  }
}

template <class T>
struct Backward {
  const T* c;
  Resets resets;
  const T *cells, *gates, *grad_output, *grad_last_h;  // the gradients may be null
  T *grad_projected, *grad_h, *grad_c;
  Sizes sizes;

  // The step's part of one row before the product with W_hh.
  void activate(int64_t t, int64_t b) const {
    const int64_t H = sizes.H, row = t * sizes.B + b;
    const bool last = t == sizes.T - 1;
    const T* dh = last ? (grad_last_h == nullptr ? nullptr : grad_last_h + b * H) : grad_h + b * H;
    // A row that the next step resets receives no gradient from that step.
    if (!last && resets.at(t + 1, b)) dh = nullptr;
    backward_row<T>(gates + row * 4 * H, cells + row * H, t == 0 ? c + b * H : cells + (row - sizes.B) * H,
                    grad_output == nullptr ? nullptr : grad_output + row * H, dh, resets.at(t, b), grad_c + b * H,
                    grad_projected + row * 4 * H, H);
  }

  // All steps of the rows [begin, end).
  void run(const Panels<T>& panels, int64_t begin, int64_t end) const {
    constexpr int64_t W = Lanes<T>::W;
    const int64_t H = sizes.H;
    for (int64_t t = sizes.T - 1; t >= 0; --t) {
      each_tile(begin, end, [&](int64_t b, auto rows) METTA_LAMBDA {
        for (int64_t r = 0; r < rows; ++r) activate(t, b + r);
        const T* grads = grad_projected + (t * sizes.B + b) * 4 * H;
        for (int64_t first = 0; first < H; first += 4 * W) {
          Vec<T> sums[rows][4];
          multiply_tile<T, rows>(grads, 4 * H, panels.at(first / (4 * W)), 4 * H, sums);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = first; j < std::min(H, first + 4 * W); j += W)
              store_live<T>(grad_h + (b + r) * H + j, sums[r][(j - first) / W], std::min(W, H - j));
        }
      });
    }
    for (int64_t b = begin; b < end; ++b)
      if (resets.at(0, b)) std::fill_n(grad_h + b * H, H, T(0));
  }
};

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
  const Resets starts(resets, sizes);
  const auto run = [&](auto zero) {
    using Real = decltype(zero);
    const auto given = [](const std::optional<Tensor>& grad) {
      return grad.has_value() ? data_of<Real>(*grad) : nullptr;
    };
    Panels<Real> panels((H + 4 * Lanes<Real>::W - 1) / (4 * Lanes<Real>::W), 4 * H);
    pack_columns(data_of<Real>(weight_hh), H, panels);
    const Backward<Real> backward{data_of<Real>(c),
                                  starts,
                                  data_of<Real>(cells),
                                  data_of<Real>(gates),
                                  given(grad_output),
                                  given(grad_last_h),
                                  mutable_data_of<Real>(grad_projected),
                                  mutable_data_of<Real>(grad_h),
                                  mutable_data_of<Real>(grad_c),
                                  sizes};
    parallel(B, work_of_row(sizes), [&](int64_t begin, int64_t end) { backward.run(panels, begin, end); });
  };
  dtype == ScalarType::Float ? run(float{}) : run(double{});
  return {grad_projected, grad_h, grad_c};
}

}  // namespace
}  // namespace metta_fastagent

STABLE_TORCH_LIBRARY_FRAGMENT(metta_fastagent_native, m) {
  m.def(
      "lstm_layer_forward(Tensor projected, Tensor weight_hh, Tensor h, Tensor c, Tensor? resets, bool keep_gates)"
      " -> (Tensor output, Tensor cells, Tensor gates)");
  m.def(
      "lstm_segment_(Tensor input, Tensor[] weights, Tensor h, Tensor c, Tensor? resets, Tensor(a!) next_h,"
      " Tensor(b!) next_c) -> Tensor");
  m.def(
      "lstm_layer_backward(Tensor weight_hh, Tensor c, Tensor? resets, Tensor cells, Tensor gates, Tensor? grad_output,"
      " Tensor? grad_last_h, Tensor? grad_last_c) -> (Tensor grad_projected, Tensor grad_h, Tensor grad_c)");
}

STABLE_TORCH_LIBRARY_IMPL(metta_fastagent_native, CPU, m) {
  m.impl("lstm_layer_forward", TORCH_BOX(&metta_fastagent::lstm_forward));
  m.impl("lstm_segment_", TORCH_BOX(&metta_fastagent::lstm_segment));
  m.impl("lstm_layer_backward", TORCH_BOX(&metta_fastagent::lstm_backward));
}
