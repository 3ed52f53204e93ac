// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// All that the bindings include of torch. No file outside this folder includes any of it.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/extension.h>

namespace py = pybind11;
