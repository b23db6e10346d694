// Convolution of the grid of observation tokens without building the grid, and its gradients.
// The formulas are in ops/tokens/reference.py.
//
// A row's tokens are first sorted by the output positions that read them, so that the sums of a position over all of
// its tokens stay in registers.

#include "checks.h"

#include <array>
#include <tuple>
#include <vector>

#include "vec.h"

namespace metta_fastagent {
namespace {

// Rows per block, which has its own weight gradient, and the maximum number of blocks. The blocks depend only on the
// number of rows and are added in order, so the number of threads does not change the result.
constexpr int64_t BLOCK_ROWS = 256, MAX_BLOCKS = 64;

struct Sizes {
  int64_t N, M, O, F, kernel_x, kernel_y, width, height, stride;
  bool x_low;

  int64_t out_x() const { return (width - kernel_x) / stride + 1; }
  int64_t out_y() const { return (height - kernel_y) / stride + 1; }
  int64_t positions() const { return out_x() * out_y(); }
  // Number of weights per feature, and over all features, for one output channel.
  int64_t taps() const { return kernel_x * kernel_y; }
  int64_t weights() const { return F * taps(); }
};

// A token's term in the sum at one output position: `value` times weight number `weight` of every channel.
template <class T>
struct Term {
  int32_t weight;
  T value;
};

// The terms of one row, by output position.
template <class T>
class Terms {
 public:
  Terms(const Sizes& sizes, const T* scale)
      : sizes_(sizes),
        scale_(scale),
        capacity_(std::min(sizes.M, sizes.weights())),
        terms_(sizes.positions() * capacity_),
        counts_(sizes.positions()),
        seen_(sizes.F * COORDINATES / 64) {
    for (int64_t i = 0; i < sizes.out_x(); ++i)
      for (int64_t j = 0; j < sizes.out_y(); ++j)
        for (int64_t a = 0; a < sizes.kernel_x; ++a)
          for (int64_t b = 0; b < sizes.kernel_y; ++b) {
            const int64_t x = i * sizes.stride + a, y = j * sizes.stride + b;
            const int64_t coordinate = sizes.x_low ? y * 16 + x : x * 16 + y;
            const int64_t position = i * sizes.out_y() + j, tap = a * sizes.kernel_y + b;
            if (coordinate != EMPTY_COORDINATE)
              readers_[coordinate].push_back({static_cast<int16_t>(position), static_cast<int16_t>(tap)});
          }
  }

  // Runs backwards, because the last token of a cell counts.
  void read(const uint8_t* tokens) {
    std::fill(counts_.begin(), counts_.end(), 0);
    std::fill(seen_.begin(), seen_.end(), 0);
    for (int64_t m = sizes_.M - 1; m >= 0; --m) {
      const uint8_t* token = tokens + m * 3;
      const int64_t coordinate = token[0], feature = token[1];
      if (feature >= sizes_.F || readers_[coordinate].empty()) continue;
      uint64_t& word = seen_[(feature * COORDINATES + coordinate) / 64];
      const uint64_t bit = uint64_t(1) << (coordinate % 64);
      if (word & bit) continue;
      word |= bit;
      const T value = T(token[2]) / scale_[feature];
      for (const Reader& reader : readers_[coordinate])
        terms_[reader.position * capacity_ + counts_[reader.position]++] = {
            static_cast<int32_t>(feature * sizes_.taps() + reader.tap), value};
    }
  }

  const Term<T>* begin(int64_t position) const { return terms_.data() + position * capacity_; }
  const Term<T>* end(int64_t position) const { return begin(position) + counts_[position]; }

 private:
  static constexpr int64_t COORDINATES = 256, EMPTY_COORDINATE = 255;

  // An output position that reads a cell, and the number of the weight that it applies to it.
  struct Reader {
    int16_t position, tap;
  };

