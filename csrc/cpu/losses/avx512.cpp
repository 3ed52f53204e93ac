// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The loops of losses compiled for AVX-512.
#include "losses.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("fma,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define FUSEDOPT_ISA avx512
#include "cross_entropy.h"
#include "mse.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fusedopt {
namespace cpu {

const LossLoops* avx512_loss_loops() { return avx512::loss_loops(); }

}  // namespace cpu
}  // namespace fusedopt

#else

namespace fusedopt {
namespace cpu {

const LossLoops* avx512_loss_loops() { return nullptr; }

}  // namespace cpu
}  // namespace fusedopt

#endif
