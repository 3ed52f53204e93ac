// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The sum of the squares of all gradients, and the order of its additions.
#pragma once

#include "control.h"
#include "dtype.h"
#include "span.h"

// It is in float64. The order depends on the sizes of the gradients only, so that the sum has the
// same bits with any number of threads, on every instruction set and device, and whether parameters
// are flat or not:
//
//   chunk   kNormChunk elements of one gradient, summed up by lanes: lane i of n adds up the
//           elements i, i + n, i + 2n ...; the lanes are then added as a tree
//   total   of the sums of all chunks, in the order of the parameters, in the same way
namespace fusedopt {

constexpr int64_t kNormChunk = 16384;

// A gradient as the norm sees it.
struct GradSpan {
  const void* grad;
  int64_t numel;
  int64_t first_chunk;  // chunks of the gradients before it
  DType dtype;
};

FUSEDOPT_HD int64_t norm_chunks(int64_t numel) { return (numel + kNormChunk - 1) / kNormChunk; }

// Lanes of a chunk: those of a warp, with as many elements each as a 16-byte access has.
constexpr int kWarp = 32;
template <class Grad>
constexpr int kQuadElements = int(16 / sizeof(Grad));

// Adds up values[0], values[stride] ... into values[0]; count is a power of two. By recursion, so
// that the host's compiler knows each half's size.
template <int count, class T>
FUSEDOPT_HD void tree_sum(T* values, int stride = 1) {
  if constexpr (count > 1) {
    constexpr int half = count / 2;
    FUSEDOPT_UNROLL
    for (int i = 0; i < half; ++i) values[i * stride] += values[(i + half) * stride];
    tree_sum<half>(values, stride);
  }
}

// The lanes of the total.
constexpr int kTotalLanes = 256;

// Of every stride-th number.
FUSEDOPT_HD double total_of(const double* sums, int64_t count, int stride = 1) {
  if (count == 1) return sums[0];  // as the other lanes are zero
  double lanes[kTotalLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % kTotalLanes] += sums[i * stride];
  tree_sum<kTotalLanes>(lanes);
  return lanes[0];
}

}  // namespace fusedopt
