// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// All that the bindings include of torch. No file outside this folder includes any of it.
#pragma once

// What core/arithmetic.h makes an error of is common in torch.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdouble-promotion"
#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/extension.h>
#pragma GCC diagnostic pop

namespace py = pybind11;
