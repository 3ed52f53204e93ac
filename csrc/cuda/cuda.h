// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
#pragma once

#include <cstddef>

#include "../core/span.h"

namespace fusedopt {
namespace cuda {

// Launches the step for all spans on the current device: one launch for each kernel that occurs,
// more only where a launch's argument is full. stream is a cudaStream_t. Null, or what went wrong.
const char* step(const Span* spans, size_t count, const HyperRow* rows, void* stream);

}  // namespace cuda
}  // namespace fusedopt
