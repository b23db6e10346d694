// A program of a launch: its warps, their registers and what decides which lanes run.
#pragma once
#include <array>
#include <cmath>
#include <unordered_map>

#include "memory.h"

namespace emulator {
constexpr int LANES = 32;
constexpr u32 ALL = ~0u;

struct Options {
  s64 approximate = 0;  // 0: approximate instructions are rounded correctly; off by their documented error, 1: at
                        // random, 2: upwards, 3: downwards
  s64 seed = 0;
  s64 truncate = 0;    // matrix units truncate their sums to the bits of the largest term
  s64 extra_bits = 0;  // and so many more
  s64 backwards = 0;   // programs run from the last to the first
  s64 shared_limit = 232448;
};
inline Options options;

struct Machine;
struct Warp;
struct Instruction;
using Handler = void (*)(Machine&, Warp&, const Instruction&, u32 active);

struct Instruction {
  Handler run = nullptr;
  int predicate = -1;  // where in the registers, as `o`; -1: none
  bool negated = false, in_any_order = false;
  std::array<int, 20> o{};  // operands: byte offsets into a warp's registers, -1: none
  std::array<int, 20> widths{};
  int size = 0, count = 1, mode = 0, flag = 0;
  s64 immediate = 0;
};

struct Fill {
  int offset, width;
  u64 value;  // a constant, or where a special register is in SPECIALS
};
inline const std::vector<std::string> SPECIALS = {
    "%tid.x",  "%tid.y",  "%tid.z",  "%ctaid.x",  "%ctaid.y",  "%ctaid.z", "%ntid.x",
    "%ntid.y", "%ntid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid"};

struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::string> text;  // of each instruction
  std::vector<Fill> constants, specials;
  std::vector<int> parameter_sizes;  // of the launch's arguments, one after the other
  int register_bytes = 0, threads = 0;
};

struct Copy {
  int lane, size, given, group;
  u64 to, from;
  std::array<u8, 16> data;
};

struct Warp {
  int id = 0, pc = 0, next_pc = INT32_MAX;  // next_pc: of the lanes that wait
  u32 active = 0;                           // lanes that run
  enum { RUNNING, AT_BARRIER, DONE } state = RUNNING;
  std::vector<std::pair<int, u32>> waiting;  // (pc, lanes) elsewhere
  std::vector<u8> registers;
  std::deque<Copy> copies;
  std::array<int, LANES> groups{};
  template <class T>
  T* reg(int offset) {
    return reinterpret_cast<T*>(registers.data() + offset);
  }
  u64 value(int offset, int width, int lane) const {
    u64 v = 0;
    memcpy(&v, registers.data() + offset + lane * width, width);
    return v;
  }
  void set(int offset, int width, int lane, u64 value) {
    memcpy(registers.data() + offset + lane * width, &value, width);
  }
};

// What a launch does. Sectors have 32 bytes: those that loads and stores of global memory touch, instruction by
// instruction, and as many as their bytes fill. Barriers are those of one warp of each program.
enum Count { LAUNCHES, PROGRAMS, INSTRUCTIONS, BARRIERS, LOADED, LOADED_LEAST, STORED, STORED_LEAST, COUNTS };
using Counts = std::array<u64, COUNTS>;

struct Machine {
  const Program& program;
  Accesses& accesses;
  std::vector<std::unique_ptr<Region>>& regions;  // of global memory, sorted
  std::vector<Region*> last_hit;                  // by instruction
  std::vector<u8> arguments, shared_bytes;
  Region shared;
  std::vector<Warp> warps;
  std::array<u32, 3> grid, block, program_id{};
  Counts counts{};
  std::vector<u64> places;  // that an instruction has accessed in global memory

  Machine(const Program& program, Accesses& accesses, std::vector<std::unique_ptr<Region>>& regions, size_t shared_size)
      : program(program),
        accesses(accesses),
        regions(regions),
        last_hit(program.code.size(), nullptr),
        shared_bytes(shared_size),
        shared(0, shared_size, shared_bytes.data(), true) {}

  [[noreturn]] void fault(const Warp& w, const Instruction& i, const std::string& what, int lane = -1) {
    std::string at = lane < 0 ? "" : format(", lane %d", lane);
    throw Fault{format("%s, program %u, warp %d%s: ", program.name.c_str(), program_id[0], w.id, at.c_str()) + what +
                " | " + program.text[&i - program.code.data()]};
  }

