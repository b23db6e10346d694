// Observation tokens to a normalised feature grid; of two tokens in one cell the later wins.

#include "checks.h"

#include <array>

namespace metta_fastagent {
namespace {

constexpr int EMPTY_COORDINATE = 255;

// Cell of each coordinate byte within a feature's plane, -1 if outside the window.
std::array<int16_t, 256> cells_of_window(int64_t width, int64_t height, bool x_low) {
  std::array<int16_t, 256> cells;
  for (int coordinate = 0; coordinate < 256; ++coordinate) {
    const int high = coordinate >> 4, low = coordinate & 15, x = x_low ? low : high, y = x_low ? high : low;
    const bool inside = coordinate != EMPTY_COORDINATE && x < width && y < height;
    cells[coordinate] = static_cast<int16_t>(inside ? x * height + y : -1);
  }
  return cells;
}

template <class T>
void scatter_rows(const uint8_t* tokens, const T* scale, T* grid, int64_t N, int64_t M, int64_t features, int64_t width,
                  int64_t height, bool x_low) {
  const int64_t plane = width * height, row_cells = features * plane;
  const std::array<int16_t, 256> cells = cells_of_window(width, height, x_low);
  parallel(N, row_cells + M, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* out = grid + row * row_cells;
      std::fill(out, out + row_cells, T(0));
      const uint8_t* token = tokens + row * M * 3;
      for (int64_t m = 0; m < M; ++m, token += 3) {
        const int64_t cell = cells[token[0]], feature = token[1];
        if (cell >= 0 && feature < features) out[feature * plane + cell] = T(token[2]) / scale[feature];
      }
    }
  });
}

// The grid has the dtype of `scale`.
Tensor to_grid(const Tensor& tokens, int64_t features, int64_t width, int64_t height, const Tensor& scale,
               bool x_low) {
  require_dense(tokens, "tokens", ScalarType::Byte);
  STD_TORCH_CHECK(tokens.dim() == 3 && tokens.size(2) == 3, "tokens: expected shape [N, M, 3]");
  STD_TORCH_CHECK(features >= 1 && features <= 256 && width >= 1 && width <= 16 && height >= 1 && height <= 16,
                  "num_features, width, height: expected 1 to 256, 16 and 16");
  const ScalarType dtype = require_floating_point(scale, "scale");
  require(scale, "scale", dtype, {features});
  const int64_t N = tokens.size(0), M = tokens.size(1);
  const Tensor grid = empty({N, features, width, height}, dtype);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    scatter_rows<T>(data_of<uint8_t>(tokens), data_of<T>(scale), mutable_data_of<T>(grid), N, M, features, width,
                    height, x_low);
  };
  dtype == ScalarType::Float ? run(float{}) : run(double{});
  return grid;
}

}  // namespace
}  // namespace metta_fastagent

STABLE_TORCH_LIBRARY_FRAGMENT(metta_fastagent_native, m) {
  m.def("tokens_to_grid(Tensor tokens, int num_features, int width, int height, Tensor scale, bool x_low) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(metta_fastagent_native, CPU, m) {
  m.impl("tokens_to_grid", TORCH_BOX(&metta_fastagent::to_grid));
}