  Sizes sizes_;
  const T* scale_;
  int64_t capacity_;
  std::vector<Term<T>> terms_;
  std::vector<int64_t> counts_;
  // One bit per feature and coordinate.
  std::vector<uint64_t> seen_;
  std::array<std::vector<Reader>, COORDINATES> readers_;
};

// Channels, rounded up to whole vectors.
template <class T>
int64_t padded(int64_t channels) {
  constexpr int64_t W = Lanes<T>::W;
  return (channels + W - 1) / W * W;
}

// f(channel, G) for groups of G vectors of channels, as many at a time as registers hold.
template <class T, int G = 8, class F>
METTA_INLINE void each_group(int64_t channel, int64_t end, const F& f) {
  for (; channel + G * Lanes<T>::W <= end; channel += G * Lanes<T>::W) f(channel, std::integral_constant<int, G>{});
  if constexpr (G > 1) each_group<T, G / 2>(channel, end, f);
}

// f(first channel, live channels) for each vector of channels.
template <class T, class F>
void each_vector(int64_t channels, const F& f) {
  constexpr int64_t W = Lanes<T>::W;
  for (int64_t first = 0; first < channels; first += W) f(first, std::min(W, channels - first));
}

// [weights + 1, padded channels]: the weights of all channels side by side, and the bias last.
template <class T>
std::vector<T> channels_last(const T* weight, const T* bias, const Sizes& sizes) {
  constexpr int64_t W = Lanes<T>::W;
  const int64_t count = sizes.weights(), width = padded<T>(sizes.O);
  std::vector<T> out((count + 1) * width), columns(count * W);
  each_vector<T>(sizes.O, [&](int64_t first, int64_t live) {
    load_columns<T>(weight + first * count, live, count, columns.data());
    for (int64_t i = 0; i < count; ++i) store(out.data() + i * width + first, load(columns.data() + i * W));
  });
  if (bias != nullptr) std::copy_n(bias, sizes.O, out.data() + count * width);
  return out;
}

// One output position: bias and terms, for G vectors of channels.
template <class T, int G>
METTA_INLINE void convolve(const Term<T>* term, const Term<T>* end, const T* weight, const T* bias, int64_t width,
                           bool relu, T* out, int64_t live) {
  constexpr int64_t W = Lanes<T>::W;
  Vec<T> sums[G];
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) sums[g] = load(bias + g * W);
  for (; term != end; ++term) {
    const T* weights = weight + term->weight * width;
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) sums[g] += load(weights + g * W) * term->value;
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) {
    // NaN stays NaN.
    if (relu) sums[g] = sums[g] < T(0) ? Vec<T>{} : sums[g];
    store_live<T>(out + g * W, sums[g], std::min(W, live - g * W));
  }
}

template <class T>
void forward_rows(const uint8_t* tokens, const T* weight, const T* bias, const T* scale, bool relu, T* output,
                  const Sizes& sizes) {
  const int64_t width = padded<T>(sizes.O), positions = sizes.positions();
  const std::vector<T> weights = channels_last(weight, bias, sizes);
  parallel(sizes.N, positions * sizes.O + sizes.M, [&](int64_t begin, int64_t end) {
    Terms<T> terms(sizes, scale);
    for (int64_t row = begin; row < end; ++row) {
      terms.read(tokens + row * sizes.M * 3);
      for (int64_t p = 0; p < positions; ++p) {
        T* out = output + (row * positions + p) * sizes.O;
        each_group<T>(0, width, [&](int64_t channel, auto group) METTA_LAMBDA {
          convolve<T, group.value>(terms.begin(p), terms.end(p), weights.data() + channel,
                                   weights.data() + sizes.weights() * width + channel, width, relu, out + channel,
                                   sizes.O - channel);
        });
      }
    }
  });
}

// Gradients of a block of rows: weights and bias in the layout of `channels_last`, and the scale.
template <class T>
struct BlockGradients {
  T *weights, *scale;
};

// One output position: `grad` is the gradient of its sums, padded with zeros.
template <class T, int G>
METTA_INLINE void accumulate(const Term<T>* term, const Term<T>* end, const T* grad, int64_t width, T* grad_weights,
                             T* grad_bias) {
  constexpr int64_t W = Lanes<T>::W;
  Vec<T> upstream[G];
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) {
    upstream[g] = load(grad + g * W);
    store(grad_bias + g * W, load(grad_bias + g * W) + upstream[g]);
  }
  for (; term != end; ++term) {
    T* sums = grad_weights + term->weight * width;
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) store(sums + g * W, load(sums + g * W) + upstream[g] * term->value);
  }
}

