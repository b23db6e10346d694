// Instructions on memory, of a whole warp, and of control flow.
#pragma once
#include "instructions.h"

namespace emulator {
// size: bytes of an element; count: elements; mode: sign extension. The address is operand `count`, plus the immediate.
template <bool SHARED>
u64 address(Warp& w, const Instruction& i, int lane, int operand) {
  return SHARED ? u32(*(w.reg<u32>(i.o[operand]) + lane) + u32(i.immediate))
                : w.reg<u64>(i.o[operand])[lane] + i.immediate;
}
template <bool SHARED>
Region& region_of(Machine& m, Warp& w, const Instruction& i, int lane, u64 at, int size) {
  return SHARED ? m.shared_region(w, i, lane, at, size) : m.region(w, i, lane, at, size);
}

template <bool SHARED>
void load(Machine& m, Warp& w, const Instruction& i, u32 active) {
  u64 values[4][LANES];
  for (int l = 0; l < LANES; l++) {
    if (!(active >> l & 1)) continue;
    u64 at = address<SHARED>(w, i, l, i.count);
    Region& r = region_of<SHARED>(m, w, i, l, at, i.size * i.count);
    const u8* from = m.read(w, i, l, r, at, i.size * i.count, i.size);
    for (int k = 0; k < i.count; k++) {
      u64 v = 0;
      memcpy(&v, from + k * i.size, i.size);
      if (i.mode) v = u64(s64(v << (64 - 8 * i.size)) >> (64 - 8 * i.size));
      values[k][l] = v;
    }
  }
  if (!SHARED) m.count_sectors(LOADED, i.size * i.count);
  for (int k = 0; k < i.count; k++)
    for (int l = 0; l < LANES && i.o[k] >= 0; l++)
      if (active >> l & 1) w.set(i.o[k], i.widths[k], l, values[k][l]);
}

template <bool SHARED>
void store(Machine& m, Warp& w, const Instruction& i, u32 active) {
  u8 values[LANES][16];
  const int size = i.size * i.count;
  for (int l = 0; l < LANES; l++) {
    if (!(active >> l & 1)) continue;
    u64 at = address<SHARED>(w, i, l, i.count);
    Region& r = region_of<SHARED>(m, w, i, l, at, size);
    for (int k = 0; k < i.count; k++) {
      u64 v = w.value(i.o[k], i.widths[k], l);
      memcpy(values[l] + k * i.size, &v, i.size);
    }
    m.write(w, i, l, r, at, values[l], size);
  }
  for (int l = 0; l < LANES && !i.in_any_order; l++) {
    if (!(active >> l & 1)) continue;
    u64 at = address<SHARED>(w, i, l, i.count);
    Region& r = region_of<SHARED>(m, w, i, l, at, size);
    if (memcmp(r.data + (at - r.first), values[l], size))
      m.fault(w, i, "lanes store different values at one address", l);
  }
  if (!SHARED) m.count_sectors(STORED, size);
}

inline void load_parameter(Machine& m, Warp& w, const Instruction& i, u32 active) {
  u64 v = 0;
  memcpy(&v, m.arguments.data() + i.immediate, i.size);
  if (i.mode) v = u64(s64(v << (64 - 8 * i.size)) >> (64 - 8 * i.size));
  for (int l = 0; l < LANES; l++)
    if (active >> l & 1) w.set(i.o[0], i.widths[0], l, v);
}

// mode: add, min, max, and, or, xor, exch, cas, inc of unsigned numbers; flag: signed (1) or float32 (2).
enum Atomic { ADD, MIN, MAX, AND, OR, XOR, EXCH, CAS, INC };
inline void atomic(Machine& m, Warp& w, const Instruction& i, u32 active) {
  for (int l = 0; l < LANES; l++) {
    if (!(active >> l & 1)) continue;
    u64 at = w.reg<u64>(i.o[3])[l] + i.immediate, old = 0, v = w.value(i.o[1], i.size, l), result = v;
    u8* data = m.region(w, i, l, at, i.size).data + (at - m.region(w, i, l, at, i.size).first);
    memcpy(&old, data, i.size);
    auto extended = [&](u64 x) { return i.size == 4 ? s64(s32(x)) : s64(x); };
    bool less = i.flag == 1 ? extended(old) < extended(v) : old < v;
    switch (i.mode) {
      case ADD:
        result = i.flag == 2 ? bits<u32>(bits<f32>(u32(old)) + bits<f32>(u32(v))) : old + v;
        break;
      case MIN:
        result = less ? old : v;
        break;
      case MAX:
        result = less ? v : old;
        break;
      case AND:
        result = old & v;
        break;
      case OR:
        result = old | v;
        break;
      case XOR:
        result = old ^ v;
        break;
      case CAS:
        result = old == v ? w.value(i.o[2], i.size, l) : old;
        break;
      case INC:
        result = old >= v ? 0 : old + 1;
        break;
    }
    memcpy(data, &result, i.size);
    if (i.o[0] >= 0) w.set(i.o[0], i.size, l, old);
  }
  m.places.clear();
  m.accesses.atomic(w.id);
}

// o: shared address, global address, bytes given or -1; size: bytes; flag: offset of the shared address. What is not
// given is zero. The bytes arrive when the lane waits for the group; until then nobody may touch them, nor change the
// source.
inline void copy_async(Machine& m, Warp& w, const Instruction& i, u32 active) {
  for (int l = 0; l < LANES; l++) {
    if (!(active >> l & 1)) continue;
    Copy c{
        l, i.size, i.o[2] >= 0 ? int(w.reg<u32>(i.o[2])[l]) : i.size, w.groups[l], w.reg<u32>(i.o[0])[l] + u64(i.flag),
        0, {}};
    c.from = w.reg<u64>(i.o[1])[l] + i.immediate;
    if (c.from % i.size) m.fault(w, i, format("copies %d bytes from the misaligned address %#lx", i.size, c.from), l);
    if (c.given > 0) {
      if (c.given != c.size) m.fault(w, i, format("copies %d of %d bytes", c.given, c.size), l);
      Region& r = m.region(w, i, l, c.from, c.given);
      memcpy(c.data.data(), m.read(w, i, l, r, c.from, c.given, 4), c.given);
    }
    Region& to = m.shared_region(w, i, l, c.to, c.size);
    std::string found = m.accesses.overwritten(to, c.to, c.size, w.id);
    if (!found.empty()) m.fault(w, i, found, l);
    m.accesses.pending(to, c.to, c.size);
    w.copies.push_back(c);
  }
  m.count_sectors(LOADED, i.size);
}
inline void commit(Machine&, Warp& w, const Instruction&, u32 active) {
  for (int l = 0; l < LANES; l++) w.groups[l] += active >> l & 1;
}
// mode: the newest groups that need not have arrived; flag: copies without a group are waited for, too.
inline void wait(Machine& m, Warp& w, const Instruction& i, u32 active) {
  std::deque<Copy> later;
  for (Copy& c : w.copies) {
    int last = w.groups[c.lane] - i.mode + (i.flag ? 1 : 0);
    if (!(active >> c.lane & 1) || c.group >= last) {
      later.push_back(c);
      continue;
    }
    if (c.given && memcmp(reinterpret_cast<void*>(c.from), c.data.data(), c.given))
      m.fault(w, i, "the source of an asynchronous copy changed before its wait", c.lane);
    m.write(w, i, c.lane, m.shared, c.to, c.data.data(), c.size, true);
  }
  w.copies = std::move(later);
}

inline void barrier(Machine& m, Warp& w, const Instruction& i, u32 active) {
  m.require_whole_warp(w, i, active);
  w.state = Warp::AT_BARRIER;
  m.counts[BARRIERS] += w.id == 0;
}
inline void whole_warp(Machine& m, Warp& w, const Instruction& i, u32 active) { m.require_whole_warp(w, i, active); }

enum Shuffle { UP, DOWN, BUTTERFLY, INDEX };
inline void shuffle(Machine& m, Warp& w, const Instruction& i, u32 active) {
  m.require_whole_warp(w, i, active);
  const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]), *c = w.reg<u32>(i.o[3]);
  u32 results[LANES], in_range = 0;
  for (int l = 0; l < LANES; l++) {
    const int segments = c[l] >> 8 & 31, clamp = c[l] & 31, n = b[l] & 31;
    const int last = (l & segments) | (clamp & ~segments), first = l & segments;
    const int from = i.mode == UP          ? l - n
                     : i.mode == DOWN      ? l + n
                     : i.mode == BUTTERFLY ? l ^ n
                                           : first | (n & ~segments);
    const bool inside = i.mode == UP ? from >= last : from <= last;
    results[l] = a[inside ? from : l];
    in_range |= u32(inside) << l;
  }
  put(w.reg<u32>(i.o[0]), results, ALL);
  if (i.o[4] >= 0) *w.reg<u32>(i.o[4]) = in_range;
}
// mode: that of `atomic`; flag: signed.
inline void reduce(Machine& m, Warp& w, const Instruction& i, u32 active) {
  m.require_whole_warp(w, i, active & w.reg<u32>(i.o[2])[0]);
  const u32* a = w.reg<u32>(i.o[1]);
  u32 r = a[0];
  for (int l = 1; l < LANES; l++) {
    bool less = i.flag ? s32(a[l]) < s32(r) : a[l] < r;
    r = i.mode == ADD             ? r + a[l]
        : i.mode == AND           ? r & a[l]
        : i.mode == OR            ? r | a[l]
        : i.mode == XOR           ? r ^ a[l]
        : less == (i.mode == MIN) ? a[l]
                                  : r;
  }
  u32 results[LANES];
  std::fill_n(results, LANES, r);
  put(w.reg<u32>(i.o[0]), results, ALL);
}

