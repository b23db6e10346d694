// The functions of csrc/vec.h on arrays whose length is a multiple of the vectors'.
#include "vec.h"

namespace {
template <class T>
void apply(const T* x, T* exponential, T* logarithm, int64_t count) {
  using namespace metta_fastagent;
  for (int64_t i = 0; i < count; i += Lanes<T>::W) {
    const Vec<T> v = load(x + i);
    store(exponential + i, exp_above_lowest<T>(above_lowest<T>(v)));
    store(logarithm + i, metta_fastagent::log<T>(v));
  }
}
}  // namespace

extern "C" void apply_float32(const float* x, float* e, float* l, int64_t count) { apply(x, e, l, count); }
extern "C" void apply_float64(const double* x, double* e, double* l, int64_t count) { apply(x, e, l, count); }
