// The functions of csrc/vec.h on arrays whose length is a multiple of the vectors'.
#include "vec.h"

namespace {
// outputs: `count` values of each function in turn.
template <class T>
void apply(const T* x, T* outputs, int64_t count) {
  using namespace metta_fastagent;
  for (int64_t i = 0; i < count; i += Lanes<T>::W) {
    const Vec<T> v = load(x + i);
    T* output = outputs + i;
    for (const Vec<T> y : {exp_above_lowest<T>(above_lowest<T>(v)), metta_fastagent::log<T>(v),
                           expm1_above_lowest<T>(above_lowest<T>(v)), sigmoid<T>(v), metta_fastagent::tanh<T>(v),
                           metta_fastagent::exp<T>(v)}) {
      store(output, y);
      output += count;
    }
  }
}
}  // namespace

extern "C" void apply_float32(const float* x, float* outputs, int64_t count) { apply(x, outputs, count); }
extern "C" void apply_float64(const double* x, double* outputs, int64_t count) { apply(x, outputs, count); }
