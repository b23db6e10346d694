// Memory of the emulated device: the storages of PyTorch's CPU tensors, and each byte's last reader and writer.
#pragma once
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace emulator {
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

// What stops a launch, or the loading of a kernel.
struct Fault {
  std::string text;
};

__attribute__((format(printf, 1, 2))) inline std::string format(const char* pattern, ...) {
  char text[1000];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

// Fresh memory holds a pattern that is NaN in every floating-point type; a kernel's read of it is a fault. Guards
// around a storage, and freed memory that is kept for a while, leave no other storage at an address out of range.
constexpr u64 FRESH = 0xFFA5FFA5FFA5FFA5;
constexpr size_t GUARD = 1024, ALIGNMENT = 512, KEPT_BYTES = size_t(128) << 20, KEPT_STORAGE = size_t(4) << 20;

class Storages final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (size == 0) return {nullptr, nullptr, &release, cpu};
    void* base = nullptr;
    if (posix_memalign(&base, ALIGNMENT, size + 2 * GUARD)) throw std::bad_alloc();
    u8* start = static_cast<u8*>(base) + GUARD;
    for (size_t i = 0; i < size; i += 8) memcpy(start + i, &FRESH, std::min<size_t>(8, size - i));
    std::lock_guard<std::mutex> guard(lock);
    sizes[u64(start)] = size;
    return {start, start, &release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { memcpy(to, from, size); }

  // [first, last) of the storage around an address; (0, 0) if none is there.
  std::pair<u64, u64> around(u64 address) {
    std::lock_guard<std::mutex> guard(lock);
    auto next = sizes.upper_bound(address);
    if (next == sizes.begin()) return {0, 0};
    --next;
    return address < next->first + next->second ? std::pair(next->first, next->first + next->second)
                                                : std::pair<u64, u64>{};
  }
  std::vector<std::pair<u64, u64>> all() {
    std::lock_guard<std::mutex> guard(lock);
    std::vector<std::pair<u64, u64>> spans;
    for (auto [start, size] : sizes) spans.emplace_back(start, start + size);
    return spans;
  }
  static void release(void* start);

 private:
  std::mutex lock;
  std::map<u64, u64> sizes;
  std::deque<std::pair<u8*, size_t>> freed;
  size_t freed_bytes = 0;
};
inline Storages& storages() {
  static Storages* one = new Storages;  // never destroyed: tensors outlive static objects
  return *one;
}
inline void Storages::release(void* start) {
  if (!start) return;
  Storages& self = storages();
  std::lock_guard<std::mutex> guard(self.lock);
  auto found = self.sizes.find(u64(start));
  if (found == self.sizes.end()) return;
  size_t size = found->second;
  self.sizes.erase(found);
  u8* base = static_cast<u8*>(start) - GUARD;
  if (size > KEPT_STORAGE) return free(base);
  for (size_t i = 0; i < size; i += 8) memcpy(static_cast<u8*>(start) + i, &FRESH, std::min<size_t>(8, size - i));
  self.freed.emplace_back(base, size);
  self.freed_bytes += size + 2 * GUARD;
  while (self.freed_bytes > KEPT_BYTES) {
    auto [oldest, bytes] = self.freed.front();
    self.freed.pop_front();
    self.freed_bytes -= bytes + 2 * GUARD;
    free(oldest);
  }
}

// A stamp is an epoch and the warp: (epoch << WARP_BITS) | warp. A barrier of a program begins an epoch, and so does
// the next program of a launch. 0: not in this launch.
constexpr int WARP_BITS = 6;
constexpr u32 SEVERAL = (1 << WARP_BITS) - 1, PENDING = ~0u;
struct Clock {
  u32 epoch = 1, program_start = 1;  // of the running program
  u32 stamp(int warp) const { return epoch << WARP_BITS | u32(warp); }
};

// Bytes that a launch may access, with the stamps of the last write and of the last read of each.
struct Region {
  u64 first, last;
  u8* data;
  std::unique_ptr<u32[], decltype(&free)> written, read;
  bool is_shared;
  Region(u64 first, u64 last, u8* data, bool is_shared)
      : first(first),
        last(last),
        data(data),
        written(static_cast<u32*>(calloc(last - first, 4)), free),
        read(static_cast<u32*>(calloc(last - first, 4)), free),
        is_shared(is_shared) {}
};

// Programs run one after the other, but must not depend on it: what one writes, another may read only after an atomic
// operation of the writer, then one of the reader.
struct Released {
  u32 program_start, stamp_limit, own_stamp;
};

class Accesses {
 public:
  Clock clock;
  void begin_launch() { clock = {}, released.clear(), acquired_from = acquiring_warp = -1; }
  void begin_program() {
    clock.program_start = ++clock.epoch;
    released.push_back({clock.program_start, 0, 0});
    acquired_from = acquiring_warp = -1;
  }
  void barrier() { clock.epoch++; }
  void atomic(int warp) {
    // Released: what all warps wrote before the last barrier, and this warp so far.
    released.back().stamp_limit = clock.epoch << WARP_BITS;
    released.back().own_stamp = clock.stamp(warp);
    if (acquired_from < 0) acquired_from = clock.epoch, acquiring_warp = warp;
  }

  // A conflict of a read by `warp`, or an empty string; `what` it finds there is named.
  std::string read(Region& region, u64 at, int size, int warp, int element) {
    u32 *written = &region.written[at - region.first], *read = &region.read[at - region.first];
    const u32 me = clock.stamp(warp), start = clock.program_start << WARP_BITS, now = clock.epoch << WARP_BITS;
    bool doubtful = false;
    for (int k = 0; k < size; k++) {
      u32 w = written[k];
      doubtful |= (w >= now && w != me) || (w < start && (w != 0 || region.is_shared));
    }
    if (doubtful)
      for (int k = 0; k < size; k++) {
        std::string found = conflict(written[k], warp, "written", region.is_shared);
        if (!found.empty()) return found;
        if (region.is_shared && written[k] < start) return "reads shared memory that was never written";
      }
    for (int k = 0; k < size; k++) read[k] = read[k] >= now && read[k] != me ? now | SEVERAL : me;
    if (!region.is_shared && element > 1)
      for (int k = 0; k < size; k += element)
        if (memcmp(region.data + (at - region.first) + k, &FRESH, element) == 0)
          return "reads memory that was never written";
    return {};
  }
  // The same of a write; storing what is there already conflicts with nothing.
  std::string write(Region& region, u64 at, const u8* value, int size, int warp, bool in_any_order, bool completes) {
    u32 *written = &region.written[at - region.first], *read = &region.read[at - region.first];
    u8* data = region.data + (at - region.first);
    const u32 me = clock.stamp(warp), start = clock.program_start << WARP_BITS, now = clock.epoch << WARP_BITS;
    bool doubtful = false;
    for (int k = 0; k < size; k++) {
      u32 w = written[k], r = read[k];
      doubtful |= (w >= now && w != me) || (r >= now && r != me) || (w != 0 && w < start) || (r != 0 && r < start);
    }
    if (doubtful && !in_any_order)
      for (int k = 0; k < size; k++) {
        if (completes && written[k] == PENDING) continue;
        if (written[k] == PENDING) return "writes where an asynchronous copy was not waited for";
        if (data[k] == value[k]) continue;
        std::string found = conflict(written[k], warp, "written", region.is_shared);
        if (found.empty()) found = conflict(read[k], warp, "read", region.is_shared);
        if (!found.empty()) return found;
      }
    for (int k = 0; k < size; k++) written[k] = me;
    memcpy(data, value, size);
    return {};
  }
  // A conflict of new bytes that are not known yet.
  std::string overwritten(Region& region, u64 at, int size, int warp) {
    for (int k = 0; k < size; k++) {
      std::string found = conflict(region.read[at - region.first + k], warp, "read", true);
      if (found.empty()) found = conflict(region.written[at - region.first + k], warp, "written", true);
      if (!found.empty()) return found;
    }
    return {};
  }
  void pending(Region& region, u64 at, int size) {
    for (int k = 0; k < size; k++) region.written[at - region.first + k] = PENDING;
  }

 private:
  std::vector<Released> released;  // by program, in the order in which they run
  int64_t acquired_from, acquiring_warp;

  std::string conflict(u32 stamp, int warp, const char* what, bool is_shared) {
    if (stamp == 0) return {};
    if (stamp == PENDING) return "reads what an asynchronous copy brings that was not waited for";
    const u32 epoch = stamp >> WARP_BITS, other = stamp & SEVERAL;
    if (epoch < clock.program_start) {
      if (is_shared) return {};
      auto writer = std::upper_bound(released.begin(), released.end(), epoch,
                                     [](u32 e, const Released& r) { return e < r.program_start; });
      --writer;
      bool was_released = stamp < writer->stamp_limit || stamp == writer->own_stamp;
      bool was_acquired = acquired_from >= 0 && (warp == acquiring_warp || int64_t(clock.epoch) > acquired_from);
      if (was_released && was_acquired) return {};
      return format("touches what another program has %s", what);
    }
    if (epoch != clock.epoch || int(other) == warp) return {};
    return format("touches what warp %d has %s since the last barrier", other == SEVERAL ? -1 : int(other), what);
  }
};
}  // namespace emulator
