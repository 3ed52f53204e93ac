// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The loops of losses compiled for AVX2.
#include "losses.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define FUSEDOPT_ISA avx2
#include "cross_entropy.h"
#include "mse.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fusedopt {
namespace cpu {

const LossLoops* avx2_loss_loops() { return avx2::loss_loops(); }

}  // namespace cpu
}  // namespace fusedopt

#else

namespace fusedopt {
namespace cpu {

const LossLoops* avx2_loss_loops() { return nullptr; }

}  // namespace cpu
}  // namespace fusedopt

#endif
