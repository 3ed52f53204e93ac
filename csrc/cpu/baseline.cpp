// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The loops compiled for any processor of the architecture.
#if defined(__x86_64__) && !defined(__FMA__)
#define FUSEDOPT_EMULATE_FMA
#endif
#include "cpu.h"

#define FUSEDOPT_ISA baseline
#include "norm.h"
#include "update.h"

namespace fusedopt {
namespace cpu {

const Loops* baseline_loops() {
  return make_loops<baseline::Loop, baseline::Measure, baseline::Sum>();
}

}  // namespace cpu
}  // namespace fusedopt
