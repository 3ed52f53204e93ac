// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What a step has to know of parameters that are measured, from the spans that name them.
#pragma once

#include <vector>

#include "core/measure.h"

namespace fusedopt {

// Numbers the chunks of spans, and returns those of each parameter.
inline std::vector<MeasuredChunks> number_chunks(std::vector<Span>& spans) {
  std::vector<MeasuredChunks> chunks;
  int64_t all = 0;
  for (Span& span : spans) {
    span.first_chunk = uint32_t(all);
    if (span.measured < 0) continue;
    if (size_t(span.measured) == chunks.size()) chunks.push_back({all, 0, 0});
    chunks.back().count += norm_chunks(span.numel);
    chunks.back().numel += span.numel;
    all += norm_chunks(span.numel);
  }
  return chunks;
}

inline int64_t count_of(const std::vector<MeasuredChunks>& chunks) {
  return chunks.empty() ? 0 : chunks.back().first + chunks.back().count;
}

}  // namespace fusedopt