// Matrices of 8 rows of 16 bytes: lanes 8j to 8j + 7 give the addresses of matrix j's rows, and lane l holds, in
// register j, the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed (flag), of the column. The address is
// operand 4.
inline void load_matrix(Machine& m, Warp& w, const Instruction& i, u32 active) {
  m.require_whole_warp(w, i, active);
  u16 matrix[4][8][8];
  for (int l = 0; l < 8 * i.count; l++) {
    u64 at = address<true>(w, i, l, 4);
    memcpy(matrix[l / 8][l % 8], m.read(w, i, l, m.shared_region(w, i, l, at, 16), at, 16, 2), 16);
  }
  for (int j = 0; j < i.count; j++)
    for (int l = 0; l < LANES; l++) {
      const int row = l / 4, column = 2 * (l % 4);
      u16 low = i.flag ? matrix[j][column][row] : matrix[j][row][column];
      u16 high = i.flag ? matrix[j][column + 1][row] : matrix[j][row][column + 1];
      w.reg<u32>(i.o[j])[l] = low | u32(high) << 16;
    }
}
inline void store_matrix(Machine& m, Warp& w, const Instruction& i, u32 active) {
  m.require_whole_warp(w, i, active);
  u16 matrix[4][8][8];
  for (int j = 0; j < i.count; j++)
    for (int l = 0; l < LANES; l++) {
      const int row = l / 4, column = 2 * (l % 4);
      u32 pair = w.reg<u32>(i.o[j])[l];
      (i.flag ? matrix[j][column][row] : matrix[j][row][column]) = u16(pair);
      (i.flag ? matrix[j][column + 1][row] : matrix[j][row][column + 1]) = u16(pair >> 16);
    }
  for (int l = 0; l < 8 * i.count; l++) {
    u64 at = address<true>(w, i, l, 4);
    m.write(w, i, l, m.shared_region(w, i, l, at, 16), at, reinterpret_cast<u8*>(matrix[l / 8][l % 8]), 16);
  }
}

