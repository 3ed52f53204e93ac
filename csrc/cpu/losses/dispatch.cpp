// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// A loss cut into pieces for the loops of an instruction set.
#include <vector>

#include "../floating_point.h"
#include "losses.h"

namespace fusedopt {
namespace cpu {

namespace {

// Below this many elements a second thread costs more than it brings. Each of cross-entropy takes
// longer than one of a step.
constexpr int64_t kGrain = 32768;
constexpr int64_t kLogitGrain = 8192;

const LossLoops& loss_loops(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return *avx512_loss_loops();
    case Isa::avx2:
      return *avx2_loss_loops();
    default:
      return *baseline_loss_loops();
  }
}

// Calls body(begin, end) in parallel pieces.
template <class Body>
void in_pieces(ParallelFor parallel_for, int64_t size, int64_t grain, const Body& body) {
  if (size == 0) return;
  parallel_for(size, grain, const_cast<Body*>(&body),
               [](void* context, int64_t begin, int64_t end) {
                 const DefaultFloatingPoint guard;
                 (*static_cast<const Body*>(context))(begin, end);
               });
}

// Fewer long rows than threads: each is shared by all of them.
template <class T>
void share_rows(const CrossEntropyWork& work, const CrossEntropyLoops& loops, bool needs_scratch,
                ParallelFor parallel_for) {
  const int64_t classes = work.loss.classes, chunks = loss_chunks(classes);
  const int64_t grain = (kLogitGrain + kLossChunk - 1) / kLossChunk;
  std::vector<ChunkTerms<T>> terms(chunks);
  const std::unique_ptr<T[]> scratch(needs_scratch ? new T[classes] : nullptr);
  for (int64_t row = 0; row < work.rows; ++row) {
    const double target_logit = loops.target_logit(work, row);
    RowLoss result;
    double maximum = 0;
    if (!work.skips(row)) {
      in_pieces(parallel_for, chunks, grain, [&](int64_t begin, int64_t end) {
        loops.begin_chunks(work, row, begin, end, terms.data(), scratch.get());
      });
      loops.finish_row(work, row, terms.data(), target_logit, result, maximum);
    }
    if (work.ignores(row)) {
      loops.no_loss(work, row);
    } else if (work.gradient.first != nullptr) {
      in_pieces(parallel_for, chunks, grain, [&](int64_t begin, int64_t end) {
        loops.end_chunks(work, row, begin, end, terms.data(), scratch.get(), result, maximum);
      });
    }
  }
}

template <class T>
Targets check_targets_of(const int64_t* targets, int64_t rows, int64_t classes,
                         int64_t ignore_index, const T* weights) {
  Targets found{rows, 0, 0};
  int64_t wrong = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const bool ignored = targets[i] == ignore_index;
    found.valid += !ignored;
    wrong += !ignored & (uint64_t(targets[i]) >= uint64_t(classes));
  }
  found.weight = double(found.valid);
  if (wrong != 0) {
    for (found.first_wrong = 0; targets[found.first_wrong] == ignore_index ||
                                uint64_t(targets[found.first_wrong]) < uint64_t(classes);)
      ++found.first_wrong;
  } else if (weights != nullptr) {
    double lanes[kTotalLanes] = {};
    for (int64_t i = 0; i < rows; ++i)
      if (targets[i] != ignore_index) lanes[i % kTotalLanes] += double(weights[targets[i]]);
    tree_sum<kTotalLanes>(lanes);
    found.weight = lanes[0];
  }
  return found;
}

}  // namespace

Targets check_targets(const int64_t* targets, int64_t rows, int64_t classes, int64_t ignore_index,
                      const void* weights, DType compute) {
  const DefaultFloatingPoint guard;
  if (compute == DType::float64)
    return check_targets_of(targets, rows, classes, ignore_index,
                            static_cast<const double*>(weights));
  return check_targets_of(targets, rows, classes, ignore_index, static_cast<const float*>(weights));
}

void cross_entropy(const CrossEntropyWork& work, DType dtype, Isa isa, int threads,
                   ParallelFor parallel_for) {
  const CrossEntropyLoops& loops = loss_loops(isa).cross_entropy[int(dtype)];
  const DefaultFloatingPoint guard;
  const int64_t classes = work.loss.classes;
  if (work.rows < threads && classes >= 4 * kLogitGrain) {
    if (dtype == DType::float64) {
      share_rows<double>(work, loops, false, parallel_for);
    } else {
      share_rows<float>(work, loops, dtype != DType::float32 && work.gradient.first != nullptr,
                        parallel_for);
    }
  } else {
    in_pieces(parallel_for, work.rows, (kLogitGrain + classes - 1) / classes,
              [&](int64_t begin, int64_t end) { loops.rows(work, begin, end); });
  }
}

double total(const double* losses, int64_t count) {
  const DefaultFloatingPoint guard;
  return total_of(losses, count);
}

void mse(const MseWork& work, DType dtype, Isa isa, ParallelFor parallel_for) {
  const MseLoop loop = loss_loops(isa).mse[int(dtype)];
  const DefaultFloatingPoint guard;
  const int64_t chunks = norm_chunks(work.numel);
  in_pieces(parallel_for, chunks, kGrain / kNormChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      work.sums[i] = loop(work, i * kNormChunk, std::min(work.numel, (i + 1) * kNormChunk));
  });
}

}  // namespace cpu
}  // namespace fusedopt
