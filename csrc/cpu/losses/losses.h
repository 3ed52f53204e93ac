// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Losses and their gradients on the CPU, and the loops of an instruction set for them.
#pragma once

#include <memory>

#include "../../core/losses/cross_entropy.h"
#include "../../core/losses/mse.h"
#include "../cpu.h"

namespace fusedopt {
namespace cpu {

// Where the rows of a matrix begin; the elements of a row lie side by side. Rows are numbered
// through all of an outer dimension and an inner one.
struct Rows {
  unsigned char* first = nullptr;
  int64_t inner = 1;  // rows in the inner dimension
  int64_t outer_bytes = 0, inner_bytes = 0;

  void* at(int64_t row) const {
    if (row < inner) return first + row * inner_bytes;  // without a division, which takes long
    return first + row / inner * outer_bytes + row % inner * inner_bytes;
  }
};

struct CrossEntropyWork {
  CrossEntropy loss;
  int64_t rows;
  Rows logits;
  Rows gradient;           // no first: none is wanted. It may be the logits.
  const int64_t* targets;  // of each row a class, or null
  int64_t ignore_index;
  Rows probabilities;   // where there are no targets; of the logits' dtype
  const void* weights;  // of the classes, in the compute type, or null
  double* losses;       // of each row
  void* lse;            // of each row, in the compute type, or null

  bool ignores(int64_t row) const { return targets != nullptr && targets[row] == ignore_index; }
  // Nothing has to be known of an ignored row, but its lse where that is wanted.
  bool skips(int64_t row) const { return ignores(row) && lse == nullptr; }
  bool has_terms() const { return targets == nullptr || loss.smoothing != 0; }
};

// Whole rows, or parts of one: first the chunks, then the row, then the chunks again. Exponentials
// are kept in the gradient, or in a scratch row of float32 where it is in half precision.
struct CrossEntropyLoops {
  void (*rows)(const CrossEntropyWork& work, int64_t begin, int64_t end);
  void (*begin_chunks)(const CrossEntropyWork& work, int64_t row, int64_t begin, int64_t end,
                       void* terms, void* scratch);
  void (*finish_row)(const CrossEntropyWork& work, int64_t row, const void* terms,
                     double target_logit, RowLoss& result, double& maximum);
  void (*end_chunks)(const CrossEntropyWork& work, int64_t row, int64_t begin, int64_t end,
                     const void* terms, const void* scratch, const RowLoss& result, double maximum);
  double (*target_logit)(const CrossEntropyWork& work, int64_t row);  // before the logits are lost
  void (*no_loss)(const CrossEntropyWork& work, int64_t row);         // of a row that is ignored
};

struct MseWork {
  const void* input;
  const void* target;
  void* gradient;  // or null
  int64_t numel;
  double factor;
  double* sums;  // of chunks
};

// Sums up a chunk, and writes its gradient.
using MseLoop = double (*)(const MseWork& work, int64_t begin, int64_t end);

struct LossLoops {
  CrossEntropyLoops cross_entropy[4];  // one per DType
  MseLoop mse[4];
};

const LossLoops* baseline_loss_loops();
const LossLoops* avx2_loss_loops();
const LossLoops* avx512_loss_loops();

// The first row whose target is neither a class nor ignored, or rows; and the valid ones: how many,
// and the sum of their weights.
struct Targets {
  int64_t first_wrong;
  int64_t valid;
  double weight;
};
Targets check_targets(const int64_t* targets, int64_t rows, int64_t classes, int64_t ignore_index,
                      const void* weights, DType compute);

// Returns the sum of the losses of all rows.
double cross_entropy(const CrossEntropyWork& work, DType dtype, Isa isa, int threads,
                     ParallelFor parallel_for);

// Returns factor times the sum of the squares.
double mse(MseWork work, DType dtype, Isa isa, ParallelFor parallel_for);

}  // namespace cpu
}  // namespace fusedopt
