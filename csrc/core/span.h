// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
#pragma once

#include <cstdint>

namespace fusedopt {

constexpr int kMaxStates = 3;

struct Coding;

// A run of consecutive elements with the same dtypes and the same row of hyper-parameters.
struct Span {
  void* param;
  const void* grad;
  void* states[kMaxStates];
  int64_t numel;
  int64_t offset;        // elements in the spans before this one
  int32_t kernel;        // see registry.h
  int32_t row;           // index into the hyper table
  const Coding* coding;  // see codes.h; null: the kernel says how elements are stored
};

// One row of the hyper table, as bytes: a Rule::Row<float> or, for float64 parameters, <double>.
struct alignas(16) HyperRow {
  unsigned char bytes[128];
};

}  // namespace fusedopt
