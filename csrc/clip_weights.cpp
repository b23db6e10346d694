// Clip many tensors in place, each to its own symmetric range, in one parallel region.

#include "memory.h"

#include <cmath>

#include "vec.h"

namespace metta_fastagent {
namespace {

struct Clipped {
  void* data;
  double bound;
  bool is_double;
};

template <class T>
void clip(T* x, int64_t count, double wide_bound) {
  constexpr int64_t W = Lanes<T>::W;
  // Makes a second pass, through the cache, only if a value is out of range: values within range are not written.
  constexpr int64_t BLOCK = 32 * W;
  // A finite bound beyond the dtype's range clips infinities to its largest number.
  const T bound = static_cast<T>(
      std::isfinite(wide_bound) ? std::min<double>(wide_bound, std::numeric_limits<T>::max()) : wide_bound);
  int64_t first = 0;
  for (; first + BLOCK <= count; first += BLOCK) {
    // Largest magnitudes, ignoring NaN, in four independent chains.
    Vec<T> largest[4] = {};
    for (int64_t i = first; i < first + BLOCK; i += 4 * W)
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4; ++k) {
        const Vec<T> v = load(x + i + k * W);
        largest[k] = larger<T>(largest[k], larger<T>(v, -v));
      }
    const Vec<T> all = larger<T>(larger<T>(largest[0], largest[1]), larger<T>(largest[2], largest[3]));
    bool any = false;
    for (int64_t l = 0; l < W; ++l) any |= all[l] > bound;
    if (!any) continue;
    for (int64_t i = first; i < first + BLOCK; i += W) {
      Vec<T> v = load(x + i);
      v = v > bound ? splat(bound) : v;
      store(x + i, v < -bound ? splat(-bound) : v);
    }
  }
  for (; first < count; ++first) {
    const T v = x[first];
    if (v > bound || v < -bound) x[first] = v > bound ? bound : -bound;
  }
}

// Returns false and changes nothing if a bound is negative or NaN, the number of bounds is wrong, or a tensor is not
// float32 or float64, is not on the CPU, or has gaps.
bool clip_all(const std::vector<Tensor>& tensors, const std::vector<double>& bounds) {
  if (tensors.size() != bounds.size()) return false;
  std::vector<Clipped> parts;
  parts.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const ScalarType dtype = tensors[i].scalar_type();
    const bool taken = tensors[i].is_cpu() && (dtype == ScalarType::Float || dtype == ScalarType::Double);
    if (!taken || !(bounds[i] >= 0) || !is_dense(tensors[i])) return false;
    parts.push_back({tensors[i].mutable_data_ptr(), bounds[i], dtype == ScalarType::Double});
  }
  const Run run(tensors);
  parallel(run.length(), 1, [&](int64_t begin, int64_t end) {
    run.each(begin, end, [&](size_t tensor, int64_t first, int64_t stop) {
      const Clipped& part = parts[tensor];
      if (part.is_double) {
        clip(static_cast<double*>(part.data) + first, stop - first, part.bound);
      } else {
        clip(static_cast<float*>(part.data) + first, stop - first, part.bound);
      }
    });
  });
  return true;
}

}  // namespace
}  // namespace metta_fastagent

STABLE_TORCH_LIBRARY_FRAGMENT(metta_fastagent_native, m) {
  m.def("clip_weights_(Tensor(a!)[] tensors, float[] bounds) -> bool");
}

// Registered for every device, because a list may mix devices.
STABLE_TORCH_LIBRARY_IMPL(metta_fastagent_native, CompositeExplicitAutograd, m) {
  m.impl("clip_weights_", TORCH_BOX(&metta_fastagent::clip_all));
}
