// Generalized advantages; the formulas are in ops/ppo/advantages.py.
//
// Terms that do not depend on later steps are computed along time. A transposition then puts W rows into the lanes of a
// vector for the recurrence. Rows are independent, so the results do not depend on how they are split over threads.

#include "checks.h"
#include "vec.h"

namespace metta_fastagent {
namespace {

template <class T>
struct Rollout {
  const T *rewards, *values, *next_value, *bootstrap_values, *ratios;
  const bool *ends, *valid;
  T gamma, decay, rho_clip, c_clip;
  int64_t rows, steps;
};

typedef int8_t Bytes4 __attribute__((vector_size(4)));
typedef int8_t Bytes8 __attribute__((vector_size(8)));

// All bits set in each lane whose flag is set; lanes past the live ones are clear.
template <class T>
METTA_INLINE typename Lanes<T>::I load_flags(const bool* from, int64_t live) {
  std::conditional_t<std::is_same_v<T, float>, Bytes8, Bytes4> flags{};
  if (live == Lanes<T>::W) {
    std::memcpy(&flags, from, sizeof flags);
  } else {
    for (int64_t l = 0; l < live; ++l) flags[l] = from[l];
  }
  return __builtin_convertvector(flags, typename Lanes<T>::I) != 0;
}

template <class T>
METTA_INLINE Vec<T> smaller(Vec<T> a, T limit) {
  return a > limit ? splat(limit) : a;
}

// delta and factor of advantage[t] = delta[t] + factor[t] advantage[t + 1] for `live` steps of one row.
template <class T>
METTA_INLINE void steps_of(const Rollout<T>& r, int64_t row, int64_t t, int64_t live, Vec<T>* delta, Vec<T>* factor) {
  const int64_t at = row * r.steps + t;
  const typename Lanes<T>::I ended = load_flags<T>(r.ends + at, live);
  const Vec<T> value = load_live(r.values + at, live);
  const bool last = t + live == r.steps;
  Vec<T> following = load_live(r.values + at + 1, last ? live - 1 : live);
  if (last) following[live - 1] = r.next_value[row];
  const Vec<T> target = ended ? load_live(r.bootstrap_values + at, live) : following;
  *delta = load_live(r.rewards + at, live) + r.gamma * target - value;
  *factor = ended ? Vec<T>{} : splat(r.decay);
  if (r.ratios != nullptr) {
    const Vec<T> ratio = load_live(r.ratios + at, live);
    *delta *= smaller<T>(ratio, r.rho_clip);
    *factor *= smaller<T>(ratio, r.c_clip);
  }
  if (r.valid != nullptr) {
    const typename Lanes<T>::I counts = load_flags<T>(r.valid + at, live);
    *delta = counts ? *delta : Vec<T>{};
    *factor = counts ? *factor : Vec<T>{};
  }
}

template <class T>
void advantages_of(const Rollout<T>& r, T* out) {
  constexpr int64_t W = Lanes<T>::W;
  parallel((r.rows + W - 1) / W, W * r.steps, [=](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * W, rows = std::min(W, r.rows - first);
      Vec<T> running{};
      const auto block = [&](int64_t t, int64_t live) METTA_LAMBDA {
        Vec<T> delta[W], factor[W];
#pragma GCC unroll 8
        for (int64_t l = 0; l < W; ++l) steps_of<T>(r, first + std::min(l, rows - 1), t, live, delta + l, factor + l);
        transpose<T>(delta);
        transpose<T>(factor);
        for (int64_t s = live - 1; s >= 0; --s) delta[s] = running = delta[s] + factor[s] * running;
        transpose<T>(delta);
        for (int64_t l = 0; l < rows; ++l) store_live<T>(out + (first + l) * r.steps + t, delta[l], live);
      };
      int64_t t = r.steps - W;
      for (; t >= 0; t -= W) block(t, W);
      if (t > -W) block(0, t + W);
    }
  });
}

Tensor advantages(const Tensor& rewards, const Tensor& values, const Tensor& ends, const Tensor& next_value,
                  const Tensor& bootstrap_values, const std::optional<Tensor>& valid,
                  const std::optional<Tensor>& ratios, double gamma, double lam, double rho_clip, double c_clip) {
  STD_TORCH_CHECK(values.dim() == 2, "values: expected a matrix");
  const int64_t B = values.size(0), steps = values.size(1);
  const ScalarType dtype = require_floating_point(values, "values");
  require_dense(values, "values", dtype);
  require(rewards, "rewards", dtype, {B, steps});
  require(ends, "ends", ScalarType::Bool, {B, steps});
  require(next_value, "next_value", dtype, {B});
  require(bootstrap_values, "bootstrap_values", dtype, {B, steps});
  if (valid.has_value()) require(*valid, "valid", ScalarType::Bool, {B, steps});
  if (ratios.has_value()) require(*ratios, "ratios", dtype, {B, steps});
  const Tensor out = empty({B, steps}, dtype);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    advantages_of<T>({data_of<T>(rewards), data_of<T>(values), data_of<T>(next_value), data_of<T>(bootstrap_values),
                      ratios.has_value() ? data_of<T>(*ratios) : nullptr, data_of<bool>(ends),
                      valid.has_value() ? data_of<bool>(*valid) : nullptr, static_cast<T>(gamma),
                      static_cast<T>(gamma * lam), static_cast<T>(rho_clip), static_cast<T>(c_clip), B, steps},
                     mutable_data_of<T>(out));
  };
  dtype == ScalarType::Float ? run(float{}) : run(double{});
  return out;
}

}  // namespace
}  // namespace metta_fastagent

STABLE_TORCH_LIBRARY_FRAGMENT(metta_fastagent_native, m) {
  m.def(
      "advantages(Tensor rewards, Tensor values, Tensor ends, Tensor next_value, Tensor bootstrap_values,"
      " Tensor? valid, Tensor? ratios, float gamma, float lam, float rho_clip, float c_clip) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(metta_fastagent_native, CPU, m) {
  m.impl("advantages", TORCH_BOX(&metta_fastagent::advantages));
}