inline int exponent_of(f64 x) { return int(bits<u64>(x) >> 52 & 2047) - 1023; }
inline f64 power_of_2(int exponent) { return bits<f64>(u64(exponent + 1023) << 52); }

// D [16, 8] = A [16, depth] B [depth, 8] + C in float32; o: 4 of D, 4 of A, 2 of B, 4 of C. mode: type of A and B.
enum Factor { TF32, F16, BF16 };
inline void multiply_matrices(Machine& m, Warp& w, const Instruction& i, u32 active) {
  m.require_whole_warp(w, i, active);
  const int depth = i.mode == TF32 ? 8 : 16;
  f64 a[16][16], b[16][8], sums[16][8];
  for (int l = 0; l < LANES; l++) {
    const int g = l / 4, t = l % 4;
    auto word = [&](int operand) { return w.reg<u32>(i.o[operand])[l]; };
    for (int half = 0; half < (i.mode == TF32 ? 1 : 2); half++) {
      auto element = [&](int operand) {
        if (i.mode == TF32) return f64(bits<f32>(word(operand) & 0xFFFFE000));
        u16 raw = u16(word(operand) >> 16 * half);
        return i.mode == F16 ? widened(Half{raw}) : widened(Bfloat{raw});
      };
      const int k = i.mode == TF32 ? t : 2 * t + half, next = i.mode == TF32 ? k + 4 : k + 8;
      a[g][k] = element(4), a[g + 8][k] = element(5), a[g][next] = element(6), a[g + 8][next] = element(7);
      b[k][g] = element(8), b[next][g] = element(9);
    }
    for (int k = 0; k < 4; k++) sums[g + 8 * (k / 2)][2 * t + k % 2] = bits<f32>(word(10 + k));
  }
  if (!options.truncate) {
    // Products are exact in float64, and so nearly is their sum; it is rounded once.
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < depth; k++)
        for (int column = 0; column < 8; column++) sums[row][column] += a[row][k] * b[k][column];
  } else {
    // As published measurements report: of half the depth at a time, terms are aligned to the largest and truncated.
    const int block = depth / 2;
    for (int row = 0; row < 16; row++)
      for (int column = 0; column < 8; column++)
        for (int first = 0; first < depth; first += block) {
          f64 terms[9] = {sums[row][column]}, largest = std::fabs(terms[0]), total = 0;
          for (int k = 0; k < block; k++) {
            terms[k + 1] = a[row][first + k] * b[first + k][column];
            largest = std::max(largest, std::fabs(terms[k + 1]));
          }
          bool finite = largest < INFINITY && std::all_of(terms, terms + block + 1, [](f64 x) { return x == x; });
          if (!finite || largest == 0) {
            for (int k = 0; k <= block; k++) total += terms[k];
            sums[row][column] = total;
            continue;
          }
          const int last_bit = exponent_of(largest) - 23 - int(options.extra_bits);
          for (int k = 0; k <= block; k++) total += std::trunc(terms[k] * power_of_2(-last_bit));
          total *= power_of_2(last_bit);
          if (total != 0) {
            const int last = std::max(exponent_of(total) - 23, -149);
            total = std::trunc(total * power_of_2(-last)) * power_of_2(last);
          }
          sums[row][column] = total;
        }
  }
  for (int l = 0; l < LANES; l++)
    for (int k = 0; k < 4; k++) w.reg<f32>(i.o[k])[l] = narrowed<f32>(sums[l / 4 + 8 * (k / 2)][2 * (l % 4) + k % 2]);
}

