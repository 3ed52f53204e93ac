// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// csrc/cuda/cuda.h for a machine without a GPU: what kernels.cu launches, run on the host. With it
// and with the CPU as its accelerator, the bindings take all of the ways of a CUDA device.
#include <functional>

#include "cuda/cuda.h"
#include "cuda/losses.h"
#include "host_launcher.h"
#include "host_losses.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

using namespace fusedopt;

// A stand-in for a CUDA graph: captured launches do not run, they are kept with their arguments.
bool capturing = false;
std::vector<std::function<void()>> captured;
int launches = 0;

struct Recorder {
  HostLauncher host{};

  template <class Launch>
  int run(Launch launch) {
    ++launches;
    if (capturing) {
      captured.push_back(launch);
    } else {
      launch();
    }
    return 0;
  }
  int norm(const NormArgs& args) {
    return run([args] { HostLauncher().norm(args); });
  }
  int prepare(int rule, const PrepareArgs& args) {
    return run([rule, args] { HostLauncher().prepare(rule, args); });
  }
  int find_unready_prepare(int) { return 0; }
  int find_unready(int) { return 0; }
  int find_unready_measure(int) { return 0; }
  PackSpans pack(int kernel) { return host.pack(kernel); }
  int step(int kernel, const LaunchArgs& args) {
    return run([kernel, args] { HostLauncher().step(kernel, args); });
  }
  PackSpans pack_chunks(int kernel) { return host.pack_chunks(kernel); }
  int measure(int kernel, const LaunchArgs& args) {
    return run([kernel, args] { HostLauncher().measure(kernel, args); });
  }
  int total(const TotalArgs& args) {
    return run([args] { HostLauncher().total(args); });
  }
};

// A launch of a loss's kernel, likewise.
template <class Launch>
const char* record(Launch launch) {
  Recorder().run(launch);
  return nullptr;
}

}  // namespace

API void host_begin_capture() {
  captured.clear();
  capturing = true;
}
API void host_end_capture() { capturing = false; }
API void host_replay() {
  for (const auto& launch : captured) launch();
}
// The number of launches since it was last asked for.
API int host_launches() { return std::exchange(launches, 0); }

namespace fusedopt {
namespace cuda {

bool is_capturing(void*) { return capturing; }

const char* norm(const DeviceStep& step, void*) {
  Recorder recorder;
  return launch_norm<int>(step, recorder) == 0 ? nullptr : "the host cannot fail";
}
const char* measure(const DeviceStep& step, void*) {
  Recorder recorder;
  return launch_measure<int>(step, recorder) == 0 ? nullptr : "the host cannot fail";
}
const char* update(const DeviceStep& step, void*) {
  Recorder recorder;
  return launch_update<int>(step, recorder) == 0 ? nullptr : "the host cannot fail";
}

const char* check_targets(const TargetArgs& args, void*) {
  return record([args] { host_check_targets(args); });
}
const char* cross_entropy(const CrossEntropyArgs& args, DType dtype, void*) {
  return record([args, dtype] { host_cross_entropy(args, dtype); });
}
const char* mse(const MseWork& work, DType dtype, void*) {
  return record([work, dtype] { host_mse(work, dtype); });
}
const char* scale(const ScaleArgs& args, DType dtype, void*) {
  return record([args, dtype] { host_scale(args, dtype); });
}
const char* finish_loss(const LossArgs& args, void*) {
  return record([args] { host_finish_loss(args); });
}

}  // namespace cuda
}  // namespace fusedopt
