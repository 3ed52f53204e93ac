// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The body of the CUDA kernel that multiplies a gradient by that of its loss, unless this is one.
#pragma once

#include "../../core/losses/work.h"
#include "../update.h"

namespace fusedopt {

struct ScaleArgs {
  void* values;
  int64_t count;
  const void* factor;  // a number of factor_dtype
  DType factor_dtype;
};

FUSEDOPT_HD double factor_of(const ScaleArgs& args) {
  switch (args.factor_dtype) {
    case DType::float64:
      return *static_cast<const double*>(args.factor);
    case DType::float32:
      return double(*static_cast<const float*>(args.factor));
    case DType::bfloat16:
      return double(widen(*static_cast<const bfloat16*>(args.factor)));
    default:
      return double(widen(*static_cast<const float16*>(args.factor)));
  }
}

// What one thread of so many does.
template <class Element>
FUSEDOPT_HD void scale_values(const ScaleArgs& args, int64_t thread, int64_t threads) {
  using T = typename ElementTraits<Element>::Compute;
  constexpr int width = int(16 / sizeof(Element));
  const double given = factor_of(args);
  if (given == 1) return;
  const T factor = T(given);
  auto* values = static_cast<Element*>(args.values);
  const bool whole = reinterpret_cast<uintptr_t>(values) % 16 == 0;
  for (int64_t at = thread * width; at < args.count; at += threads * width) {
    if (whole && at + width <= args.count) {
      Pack<Element, width> pack;
      pack.load(values + at);
      FUSEDOPT_UNROLL
      for (int i = 0; i < width; ++i) {
        Element element;
        narrow(T(widen(pack.get(i))) * factor, element);
        pack.set(i, element);
      }
      pack.store(values + at);
    } else {
      FUSEDOPT_UNROLL
      for (int i = 0; i < width; ++i)
        if (at + i < args.count) narrow(T(widen(values[at + i])) * factor, values[at + i]);
    }
  }
}

}  // namespace fusedopt
