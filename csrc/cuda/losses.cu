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

// One warp: the terms of a chunk, whose exponentials its lanes have then.
template <class Lane>
__device__ __forceinline__ typename Lane::Terms begin_chunk(Lane& own, const CrossEntropyWork& work,
                                                            int64_t row, int64_t chunk,
                                                            uint32_t lane) {
  using T = typename Lane::T;
  own.load(work, row, chunk, lane);
  const T maximum = warp_maximum(own.maximum());
  own.add_up(work, maximum);
  const auto exchange = [](T value, int distance) {
    return __shfl_xor_sync(kAll, value, distance);
  };
  typename Lane::Terms terms{maximum, Lane::tree(own.sums, exchange), 0, 0};
  if (work.has_shares()) {
    terms.distance = Lane::tree(own.distances, exchange);
    terms.share = Lane::tree(own.shares, exchange);
  }
  return terms;
}

// One warp: the loss of a row, and the scales of its chunks.
template <class Element>
__device__ __forceinline__ void end_row(const CrossEntropyArgs& args, int64_t row, uint32_t lane,
                                        int64_t chunks) {
  using T = typename ElementTraits<Element>::Compute;
  ChunkTerms<T>* terms = terms_of<T>(args, row, chunks);
  T largest = lowest(T());
  for (int64_t i = lane; i < chunks; i += kWarp) largest = larger_of(terms[i].maximum, largest);
  const double maximum = double(warp_maximum(largest));
  const RowParts parts = row_parts(terms, chunks, lane, maximum);
  const RowTerms of_row{maximum, warp_sum(parts.sum), warp_sum(parts.distance),
                        warp_sum(parts.share)};
  double scale = 0;
  if (lane == 0)
    *factors_of(args, row, chunks) = finish_row<Element>(args.work, row, of_row, true, &scale);
  scale = __shfl_sync(kAll, scale, 0);
  set_scales(terms, chunks, lane, maximum, scale);
}

template <class Element>
__global__ void __launch_bounds__(kThreads)
    short_rows_kernel(const __grid_constant__ CrossEntropyArgs args) {
  for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < args.work.rows;
       row += int64_t(gridDim.x) * kThreads)
    short_row<Element>(args.work, row);
}

// A multiprocessor has registers for two blocks; for one of float64, and of elements of two bytes
// that are loaded one by one, which would spill.
template <class Element, int width>
constexpr int kBlocks = sizeof(Element) == sizeof(double) || sizeof(Element) * width == 2 ? 1 : 2;

// A warp has a row of one chunk.
template <class Element, int width>
__global__ void __launch_bounds__(kThreads, kBlocks<Element, width>)
    rows_kernel(const __grid_constant__ CrossEntropyArgs args) {
  using Lane = CrossEntropyLane<Element, width>;
  const CrossEntropyWork& work = args.work;
  const uint32_t lane = threadIdx.x % kWarp;
  for (int64_t row = int64_t(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarp; row < work.rows;
       row += int64_t(gridDim.x) * kWarpsOfBlock) {
    Lane own;
    typename Lane::Terms terms = begin_chunk(own, work, row, 0, lane);
    const RowTerms of_row{double(terms.maximum), double(terms.sum), double(terms.distance),
                          double(terms.share)};
    double scale;
    const RowFactors factors = finish_row<Element>(work, row, of_row, lane == 0, &scale);
    if (work.gradient.first == nullptr) continue;
    __syncwarp();  // a gradient in place takes the place of the target's logit
    terms.sum = typename Lane::T(scale);
    if (work.has_shares())
      own.store_gradient_with_shares(work, terms, factors);
    else
      own.template store_gradient<false>(work, terms, factors);
  }
}

// A team, a warp or the whole block, takes one task after the other: a row, or a chunk of one.
template <class Element, int width>
__global__ void __launch_bounds__(kThreads, kBlocks<Element, width>)
    cross_entropy_kernel(const __grid_constant__ CrossEntropyArgs args) {
  using Lane = CrossEntropyLane<Element, width>;
  const CrossEntropyWork& work = args.work;
  const uint32_t lane = threadIdx.x % kWarp;
  const bool is_block = args.form == Form::blocks, by_chunk = is_by_chunk(args);
  const int warps = is_block ? kWarpsOfBlock : 1;
  const int teams = int(gridDim.x) * (is_block ? 1 : kWarpsOfBlock);
  const int chunks = int(loss_chunks(work.loss.classes));
  const auto synchronize = [=] {
    if (is_block)
      __syncthreads();
    else
      __syncwarp();
  };
  for (int64_t task = is_block ? blockIdx.x
                               : int64_t(blockIdx.x) * kWarpsOfBlock + threadIdx.x / kWarp;
       task < tasks_of(args); task += teams) {
    const int64_t row = by_chunk ? task / chunks : task;
    const int first = by_chunk ? int(task % chunks) : is_block ? int(threadIdx.x / kWarp) : 0;
    const int last = by_chunk ? first + 1 : chunks;
    typename Lane::Terms* terms = terms_of<typename Lane::T>(args, row, chunks);
    if (args.phases & kBegin) {
      FUSEDOPT_NO_UNROLL
      for (int chunk = first; chunk < last; chunk += warps) {
        Lane own;
        const typename Lane::Terms found = begin_chunk(own, work, row, chunk, lane);
        if (lane == 0) terms[chunk] = found;
      }
      synchronize();
    }
    if (args.phases & kRow) {
      if (!is_block || threadIdx.x < kWarp) end_row<Element>(args, row, lane, chunks);
      synchronize();
    }
    if (args.phases & kFinish) {
      FUSEDOPT_NO_UNROLL
      for (int chunk = first; chunk < last; chunk += warps) {
        const RowFactors& factors = *factors_of(args, row, chunks);
        Lane own;
        own.load(work, row, chunk, lane);
        if (work.has_shares())
          own.store_gradient_with_shares(work, terms[chunk], factors);
        else
          own.template store_gradient<true>(work, terms[chunk], factors);
      }
    }
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads, 2) mse_kernel(const __grid_constant__ MseWork work) {
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
  return for_dtype(dtype, [&](auto element) {
    using Element = decltype(element);
    constexpr int width = int(16 / sizeof(Element));
    auto* on = static_cast<cudaStream_t>(stream);
    const int64_t blocks = blocks_of(args);
    if (args.form == Form::short_rows)
      return CudaLaunches::launch<short_rows_kernel<Element>>(args, blocks, on);
    if (args.form == Form::rows)
      return args.wide ? CudaLaunches::launch<rows_kernel<Element, width>>(args, blocks, on)
                       : CudaLaunches::launch<rows_kernel<Element, 1>>(args, blocks, on);
    return args.wide ? CudaLaunches::launch<cross_entropy_kernel<Element, width>>(args, blocks, on)
                     : CudaLaunches::launch<cross_entropy_kernel<Element, 1>>(args, blocks, on);
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
