// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The loops compiled for AVX-512.
#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define FUSEDOPT_F16C
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define FUSEDOPT_ISA avx512
#include "norm.h"
#include "update.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fusedopt {
namespace cpu {

const Loops* avx512_loops() { return make_loops<avx512::Loop, avx512::Measure, avx512::Sum>(); }

}  // namespace cpu
}  // namespace fusedopt

#else

namespace fusedopt {
namespace cpu {

const Loops* avx512_loops() { return nullptr; }

}  // namespace cpu
}  // namespace fusedopt

#endif
