// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// How often dictionaries of states that tell of it were changed, all of them together.
#pragma once

#include <cstdint>

namespace fusedopt {
namespace {

// Read and written under the GIL.
uint64_t changes = 1;

void note_change() { ++changes; }

}  // namespace
}  // namespace fusedopt
