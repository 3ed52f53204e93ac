// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Losses and their gradients on the CPU, and the loops of an instruction set for them.
#pragma once

#include <memory>

#include "../../core/losses/cross_entropy.h"
#include "../../core/losses/mse.h"
#include "../../core/losses/work.h"
#include "../cpu.h"

namespace fusedopt {
namespace cpu {

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

void cross_entropy(const CrossEntropyWork& work, DType dtype, Isa isa, int threads,
                   ParallelFor parallel_for);

// The sum of the losses of rows or chunks, in the order of norm.h's total.
double total(const double* losses, int64_t count);

// Sums up the squares of each chunk.
void mse(const MseWork& work, DType dtype, Isa isa, ParallelFor parallel_for);

}  // namespace cpu
}  // namespace fusedopt
