// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What launches need of CUDA's runtime.
#pragma once

#include <cuda_runtime.h>

#include "../device/update.h"
#include "launch.h"

namespace fusedopt {
namespace cuda {

struct CudaRuntime {
  static int current_device(int& device) { return cudaGetDevice(&device); }
  static int driver_version(int& version) { return cudaDriverGetVersion(&version); }
  static int processors(int device, int& count) {
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  template <auto kernel>
  static int resident_blocks(int& blocks) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0);
  }
  template <auto kernel, class Args>
  static int launch(const Args& args, int blocks, cudaStream_t stream) {
    void* pointers[] = {const_cast<Args*>(&args)};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)),
                            dim3(kThreads), pointers, 0, stream);
  }
  static void forget_error() { cudaGetLastError(); }
  static const char* text(int error) { return cudaGetErrorString(cudaError_t(error)); }
  static bool lacks_code(int error) {
    return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
           error == cudaErrorUnsupportedPtxVersion || error == cudaErrorJitCompilerNotFound;
  }
};
using CudaLaunches = Launches<CudaRuntime>;

}  // namespace cuda
}  // namespace fusedopt
