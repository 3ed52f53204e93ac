// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The CUDA kernels: __global__ wrappers around the bodies in device/, and their launches.
#include <cuda_runtime.h>

#include "cuda.h"
#include "runtime.h"

namespace fusedopt {
namespace cuda {

namespace {

template <class Variant, class Types>
__global__ void __launch_bounds__(kThreads, Tile<Variant, Types>::kMinBlocks)
    step_kernel(const __grid_constant__ LaunchArgs args) {
  Tile<Variant, Types>::run(args, blockIdx.x, gridDim.x, threadIdx.x);
}

template <class Variant, class StateFormat>
__global__ void __launch_bounds__(kThreads, Tile<Variant, Coded>::kMinBlocks)
    coded_step_kernel(const __grid_constant__ LaunchArgs args) {
  Tile<Variant, Coded>::template run<StateFormat>(args, blockIdx.x, gridDim.x, threadIdx.x);
}

// A warp sums up a chunk. The last block to be done makes up the total, and what follows from it.
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormArgs args) {
  const uint32_t thread = threadIdx.x, lane = thread % kWarp;
  const int64_t stride = int64_t(gridDim.x) * kWarps;
  for (int64_t chunk = int64_t(blockIdx.x) * kWarps + thread / kWarp; chunk < args.chunks;
       chunk += stride) {
    double sum = norm_share(args, chunk, lane);
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) args.sums[args.first_chunk + chunk] = sum;
  }
  if (args.last == 0) return;

  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (thread == 0) is_last = atomicAdd(&args.control->arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;

  __shared__ double lanes[kTotalLanes];
  static_assert(kTotalLanes == kThreads, "a lane is a thread");
  __threadfence();
  lanes[thread] = total_lane(args, thread);
  for (int half = kTotalLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) lanes[thread] += lanes[thread + half];
  }
  if (thread == 0) set_control(args.factor, lanes[0], *args.control);
}

// A warp measures a chunk.
template <class Variant, class Types>
__global__ void __launch_bounds__(kThreads, MeasureTile<Variant, Types>::kMinBlocks)
    measure_kernel(const __grid_constant__ LaunchArgs args) {
  if (args.control != nullptr && args.control->skip != 0) return;
  using Body = MeasureTile<Variant, Types>;
  const uint32_t lane = threadIdx.x % kWarp, stride = gridDim.x * kWarps;
  for (uint32_t chunk = blockIdx.x * kWarps + threadIdx.x / kWarp; chunk < args.chunks;
       chunk += stride) {
    uint32_t of_all;
    const auto sums = Body::share(args, chunk, lane, of_all);
    double* const place = lane == 0 ? Body::place_of(args.sums, of_all) : nullptr;
    for (int k = 0; k < Body::kSums; ++k) {
      double sum = sums.of_lane[0][k] + sums.of_lane[1][k];
      for (int distance = kWarp / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (lane == 0) place[k] = sum;
    }
  }
}

// A block adds up the chunks of a parameter.
__global__ void __launch_bounds__(kThreads) total_kernel(const __grid_constant__ TotalArgs args) {
  __shared__ double lanes[kTotalLanes];
  const uint32_t thread = threadIdx.x;
  for (uint32_t i = blockIdx.x; i < args.count; i += gridDim.x) {
    for (int k = 0; k < kMaxSums; ++k) {
      lanes[thread] = measured_lane(args, i, k, thread);
      for (uint32_t half = kTotalLanes / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) lanes[thread] += lanes[thread + half];
      }
      if (thread == 0) args.measured[i].sums[k] = lanes[0];
      __syncthreads();
    }
    if (thread != 0) continue;
    args.measured[i].numel = double(args.chunks[i].numel);
    finish(args.measured[i]);
  }
}

template <class Rule>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ PrepareArgs args) {
  prepare_rows<Rule>(args, threadIdx.x, kThreads);
  __syncthreads();
  advance_counts(args, threadIdx.x, kThreads);
}

// Null, or why the current device cannot run one of these.
template <auto... kernels>
const char* find_unready() {
  const char* error = nullptr;
  int blocks = 0;
  ((error = error == nullptr ? CudaLaunches::resident_blocks<kernels>(blocks) : error), ...);
  return error;
}

struct StepKernel {
  PackSpans pack;
  const char* (*find_unready)();
  const char* (*launch)(const LaunchArgs& args, cudaStream_t stream);
};

template <class Variant, class Types>
struct MakeStepKernel {
  static const char* launch(const LaunchArgs& args, cudaStream_t stream) {
    return CudaLaunches::launch<step_kernel<Variant, Types>>(args, args.chunks, stream);
  }
  static constexpr StepKernel value = {Tile<Variant, Types>::pack,
                                       find_unready<step_kernel<Variant, Types>>, launch};
};

