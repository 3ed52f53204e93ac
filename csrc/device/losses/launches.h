// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The launches that a loss on a device is made of.
#pragma once

#include "cross_entropy.h"
#include "mse.h"
#include "scale.h"
#include "totals.h"

namespace fusedopt {

// With at least so many rows of more than one chunk, a block has a row to itself: it reads the
// logits a second time from the L2 cache. Fewer do not fill a device: their chunks are shared out
// among all warps, in three launches.
constexpr int64_t kRowsThatFill = 264;

// Whether all rows are made of whole accesses of 16 bytes.
inline bool are_wide(const CrossEntropyWork& work, int64_t element_bytes) {
  int64_t all = work.loss.classes * element_bytes;
  for (const Rows& rows : {work.logits, work.gradient})
    if (rows.first != nullptr)
      all |= int64_t(reinterpret_cast<uintptr_t>(rows.first)) | rows.outer_bytes | rows.inner_bytes;
  return all % 16 == 0;
}

// launch(args) returns an error, null: none.
template <class Launch>
const char* launch_cross_entropy(const CrossEntropyWork& work, int64_t element_bytes, void* terms,
                                 Launch launch) {
  CrossEntropyArgs args{work, terms, Form::chunks, are_wide(work, element_bytes), kBegin | kRow};
  const int finish = work.gradient.first == nullptr ? 0 : kFinish;
  if (work.loss.classes <= kLossChunk || work.rows >= kRowsThatFill) {
    args.form = work.loss.classes <= kShortRow    ? Form::short_rows
                : work.loss.classes <= kLossChunk ? Form::rows
                                                  : Form::blocks;
    args.phases |= finish;
    return launch(args);
  }
  for (const int phase : {kBegin, kRow, finish}) {
    args.phases = phase;
    if (phase == 0) continue;
    if (const char* error = launch(args)) return error;
  }
  return nullptr;
}

inline int64_t blocks_of(const CrossEntropyArgs& args) {
  const int64_t of_block = args.form == Form::blocks       ? 1
                           : args.form == Form::short_rows ? kThreads
                                                           : kThreads / kWarp;
  return (tasks_of(args) + of_block - 1) / of_block;
}

// Bytes of CrossEntropyArgs::terms: those of the chunks, and behind them those of the rows. A row
// of one chunk needs none.
inline int64_t bytes_of_terms(const CrossEntropyWork& work) {
  if (work.loss.classes <= kLossChunk) return 0;
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
