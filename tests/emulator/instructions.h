// Instructions that work on registers: one table by PTX name.
#pragma once
#include <climits>
#include <type_traits>

#include "machine.h"

namespace emulator {
struct Entry {
  Handler run;
  std::vector<int> widths;  // bytes of each operand, 0 of a predicate
  int mode = 0;
};
using Table = std::unordered_map<std::string, Entry>;

template <class T>
void put(T* to, const T* values, u32 active) {
  if (active == ALL)
    memcpy(to, values, LANES * sizeof(T));
  else
    for (int l = 0; l < LANES; l++)
      if (active >> l & 1) to[l] = values[l];
}

// D = f(S...), lane by lane.
template <class F, class D, class... S>
struct Lanewise {
  template <size_t... K>
  static void apply(Warp& w, const Instruction& i, u32 active, std::index_sequence<K...>) {
    std::tuple<const S*...> sources{w.reg<S>(i.o[K + 1])...};
    D results[LANES];
    for (int l = 0; l < LANES; l++) results[l] = F{}(std::get<K>(sources)[l]...);
    put(w.reg<D>(i.o[0]), results, active);
  }
  static void run(Machine&, Warp& w, const Instruction& i, u32 active) {
    apply(w, i, active, std::index_sequence_for<S...>{});
  }
};
template <class D, class... S, class F>
Entry lanewise(F) {
  return {Lanewise<F, D, S...>::run, {int(sizeof(D)), int(sizeof(S))...}};
}

// Predicates: one bit for each lane.
template <class F>
Entry on_predicates(F, int sources) {
  return {[](Machine&, Warp& w, const Instruction& i, u32 active) {
            u32& d = *w.reg<u32>(i.o[0]);
            u32 b = i.o[2] >= 0 ? *w.reg<u32>(i.o[2]) : 0;
            d = (d & ~active) | (F{}(*w.reg<u32>(i.o[1]), b) & active);
          },
          std::vector<int>(sources + 1, 0)};
}

template <class T>
Entry select() {
  return {[](Machine&, Warp& w, const Instruction& i, u32 active) {
            const T *a = w.reg<T>(i.o[1]), *b = w.reg<T>(i.o[2]);
            const u32 chosen = *w.reg<u32>(i.o[3]);
            T results[LANES];
            for (int l = 0; l < LANES; l++) results[l] = chosen >> l & 1 ? a[l] : b[l];
            put(w.reg<T>(i.o[0]), results, active);
          },
          {sizeof(T), sizeof(T), sizeof(T), 0}};
}

// p|q = f(a, b) op c, where mode is 0 without c, else 1 and, 2 or, 3 xor; flag: c is negated.
template <class T, class F>
Entry compare(F) {
  return {[](Machine&, Warp& w, const Instruction& i, u32 active) {
            const T *a = w.reg<T>(i.o[1]), *b = w.reg<T>(i.o[2]);
            u32 found = 0;
            for (int l = 0; l < LANES; l++) found |= u32(F{}(a[l], b[l])) << l;
            u32 c = i.mode ? *w.reg<u32>(i.o[3]) : 0;
            if (i.flag) c = ~c;
            auto joined = [&](u32 v) { return i.mode == 1 ? v & c : i.mode == 2 ? v | c : i.mode == 3 ? v ^ c : v; };
            u32& p = *w.reg<u32>(i.o[0]);
            p = (p & ~active) | (joined(found) & active);
            if (i.o[4] < 0) return;
            u32& q = *w.reg<u32>(i.o[4]);
            q = (q & ~active) | (joined(~found) & active);
          },
          {0, sizeof(T), sizeof(T), 0, 0}};
}

template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline f32 flushed(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
template <class T>
T quiet_nan() {
  return sizeof(T) == 4 ? bits<f32>(0x7FFFFFFFu) : std::nan("");
}
struct Half {
  u16 raw;
  operator f64() const { return f32(bits<_Float16>(raw)); }
};
struct Bfloat {
  u16 raw;
  operator f64() const { return bits<f32>(u32(raw) << 16); }
};
inline f64 widened(f32 x) { return x; }
inline f64 widened(f64 x) { return x; }
inline f64 widened(Half x) { return x; }
inline f64 widened(Bfloat x) { return x; }
template <class T>
T narrowed(f64 x) {
  if constexpr (std::is_same_v<T, Half>)
    return {std::isnan(x) ? u16(0x7FFF) : bits<u16>(_Float16(x))};
  else if constexpr (std::is_same_v<T, Bfloat>) {
    if (std::isnan(x)) return {0x7FFF};
    // To odd first: then rounding to nearest even is that of x.
    f32 y = f32(x);
    u32 raw = bits<u32>(y);
    if (f64(y) != x) raw = (std::fabs(f64(y)) > std::fabs(x) ? raw - 1 : raw) | 1;
    return {u16((raw + 0x7FFF + (raw >> 16 & 1)) >> 16)};
  } else
    return std::isnan(x) ? quiet_nan<T>() : T(x);
}
inline f32 to_tf32(f32 x) {
  return std::isfinite(x) ? bits<f32>((bits<u32>(x) + 0x1000) & 0xFFFFE000) : std::isnan(x) ? quiet_nan<f32>() : x;
}

inline u64 mixed(u64 x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccd;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53;
  return x ^ x >> 33;
}
inline f64 direction(u64 of) {
  if (options.approximate == 1) return mixed(of + u64(options.seed) * 0x9E3779B97F4A7C15) & 1 ? 1 : -1;
  return options.approximate == 2 ? 1 : options.approximate == 3 ? -1 : 0;
}
// A result moved by the units in the last place that PTX documents as an approximate instruction's largest error.
inline f32 approximated(f64 exact, int units, u64 of) {
  f32 y = f32(exact);
  f64 to = direction(of);
  if (to == 0 || y == 0 || !std::isfinite(y)) return std::isnan(y) ? quiet_nan<f32>() : y;
  for (int k = 0; k < units; k++) y = std::nextafterf(y, to > 0 ? INFINITY : -INFINITY);
  return y;
}
template <class T>
T smaller(T a, T b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? std::isnan(b) ? quiet_nan<T>() : b : a;
  return a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  return -smaller<T>(-a, -b);
}

template <class T>
void add_comparisons(Table& t, const std::string& type, bool ordered = true) {
  auto add = [&](const char* name, auto f) { t["setp." + std::string(name) + "." + type] = compare<T>(f); };
  add("eq", [](T a, T b) { return a == b; });
  if constexpr (!std::is_integral_v<T>) {
    add("ne", [](T a, T b) { return a < b || a > b; });
    add("equ", [](T a, T b) { return !(a < b || a > b); });
    add("neu", [](T a, T b) { return !(a == b); });
    add("ltu", [](T a, T b) { return !(a >= b); });
    add("leu", [](T a, T b) { return !(a > b); });
    add("gtu", [](T a, T b) { return !(a <= b); });
    add("geu", [](T a, T b) { return !(a < b); });
    add("num", [](T a, T b) { return a == a && b == b; });
    add("nan", [](T a, T b) { return a != a || b != b; });
  } else
    add("ne", [](T a, T b) { return a != b; });
  if (!ordered) return;
  auto add_both = [&](const char* name, const char* unsigned_name, auto f) {
    add(name, f);
    if (std::is_unsigned_v<T>) add(unsigned_name, f);
  };
  add_both("lt", "lo", [](T a, T b) { return a < b; });
  add_both("le", "ls", [](T a, T b) { return a <= b; });
  add_both("gt", "hi", [](T a, T b) { return a > b; });
  add_both("ge", "hs", [](T a, T b) { return a >= b; });
}

template <class T>
void add_bits(Table& t, const std::string& type) {
  auto add = [&](const char* name, Entry e) { t[std::string(name) + "." + type] = e; };
  add("and", lanewise<T, T, T>([](T a, T b) { return T(a & b); }));
  add("or", lanewise<T, T, T>([](T a, T b) { return T(a | b); }));
  add("xor", lanewise<T, T, T>([](T a, T b) { return T(a ^ b); }));
  add("not", lanewise<T, T>([](T a) { return T(~a); }));
  // Amounts are 32-bit and end at the width.
  add("shl", lanewise<T, T, u32>([](T a, u32 n) { return n >= 8 * sizeof(T) ? T(0) : T(a << n); }));
  add("shr", lanewise<T, T, u32>([](T a, u32 n) { return n >= 8 * sizeof(T) ? T(0) : T(a >> n); }));
  add("selp", select<T>());
  add_comparisons<T>(t, type, false);
}

template <class T>
void add_integers(Table& t, const std::string& type) {
  using U = std::make_unsigned_t<T>;
  using Twice = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                                   std::conditional_t<std::is_signed_v<T>, s64, u64>>;
  constexpr int width = 8 * sizeof(T);
  auto add = [&](const char* name, Entry e) { t[std::string(name) + "." + type] = e; };
  add("add", lanewise<T, T, T>([](T a, T b) { return T(Twice(a) + Twice(b)); }));
  add("sub", lanewise<T, T, T>([](T a, T b) { return T(Twice(a) - Twice(b)); }));
  add("mul.lo", lanewise<U, U, U>([](U a, U b) { return U(u64(a) * u64(b)); }));
  add("mul.hi", lanewise<T, T, T>([](T a, T b) { return T((Twice(a) * Twice(b)) >> width); }));
  add("mad.lo", lanewise<U, U, U, U>([](U a, U b, U c) { return U(u64(a) * u64(b) + u64(c)); }));
  add("min", lanewise<T, T, T>([](T a, T b) { return std::min(a, b); }));
  add("max", lanewise<T, T, T>([](T a, T b) { return std::max(a, b); }));
  // By zero, hardware's quotient is all ones; the smallest number over -1 wraps.
  add("div", lanewise<T, T, T>([](T a, T b) { return b == 0 ? T(-1) : T(Twice(a) / Twice(b)); }));
  add("rem", lanewise<T, T, T>([](T a, T b) { return b == 0 ? a : T(Twice(a) % Twice(b)); }));
  add("neg", lanewise<U, U>([](U a) { return U(0 - a); }));
  add("abs", lanewise<T, T>([](T a) { return T(a < 0 ? U(0) - U(a) : U(a)); }));
  add("shr", lanewise<T, T, u32>([](T a, u32 n) { return T(n >= width ? (a < 0 ? -1 : 0) : a >> n); }));
  add("selp", select<T>());
  add_comparisons<T>(t, type);
  if constexpr (width < 64) {
    using Wide = std::conditional_t<width == 32, Twice, std::conditional_t<std::is_signed_v<T>, s32, u32>>;
    add("mul.wide", lanewise<Wide, T, T>([](T a, T b) { return Wide(Twice(a) * Twice(b)); }));
    add("mad.wide",
        lanewise<Wide, T, T, Wide>([](T a, T b, Wide c) { return Wide(u64(Twice(a) * Twice(b)) + u64(c)); }));
  }
}

template <class T>
void add_pairs(Table& t, const std::string& type) {
  auto each = []<class F>(F) {
    return lanewise<u32, u32, u32>(
        [](u32 a, u32 b) { return u32(u16(F{}(T(a), T(b)))) | u32(u16(F{}(T(a >> 16), T(b >> 16)))) << 16; });
  };
  t["add." + type] = each([](T a, T b) { return a + b; });
  t["min." + type] = each([](T a, T b) { return std::min(a, b); });
  t["max." + type] = each([](T a, T b) { return std::max(a, b); });
}

template <class T>
void add_floats(Table& t, const std::string& type) {
  auto add = [&](const std::string& name, Entry e) { t[name + "." + type] = e; };
  for (const char* rounding : {"", ".rn"}) {
    add(std::string("add") + rounding, lanewise<T, T, T>([](T a, T b) { return a + b; }));
    add(std::string("sub") + rounding, lanewise<T, T, T>([](T a, T b) { return a - b; }));
    add(std::string("mul") + rounding, lanewise<T, T, T>([](T a, T b) { return a * b; }));
  }
  add("fma.rn", lanewise<T, T, T, T>([](T a, T b, T c) { return std::fma(a, b, c); }));
  add("div.rn", lanewise<T, T, T>([](T a, T b) { return a / b; }));
  add("rcp.rn", lanewise<T, T>([](T a) { return 1 / a; }));
  add("sqrt.rn", lanewise<T, T>([](T a) { return std::sqrt(a); }));
  add("neg", lanewise<T, T>([](T a) { return -a; }));
  add("abs", lanewise<T, T>([](T a) { return std::fabs(a); }));
  add("min", lanewise<T, T, T>([](T a, T b) { return smaller(a, b); }));
  add("max", lanewise<T, T, T>([](T a, T b) { return larger(a, b); }));
  add("min.NaN", lanewise<T, T, T>([](T a, T b) {
        return std::isnan(a + b) && (a != a || b != b) ? quiet_nan<T>() : smaller(a, b);
      }));
  add("max.NaN", lanewise<T, T, T>(
                     [](T a, T b) { return std::isnan(a + b) && (a != a || b != b) ? quiet_nan<T>() : larger(a, b); }));
  add("selp", select<T>());
  add_comparisons<T>(t, type);
}

// Functions of one float32 that hardware approximates, and the same with subnormal numbers flushed to zero.
template <class F>
void add_approximate(Table& t, const std::string& name, F) {
  t[name + ".f32"] = lanewise<f32, f32>([](f32 x) { return F{}(x); });
  t[name + ".ftz.f32"] = lanewise<f32, f32>([](f32 x) { return flushed(F{}(flushed(x))); });
}

inline void add_float32(Table& t) {
  t["fma.rn.ftz.f32"] = lanewise<f32, f32, f32, f32>(
      [](f32 a, f32 b, f32 c) { return flushed(std::fma(flushed(a), flushed(b), flushed(c))); });
  t["abs.ftz.f32"] = lanewise<f32, f32>([](f32 a) { return flushed(std::fabs(a)); });
  t["add.ftz.f32"] = lanewise<f32, f32, f32>([](f32 a, f32 b) { return flushed(flushed(a) + flushed(b)); });
  t["mul.ftz.f32"] = lanewise<f32, f32, f32>([](f32 a, f32 b) { return flushed(flushed(a) * flushed(b)); });
  auto divide = [](f32 a, f32 b) {
    return approximated(f64(a / b), 2, bits<u32>(a) * 0x100000001u ^ mixed(bits<u32>(b)));
  };
  t["div.full.f32"] = t["div.approx.f32"] = lanewise<f32, f32, f32>(divide);
  add_approximate(t, "ex2.approx",
                  [](f32 x) { return x == 0 ? 1.0f : approximated(std::exp2(f64(x)), 2, bits<u32>(x)); });
  add_approximate(t, "lg2.approx", [](f32 x) {
    f64 y = std::log2(f64(x));
    return narrowed<f32>(x == 1 || !std::isfinite(y) ? y : y + direction(bits<u32>(x)) * 0x1p-22);
  });
  add_approximate(t, "rcp.approx", [](f32 x) { return approximated(1 / f64(x), 1, bits<u32>(x)); });
  add_approximate(t, "sqrt.approx", [](f32 x) { return approximated(std::sqrt(f64(x)), 1, bits<u32>(x)); });
  add_approximate(t, "rsqrt.approx", [](f32 x) { return approximated(1 / std::sqrt(f64(x)), 2, bits<u32>(x)); });
  add_approximate(t, "tanh.approx",
                  [](f32 x) { return narrowed<f32>(std::tanh(f64(x)) * (1 + direction(bits<u32>(x)) * 0x1p-11)); });
  // Of a float64 the upper word only.
  t["rcp.approx.ftz.f64"] = lanewise<f64, f64>([](f64 a) {
    auto upper = [](f64 x) {
      return std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : bits<f64>(bits<u64>(x) >> 32 << 32);
    };
    return std::isnan(a) ? a : upper(1 / upper(a));
  });
}

inline void add_words(Table& t) {
  t["bfe.u32"] = lanewise<u32, u32, u32, u32>([](u32 a, u32 at, u32 length) {
    at &= 255, length &= 255;
    u64 field = at > 31 ? 0 : u64(a) >> at;
    return u32(length > 31 ? field : field & ((1ull << length) - 1));
  });
  t["bfe.s32"] = lanewise<u32, u32, u32, u32>([](u32 a, u32 at, u32 length) {
    at &= 255, length = std::min(length & 255, 32u);
    if (length == 0) return 0u;
    // The sign is that of the field's last bit, or of the number's.
    s64 field = s64(s32(a)) >> std::min(at, 63u);
    return u32(s64(u64(field) << (64 - length)) >> (64 - length));
  });
  t["bfi.b32"] = lanewise<u32, u32, u32, u32, u32>([](u32 a, u32 b, u32 at, u32 length) {
    at &= 255, length = std::min(length & 255, 32u);
    u32 field = at > 31 ? 0 : u32(((1ull << length) - 1) << at);
    return at > 31 ? b : (b & ~field) | ((a << at) & field);
  });
  t["popc.b32"] = lanewise<u32, u32>([](u32 a) { return u32(__builtin_popcount(a)); });
  t["clz.b32"] = lanewise<u32, u32>([](u32 a) { return u32(a ? __builtin_clz(a) : 32); });
  t["brev.b32"] = lanewise<u32, u32>([](u32 a) {
    u32 r = 0;
    for (int k = 0; k < 32; k++) r |= (a >> k & 1) << (31 - k);
    return r;
  });
  t["prmt.b32"] = lanewise<u32, u32, u32, u32>([](u32 a, u32 b, u32 selectors) {
    u64 bytes = a | u64(b) << 32;
    u32 r = 0;
    for (int k = 0; k < 4; k++) {
      u32 s = selectors >> 4 * k & 15, byte = bytes >> 8 * (s & 7) & 255;
      r |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * k;
    }
    return r;
  });
  t["and.pred"] = on_predicates([](u32 a, u32 b) { return a & b; }, 2);
  t["or.pred"] = on_predicates([](u32 a, u32 b) { return a | b; }, 2);
  t["xor.pred"] = on_predicates([](u32 a, u32 b) { return a ^ b; }, 2);
  t["not.pred"] = on_predicates([](u32 a, u32) { return ~a; }, 1);
  t["mov.pred"] = on_predicates([](u32 a, u32) { return a; }, 1);
}

// Registers have at least 16 bits; a narrower result is extended.
template <class T>
using Register = std::conditional_t<sizeof(T) == 1, std::conditional_t<std::is_signed_v<T>, s16, u16>, T>;

template <class To, class From>
void add_conversion(Table& t, const std::string& to, const std::string& from) {
  constexpr bool to_integer = std::is_integral_v<To>, from_integer = std::is_integral_v<From>;
  const std::string types = "." + to + "." + from;
  using Source = std::conditional_t<sizeof(From) == 1, u16, From>;
  if constexpr (to_integer && from_integer) {
    t["cvt" + types] = lanewise<Register<To>, Source>([](Source x) { return Register<To>(To(From(x))); });
  } else if constexpr (from_integer) {
    t["cvt.rn" + types] = lanewise<To, Source>([](Source x) {
      if constexpr (std::is_floating_point_v<To>)
        return To(From(x));
      else
        return narrowed<To>(f64(From(x)));
    });
  } else if constexpr (to_integer) {
    auto add = [&]<class F>(const char* rounding, F) {
      t[std::string("cvt.") + rounding + types] = lanewise<Register<To>, From>([](From x) {
        f64 y = F{}(widened(x));
        // Out of range: the nearest; NaN: zero, but of 64 bits the upper one.
        if (y != y) return Register<To>(sizeof(To) == 8 ? u64(1) << 63 : 0);
        constexpr To low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
        return Register<To>(y <= f64(low) ? low : y >= f64(high) ? high : To(y));
      });
    };
    add("rzi", [](f64 x) { return std::trunc(x); });
    add("rni", [](f64 x) { return std::nearbyint(x); });
    add("rmi", [](f64 x) { return std::floor(x); });
    add("rpi", [](f64 x) { return std::ceil(x); });
  } else {
    Entry e = lanewise<To, From>([](From x) { return narrowed<To>(widened(x)); });
    t["cvt.rn" + types] = e;
    if (sizeof(To) > sizeof(From)) t["cvt" + types] = e;
  }
}
template <class To>
void add_conversions_to(Table& t, const std::string& to) {
  add_conversion<To, u8>(t, to, "u8"), add_conversion<To, s8>(t, to, "s8"), add_conversion<To, u16>(t, to, "u16");
  add_conversion<To, s16>(t, to, "s16"), add_conversion<To, u32>(t, to, "u32"), add_conversion<To, s32>(t, to, "s32");
  add_conversion<To, u64>(t, to, "u64"), add_conversion<To, s64>(t, to, "s64"), add_conversion<To, f32>(t, to, "f32");
  add_conversion<To, f64>(t, to, "f64"), add_conversion<To, Half>(t, to, "f16"),
      add_conversion<To, Bfloat>(t, to, "bf16");
}

inline const Table& table() {
  static const Table all = [] {
    Table t;
    add_bits<u16>(t, "b16"), add_bits<u32>(t, "b32"), add_bits<u64>(t, "b64");
    add_integers<u16>(t, "u16"), add_integers<s16>(t, "s16"), add_integers<u32>(t, "u32");
    add_integers<s32>(t, "s32"), add_integers<u64>(t, "u64"), add_integers<s64>(t, "s64");
    add_pairs<u16>(t, "u16x2"), add_pairs<s16>(t, "s16x2");
    add_floats<f32>(t, "f32"), add_floats<f64>(t, "f64"), add_float32(t), add_words(t);
    add_comparisons<Half>(t, "f16"), add_comparisons<Bfloat>(t, "bf16");
    add_conversions_to<u8>(t, "u8"), add_conversions_to<s8>(t, "s8"), add_conversions_to<u16>(t, "u16");
    add_conversions_to<s16>(t, "s16"), add_conversions_to<u32>(t, "u32"), add_conversions_to<s32>(t, "s32");
    add_conversions_to<u64>(t, "u64"), add_conversions_to<s64>(t, "s64"), add_conversions_to<f32>(t, "f32");
    add_conversions_to<f64>(t, "f64"), add_conversions_to<Half>(t, "f16"), add_conversions_to<Bfloat>(t, "bf16");
    t["cvt.rna.tf32.f32"] = lanewise<f32, f32>([](f32 x) { return to_tf32(x); });
    auto pair = []<class T>(T) {
      return lanewise<u32, f32, f32>(
          [](f32 high, f32 low) { return u32(narrowed<T>(high).raw) << 16 | narrowed<T>(low).raw; });
    };
    t["cvt.rn.f16x2.f32"] = pair(Half{}), t["cvt.rn.bf16x2.f32"] = pair(Bfloat{});
    return t;
  }();
  return all;
}
}  // namespace emulator