  Region& region(const Warp& w, const Instruction& i, int lane, u64 at, int size) {
    if (at % size) fault(w, i, format("%d bytes at the misaligned address %#lx", size, at), lane);
    places.push_back(at);
    Region*& last = last_hit[&i - program.code.data()];
    if (last && at >= last->first && at + size <= last->last) return *last;
    auto next = std::upper_bound(regions.begin(), regions.end(), at, [](u64 a, auto& r) { return a < r->first; });
    if (next != regions.begin() && at + size <= (*--next)->last) return *(last = next->get());
    auto [first, end] = storages().around(at);
    std::string where = first == 0 ? "no storage" : format("byte %lu of a storage of %lu", at - first, end - first);
    fault(w, i, format("%d bytes at %#lx, outside of the launch's tensors (%s)", size, at, where.c_str()), lane);
  }
  Region& shared_region(const Warp& w, const Instruction& i, int lane, u64 at, int size) {
    if (at % size) fault(w, i, format("%d bytes at the misaligned shared address %#lx", size, at), lane);
    if (at + size > shared.last)
      fault(w, i, format("%d bytes at %#lx of %lu bytes of shared memory", size, at, shared.last), lane);
    return shared;
  }
  const u8* read(const Warp& w, const Instruction& i, int lane, Region& r, u64 at, int size, int element) {
    std::string found = accesses.read(r, at, size, w.id, element);
    if (!found.empty()) fault(w, i, found + format(" (%d bytes at %#lx)", size, at), lane);
    return r.data + (at - r.first);
  }
  void write(const Warp& w, const Instruction& i, int lane, Region& r, u64 at, const u8* value, int size,
             bool completes = false) {
    std::string found = accesses.write(r, at, value, size, w.id, i.in_any_order, completes);
    if (!found.empty()) fault(w, i, found + format(" (%d bytes at %#lx)", size, at), lane);
  }
  void count_sectors(Count touched, int size) {
    auto distinct = [&] {
      std::sort(places.begin(), places.end());
      return u64(std::unique(places.begin(), places.end()) - places.begin());
    };
    counts[touched + 1] += (distinct() * size + 31) / 32;
    for (u64& at : places) at /= 32;
    counts[touched] += distinct();
    places.clear();
  }
  // An instruction that all lanes of the warp take together.
  void require_whole_warp(const Warp& w, const Instruction& i, u32 active) {
    if (active != ALL) fault(w, i, format("taken by lanes %#x only", active));
  }

  // Of the lanes' groups the one with the lowest pc runs, so that branches meet where they join.
  void reschedule(Warp& w) {
    if (w.active) w.waiting.emplace_back(w.pc, w.active);
    w.active = 0;
    w.next_pc = INT32_MAX;
    if (w.waiting.empty()) {
      w.state = Warp::DONE;
      return;
    }
    std::sort(w.waiting.begin(), w.waiting.end());
    w.pc = w.waiting[0].first;
    std::vector<std::pair<int, u32>> others;
    for (auto [pc, lanes] : w.waiting) {
      if (pc == w.pc)
        w.active |= lanes;
      else
        others.emplace_back(pc, lanes);
    }
    if (!others.empty()) w.next_pc = others[0].first;
    w.waiting = std::move(others);
  }

  void run(Warp& w) {
    while (w.state == Warp::RUNNING) {
      if (w.pc >= w.next_pc) {
        reschedule(w);
        continue;
      }
      const Instruction& i = program.code[w.pc++];
      u32 active = w.active;
      if (i.predicate >= 0) active &= i.negated ? ~*w.reg<u32>(i.predicate) : *w.reg<u32>(i.predicate);
      counts[INSTRUCTIONS]++;
      if (active) i.run(*this, w, i, active);
    }
  }

  void begin(Warp& w, int id) {
    w.id = id;
    w.registers.assign(program.register_bytes, 0);
    w.active = ALL;
    for (auto [offset, width, value] : program.constants) {
      if (width == 0) *w.reg<u32>(offset) = value ? ALL : 0;  // a predicate: one bit for each lane
      for (int lane = 0; width && lane < LANES; lane++) w.set(offset, width, lane, value);
    }
    for (auto [offset, width, which] : program.specials)
      for (int lane = 0; lane < LANES; lane++) {
        u32 thread = id * LANES + lane;
        std::array<u32, 3> ids[] = {
            {thread % block[0], thread / block[0] % block[1], thread / block[0] / block[1]}, program_id, block, grid,
            {u32(lane)}};
        w.set(offset, width, lane, ids[which / 3][which % 3]);
      }
  }

  void run_program() {
    accesses.begin_program();
    warps.assign(program.threads / LANES, {});
    for (size_t id = 0; id < warps.size(); id++) begin(warps[id], int(id));
    for (size_t done = 0; done < warps.size();) {
      for (Warp& w : warps) run(w);
      done = std::count_if(warps.begin(), warps.end(), [](Warp& w) { return w.state == Warp::DONE; });
      for (Warp& w : warps)
        if (w.state == Warp::AT_BARRIER && done > 0)
          fault(w, program.code[w.pc - 1], "a barrier that another warp does not reach");
      for (Warp& w : warps) {
        if (w.state == Warp::DONE) continue;
        if (w.pc != warps[0].pc) fault(w, program.code[w.pc - 1], "another barrier than that of warp 0");
        w.state = Warp::RUNNING;
      }
      accesses.barrier();
    }
    for (Warp& w : warps)
      if (!w.copies.empty()) fault(w, program.code.back(), "ends before an asynchronous copy was waited for");
  }
};
}  // namespace emulator
