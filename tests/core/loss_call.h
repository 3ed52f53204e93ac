// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What a loss is called with in the tests, as ctypes lays it out, and the work that this is.
#pragma once

#include "device/losses/launches.h"

namespace fusedopt {

// Rows of a matrix: see Rows.
struct CalledRows {
  unsigned char* first;
  int64_t inner, outer_bytes, inner_bytes;

  Rows rows() const { return {first, inner, outer_bytes, inner_bytes}; }
};

struct CrossEntropyCall {
  int64_t dtype, row_count, classes;
  CalledRows logits, gradient;
  const int64_t* targets;
  int64_t ignore_index;
  CalledRows probabilities;
  const void* weights;
  double smoothing, z_loss;
  int64_t is_mean;
  double* losses;
  void* lse;
  void* loss;

  DType type() const { return DType(dtype); }
  // Without what a mean divides by.
  CrossEntropyWork work() const {
    CrossEntropyWork work;
    work.loss.classes = classes;
    work.loss.smoothing = smoothing;
    work.loss.z_loss = z_loss;
    work.rows = row_count;
    work.logits = logits.rows();
    work.gradient = gradient.rows();
    work.targets = targets;
    work.ignore_index = ignore_index;
    work.probabilities = probabilities.rows();
    work.weights = weights;
    work.losses = losses;
    work.lse = lse;
    return work;
  }
  LossArgs total(const Divisors* divisors) const {
    return {losses, row_count, 1, is_mean ? divisors : nullptr, loss, type(), is_mean != 0};
  }
};

inline TargetArgs target_args(const CrossEntropyCall& call, Divisors* divisors) {
  return {call.targets, call.weights,      call.row_count,
          call.classes, call.ignore_index, call.type() == DType::float64,
          divisors};
}

struct MseCall {
  int64_t dtype, numel;
  const void *input, *target;
  void* gradient;
  int64_t is_mean;
  double* sums;
  void* loss;

  DType type() const { return DType(dtype); }
  MseWork work() const { return {input, target, gradient, numel, factor(), sums}; }
  LossArgs total(const Divisors* divisors) const {
    return {sums, norm_chunks(numel), factor(), divisors, loss, type(), is_mean != 0};
  }
  double factor() const { return is_mean ? 1 / double(numel) : 1.0; }
};

}  // namespace fusedopt
