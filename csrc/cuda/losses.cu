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

// One warp: the terms of a chunk. The lane keeps its logits.
template <class Element>
__device__ __forceinline__ void begin_chunk(const CrossEntropyWork& work, int64_t row,
                                            int64_t chunk, uint32_t lane,
                                            CrossEntropyLane<Element>& own,
                                            typename CrossEntropyLane<Element>::Terms& terms) {
  using Lane = CrossEntropyLane<Element>;
  using T = typename Lane::T;
  own.load(work, row, chunk, lane);
  const T maximum = warp_maximum(own.maximum());
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

// Rows of one chunk, a warp each.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    warp_rows_kernel(const __grid_constant__ CrossEntropyArgs args) {
  using Lane = CrossEntropyLane<Element>;
  const uint32_t lane = threadIdx.x % kWarp;
  const int64_t stride = int64_t(gridDim.x) * kWarpsOfBlock;
  for (int64_t row = int64_t(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarp;
       row < args.work.rows; row += stride) {
    typename Lane::Terms* terms = terms_of<typename Lane::T>(args, row, 1);
    {
      Lane own;
      begin_chunk<Element>(args.work, row, 0, lane, own, *terms);
    }
    __syncwarp();
    end_row<Element>(args, row, lane, 1);
    __syncwarp();
    if (args.work.gradient.first == nullptr) continue;
    Lane own;  // loaded again: kept, it would take most registers all along
    own.load(args.work, row, 0, lane);
    own.finish(args.work, row, 0, lane, *terms, *factors_of(args, row, 1));
  }
}

// Rows of many chunks, a block each.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    block_rows_kernel(const __grid_constant__ CrossEntropyArgs args) {
  using Lane = CrossEntropyLane<Element>;
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t chunks = loss_chunks(args.work.loss.classes);
  for (int64_t row = blockIdx.x; row < args.work.rows; row += gridDim.x) {
    typename Lane::Terms* terms = terms_of<typename Lane::T>(args, row, chunks);
    for (int64_t chunk = warp; chunk < chunks; chunk += kWarpsOfBlock) {
      Lane own;
      begin_chunk<Element>(args.work, row, chunk, lane, own, terms[chunk]);
    }
    __syncthreads();
    if (warp == 0) end_row<Element>(args, row, lane, chunks);
    __syncthreads();
    if (args.work.gradient.first == nullptr) continue;
    for (int64_t chunk = warp; chunk < chunks; chunk += kWarpsOfBlock) {
      Lane own;
      own.load(args.work, row, chunk, lane);
      own.finish(args.work, row, chunk, lane, terms[chunk], *factors_of(args, row, chunks));
    }
  }
}

// Few rows of many chunks, a warp each chunk: the terms, the rows, the gradients.
template <class Element, int phase>
__global__ void __launch_bounds__(kThreads)
    chunks_kernel(const __grid_constant__ CrossEntropyArgs args) {
  using Lane = CrossEntropyLane<Element>;
  const uint32_t lane = threadIdx.x % kWarp;
  const int64_t chunks = loss_chunks(args.work.loss.classes);
  const int64_t count = phase == 1 ? args.work.rows : args.work.rows * chunks;
  const int64_t stride = int64_t(gridDim.x) * kWarpsOfBlock;
  for (int64_t i = int64_t(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarp; i < count;
       i += stride) {
    if constexpr (phase == 1) {
      end_row<Element>(args, i, lane, chunks);
    } else {
      const int64_t row = i / chunks, chunk = i % chunks;
      Lane own;
      typename Lane::Terms& terms = terms_of<typename Lane::T>(args, row, chunks)[chunk];
      if constexpr (phase == 0) {
        begin_chunk<Element>(args.work, row, chunk, lane, own, terms);
      } else {
        own.load(args.work, row, chunk, lane);
        own.finish(args.work, row, chunk, lane, terms, *factors_of(args, row, chunks));
      }
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

template <class Element>
const char* launch_cross_entropy(const CrossEntropyArgs& args, cudaStream_t stream) {
  const int64_t rows = args.work.rows, chunks = loss_chunks(args.work.loss.classes);
  switch (row_shape(args.work)) {
    case RowShape::warp:
      return CudaLaunches::launch<warp_rows_kernel<Element>>(args, blocks_of_warps(rows), stream);
    case RowShape::block:
      return CudaLaunches::launch<block_rows_kernel<Element>>(args, rows, stream);
    default:
      break;
  }
  const int64_t blocks = blocks_of_warps(rows * chunks);
  if (const char* error = CudaLaunches::launch<chunks_kernel<Element, 0>>(args, blocks, stream))
    return error;
  if (const char* error =
          CudaLaunches::launch<chunks_kernel<Element, 1>>(args, blocks_of_warps(rows), stream))
    return error;
  if (args.work.gradient.first == nullptr) return nullptr;
  return CudaLaunches::launch<chunks_kernel<Element, 2>>(args, blocks, stream);
}

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
  return for_dtype(dtype, [&](auto element) {
    return launch_cross_entropy<decltype(element)>(args, static_cast<cudaStream_t>(stream));
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
