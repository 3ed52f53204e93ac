// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// cuda.h and losses.h for builds without CUDA. Never called, as parameters on a GPU are refused.
#include "cuda.h"
#include "losses.h"

namespace fusedopt {
namespace cuda {

bool is_capturing(void*) { return false; }

const char* norm(const DeviceStep&, void*) { return "fusedopt was built without CUDA"; }
const char* measure(const DeviceStep&, void*) { return "fusedopt was built without CUDA"; }
const char* update(const DeviceStep&, void*) { return "fusedopt was built without CUDA"; }

const char* check_targets(const TargetArgs&, void*) { return "fusedopt was built without CUDA"; }
const char* cross_entropy(const CrossEntropyArgs&, DType, void*) {
  return "fusedopt was built without CUDA";
}
const char* mse(const MseWork&, DType, void*) { return "fusedopt was built without CUDA"; }
const char* scale(const ScaleArgs&, DType, void*) { return "fusedopt was built without CUDA"; }
const char* finish_loss(const LossArgs&, void*) { return "fusedopt was built without CUDA"; }

}  // namespace cuda
}  // namespace fusedopt
