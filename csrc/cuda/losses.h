// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Launches of losses on a CUDA device, for the bindings.
#pragma once

#include "../device/losses/launches.h"

namespace fusedopt {
namespace cuda {

// Each launches on the current device, and returns null, or what went wrong. Memory is the
// device's.
const char* check_targets(const TargetArgs& args, void* stream);
const char* cross_entropy(const CrossEntropyArgs& args, DType dtype, void* stream);
const char* mse(const MseWork& work, DType dtype, void* stream);
const char* scale(const ScaleArgs& args, DType dtype, void* stream);
const char* finish_loss(const LossArgs& args, void* stream);

}  // namespace cuda
}  // namespace fusedopt
