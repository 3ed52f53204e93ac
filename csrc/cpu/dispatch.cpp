// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// A step, and a norm, cut into pieces for the loops of an instruction set.
#include <algorithm>

#include "cpu.h"
#include "floating_point.h"

namespace fusedopt {
namespace cpu {

namespace {

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;
// Where a span is cut, it is cut at a multiple of this, so that every piece stays aligned. One with
// a Coding is cut where a block begins, so that every piece has its blocks to itself.
constexpr int64_t kCut = 256;

const Loops& loops(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return *avx512_loops();
    case Isa::avx2:
      return *avx2_loops();
    default:
      return *baseline_loops();
  }
}

struct Work {
  const Span* spans;
  size_t count;
  const HyperRow* rows;
  const SpanLoop* loops;
};

struct NormWork {
  const GradSpan* gradients;
  size_t count;
  double* sums;
  const SquareSum* square_sums;
};

// The cut nearest below the global element index, as an index into its span.
int64_t cut(const Span& span, int64_t index) {
  const int64_t local = std::max<int64_t>(0, index - span.offset);
  if (local >= span.numel) return span.numel;
  if (span.coding == nullptr) return local / kCut * kCut;
  return local - Blocks{span.numel, span.coding->row}.place_of(local);
}

void run_piece(void* context, int64_t begin, int64_t end) {
  const Work& work = *static_cast<const Work*>(context);
  const DefaultFloatingPoint guard;
  const Span* last = work.spans + work.count;
  const Span* span = std::upper_bound(work.spans, last, begin, [](int64_t index, const Span& s) {
    return index < s.offset + s.numel;
  });
  for (; span != last && span->offset < end; ++span) {
    const int64_t from = cut(*span, begin);
    const int64_t to = cut(*span, end);
    if (from < to) work.loops[span->kernel](*span, work.rows[span->row], from, to);
  }
}

void sum_chunks(void* context, int64_t begin, int64_t end) {
  const NormWork& work = *static_cast<const NormWork*>(context);
  const DefaultFloatingPoint guard;
  const GradSpan* last = work.gradients + work.count;
  // The last gradient that begins at or before this chunk.
  const GradSpan* gradient =
      std::upper_bound(work.gradients, last, begin,
                       [](int64_t chunk, const GradSpan& g) { return chunk < g.first_chunk; }) -
      1;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    while (gradient + 1 != last && gradient[1].first_chunk <= chunk) ++gradient;
    const int64_t at = (chunk - gradient->first_chunk) * kNormChunk;
    const auto* bytes = static_cast<const unsigned char*>(gradient->grad);
    work.sums[chunk] = work.square_sums[int(gradient->dtype)](
        bytes + at * size_of(gradient->dtype), std::min(kNormChunk, gradient->numel - at));
  }
}

}  // namespace

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    default:
      return true;
  }
#else
  return isa == Isa::baseline;
#endif
}

Isa best_isa() {
  return supported(Isa::avx512) ? Isa::avx512 : supported(Isa::avx2) ? Isa::avx2 : Isa::baseline;
}

void step(const Span* spans, size_t count, const HyperRow* rows, Isa isa,
          ParallelFor parallel_for) {
  if (count == 0) return;
  Work work{spans, count, rows, loops(isa).span_loops};
  parallel_for(spans[count - 1].offset + spans[count - 1].numel, kGrain, &work, run_piece);
}

double sum_of_squares(const GradSpan* gradients, size_t count, double* sums, Isa isa,
                      ParallelFor parallel_for) {
  const int64_t chunks =
      count == 0 ? 0 : gradients[count - 1].first_chunk + norm_chunks(gradients[count - 1].numel);
  if (chunks == 0) return 0;
  int64_t elements = 0;
  for (size_t i = 0; i < count; ++i) elements += gradients[i].numel;
  NormWork work{gradients, count, sums, loops(isa).square_sums};
  // kGrain elements, in chunks.
  parallel_for(chunks, (chunks * kGrain + elements - 1) / elements, &work, sum_chunks);
  const DefaultFloatingPoint guard;
  return total_of(sums, chunks);
}

}  // namespace cpu
}  // namespace fusedopt
