// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
#if defined(__x86_64__) && !defined(__FMA__)
#define FUSEDOPT_EMULATE_FMA
#endif
#include "../core/registry.h"
#include "cpu.h"

#define FUSEDOPT_ISA baseline
#include "loop.h"

namespace fusedopt {
namespace cpu {

const SpanLoop* baseline_loops() {
  static const auto table = kernel_table<baseline::Loop, SpanLoop>();
  return table.data();
}

}  // namespace cpu
}  // namespace fusedopt
