// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The bodies of the CUDA kernels of one block: what a mean divides by, and the loss of all rows.
#pragma once

#include "../../core/losses/work.h"
#include "../update.h"

namespace fusedopt {

struct TargetArgs {
  const int64_t* targets;
  const void* weights;  // in the compute type, or null
  int64_t rows, classes, ignore_index;
  bool float64;
  Divisors* divisors;
};

// Of a target that is ignored, or no class, nothing.
FUSEDOPT_HD double weight_of(const TargetArgs& args, int64_t target) {
  if (target == args.ignore_index || uint64_t(target) >= uint64_t(args.classes)) return 0;
  return args.float64 ? static_cast<const double*>(args.weights)[target]
                      : double(static_cast<const float*>(args.weights)[target]);
}

// So many loads of a lane are under way at a time.
constexpr int kTotalLoads = 16;
constexpr int kTotalRound = kTotalLoads * kTotalLanes;

// How many of a round's places there are from here on.
FUSEDOPT_HD int left_of_round(int64_t count, int64_t begin) {
  return int(count - begin < kTotalRound ? count - begin : kTotalRound);
}

// A lane's part, of kTotalLanes.
FUSEDOPT_HD Divisors target_lane(const TargetArgs& args, uint32_t lane) {
  double weight = 0;
  int64_t valid = 0;
  FUSEDOPT_NO_UNROLL
  for (int64_t begin = lane; begin < args.rows; begin += kTotalRound) {
    const int left = left_of_round(args.rows, begin);
    int64_t targets[kTotalLoads];
    FUSEDOPT_UNROLL
    for (int i = 0; i < kTotalLoads; ++i)
      targets[i] =
          i * kTotalLanes < left ? args.targets[begin + i * kTotalLanes] : args.ignore_index;
    FUSEDOPT_UNROLL
    for (int i = 0; i < kTotalLoads; ++i) valid += targets[i] == args.ignore_index ? 0 : 1;
    if (args.weights == nullptr) continue;
    FUSEDOPT_UNROLL
    for (int i = 0; i < kTotalLoads; ++i) weight += weight_of(args, targets[i]);
  }
  return {args.weights == nullptr ? double(valid) : weight, double(valid)};
}

FUSEDOPT_HD double loss_lane(const LossArgs& args, uint32_t lane) {
  double sum = 0;
  FUSEDOPT_NO_UNROLL
  for (int64_t begin = lane; begin < args.count; begin += kTotalRound) {
    const int left = left_of_round(args.count, begin);
    double losses[kTotalLoads];
    FUSEDOPT_UNROLL
    for (int i = 0; i < kTotalLoads; ++i)
      losses[i] = i * kTotalLanes < left ? args.losses[begin + i * kTotalLanes] : 0;
    FUSEDOPT_UNROLL
    for (int i = 0; i < kTotalLoads; ++i) sum += losses[i];
  }
  return sum;
}

}  // namespace fusedopt
