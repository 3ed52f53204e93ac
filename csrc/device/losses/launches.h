// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The launches that a loss on a device is made of.
#pragma once

#include "cross_entropy.h"
#include "mse.h"
#include "scale.h"

namespace fusedopt {

// With at least so many rows of more than one chunk, a block has a row to itself: it reads the
// logits a second time from the L2 cache. Fewer do not fill a device: their chunks are shared out
// among all blocks, in three launches.
constexpr int64_t kRowsThatFill = 264;

// How the rows of a launch are shared out.
enum class RowShape { warp, block, chunks };

inline RowShape row_shape(const CrossEntropyWork& work) {
  if (work.loss.classes <= kLossChunk) return RowShape::warp;
  return work.rows >= kRowsThatFill ? RowShape::block : RowShape::chunks;
}

// Bytes of CrossEntropyArgs::terms: those of the chunks, and behind them those of the rows.
inline int64_t bytes_of_terms(const CrossEntropyWork& work) {
  return work.rows * (loss_chunks(work.loss.classes) * int64_t(sizeof(ChunkTerms<double>)) +
                      int64_t(sizeof(RowFactors)));
}

template <class T>
FUSEDOPT_HD ChunkTerms<T>* terms_of(const CrossEntropyArgs& args, int64_t row, int64_t chunks) {
  return static_cast<ChunkTerms<T>*>(args.terms) + row * chunks;
}
FUSEDOPT_HD RowFactors* factors_of(const CrossEntropyArgs& args, int64_t row, int64_t chunks) {
  return reinterpret_cast<RowFactors*>(static_cast<ChunkTerms<double>*>(args.terms) +
                                       args.work.rows * chunks) +
         row;
}

}  // namespace fusedopt
