// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
#include <cuda_runtime.h>

#include "../core/tile.h"
#include "cuda.h"

namespace fusedopt {
namespace cuda {

namespace {

template <class Variant, class Types>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ LaunchArgs args) {
  Tile<Variant, Types>::run(args, blockIdx.x, gridDim.x, threadIdx.x);
}

template <class Variant, class Types>
cudaError_t launch_all(const Span* spans, size_t count, int kernel, const HyperRow* rows,
                       cudaStream_t stream) {
  LaunchArgs args;
  size_t next = 0;
  while (next < count) {
    next = Tile<Variant, Types>::pack(spans, count, next, kernel, rows, args);
    if (args.spans == 0) break;
    step_kernel<Variant, Types><<<args.chunks, kThreads, 0, stream>>>(args);
    if (cudaError_t error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}

using Launcher = cudaError_t (*)(const Span*, size_t, int, const HyperRow*, cudaStream_t);

template <class Variant, class Types>
struct Launch {
  static constexpr Launcher value = launch_all<Variant, Types>;
};

}  // namespace

const char* step(const Span* spans, size_t count, const HyperRow* rows, void* stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture))
    return cudaGetErrorString(error);
  if (capture != cudaStreamCaptureStatusNone)
    return "the stream is being captured into a CUDA graph, which would replay this step with "
           "today's learning rate and step count for ever; capture forward and backward only";
  static const auto launchers = kernel_table<Launch, Launcher>();
  // Each kernel once, when its first span is met.
  for (size_t i = 0; i < count; ++i) {
    const int kernel = spans[i].kernel;
    bool seen = false;
    for (size_t k = 0; k < i && !seen; ++k) seen = spans[k].kernel == kernel;
    if (seen) continue;
    const cudaError_t error =
        launchers[kernel](spans, count, kernel, rows, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace fusedopt
