// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/span.h"

namespace fusedopt {
namespace cpu {

enum class Isa { baseline, avx2, avx512 };

// Updates the elements [begin, end) of a span.
using SpanLoop = void (*)(const Span& span, const HyperRow& row, int64_t begin, int64_t end);

// One loop per kernel, in kernel order. Null where the build has no such instruction set.
const SpanLoop* baseline_loops();
const SpanLoop* avx2_loops();
const SpanLoop* avx512_loops();

bool supported(Isa isa);
Isa best_isa();

// Runs body(context, begin, end) over [0, size) in parallel pieces of at least grain.
using ParallelFor = void (*)(int64_t size, int64_t grain, void* context,
                             void (*body)(void* context, int64_t begin, int64_t end));

// One parallel region over all spans. The result does not depend on how it is divided.
void step(const Span* spans, size_t count, const HyperRow* rows, Isa isa, ParallelFor parallel_for);

}  // namespace cpu
}  // namespace fusedopt
