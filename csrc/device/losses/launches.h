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
// among all warps, in three launches.
constexpr int64_t kRowsThatFill = 264;

// launch(args) returns an error, null: none.
template <class Launch>
const char* launch_cross_entropy(const CrossEntropyWork& work, void* terms, Launch launch) {
  CrossEntropyArgs args{work, terms, Team::warp, false, kBegin | kRow};
  const int finish = work.gradient.first == nullptr ? 0 : kFinish;
  if (work.loss.classes <= kLossChunk || work.rows >= kRowsThatFill) {
    if (work.loss.classes > kLossChunk) args.team = Team::block;
    args.phases |= finish;
    return launch(args);
  }
  for (const int phase : {kBegin, kRow, finish}) {
    args.phases = phase;
    args.by_chunk = phase != kRow;
    if (phase == 0) continue;
    if (const char* error = launch(args)) return error;
  }
  return nullptr;
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