// d (v / s) / d s = -(v / s) / s
template <class T>
void accumulate_scale(const Term<T>* term, const Term<T>* end, const T* grad, const T* weights, const T* scale,
                      const Sizes& sizes, T* grad_scale) {
  const int64_t width = padded<T>(sizes.O);
  for (; term != end; ++term) {
    Vec<T> products{};
    each_vector<T>(width, [&](int64_t c, int64_t) {
      products += load(grad + c) * load(weights + term->weight * width + c);
    });
    T sum = 0;
    for (int64_t l = 0; l < Lanes<T>::W; ++l) sum += products[l];
    const int64_t feature = term->weight / sizes.taps();
    grad_scale[feature] -= sum * term->value / scale[feature];
  }
}

// grad_output and output as [N, positions, O]; output is null without ReLU. `weights` is null if the gradient of the
// scale is not needed.
template <class T>
void backward_block(const uint8_t* tokens, const T* weights, const T* scale, const T* output, const T* grad_output,
                    int64_t begin, int64_t end, const Sizes& sizes, BlockGradients<T> grads) {
  const int64_t width = padded<T>(sizes.O), positions = sizes.positions();
  std::fill_n(grads.weights, (sizes.weights() + 1) * width, T(0));
  std::fill_n(grads.scale, sizes.F, T(0));
  Terms<T> terms(sizes, scale);
  std::vector<T> grad(width);
  for (int64_t row = begin; row < end; ++row) {
    terms.read(tokens + row * sizes.M * 3);
    for (int64_t p = 0; p < positions; ++p) {
      const int64_t at = (row * positions + p) * sizes.O;
      each_vector<T>(sizes.O, [&](int64_t c, int64_t live) {
        Vec<T> upstream = load_live(grad_output + at + c, live);
        if (output != nullptr) upstream = load_live(output + at + c, live) <= T(0) ? Vec<T>{} : upstream;
        store(grad.data() + c, upstream);
      });
      each_group<T>(0, width, [&](int64_t channel, auto group) METTA_LAMBDA {
        accumulate<T, group.value>(terms.begin(p), terms.end(p), grad.data() + channel, width, grads.weights + channel,
                                   grads.weights + sizes.weights() * width + channel);
      });
      if (weights != nullptr)
        accumulate_scale(terms.begin(p), terms.end(p), grad.data(), weights, scale, sizes, grads.scale);
    }
  }
}

template <class T>
struct Gradients {
  T *weight, *bias, *scale;
};

template <class T>
void backward_rows(const uint8_t* tokens, const T* weight, const T* scale, const T* output, const T* grad_output,
                   const Sizes& sizes, Gradients<T> grads) {
  const int64_t width = padded<T>(sizes.O), count = sizes.weights(), length = (count + 1) * width;
  const int64_t blocks = std::clamp<int64_t>((sizes.N + BLOCK_ROWS - 1) / BLOCK_ROWS, 1, MAX_BLOCKS);
  const int64_t rows = (sizes.N + blocks - 1) / blocks;
  std::vector<T> weights, sums_of_scale(blocks * sizes.F);
  if (grads.scale != nullptr) weights = channels_last<T>(weight, nullptr, sizes);
  const Tensor buffer = empty({blocks, length}, sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double);
  T* sums = mutable_data_of<T>(buffer);
  parallel(blocks, ELEMENTS_PER_THREAD, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      backward_block<T>(tokens, weights.empty() ? nullptr : weights.data(), scale, output, grad_output,
                        std::min(sizes.N, b * rows), std::min(sizes.N, (b + 1) * rows), sizes,
                        {sums + b * length, sums_of_scale.data() + b * sizes.F});
  });
  parallel(length, blocks, [&](int64_t begin, int64_t end) {
    for (int64_t b = 1; b < blocks; ++b)
      for (int64_t i = begin; i < end; ++i) sums[i] += sums[b * length + i];
  });
  each_vector<T>(sizes.O, [&](int64_t first, int64_t live) {
    store_columns<T>(live, count, grads.weight + first * count,
                     [&](int64_t i) METTA_LAMBDA { return load(sums + i * width + first); });
  });
  std::copy_n(sums + count * width, sizes.O, grads.bias);
  if (grads.scale == nullptr) return;
  std::fill_n(grads.scale, sizes.F, T(0));
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t f = 0; f < sizes.F; ++f) grads.scale[f] += sums_of_scale[b * sizes.F + f];
}

