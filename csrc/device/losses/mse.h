// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The body of the CUDA kernel of the mean squared error: a warp's share of a chunk.
#pragma once

#include "../../core/losses/mse.h"
#include "../../core/losses/work.h"
#include "../update.h"

namespace fusedopt {

// What one lane of a warp adds up in a chunk, in the order of norm.h; it stores its part of the
// gradient.
template <class Element>
FUSEDOPT_HD double mse_lane(const MseWork& work, int64_t chunk, uint32_t lane) {
  using T = typename ElementTraits<Element>::Compute;
  constexpr int width = kQuadElements<Element>;
  constexpr int64_t stride = kWarp * width;
  constexpr int kUnroll = 4;  // so many loads of each tensor are under way at a time
  const int64_t begin = chunk * kNormChunk;
  const int64_t left = work.numel - begin, count = left < kNormChunk ? left : kNormChunk;
  const auto* input = static_cast<const Element*>(work.input) + begin;
  const auto* target = static_cast<const Element*>(work.target) + begin;
  auto* gradient = static_cast<Element*>(work.gradient) + begin;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(input) |
                              reinterpret_cast<uintptr_t>(target) |
                              reinterpret_cast<uintptr_t>(work.gradient);
  const T twice_factor = T(2 * work.factor);
  double sums[width] = {};
  int64_t at = int64_t(lane) * width;
  if (addresses % 16 == 0) {
    FUSEDOPT_NO_UNROLL
    for (; at + width <= count; at += kUnroll * stride) {
      Pack<Element, width> x[kUnroll], y[kUnroll];
      FUSEDOPT_UNROLL
      for (int i = 0; i < kUnroll; ++i) {
        if (at + i * stride + width > count) continue;
        x[i].load(input + at + i * stride);
        y[i].load(target + at + i * stride);
      }
      FUSEDOPT_UNROLL
      for (int i = 0; i < kUnroll; ++i) {
        if (at + i * stride + width > count) continue;
        FUSEDOPT_UNROLL
        for (int j = 0; j < width; ++j) {
          const T difference = squared_error(T(widen(x[i].get(j))), T(widen(y[i].get(j))), sums[j]);
          Element element;
          narrow(squared_error_gradient(difference, twice_factor), element);
          x[i].set(j, element);
        }
        if (work.gradient != nullptr) x[i].store(gradient + at + i * stride);
      }
    }
    // What is left is less than a pack, of one lane.
    const int64_t last = count - count % width;
    at = last / width % kWarp == lane ? last : count;
  }
  for (; at < count; at += stride) {
    FUSEDOPT_UNROLL
    for (int i = 0; i < width; ++i) {
      if (at + i >= count) continue;
      const T difference =
          squared_error(T(widen(input[at + i])), T(widen(target[at + i])), sums[i]);
      if (work.gradient != nullptr)
        narrow(squared_error_gradient(difference, twice_factor), gradient[at + i]);
    }
  }
  tree_sum<width>(sums);
  return sums[0];
}

}  // namespace fusedopt
