// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The bodies of the CUDA kernel that sums up the squares of all gradients.
#pragma once

#include "../core/norm.h"
#include "update.h"

namespace fusedopt {

constexpr int kWarps = kThreads / kWarp;  // a chunk is the work of a warp

// The kernel's whole argument.
struct NormArgs {
  static constexpr int kCapacity = 803;  // gradients of a launch
  double* sums;                          // of all chunks of all launches
  Control* control;
  FactorSource factor;
  int64_t first_chunk;  // that of this launch
  int64_t chunks;       // of this launch
  int64_t total_chunks;
  uint32_t count;
  uint32_t last;  // whether this launch makes up the total
  GradSpan gradients[kCapacity];
};
static_assert(sizeof(NormArgs) <= kMaxArgumentBytes, "more than a launch takes");

inline int64_t norm_blocks(const NormArgs& args) { return (args.chunks + kWarps - 1) / kWarps; }

// What one thread of a warp has to add up in a chunk of count elements, into the sums of its lanes.
template <class Grad>
FUSEDOPT_HD void add_squares(const Grad* grad, int64_t count, uint32_t thread, double* lanes) {
  constexpr int width = kQuadElements<Grad>;
  constexpr int kUnroll = 8;
  const int64_t stride = kWarp * width;
  grad += thread * width;
  count -= thread * width;
  int64_t at = 0;
  if (reinterpret_cast<uintptr_t>(grad) % 16 == 0) {
    for (; at + (kUnroll - 1) * stride + width <= count; at += kUnroll * stride) {
      Pack<Grad, width> packs[kUnroll];
      FUSEDOPT_UNROLL
      for (int u = 0; u < kUnroll; ++u) packs[u].load(grad + at + u * stride);
      FUSEDOPT_UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        FUSEDOPT_UNROLL
        for (int j = 0; j < width; ++j) add_square(lanes[j], packs[u].get(j));
      }
    }
  }
  for (; at < count; at += stride) {
    FUSEDOPT_UNROLL
    for (int j = 0; j < width; ++j)
      if (at + j < count) add_square(lanes[j], grad[at + j]);
  }
}

template <class Grad>
FUSEDOPT_HD double norm_thread(const void* grad, int64_t begin, int64_t count, uint32_t thread) {
  double sums[kQuadElements<Grad>] = {};
  add_squares(static_cast<const Grad*>(grad) + begin, count, thread, sums);
  tree_sum<kQuadElements<Grad>>(sums);
  return sums[0];
}

// A thread's share in the sum of a chunk, given by its number in this launch.
FUSEDOPT_HD double norm_share(const NormArgs& args, int64_t chunk, uint32_t thread) {
  chunk += args.first_chunk;
  const GradSpan& g = args.gradients[span_of_chunk(args.gradients, 0, args.count, chunk)];
  const int64_t begin = (chunk - g.first_chunk) * kNormChunk;
  const int64_t left = g.numel - begin;
  const int64_t count = left < kNormChunk ? left : kNormChunk;
  switch (g.dtype) {
    case DType::float32:
      return norm_thread<float>(g.grad, begin, count, thread);
    case DType::float64:
      return norm_thread<double>(g.grad, begin, count, thread);
    case DType::bfloat16:
      return norm_thread<bfloat16>(g.grad, begin, count, thread);
    default:
      return norm_thread<float16>(g.grad, begin, count, thread);
  }
}

// A lane of the total.
FUSEDOPT_HD double total_lane(const NormArgs& args, uint32_t thread) {
  double sum = 0;
  for (int64_t i = thread; i < args.total_chunks; i += kTotalLanes) sum += args.sums[i];
  return sum;
}

}  // namespace fusedopt
