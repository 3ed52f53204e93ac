// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The loops of losses compiled for any processor of the architecture.
#if defined(__x86_64__) && !defined(__FMA__)
#define FUSEDOPT_EMULATE_FMA
#endif
#include "losses.h"

#define FUSEDOPT_ISA baseline
#include "cross_entropy.h"
#include "mse.h"

namespace fusedopt {
namespace cpu {

const LossLoops* baseline_loss_loops() { return baseline::loss_loops(); }

}  // namespace cpu
}  // namespace fusedopt
