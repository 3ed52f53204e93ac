// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The CUDA kernels of losses: __global__ wrappers around the bodies in device/losses, and launches.
#include <cuda_runtime.h>

#include "losses.h"
#include "runtime.h"

namespace fusedopt {
namespace cuda {

namespace {

constexpr uint32_t kAll = 0xffffffffu;
constexpr int kWarpsOfBlock = kThreads / kWarp;

template <class T>
__device__ __forceinline__ T warp_maximum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = larger_of(__shfl_xor_sync(kAll, value, distance), value);
  return value;
}
__device__ __forceinline__ double warp_sum(double value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kAll, value, distance);
  return value;
}

// One warp: the terms of a chunk.
template <class Element>
__device__ __forceinline__ void begin_chunk(const CrossEntropyWork& work, int64_t row,
                                            int64_t chunk, uint32_t lane,
                                            typename CrossEntropyLane<Element>::Terms& terms) {
  using Lane = CrossEntropyLane<Element>;
  using T = typename Lane::T;
  Lane own;
  const T maximum = warp_maximum(Lane::maximum(work, row, chunk, lane));
  own.add_up(work, row, chunk, lane, maximum);
  const auto exchange = [](T value, int distance) {
    return __shfl_xor_sync(kAll, value, distance);
  };
  const T sum = Lane::tree(own.sums, exchange);
  T distance = 0, share = 0;
  if (work.has_shares()) {
    distance = Lane::tree(own.distances, exchange);
    share = Lane::tree(own.shares, exchange);
  }
  if (lane == 0) terms = {maximum, sum, distance, share};
}

// One warp: the loss of a row, and the scales of its chunks.
template <class Element>
__device__ __forceinline__ void end_row(const CrossEntropyArgs& args, int64_t row, uint32_t lane,
                                        int64_t chunks) {
  using T = typename CrossEntropyLane<Element>::T;
  ChunkTerms<T>* terms = terms_of<T>(args, row, chunks);
  T largest = lowest(T());
  for (int64_t i = lane; i < chunks; i += kWarp) largest = larger_of(terms[i].maximum, largest);
  const double maximum = double(warp_maximum(largest));
  const RowParts parts = row_parts(terms, chunks, lane, maximum);
  const RowTerms of_row{maximum, warp_sum(parts.sum), warp_sum(parts.distance),
                        warp_sum(parts.share)};
  double scale = 0;
  if (lane == 0)
    *factors_of(args, row, chunks) = finish_row<Element>(args.work, row, of_row, &scale);
  scale = __shfl_sync(kAll, scale, 0);
  set_scales(terms, chunks, lane, maximum, scale);
}

// A team, a warp or the whole block, takes one task after the other: a row, or a chunk of one.
// (With three blocks on a multiprocessor in mind, ptxas would spill a register.)
template <class Element>
__global__ void __launch_bounds__(kThreads, 2)
    cross_entropy_kernel(const __grid_constant__ CrossEntropyArgs args) {
  using Lane = CrossEntropyLane<Element>;
  const uint32_t lane = threadIdx.x % kWarp;
  const bool is_block = args.team == Team::block;
  const uint32_t warps = is_block ? kWarpsOfBlock : 1;
  const uint32_t warp = is_block ? threadIdx.x / kWarp : 0;
  const int64_t teams = int64_t(gridDim.x) * (is_block ? 1 : kWarpsOfBlock);
  const int64_t chunks = loss_chunks(args.work.loss.classes);
  const auto synchronize = [=] {
    if (is_block)
      __syncthreads();
    else
      __syncwarp();
  };
  for (int64_t task = is_block ? blockIdx.x
                               : int64_t(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarp;
       task < tasks_of(args); task += teams) {
    const int64_t row = args.by_chunk ? task / chunks : task;
    const int64_t first = args.by_chunk ? task % chunks : 0;
    const int64_t last = args.by_chunk ? first + 1 : chunks;
    typename Lane::Terms* terms = terms_of<typename Lane::T>(args, row, chunks);
    if (args.phases & kBegin) {
      for (int64_t chunk = first + warp; chunk < last; chunk += warps)
        begin_chunk<Element>(args.work, row, chunk, lane, terms[chunk]);
      synchronize();
    }
    if (args.phases & kRow) {
      if (warp == 0) end_row<Element>(args, row, lane, chunks);
      synchronize();
    }
    if (args.phases & kFinish) {
      for (int64_t chunk = first + warp; chunk < last; chunk += warps)
        Lane::finish(args.work, row, chunk, lane, terms[chunk], *factors_of(args, row, chunks));
    }
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads) mse_kernel(const __grid_constant__ MseWork work) {
  const uint32_t lane = threadIdx.x % kWarp;
  const int64_t chunks = (work.numel + kNormChunk - 1) / kNormChunk;
  const int64_t stride = int64_t(gridDim.x) * kWarpsOfBlock;
  for (int64_t chunk = int64_t(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarp; chunk < chunks;
       chunk += stride) {
    const double sum = warp_sum(mse_lane<Element>(work, chunk, lane));
    if (lane == 0) work.sums[chunk] = sum;
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleArgs args) {
  scale_values<Element>(args, int64_t(blockIdx.x) * kThreads + threadIdx.x,
                        int64_t(gridDim.x) * kThreads);
}

// One block: the sum over its threads, each of which is a lane of a total.
__device__ __forceinline__ double block_total(double own, double* lanes) {
  static_assert(kTotalLanes == kThreads, "a lane is a thread");
  lanes[threadIdx.x] = own;
  for (uint32_t half = kTotalLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
  }
  __syncthreads();
  return lanes[0];
}

__global__ void __launch_bounds__(kThreads)
    targets_kernel(const __grid_constant__ TargetArgs args) {
  __shared__ double weights[kTotalLanes], counts[kTotalLanes];
  const Divisors own = target_lane(args, threadIdx.x);
  const double weight = block_total(own.weight, weights), valid = block_total(own.valid, counts);
  if (threadIdx.x == 0) *args.divisors = {weight, valid};
}

__global__ void __launch_bounds__(kThreads) loss_kernel(const __grid_constant__ LossArgs args) {
  __shared__ double lanes[kTotalLanes];
  const double sum = block_total(loss_lane(args, threadIdx.x), lanes);
  if (threadIdx.x == 0) finish_loss(args, sum);
}

int64_t blocks_of_warps(int64_t warps) { return (warps + kWarpsOfBlock - 1) / kWarpsOfBlock; }

// Calls run(Element()) for the element of a dtype.
template <class Run>
const char* for_dtype(DType dtype, Run run) {
  switch (dtype) {
    case DType::float32:
      return run(float());
    case DType::float64:
      return run(double());
    case DType::bfloat16:
      return run(bfloat16());
    default:
      return run(float16());
  }
}

}  // namespace

const char* check_targets(const TargetArgs& args, void* stream) {
  return CudaLaunches::launch<targets_kernel>(args, 1, static_cast<cudaStream_t>(stream));
}

const char* cross_entropy(const CrossEntropyArgs& args, DType dtype, void* stream) {
  const int64_t tasks = tasks_of(args);
  const int64_t blocks = args.team == Team::block ? tasks : blocks_of_warps(tasks);
  return for_dtype(dtype, [&](auto element) {
    return CudaLaunches::launch<cross_entropy_kernel<decltype(element)>>(
        args, blocks, static_cast<cudaStream_t>(stream));
  });
}

const char* mse(const MseWork& work, DType dtype, void* stream) {
  return for_dtype(dtype, [&](auto element) {
    return CudaLaunches::launch<mse_kernel<decltype(element)>>(
        work, blocks_of_warps(norm_chunks(work.numel)), static_cast<cudaStream_t>(stream));
  });
}

const char* scale(const ScaleArgs& args, DType dtype, void* stream) {
  return for_dtype(dtype, [&](auto element) {
    const int64_t of_block = kThreads * 16 / int64_t(sizeof element);
    return CudaLaunches::launch<scale_kernel<decltype(element)>>(
        args, (args.count + of_block - 1) / of_block, static_cast<cudaStream_t>(stream));
  });
}

const char* finish_loss(const LossArgs& args, void* stream) {
  return CudaLaunches::launch<loss_kernel>(args, 1, static_cast<cudaStream_t>(stream));
}

}  // namespace cuda
}  // namespace fusedopt
