// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
#pragma once

#include "../device/step.h"

namespace fusedopt {
namespace cuda {

// Whether the stream is being captured into a graph. Streams are cudaStream_t.
bool is_capturing(void* stream);

// Launches a step on the current device. Null, or what went wrong.
const char* step(const DeviceStep& step, void* stream);

}  // namespace cuda
}  // namespace fusedopt
