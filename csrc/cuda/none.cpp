// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// cuda.h for builds without CUDA. Never called, as parameters on a GPU are refused.
#include "cuda.h"

namespace fusedopt {
namespace cuda {

bool is_capturing(void*) { return false; }

const char* norm(const DeviceStep&, void*) { return "fusedopt was built without CUDA"; }
const char* update(const DeviceStep&, void*) { return "fusedopt was built without CUDA"; }

}  // namespace cuda
}  // namespace fusedopt