// A launch for each format that states of its spans are in.
template <class Variant>
struct MakeStepKernel<Variant, Coded> {
  template <class... Formats>
  static const char* launch_formats(TypeList<Formats...>, const LaunchArgs& args,
                                    cudaStream_t stream) {
    const char* error = nullptr;
    const auto launch_format = [&](auto format) {
      using Format = decltype(format);
      if (error == nullptr && (args.formats >> state_format<Format> & 1u) != 0)
        error = CudaLaunches::launch<coded_step_kernel<Variant, Format>>(args, args.chunks, stream);
    };
    (launch_format(Formats{}), ...);
    return error;
  }
  static const char* launch(const LaunchArgs& args, cudaStream_t stream) {
    return launch_formats(StateFormats{}, args, stream);
  }
  template <class... Formats>
  static constexpr StepKernel value_of(TypeList<Formats...>) {
    return {Tile<Variant, Coded>::pack, find_unready<coded_step_kernel<Variant, Formats>...>,
            launch};
  }
  static constexpr StepKernel value = value_of(StateFormats{});
};

// Those of rules that measure; null for others.
struct MeasureKernel {
  PackSpans pack = nullptr;
  const char* (*find_unready)() = nullptr;
  const char* (*launch)(const LaunchArgs& args, cudaStream_t stream) = nullptr;
};

template <class Variant, class Types>
struct MakeMeasureKernel {
  static const char* launch(const LaunchArgs& args, cudaStream_t stream) {
    const int64_t blocks = (int64_t(args.chunks) + kWarps - 1) / kWarps;
    return CudaLaunches::launch<measure_kernel<Variant, Types>>(args, blocks, stream);
  }
  static constexpr MeasureKernel make() {
    if constexpr (sums_of<typename Variant::Rule> > 0) {
      return {MeasureTile<Variant, Types>::pack,
              find_unready<measure_kernel<Variant, Types>, total_kernel>, launch};
    } else {
      return {};
    }
  }
  static constexpr MeasureKernel value = make();
};

struct PrepareKernel {
  const char* (*find_unready)();
  const char* (*launch)(const PrepareArgs& args, cudaStream_t stream);
};

template <class Rule>
const char* launch_prepare_kernel(const PrepareArgs& args, cudaStream_t stream) {
  return CudaLaunches::launch<prepare_kernel<Rule>>(args, 1, stream);
}

template <class... Members>
std::vector<PrepareKernel> prepare_kernels(TypeList<Members...>) {
  return {{find_unready<prepare_kernel<Members>>, launch_prepare_kernel<Members>}...};
}

class Launcher {
 public:
  explicit Launcher(cudaStream_t stream) : stream_(stream) {}

  const char* norm(const NormArgs& args) {
    return CudaLaunches::launch<norm_kernel>(args, norm_blocks(args), stream_);
  }
  const char* find_unready_prepare(int rule) { return prepares()[rule].find_unready(); }
  const char* prepare(int rule, const PrepareArgs& args) {
    return prepares()[rule].launch(args, stream_);
  }
  PackSpans pack(int kernel) { return kernels()[kernel].pack; }
  const char* find_unready(int kernel) { return kernels()[kernel].find_unready(); }
  const char* step(int kernel, const LaunchArgs& args) {
    return kernels()[kernel].launch(args, stream_);
  }
  const char* find_unready_measure(int kernel) { return measures()[kernel].find_unready(); }
  PackSpans pack_chunks(int kernel) { return measures()[kernel].pack; }
  const char* measure(int kernel, const LaunchArgs& args) {
    return measures()[kernel].launch(args, stream_);
  }
  const char* total(const TotalArgs& args) {
    return CudaLaunches::launch<total_kernel>(args, args.count, stream_);
  }

 private:
  static const std::vector<MeasureKernel>& measures() {
    static const auto table = kernel_table<MakeMeasureKernel, MeasureKernel>();
    return table;
  }
  static const std::vector<PrepareKernel>& prepares() {
    static const auto table = prepare_kernels(Rules{});
    return table;
  }
  static const std::vector<StepKernel>& kernels() {
    static const auto table = kernel_table<MakeStepKernel, StepKernel>();
    return table;
  }

  cudaStream_t stream_;
};

}  // namespace

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess)
    return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();  // forgotten here, or the next launch would report it
  return false;
}

const char* norm(const DeviceStep& step, void* stream) {
  Launcher launcher(static_cast<cudaStream_t>(stream));
  return launch_norm<const char*>(step, launcher);
}

const char* measure(const DeviceStep& step, void* stream) {
  Launcher launcher(static_cast<cudaStream_t>(stream));
  return launch_measure<const char*>(step, launcher);
}

const char* update(const DeviceStep& step, void* stream) {
  Launcher launcher(static_cast<cudaStream_t>(stream));
  return launch_update<const char*>(step, launcher);
}

}  // namespace cuda
}  // namespace fusedopt
