// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The CUDA kernels: __global__ wrappers around the bodies in device/, and their launches.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "cuda.h"

namespace fusedopt {
namespace cuda {

namespace {

template <class Variant, class Types>
__global__ void __launch_bounds__(kThreads, Tile<Variant, Types>::kMinBlocks)
    step_kernel(const __grid_constant__ LaunchArgs args) {
  Tile<Variant, Types>::run(args, blockIdx.x, gridDim.x, threadIdx.x);
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

template <class Rule>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ PrepareArgs args) {
  prepare_rows<Rule>(args, threadIdx.x, kThreads);
  __syncthreads();
  advance_counts(args, threadIdx.x, kThreads);
}

// As many blocks of a kernel as the current device holds at a time.
template <auto kernel>
cudaError_t resident_blocks(int& blocks) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, processors = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (device < kDevices && (blocks = known[device]) != 0) return cudaSuccess;
  if (cudaError_t error =
          cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
    return error;
  if (cudaError_t error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0))
    return error;
  blocks = std::max(1, blocks) * processors;
  if (device < kDevices) known[device] = blocks;
  return cudaSuccess;
}

template <auto kernel, class Args>
cudaError_t launch(const Args& args, int64_t wanted_blocks, cudaStream_t stream) {
  int blocks = 0;
  if (cudaError_t error = resident_blocks<kernel>(blocks)) return error;
  kernel<<<unsigned(std::clamp<int64_t>(wanted_blocks, 1, blocks)), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

struct StepKernel {
  PackSpans pack;
  cudaError_t (*launch)(const LaunchArgs& args, cudaStream_t stream);
};

template <class Variant, class Types>
struct MakeStepKernel {
  static cudaError_t launch_chunks(const LaunchArgs& args, cudaStream_t stream) {
    return launch<step_kernel<Variant, Types>>(args, args.chunks, stream);
  }
  static constexpr StepKernel value = {Tile<Variant, Types>::pack, launch_chunks};
};

using Prepare = cudaError_t (*)(const PrepareArgs& args, cudaStream_t stream);

template <class Rule>
cudaError_t launch_prepare_kernel(const PrepareArgs& args, cudaStream_t stream) {
  return launch<prepare_kernel<Rule>>(args, 1, stream);
}

template <class... Members>
std::vector<Prepare> prepare_kernels(TypeList<Members...>) {
  return {launch_prepare_kernel<Members>...};
}

class Launcher {
 public:
  explicit Launcher(cudaStream_t stream) : stream_(stream) {}

  cudaError_t norm(const NormArgs& args) {
    return launch<norm_kernel>(args, (args.chunks + kWarps - 1) / kWarps, stream_);
  }
  cudaError_t prepare(int rule, const PrepareArgs& args) {
    static const auto kernels = prepare_kernels(Rules{});
    return kernels[rule](args, stream_);
  }
  PackSpans pack(int kernel) { return kernels()[kernel].pack; }
  cudaError_t step(int kernel, const LaunchArgs& args) {
    return kernels()[kernel].launch(args, stream_);
  }

 private:
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

namespace {

const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* norm(const DeviceStep& step, void* stream) {
  Launcher launcher(static_cast<cudaStream_t>(stream));
  return text_of(launch_norm<cudaError_t>(step, launcher));
}

const char* update(const DeviceStep& step, void* stream) {
  Launcher launcher(static_cast<cudaStream_t>(stream));
  return text_of(launch_update<cudaError_t>(step, launcher));
}

}  // namespace cuda
}  // namespace fusedopt
