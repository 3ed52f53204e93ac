// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// csrc/cuda/launch.h over a runtime that fails where it is told to, as a C API for ctypes. And a
// step on a device that lacks a kernel.
#include <utility>

#include "cuda/launch.h"
#include "device/step.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

enum Call { kCurrentDevice, kDriverVersion, kProcessors, kResidentBlocks, kLaunch, kCalls };
constexpr int kLacksCode = 209;

int errors[kCalls] = {};
int driver = fusedopt::cuda::kLeastDriver;
int device = 0;
int last_error = 0;  // as cudaGetLastError() would tell it to whoever asks next
int launched_blocks = 0;
int queries = 0;

int result(Call call) {
  if (errors[call] != 0) last_error = errors[call];
  return errors[call];
}

void kernel() {}
void other_kernel() {}

struct FakeRuntime {
  static int current_device(int& current) {
    current = device;
    return result(kCurrentDevice);
  }
  static int driver_version(int& version) {
    version = driver;
    return result(kDriverVersion);
  }
  static int processors(int, int& count) {
    count = 100;
    return result(kProcessors);
  }
  template <auto>
  static int resident_blocks(int& blocks) {
    ++queries;
    blocks = 2;
    return result(kResidentBlocks);
  }
  template <auto>
  static int launch(int, int blocks, int) {
    launched_blocks = errors[kLaunch] == 0 ? blocks : 0;
    return result(kLaunch);
  }
  static void forget_error() { last_error = 0; }
  static const char* text(int error) { return error == kLacksCode ? "no image" : "an error"; }
  static bool lacks_code(int error) { return error == kLacksCode; }
};
using FakeLaunches = fusedopt::cuda::Launches<FakeRuntime>;

// Counts launches, and has no kernel of one number, or none that prepares rows.
struct FakeLauncher {
  int lacking_kernel, lacking_rule, launched = 0;

  const char* norm(const fusedopt::NormArgs&) { return count(); }
  const char* prepare(int, const fusedopt::PrepareArgs&) { return count(); }
  const char* step(int, const fusedopt::LaunchArgs&) { return count(); }
  const char* find_unready_prepare(int rule) { return rule == lacking_rule ? "lacking" : nullptr; }
  const char* measure(int, const fusedopt::LaunchArgs&) { return count(); }
  const char* total(const fusedopt::TotalArgs&) { return count(); }
  const char* find_unready_measure(int kernel) { return find_unready(kernel); }
  static fusedopt::PackSpans pack_chunks(int kernel) { return pack(kernel); }
  const char* find_unready(int kernel) { return kernel == lacking_kernel ? "lacking" : nullptr; }
  static fusedopt::PackSpans pack(int) {
    return [](const fusedopt::Span*, size_t count, size_t, int, const fusedopt::HyperRow*,
              fusedopt::LaunchArgs& args) {
      args.spans = 1;
      return count;
    };
  }
  const char* count() {
    ++launched;
    return nullptr;
  }
};

}  // namespace

API void set_error(int call, int error) { errors[call] = error; }
API void set_driver(int version) { driver = version; }
API void set_device(int number) { device = number; }
// A step of spans of the kernels 0, 1 and 2, with rows of the rules 0 and 1: how many launches
// there were; negative where it failed.
API int launches_without(int kernel, int rule) {
  fusedopt::Span spans[3] = {};
  for (int i = 0; i < 3; ++i) spans[i].kernel = i;
  const fusedopt::RowSource sources[2] = {};
  const int rules[2] = {0, 1};
  fusedopt::DeviceStep step;
  step.spans = spans;
  step.span_count = 3;
  step.sources = sources;
  step.source_rules = rules;
  step.source_count = 2;
  FakeLauncher launcher{kernel, rule};
  const char* const error = fusedopt::launch_update<const char*>(step, launcher);
  return error == nullptr ? launcher.launched : -1 - launcher.launched;
}

API int left_error() { return last_error; }
API int blocks_of_launch() { return std::exchange(launched_blocks, 0); }
API int count_queries() { return std::exchange(queries, 0); }
API const char* launch(int64_t wanted) { return FakeLaunches::launch<kernel>(0, wanted, 0); }
API const char* launch_other(int64_t wanted) {
  return FakeLaunches::launch<other_kernel>(0, wanted, 0);
}
