// Vectors of float or double, their elementary functions, and rows of a matrix as columns of vectors.
//
// Uses the vector extensions of GCC and Clang: the compiler splits vectors if the machine's are narrower. A source that
// benefits from more than 32 bytes defines METTA_VECTOR_BYTES first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#define METTA_INLINE inline __attribute__((always_inline))
#define METTA_LAMBDA __attribute__((always_inline))

#ifndef METTA_VECTOR_BYTES
#define METTA_VECTOR_BYTES 32
#endif
#define METTA_JOIN(a, b) a##b
#define METTA_NAME(a, b) METTA_JOIN(a, b)

namespace metta_fastagent {
// Needed because sources with different vector lengths are linked together.
inline namespace METTA_NAME(vectors_of_bytes_, METTA_VECTOR_BYTES) {

template <class T>
struct Lanes {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "float or double");
  using Integer = std::conditional_t<std::is_same_v<T, float>, int32_t, int64_t>;
  using Unsigned = std::make_unsigned_t<Integer>;
  typedef T V __attribute__((vector_size(METTA_VECTOR_BYTES)));
  typedef Integer I __attribute__((vector_size(METTA_VECTOR_BYTES)));
  typedef Unsigned U __attribute__((vector_size(METTA_VECTOR_BYTES)));
  static constexpr int64_t W = METTA_VECTOR_BYTES / sizeof(T);
};

template <class T>
using Vec = typename Lanes<T>::V;

template <class T>
METTA_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
METTA_INLINE void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}

// The first `live` lanes; the others are 0.
template <class T>
METTA_INLINE Vec<T> load_live(const T* from, int64_t live) {
  if (live == Lanes<T>::W) return load(from);
  Vec<T> v{};
  for (int64_t l = 0; l < live; ++l) v[l] = from[l];
  return v;
}

template <class T>
METTA_INLINE void store_live(T* to, Vec<T> v, int64_t live) {
  if (live == Lanes<T>::W) {
    store(to, v);
  } else {
    for (int64_t l = 0; l < live; ++l) to[l] = v[l];
  }
}

// f(first, live) for each vector of a row of `count` elements.
template <class T, class F>
METTA_INLINE void each_vector(int64_t count, const F& f) {
  constexpr int64_t W = Lanes<T>::W;
  int64_t i = 0;
  for (; i + W <= count; i += W) f(i, W);
  if (i < count) f(i, count - i);
}

template <class T>
METTA_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <class T>
METTA_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return b > a ? b : a;
}

template <class To, class From>
METTA_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}

template <class T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
  // Adding and subtracting 1.5 * 2^23 rounds to an integer, which is then in the low bits.
  static constexpr float rounder = 12582912.0f;
  // ln 2 in two parts; the first has so few bits that its products with exponents are exact.
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, log2_e = 1.44269504f;
  // Its exponential rounds to 0.
  static constexpr float exp_lowest = -104.0f;
  // Taylor terms that matter at this precision: of exp for |r| <= ln 2 / 2, and of atanh for |t| <= 0.172.
  static constexpr int exp_terms = 8, atanh_terms = 5;
  static constexpr float subnormal_scale = 33554432.0f;
  static constexpr int subnormal_shift = 25;
};

template <>
struct Constants<double> {
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double rounder = 6755399441055744.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10,
                          log2_e = 1.44269504088896338700e+00;
  static constexpr double exp_lowest = -746.0;
  static constexpr int exp_terms = 14, atanh_terms = 11;
  static constexpr double subnormal_scale = 18014398509481984.0;
  static constexpr int subnormal_shift = 54;
};

template <int N>
constexpr double inverse_factorial() {
  double f = 1.0;
  for (int i = 2; i <= N; ++i) f *= i;
  return 1.0 / f;
}

// sum over k < TERMS of r^k / k!
template <class T, int TERMS, int K = 0>
METTA_INLINE Vec<T> exp_series(Vec<T> r) {
  if constexpr (K == TERMS - 1) {
    return splat(T(inverse_factorial<K>()));
  } else {
    return exp_series<T, TERMS, K + 1>(r) * r + T(inverse_factorial<K>());
  }
}

// sum over 1 <= k < TERMS of 2 z^k / (2 k + 1)
template <class T, int TERMS, int K = 1>
METTA_INLINE Vec<T> atanh_series(Vec<T> z) {
  if constexpr (K == TERMS - 1) {
    return z * T(2.0 / (2 * K + 1));
  } else {
    return z * (atanh_series<T, TERMS, K + 1>(z) + T(2.0 / (2 * K + 1)));
  }
}

