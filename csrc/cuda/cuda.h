// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Launches on a CUDA device, for the bindings.
#pragma once

#include "../device/step.h"

namespace fusedopt {
namespace cuda {

// Whether the stream is being captured into a graph. Streams are cudaStream_t.
bool is_capturing(void* stream);

// Launches the norm of a step's gradients, what measures its parameters, or its update, on the
// current device. Null, or what went wrong.
const char* norm(const DeviceStep& step, void* stream);
const char* measure(const DeviceStep& step, void* stream);
const char* update(const DeviceStep& step, void* stream);

}  // namespace cuda
}  // namespace fusedopt