inline void branch(Machine& m, Warp& w, const Instruction& i, u32 active) {
  const int target = int(i.immediate);
  if (active == w.active)
    w.pc = target;
  else {
    w.waiting.emplace_back(target, active);
    w.active &= ~active;
  }
  if (!w.waiting.empty()) m.reschedule(w);
}
inline void leave(Machine& m, Warp& w, const Instruction&, u32 active) {
  w.active &= ~active;
  m.reschedule(w);
}
inline void trap(Machine& m, Warp& w, const Instruction& i, u32) { m.fault(w, i, "trap"); }
inline void nothing(Machine&, Warp&, const Instruction&, u32) {}

// Bytes of the sources one after the other become those of the destinations: moves, packs and unpacks; count: of the
// destinations, mode: of the sources.
inline void move(Machine&, Warp& w, const Instruction& i, u32 active) {
  for (int l = 0; l < LANES; l++) {
    if (!(active >> l & 1)) continue;
    u64 all = 0;
    for (int k = 0, at = 0; k < i.mode; at += 8 * i.widths[i.count + k++])
      all |= w.value(i.o[i.count + k], i.widths[i.count + k], l) << at;
    for (int k = 0; k < i.count; all >>= 8 * i.widths[k] % 64, k++)
      if (i.o[k] >= 0) w.set(i.o[k], i.widths[k], l, all);
  }
}
}  // namespace emulator
