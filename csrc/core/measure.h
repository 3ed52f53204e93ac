// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Sums over whole parameters, which some rules need before they update any element, and the order
// of their additions.
#pragma once

#include "norm.h"
#include "registry.h"

// They are in float64, and added up as the norm is, by chunks of kNormChunk elements of a span:
//
//   chunk       lane i of kMeasureLanes adds up the elements i, i + kMeasureLanes ...; lanes are
//               then added as a tree
//   parameter   the sums of its chunks in their order, as the norm's total is made up
namespace fusedopt {

constexpr int kMeasureLanes = 2 * kWarp;

// The chunks of a parameter that is measured, which may be a part of a whole one.
struct MeasuredChunks {
  int64_t first, count;
  int64_t numel;
};

// The sums of a chunk have the place of all kMaxSums, as have those of a parameter.
FUSEDOPT_HD double* sums_of_chunk(double* sums, int64_t chunk) { return sums + chunk * kMaxSums; }

// What follows from the sums.
FUSEDOPT_HD void finish(Measured& measured) {
  FUSEDOPT_UNROLL
  for (int k = 0; k < kMaxSums; ++k) {
    measured.wide.means[k] = measured.sums[k] / measured.numel;
    measured.wide.norms[k] = square_root(measured.sums[k]);
    measured.narrow.means[k] = float(measured.wide.means[k]);
    measured.narrow.norms[k] = float(measured.wide.norms[k]);
  }
}

inline void add_up_chunks(const double* sums, const MeasuredChunks& chunks, Measured& to) {
  for (int k = 0; k < kMaxSums; ++k)
    to.sums[k] = total_of(sums + chunks.first * kMaxSums + k, chunks.count, kMaxSums);
  to.numel = double(chunks.numel);
  finish(to);
}

}  // namespace fusedopt