Sizes checked_sizes(const Tensor& tokens, const Tensor& weight, const Tensor& scale, int64_t width, int64_t height,
                    int64_t stride, bool x_low) {
  const ScalarType dtype = require_floating_point(weight, "weight");
  require_dense(tokens, "tokens", ScalarType::Byte);
  require_dense(weight, "weight", dtype);
  STD_TORCH_CHECK(tokens.dim() == 3 && tokens.size(2) == 3, "tokens: expected shape [N, M, 3]");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) >= 1 && weight.size(1) >= 1 && weight.size(1) <= 256,
                  "weight: expected shape [O, L, kernel, kernel], L at most 256");
  const Sizes sizes{tokens.size(0), tokens.size(1), weight.size(0), weight.size(1), weight.size(2),
                    weight.size(3), width,          height,         stride,         x_low};
  STD_TORCH_CHECK(width >= sizes.kernel_x && width <= 16 && height >= sizes.kernel_y && height <= 16 &&
                      sizes.kernel_x >= 1 && sizes.kernel_y >= 1 && stride >= 1,
                  "width, height, stride: expected at most 16, at least the kernel's size, and 1 or more");
  require(scale, "scale", dtype, {sizes.F});
  return sizes;
}

Tensor forward(const Tensor& tokens, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& scale,
               int64_t width, int64_t height, int64_t stride, bool relu, bool x_low) {
  const Sizes sizes = checked_sizes(tokens, weight, scale, width, height, stride, x_low);
  const ScalarType dtype = weight.scalar_type();
  if (bias.has_value()) require(*bias, "bias", dtype, {sizes.O});
  const Tensor output = empty({sizes.N, sizes.out_x(), sizes.out_y(), sizes.O}, dtype);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    forward_rows<T>(data_of<uint8_t>(tokens), data_of<T>(weight), bias.has_value() ? data_of<T>(*bias) : nullptr,
                    data_of<T>(scale), relu, mutable_data_of<T>(output), sizes);
  };
  dtype == ScalarType::Float ? run(float{}) : run(double{});
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& tokens, const Tensor& weight, const Tensor& scale,
                                            const std::optional<Tensor>& output, const Tensor& grad_output,
                                            int64_t width, int64_t height, int64_t stride, bool with_scale,
                                            bool x_low) {
  const Sizes sizes = checked_sizes(tokens, weight, scale, width, height, stride, x_low);
  const ScalarType dtype = weight.scalar_type();
  require(grad_output, "grad_output", dtype, {sizes.N, sizes.out_x(), sizes.out_y(), sizes.O});
  if (output.has_value()) require(*output, "output", dtype, {sizes.N, sizes.out_x(), sizes.out_y(), sizes.O});
  const Tensor grad_weight = empty({sizes.O, sizes.F, sizes.kernel_x, sizes.kernel_y}, dtype);
  const Tensor grad_bias = empty({sizes.O}, dtype), grad_scale = empty({with_scale ? sizes.F : 0}, dtype);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Gradients<T> grads{mutable_data_of<T>(grad_weight), mutable_data_of<T>(grad_bias),
                             with_scale ? mutable_data_of<T>(grad_scale) : nullptr};
    backward_rows<T>(data_of<uint8_t>(tokens), data_of<T>(weight), data_of<T>(scale),
                     output.has_value() ? data_of<T>(*output) : nullptr, data_of<T>(grad_output), sizes, grads);
  };
  dtype == ScalarType::Float ? run(float{}) : run(double{});
  return {grad_weight, grad_bias, grad_scale};
}

}  // namespace
}  // namespace metta_fastagent

STABLE_TORCH_LIBRARY_FRAGMENT(metta_fastagent_native, m) {
  m.def(
      "tokens_conv2d_forward(Tensor tokens, Tensor weight, Tensor? bias, Tensor scale, int width, int height,"
      " int stride, bool relu, bool x_low) -> Tensor");
  m.def(
      "tokens_conv2d_backward(Tensor tokens, Tensor weight, Tensor scale, Tensor? output, Tensor grad_output,"
      " int width, int height, int stride, bool with_scale, bool x_low)"
      " -> (Tensor grad_weight, Tensor grad_bias, Tensor grad_scale)");
}

STABLE_TORCH_LIBRARY_IMPL(metta_fastagent_native, CPU, m) {
  m.impl("tokens_conv2d_forward", TORCH_BOX(&metta_fastagent::forward));
  m.impl("tokens_conv2d_backward", TORCH_BOX(&metta_fastagent::backward));
}
