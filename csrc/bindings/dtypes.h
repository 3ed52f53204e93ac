// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Dtypes of torch, and those of the core.
#pragma once

#include <optional>

#include "../core/dtype.h"
#include "torch.h"

namespace fusedopt {
namespace {

inline std::optional<DType> dtype_of(at::ScalarType type) {
  switch (c10::toRealValueType(type)) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      return std::nullopt;
  }
}

inline at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return at::kFloat;
    case DType::float64:
      return at::kDouble;
    case DType::bfloat16:
      return at::kBFloat16;
    default:
      return at::kHalf;
  }
}

}  // namespace
}  // namespace fusedopt
