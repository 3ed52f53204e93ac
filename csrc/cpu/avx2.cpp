// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The loops compiled for AVX2.
#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define FUSEDOPT_F16C
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FUSEDOPT_ISA avx2
#include "norm.h"
#include "update.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fusedopt {
namespace cpu {

const Loops* avx2_loops() { return make_loops<avx2::Loop, avx2::Measure, avx2::Sum>(); }

}  // namespace cpu
}  // namespace fusedopt

#else

namespace fusedopt {
namespace cpu {

const Loops* avx2_loops() { return nullptr; }

}  // namespace cpu
}  // namespace fusedopt

#endif
