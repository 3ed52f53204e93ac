// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Words that mean different things to the compilers of the host and of the device.
#pragma once

// FUSEDOPT_HD marks the code that runs on the host and on the device. It is always inlined, so that
// no copy compiled for one instruction set can ever be linked into the callers of another.
#if defined(__CUDACC__)
#define FUSEDOPT_HD __host__ __device__ __forceinline__
#define FUSEDOPT_RESTRICT __restrict__
#define FUSEDOPT_UNROLL _Pragma("unroll")
#define FUSEDOPT_NO_UNROLL _Pragma("unroll 1")
#else
#define FUSEDOPT_HD inline __attribute__((always_inline))
#define FUSEDOPT_RESTRICT __restrict__
#define FUSEDOPT_UNROLL
#define FUSEDOPT_NO_UNROLL
#endif
