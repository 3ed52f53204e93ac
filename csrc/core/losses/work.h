// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What a loss walks over: rows of logits, and tensors of one order.
#pragma once

#include "cross_entropy.h"

namespace fusedopt {

// Where the rows of a matrix begin; the elements of a row lie side by side. Rows are numbered
// through all of an outer dimension and an inner one.
struct Rows {
  unsigned char* first = nullptr;
  int64_t inner = 1;  // rows in the inner dimension
  int64_t outer_bytes = 0, inner_bytes = 0;

  FUSEDOPT_HD void* at(int64_t row) const {
    if (row < inner) return first + row * inner_bytes;  // without a division, which takes long
    return first + row / inner * outer_bytes + row % inner * inner_bytes;
  }
};

// What a mean divides by: the weights of all targets that are not ignored; and how many these are.
struct Divisors {
  double weight, valid;
};

struct CrossEntropyWork {
  CrossEntropy loss;
  int64_t rows = 0;
  Rows logits;
  Rows gradient;                     // no first: none is wanted. It may be the logits.
  const int64_t* targets = nullptr;  // of each row a class, or null
  int64_t ignore_index = -100;
  Rows probabilities;                  // where there are no targets; of the logits' dtype
  const void* weights = nullptr;       // of the classes, in the compute type, or null
  double* losses = nullptr;            // of each row
  void* lse = nullptr;                 // of each row, in the compute type, or null
  const Divisors* divisors = nullptr;  // those of a mean, where only the device knows them

  FUSEDOPT_HD bool ignores(int64_t row) const {
    return targets != nullptr && targets[row] == ignore_index;
  }
  // Nothing has to be known of an ignored row, but its lse where that is wanted.
  FUSEDOPT_HD bool skips(int64_t row) const { return ignores(row) && lse == nullptr; }
  FUSEDOPT_HD bool has_shares() const { return targets == nullptr || loss.smoothing != 0; }
};

FUSEDOPT_HD double not_a_number() { return double(bits_to_float(0x7fc00000u)); }

// One loss, of the dtype that users get.
FUSEDOPT_HD void store_loss(double value, void* loss, DType dtype, int64_t at = 0) {
  switch (dtype) {
    case DType::float64:
      static_cast<double*>(loss)[at] = value;
      break;
    case DType::float32:
      static_cast<float*>(loss)[at] = float(value);
      break;
    case DType::bfloat16:
      narrow(float(value), static_cast<bfloat16*>(loss)[at]);
      break;
    default:
      narrow(float(value), static_cast<float16*>(loss)[at]);
  }
}

// The loss of all rows, or chunks.
struct LossArgs {
  const double* losses;  // of rows, or of chunks
  int64_t count;
  double factor;
  const Divisors* divisors;  // null: the loss of no row is no mean
  void* loss;                // a number of dtype
  DType dtype;
  bool is_mean;
};

FUSEDOPT_HD void finish_loss(const LossArgs& args, double sum) {
  const bool of_nothing =
      args.is_mean && (args.divisors != nullptr ? args.divisors->valid == 0 : args.count == 0);
  store_loss(of_nothing ? not_a_number() : sum * args.factor, args.loss, args.dtype);
}

struct MseWork {
  const void* input;
  const void* target;
  void* gradient;  // or null
  int64_t numel;
  double factor;
  double* sums;  // of chunks of kNormChunk elements
};

}  // namespace fusedopt
