// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Rows of hyper-parameters, as they are found again.
#pragma once

#include "work.h"

namespace fusedopt {
namespace {

// A row of hyper-parameters, to be found again by the group's next parameter.
struct CachedRow {
  const void* work;
  float taken;
  bool first, float64;
  int lineage;
  int index;
};

// Parameters of one lineage, and those of them in the step at hand.
struct Lineage {
  int members, active;
};

}  // namespace
}  // namespace fusedopt
