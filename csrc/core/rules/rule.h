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
  // May be a tensor on the device that its parameters are on, so that a captured graph follows it.
  // Never an option that variant() looks at.
  bool on_device = false;
};

constexpr int kMaxOptions = 8;

}  // namespace fusedopt