// sum over 1 <= k <= TERMS of r^(k - 1) / k!
template <class T, int TERMS, int K = 1>
METTA_INLINE Vec<T> expm1_series(Vec<T> r) {
  if constexpr (K == TERMS) {
    return splat(T(inverse_factorial<K>()));
  } else {
    return expm1_series<T, TERMS, K + 1>(r) * r + T(inverse_factorial<K>());
  }
}

// exp(x) = exp(r) 2^n, |r| <= ln 2 / 2.
template <class T>
struct Reduced {
  Vec<T> r;
  // 2^n times subnormal_scale, because 2^n may be below the normal numbers.
  Vec<T> scale;
};

template <class T>
METTA_INLINE Reduced<T> reduce(Vec<T> x) {
  using C = Constants<T>;
  using L = Lanes<T>;
  using U = typename L::U;
  const Vec<T> rounded = x * C::log2_e + C::rounder;
  const Vec<T> n = rounded - C::rounder;
  const Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
  // n is in the low bits; the shift moves it to the exponent.
  constexpr typename L::Unsigned bias = C::exponent_bias + C::subnormal_shift;
  return {r, bits<Vec<T>>((bits<U>(rounded) + bias) << C::mantissa_bits)};
}

// exp(x) for x <= 0 within 2 ulp, also for subnormal results; exp(-inf) = 0, exp(NaN) = NaN. x must not be below
// exp_lowest.
template <class T>
METTA_INLINE Vec<T> exp_above_lowest(Vec<T> x) {
  using C = Constants<T>;
  const Reduced<T> reduced = reduce<T>(x);
  return exp_series<T, C::exp_terms>(reduced.r) * reduced.scale * (T(1) / C::subnormal_scale);
}

// exp(x) - 1 for x <= 0 within 3 ulp; NaN stays NaN. x must not be below exp_lowest.
template <class T>
METTA_INLINE Vec<T> expm1_above_lowest(Vec<T> x) {
  using C = Constants<T>;
  const Reduced<T> reduced = reduce<T>(x);
  const Vec<T> scale = reduced.scale * (T(1) / C::subnormal_scale);
  const Vec<T> expm1_r = reduced.r * expm1_series<T, C::exp_terms>(reduced.r);
  return scale * expm1_r + (scale - T(1));
}

// The larger of x and a number whose exponential is 0; NaN stays NaN.
template <class T>
METTA_INLINE Vec<T> above_lowest(Vec<T> x) {
  const Vec<T> lowest = splat(Constants<T>::exp_lowest);
  return lowest > x ? lowest : x;
}

// exp(x) within 4 ulp; 0 and infinity at the infinities and beyond the range, exactly 1 at 0, NaN stays NaN.
template <class T>
METTA_INLINE Vec<T> exp(Vec<T> x) {
  const Vec<T> e = exp_above_lowest<T>(above_lowest<T>(x < T(0) ? x : -x));
  return x > T(0) ? T(1) / e : e;
}

// 1 / (1 + exp(-x)) within 4 ulp; 0 and 1 at the infinities, NaN stays NaN.
template <class T>
METTA_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_above_lowest<T>(above_lowest<T>(x < T(0) ? x : -x));
  const Vec<T> larger_half = T(1) / (T(1) + e);
  return x < T(0) ? e * larger_half : larger_half;
}

// tanh(x) within 4 ulp; -1 and 1 at the infinities, NaN stays NaN.
template <class T>
METTA_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> t = expm1_above_lowest<T>(above_lowest<T>((x < T(0) ? x : -x) * T(2)));
  const Vec<T> magnitude = -t / (t + T(2));
  return x < T(0) ? -magnitude : magnitude;
}

// log(x) within 2 ulp; log(0) = -inf, log(inf) = inf, NaN for negative numbers and NaN.
template <class T>
METTA_INLINE Vec<T> log(Vec<T> x) {
  using C = Constants<T>;
  using L = Lanes<T>;
  using I = typename L::I;
  using U = typename L::U;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const I tiny = x < std::numeric_limits<T>::min();
  const Vec<T> y = tiny ? x * C::subnormal_scale : x;
  // Counting exponents from sqrt(1/2) on puts the mantissa into [sqrt(1/2), sqrt(2)).
  const U root = bits<U>(splat(T(0.70710678118654752440)));
  const U offset = bits<U>(y) - root;
  const I exponent = bits<I>(offset) >> C::mantissa_bits;
  const Vec<T> mantissa = bits<Vec<T>>(bits<U>(y) - (bits<U>(exponent) << C::mantissa_bits));
  const Vec<T> n = __builtin_convertvector(tiny ? exponent - C::subnormal_shift : exponent, Vec<T>);
  const Vec<T> f = mantissa - T(1);
  const Vec<T> t = f / (f + T(2));
  // log(1 + f) = 2 atanh(t) = f - t (f - series): f is exact, and the subtracted term is small.
  const Vec<T> series = atanh_series<T, C::atanh_terms>(t * t);
  Vec<T> result = n * C::ln2_high + (f - (t * (f - series) - n * C::ln2_low));
  result = x == infinity ? x : result;
  result = x == T(0) ? splat(-infinity) : result;
  return x >= T(0) ? result : splat(std::numeric_limits<T>::quiet_NaN());
}

