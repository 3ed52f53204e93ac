// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
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
