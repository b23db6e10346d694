// The part of the CUDA driver that Triton uses. A module is PTX, and a launch runs it.
#include "parser.h"

using namespace emulator;

namespace {
std::mutex lock;
std::string message = "no error";
std::vector<std::string> faults;
std::map<std::string, Counts> counts;  // by kernel
thread_local std::vector<std::pair<u64, u64>> allowed;
thread_local bool is_restricted = false;
Accesses accesses;
char handle[64];
enum { SUCCESS = 0, FAULT = 999 };

template <class F>
int guarded(F f) {
  try {
    f();
    return SUCCESS;
  } catch (const Fault& fault) {
    message = "emulator: " + fault.text;
    faults.push_back(fault.text);
    return FAULT;
  }
}

struct LaunchConfig {  // as CUlaunchConfig begins
  u32 grid[3], block[3], shared_bytes;
};

// What a launch may access: what `emulator_allow` says, or the storages that its arguments point into.
std::vector<std::unique_ptr<Region>> regions_of(const Program& program, void** arguments) {
  std::vector<std::pair<u64, u64>> spans = allowed;
  if (!is_restricted)
    for (size_t k = 0; k < program.parameter_sizes.size(); k++)
      if (program.parameter_sizes[k] == 8) spans.push_back(storages().around(*static_cast<u64*>(arguments[k])));
  std::sort(spans.begin(), spans.end());
  std::vector<std::pair<u64, u64>> joined;
  for (auto [first, last] : spans) {
    if (first == last) continue;
    if (!joined.empty() && first <= joined.back().second)
      joined.back().second = std::max(joined.back().second, last);
    else
      joined.emplace_back(first, last);
  }
  std::vector<std::unique_ptr<Region>> regions;
  for (auto [first, last] : joined)
    regions.push_back(std::make_unique<Region>(first, last, reinterpret_cast<u8*>(first), false));
  return regions;
}

void launch(const Program& program, const LaunchConfig& config, void** arguments) {
  if (int(config.block[0]) != program.threads || config.block[1] != 1 || config.block[2] != 1 ||
      program.threads % LANES)
    throw Fault{program.name + format(": %u threads, compiled for %d", config.block[0], program.threads)};
  if (config.shared_bytes > options.shared_limit)
    throw Fault{program.name +
                format(": %u bytes of shared memory, the device has %ld", config.shared_bytes, options.shared_limit)};
  auto regions = regions_of(program, arguments);
  accesses.begin_launch();
  Machine machine(program, accesses, regions, config.shared_bytes);
  for (size_t k = 0; k < program.parameter_sizes.size(); k++) {
    const u8* value = static_cast<const u8*>(arguments[k]);
    machine.arguments.insert(machine.arguments.end(), value, value + program.parameter_sizes[k]);
  }
  std::copy_n(config.grid, 3, machine.grid.begin());
  std::copy_n(config.block, 3, machine.block.begin());
  const u32 programs = config.grid[0] * config.grid[1] * config.grid[2];
  for (u32 k = 0; k < programs; k++) {
    u32 n = options.backwards ? programs - 1 - k : k;
    machine.program_id = {n % config.grid[0], n / config.grid[0] % config.grid[1], n / config.grid[0] / config.grid[1]};
    machine.run_program();
  }
  machine.counts[LAUNCHES] = 1, machine.counts[PROGRAMS] = programs;
  for (int k = 0; k < COUNTS; k++) counts[program.name][k] += machine.counts[k];
}
}  // namespace

extern "C" {
int cuModuleLoadData(void** module, const char* ptx) {
  return guarded([&] { *module = new Program(Parser(ptx).program); });
}
int cuModuleGetFunction(void** function, void* module, const char*) { return *function = module, SUCCESS; }
int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** arguments, void**) {
  std::lock_guard<std::mutex> guard(lock);
  return guarded([&] { launch(*static_cast<Program*>(function), *config, arguments); });
}
int cuGetErrorString(int, const char** text) { return *text = message.c_str(), SUCCESS; }
int cuCtxGetCurrent(void** context) { return *context = handle, SUCCESS; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, SUCCESS; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = handle, SUCCESS; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  // Lanes of a warp; shared memory of a block, by default and at most.
  return *value = attribute == 10   ? LANES
                  : attribute == 8  ? 49152
                  : attribute == 97 ? int(options.shared_limit)
                                    : 1 << 18,
         SUCCESS;
}
int cuFuncGetAttribute(int* value, int attribute, void*) { return *value = attribute == 0 ? 1024 : 0, SUCCESS; }
int cuPointerGetAttribute(void** value, int, void* address) { return *value = address, SUCCESS; }
int cuOccupancyMaxActiveClusters(int* clusters, void*, const void*) { return *clusters = 1, SUCCESS; }
int cuCtxGetLimit(size_t*, int) { return SUCCESS; }
int cuCtxSetCurrent(void*) { return SUCCESS; }
int cuCtxSetLimit(int, size_t) { return SUCCESS; }
int cuFuncSetAttribute(void*, int, int) { return SUCCESS; }
int cuFuncSetCacheConfig(void*, int) { return SUCCESS; }
int cuTensorMapEncodeTiled() { return FAULT; }
int cuDriverGetVersion(int* version) { return *version = 12080, SUCCESS; }

void emulator_install() { c10::SetCPUAllocator(&storages(), 1); }
// Launches of this thread may access these [first, last) only; with count < 0, the storages that their arguments point
// into.
void emulator_allow(const u64* spans, s64 count) {
  allowed.clear();
  is_restricted = count >= 0;
  for (s64 k = 0; k < count; k++) allowed.emplace_back(spans[2 * k], spans[2 * k + 1]);
}
// All live storages too, for kernels that read addresses from tables.
void emulator_allow_storages() {
  auto all = storages().all();
  allowed.insert(allowed.end(), all.begin(), all.end());
}
s64 emulator_option(const char* name, s64 value) {
  const std::map<std::string, s64*> all = {
      {"approximate", &options.approximate}, {"seed", &options.seed},
      {"truncate", &options.truncate},       {"extra_bits", &options.extra_bits},
      {"backwards", &options.backwards},     {"shared_limit", &options.shared_limit}};
  return std::exchange(*all.at(name), value);
}
// Another PTX for a function.
int emulator_replace(Program* function, const char* ptx) {
  return guarded([&] { *function = Parser(ptx).program; });
}
const char* emulator_message() { return message.c_str(); }
// Faults, and each kernel's counts, since the last call, one on a line.
const char* emulator_faults() {
  static std::string text;
  text.clear();
  for (const std::string& each : faults) text += each + "\n";
  faults.clear();
  return text.c_str();
}
const char* emulator_counts() {
  static std::string text;
  text.clear();
  for (auto& [name, numbers] : counts) {
    text += name;
    for (u64 number : numbers) text += format(" %lu", number);
    text += "\n";
  }
  counts.clear();
  return text.c_str();
}
}
