// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
#pragma once

#include "../dtype.h"
#include "../macros.h"

namespace fusedopt {

// Where an option stands in a parameter group: group[key], or group[key][element] for a tuple.
struct OptionKey {
  const char* key;
  int element = -1;
};

}  // namespace fusedopt
