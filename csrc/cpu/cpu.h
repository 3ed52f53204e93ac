// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Steps and norms on the CPU, and the instruction sets that have loops for them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../core/codes.h"
#include "../core/measure.h"

namespace fusedopt {
namespace cpu {

enum class Isa { baseline, avx2, avx512 };

// Updates the elements [begin, end) of a span.
using SpanLoop = void (*)(const Span& span, const HyperRow& row, int64_t begin, int64_t end);

// The sums that its rule needs, over the elements [begin, end), at most kNormChunk.
using MeasureLoop = void (*)(const Span& span, const HyperRow& row, int64_t begin, int64_t end,
                             double* sums);

// Sums up the squares of at most kNormChunk elements of a gradient.
using SquareSum = double (*)(const void* grad, int64_t count);

struct Loops {
  const SpanLoop* span_loops;        // one per kernel, in kernel order
  const MeasureLoop* measure_loops;  // likewise; null: the rule measures nothing
  SquareSum square_sums[4];          // one per DType
};

template <template <class, class> class Loop, template <class, class> class Measure,
          template <class> class Sum>
const Loops* make_loops() {
  static const auto span_loops = kernel_table<Loop, SpanLoop>();
  static const auto measure_loops = kernel_table<Measure, MeasureLoop>();
  static const Loops loops = {
      span_loops.data(),
      measure_loops.data(),
      {Sum<float>::value, Sum<double>::value, Sum<bfloat16>::value, Sum<float16>::value}};
  return &loops;
}

// Null where the build has no such instruction set.
const Loops* baseline_loops();
const Loops* avx2_loops();
const Loops* avx512_loops();

bool supported(Isa isa);
Isa best_isa();

// Runs body(context, begin, end) over [0, size) in parallel pieces of at least grain.
using ParallelFor = void (*)(int64_t size, int64_t grain, void* context,
                             void (*body)(void* context, int64_t begin, int64_t end));

// One parallel region over all spans. The result does not depend on how it is divided. Measured: by
// the numbers that spans name; of these the rows are completed.
void step(const Span* spans, size_t count, const HyperRow* rows, const Measured* measured, Isa isa,
          ParallelFor parallel_for);

// Measures all parameters that spans belong to which are measured; sums has room for their chunks.
void measure(const Span* spans, size_t count, const HyperRow* rows, const MeasuredChunks* chunks,
             size_t parameters, double* sums, Measured* measured, Isa isa,
             ParallelFor parallel_for);

// Both, where nothing has to be known of all parameters at once: those that fit into a cache are
// updated while they are there. With the same bits.
void measure_and_step(const Span* spans, size_t count, const HyperRow* rows, Isa isa,
                      ParallelFor parallel_for);

// The sum of the squares of all gradients; sums holds those of their chunks.
double sum_of_squares(const GradSpan* gradients, size_t count, double* sums, Isa isa,
                      ParallelFor parallel_for);

}  // namespace cpu
}  // namespace fusedopt
