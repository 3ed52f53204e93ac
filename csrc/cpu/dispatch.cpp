// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// A step, and a norm, cut into pieces for the loops of an instruction set.
#include <algorithm>
#include <vector>

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
  const Measured* measured;
  const SpanLoop* loops;
};

struct MeasureWork {
  const Span* spans;
  size_t count;
  const HyperRow* rows;
  double* sums;
  const MeasureLoop* loops;
};

// Of a parameter that a thread measures and updates by itself, while it is in its cache.
constexpr int64_t kMostSmallChunks = 16;

struct TotalWork {
  const MeasuredChunks* chunks;
  const double* sums;
  Measured* measured;
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

// The row of a span, with what was measured of its parameter.
HyperRow completed(HyperRow row, const Measured& measured, const Span& span) {
  registry().rule_of(span.kernel).use_measured(measured, registry().is_float64(span.kernel), row);
  return row;
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
    if (from >= to) continue;
    if (span->measured < 0) {
      work.loops[span->kernel](*span, work.rows[span->row], from, to);
      continue;
    }
    const HyperRow row = completed(work.rows[span->row], work.measured[span->measured], *span);
    work.loops[span->kernel](*span, row, from, to);
  }
}

void measure_chunks(void* context, int64_t begin, int64_t end) {
  const MeasureWork& work = *static_cast<const MeasureWork*>(context);
  const DefaultFloatingPoint guard;
  // The last span that begins at or before this chunk: those that are not measured have none.
  const Span* span =
      std::upper_bound(work.spans, work.spans + work.count, begin,
                       [](int64_t chunk, const Span& s) { return chunk < s.first_chunk; }) -
      1;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    while (span->measured < 0 || chunk >= span->first_chunk + norm_chunks(span->numel)) ++span;
    const int64_t from = (chunk - span->first_chunk) * kNormChunk;
    work.loops[span->kernel](*span, work.rows[span->row], from,
                             std::min(from + kNormChunk, span->numel),
                             sums_of_chunk(work.sums, chunk));
  }
}

// The spans of parameters that are measured, each of which a thread has to itself.
struct SmallWork {
  const Span* spans;
  size_t count;
  const HyperRow* rows;
  const Loops* loops;
};

// With the offsets of the first elements of their parameters in [begin, end).
void measure_and_run(void* context, int64_t begin, int64_t end) {
  const SmallWork& work = *static_cast<const SmallWork*>(context);
  const DefaultFloatingPoint guard;
  const Span* const last = work.spans + work.count;
  const Span* span = std::lower_bound(
      work.spans, last, begin, [](const Span& s, int64_t index) { return s.offset < index; });
  // A parameter that begins in the piece before belongs to that one.
  while (span != last && span != work.spans && span->measured == span[-1].measured) ++span;
  while (span != last && span->offset < end) {
    const Span* const first = span;
    double sums[kMostSmallChunks * kMaxSums];
    MeasuredChunks chunks{0, 0, 0};
    for (; span != last && span->measured == first->measured; ++span) {
      for (int64_t at = 0; at < span->numel; at += kNormChunk)
        work.loops->measure_loops[span->kernel](*span, work.rows[span->row], at,
                                                std::min(at + kNormChunk, span->numel),
                                                sums_of_chunk(sums, chunks.count++));
      chunks.numel += span->numel;
    }
    Measured measured;
    add_up_chunks(sums, chunks, measured);
    const HyperRow row = completed(work.rows[first->row], measured, *first);
    for (const Span* of_this = first; of_this != span; ++of_this)
      work.loops->span_loops[of_this->kernel](*of_this, row, 0, of_this->numel);
  }
}

void total_chunks(void* context, int64_t begin, int64_t end) {
  const TotalWork& work = *static_cast<const TotalWork*>(context);
  const DefaultFloatingPoint guard;
  for (int64_t i = begin; i < end; ++i) add_up_chunks(work.sums, work.chunks[i], work.measured[i]);
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

void step(const Span* spans, size_t count, const HyperRow* rows, const Measured* measured, Isa isa,
          ParallelFor parallel_for) {
  if (count == 0) return;
  Work work{spans, count, rows, measured, loops(isa).span_loops};
  parallel_for(spans[count - 1].offset + spans[count - 1].numel, kGrain, &work, run_piece);
}

void measure(const Span* spans, size_t count, const HyperRow* rows, const MeasuredChunks* chunks,
             size_t parameters, double* sums, Measured* measured, Isa isa,
             ParallelFor parallel_for) {
  if (parameters == 0) return;
  const int64_t all = chunks[parameters - 1].first + chunks[parameters - 1].count;
  int64_t elements = 0;
  for (size_t i = 0; i < parameters; ++i) elements += chunks[i].numel;
  MeasureWork work{spans, count, rows, sums, loops(isa).measure_loops};
  if (all > 0) parallel_for(all, (all * kGrain + elements - 1) / elements, &work, measure_chunks);
  TotalWork totals{chunks, sums, measured};
  constexpr int64_t kTotalGrain = 256;
  parallel_for(int64_t(parameters), kTotalGrain, &totals, total_chunks);
}

void measure_and_step(const Span* spans, size_t count, const HyperRow* rows, Isa isa,
                      ParallelFor parallel_for) {
  thread_local struct {
    std::vector<Span> small, others;
    std::vector<MeasuredChunks> chunks;  // of the others
    std::vector<double> sums;
    std::vector<Measured> measured;
  } work;
  if (count == 0) return;
  work.small.clear();
  work.others.clear();
  work.chunks.clear();
  // A thread has a share of them only where there are many.
  constexpr int64_t kFew = 64;
  const int64_t most_small = (spans[count - 1].offset + spans[count - 1].numel) / kFew;
  int64_t small_elements = 0, elements = 0, all_chunks = 0;
  for (size_t i = 0; i < count;) {
    size_t end = i + 1;
    int64_t chunks = norm_chunks(spans[i].numel), numel = spans[i].numel;
    const bool is_measured = spans[i].measured >= 0;
    for (; is_measured && end < count && spans[end].measured == spans[i].measured; ++end) {
      chunks += norm_chunks(spans[end].numel);
      numel += spans[end].numel;
    }
    const bool is_small =
        is_measured && chunks <= kMostSmallChunks && (numel <= kGrain || numel <= most_small);
    if (is_measured && !is_small) work.chunks.push_back({all_chunks, chunks, numel});
    for (; i < end; ++i) {
      Span span = spans[i];
      int64_t& before = is_small ? small_elements : elements;
      span.offset = before;
      before += span.numel;
      if (!is_small) {
        span.measured = is_measured ? int32_t(work.chunks.size()) - 1 : -1;
        span.first_chunk = uint32_t(all_chunks);
        if (is_measured) all_chunks += norm_chunks(span.numel);
      }
      (is_small ? work.small : work.others).push_back(span);
    }
  }
  if (!work.small.empty()) {
    SmallWork small{work.small.data(), work.small.size(), rows, &loops(isa)};
    parallel_for(small_elements, kGrain, &small, measure_and_run);
  }
  work.sums.resize(size_t(all_chunks) * kMaxSums);
  work.measured.resize(work.chunks.size());
  measure(work.others.data(), work.others.size(), rows, work.chunks.data(), work.chunks.size(),
          work.sums.data(), work.measured.data(), isa, parallel_for);
  step(work.others.data(), work.others.size(), rows, work.measured.data(), isa, parallel_for);
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