// Lane l of the result: a[l] where bit H of l is 0, b[l - H] where it is 1.
template <class T, int H, std::size_t... L>
METTA_INLINE Vec<T> exchange_low(Vec<T> a, Vec<T> b, std::index_sequence<L...>) {
  constexpr int W = Lanes<T>::W;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((L & H) ? int(W + L - H) : int(L))...);
#else
  return __builtin_shuffle(a, b, typename Lanes<T>::I{((L & H) ? int(W + L - H) : int(L))...});
#endif
}

// Lane l of the result: a[l + H] where bit H of l is 0, b[l] where it is 1.
template <class T, int H, std::size_t... L>
METTA_INLINE Vec<T> exchange_high(Vec<T> a, Vec<T> b, std::index_sequence<L...>) {
  constexpr int W = Lanes<T>::W;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((L & H) ? int(W + L) : int(L + H))...);
#else
  return __builtin_shuffle(a, b, typename Lanes<T>::I{((L & H) ? int(W + L) : int(L + H))...});
#endif
}

// Transpose the W x W matrix whose rows are v[0..W), by exchanging ever smaller blocks across the diagonal.
template <class T, int H = Lanes<T>::W / 2>
METTA_INLINE void transpose(Vec<T>* v) {
  constexpr int W = Lanes<T>::W;
  constexpr auto lanes = std::make_index_sequence<W>{};
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if ((i & H) == 0) {
      const Vec<T> a = v[i], b = v[i + H];
      v[i] = exchange_low<T, H>(a, b, lanes);
      v[i + H] = exchange_high<T, H>(a, b, lanes);
    }
  }
  if constexpr (H > 1) transpose<T, H / 2>(v);
}

// columns[j][l] = matrix[l][j] for W rows of A contiguous elements; the last live row stands in for the rows past it.
// Returns the largest element of each row, ignoring NaN.
template <class T>
METTA_INLINE Vec<T> load_columns(const T* matrix, int64_t live, int64_t A, T* columns) {
  constexpr int64_t W = Lanes<T>::W;
  const T* rows[W];
  for (int64_t l = 0; l < W; ++l) rows[l] = matrix + (l < live ? l : live - 1) * A;
  Vec<T> top = splat(-std::numeric_limits<T>::infinity());
  if (A < W) {
    for (int64_t j = 0; j < A; ++j) {
      Vec<T> v;
#pragma GCC unroll 16
      for (int64_t l = 0; l < W; ++l) v[l] = rows[l][j];
      top = larger<T>(top, v);
      store(columns + j * W, v);
    }
    return top;
  }
  for (int64_t first = 0; first < A; first += W) {
    // The last block may overlap the one before: those columns are written twice, with equal values.
    const int64_t j = first + W <= A ? first : A - W;
    Vec<T> v[W];
#pragma GCC unroll 16
    for (int64_t l = 0; l < W; ++l) v[l] = load(rows[l] + j);
    transpose<T>(v);
#pragma GCC unroll 16
    for (int64_t c = 0; c < W; ++c) {
      top = larger<T>(top, v[c]);
      store(columns + (j + c) * W, v[c]);
    }
  }
  return top;
}

// matrix[l][j] = column(j)[l] for the live rows l; a column may be requested twice.
template <class T, class F>
METTA_INLINE void store_columns(int64_t live, int64_t A, T* matrix, const F& column) {
  constexpr int64_t W = Lanes<T>::W;
  if (A < W) {
    for (int64_t j = 0; j < A; ++j) {
      const Vec<T> v = column(j);
      for (int64_t l = 0; l < live; ++l) matrix[l * A + j] = v[l];
    }
    return;
  }
  for (int64_t first = 0; first < A; first += W) {
    const int64_t j = first + W <= A ? first : A - W;
    Vec<T> v[W];
#pragma GCC unroll 16
    for (int64_t c = 0; c < W; ++c) v[c] = column(j + c);
    transpose<T>(v);
    if (live == W) {
#pragma GCC unroll 16
      for (int64_t l = 0; l < W; ++l) store(matrix + l * A + j, v[l]);
    } else {
      for (int64_t l = 0; l < live; ++l) store(matrix + l * A + j, v[l]);
    }
  }
}

}  // namespace
}  // namespace metta_fastagent
