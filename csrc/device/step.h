// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The launches that a step on a device is made of.
#pragma once

#include <algorithm>

#include "measure.h"
#include "prepare.h"

namespace fusedopt {

// The step on one device. A plain one needs only spans and rows.
struct DeviceStep {
  const Span* spans = nullptr;
  size_t span_count = 0;
  const HyperRow* rows = nullptr;  // null: they are worked out on the device, from the sources
  const RowSource* sources = nullptr;
  const int* source_rules = nullptr;  // the rule of each
  size_t source_count = 0;
  const CountRange* counts = nullptr;
  size_t count_ranges = 0;
  const GradSpan* gradients = nullptr;  // for the norm, where it clips
  size_t gradient_count = 0;
  FactorSource factor;
  // Memory of the device. Without control, gradients are taken as the rows say.
  Control* control = nullptr;
  HyperRow* device_rows = nullptr;
  double* sums = nullptr;
  // Parameters that are measured, the sums of their chunks, and their own.
  const MeasuredChunks* measured_chunks = nullptr;
  size_t measured_count = 0;
  double* chunk_sums = nullptr;
  Measured* measured = nullptr;
};

// A kernel that updates spans: packs its argument, as Tile::pack does.
using PackSpans = size_t (*)(const Span* spans, size_t count, size_t next, int kernel,
                             const HyperRow* rows, LaunchArgs& args);

// Launcher has norm(args), prepare(rule, args), pack(kernel) and step(kernel, args), pack_chunks
// and measure likewise, and total(args). It tells by find_unready_prepare(rule),
// find_unready(kernel) and find_unready_measure(kernel) whether it can launch these. All but the
// packs return an Error, which converts to false when there is none.
template <class Error, class Launcher>
Error launch_norm(const DeviceStep& step, Launcher& launcher) {
  NormArgs args;
  args.sums = step.sums;
  args.control = step.control;
  args.factor = step.factor;
  size_t next = 0;
  const GradSpan* end = step.gradients + step.gradient_count;
  args.total_chunks =
      step.gradient_count == 0 ? 0 : end[-1].first_chunk + norm_chunks(end[-1].numel);
  do {
    args.first_chunk = next < step.gradient_count ? step.gradients[next].first_chunk : 0;
    for (args.count = 0; args.count < NormArgs::kCapacity && next < step.gradient_count; ++next)
      args.gradients[args.count++] = step.gradients[next];
    args.last = next == step.gradient_count;
    args.chunks =
        (args.last ? args.total_chunks : step.gradients[next].first_chunk) - args.first_chunk;
    if (Error error = launcher.norm(args)) return error;
  } while (next < step.gradient_count);
  return Error{};
}

template <class Error, class Launcher>
Error launch_prepare(const DeviceStep& step, Launcher& launcher) {
  PrepareArgs args;
  args.rows = step.device_rows;
  args.control = step.control;
  args.factor = step.factor;
  args.sets_control = step.control != nullptr && !step.factor.clips;
  size_t source = 0, range = 0;
  while (args.sets_control || source < step.source_count || range < step.count_ranges) {
    args.sources = args.ranges = 0;
    size_t left = PrepareArgs::kBytes;
    // A launch makes the rows of one rule.
    const int rule = source < step.source_count ? step.source_rules[source] : 0;
    for (; source < step.source_count && step.source_rules[source] == rule &&
           left >= sizeof(RowSource);
         ++source) {
      memcpy(args.data + args.sources++ * sizeof(RowSource), &step.sources[source],
             sizeof(RowSource));
      left -= sizeof(RowSource);
    }
    // Counts are advanced when the last row has been worked out.
    if (source == step.source_count) {
      for (; range < step.count_ranges && left >= sizeof(CountRange); ++range) {
        memcpy(args.data + PrepareArgs::kBytes - ++args.ranges * sizeof(CountRange),
               &step.counts[range], sizeof(CountRange));
        left -= sizeof(CountRange);
      }
    }
    if (Error error = launcher.prepare(rule, args)) return error;
    args.sets_control = 0;
  }
  return Error{};
}

inline LaunchArgs args_of(const DeviceStep& step) {
  LaunchArgs args;
  args.control = step.control;
  args.rows = step.rows == nullptr ? step.device_rows : nullptr;
  return args;
}

// Calls visit(kernel, first) with each kernel once, and its first span, of those that are wanted.
template <class Error, class Wants, class Visit>
Error for_each_kernel(const DeviceStep& step, Wants wants, Visit visit) {
  for (size_t i = 0; i < step.span_count; ++i) {
    const int kernel = step.spans[i].kernel;
    const auto same = [&](const Span& span) { return span.kernel == kernel && wants(span); };
    if (!wants(step.spans[i]) || std::any_of(step.spans, step.spans + i, same)) continue;
    if (Error error = visit(kernel, i)) return error;
  }
  return Error{};
}

// One launch for each kernel that occurs, more only where the argument of a launch is full.
template <class Error, class Launcher>
Error launch_spans(const DeviceStep& step, Launcher& launcher) {
  LaunchArgs args = args_of(step);
  args.measured = step.measured;
  return for_each_kernel<Error>(
      step, [](const Span&) { return true; },
      [&](int kernel, size_t first) {
        for (size_t next = first; next < step.span_count;) {
          next = launcher.pack(kernel)(step.spans, step.span_count, next, kernel, step.rows, args);
          if (args.spans == 0) break;
          if (Error error = launcher.step(kernel, args)) return error;
        }
        return Error{};
      });
}

// Likewise for the spans of parameters that are measured; and their totals.
template <class Error, class Launcher>
Error launch_chunks(const DeviceStep& step, Launcher& launcher) {
  LaunchArgs args = args_of(step);
  args.sums = step.chunk_sums;
  const Error failed = for_each_kernel<Error>(
      step, [](const Span& span) { return span.measured >= 0; },
      [&](int kernel, size_t first) {
        for (size_t next = first; next < step.span_count;) {
          next = launcher.pack_chunks(kernel)(step.spans, step.span_count, next, kernel, step.rows,
                                              args);
          if (args.spans == 0) break;
          if (Error error = launcher.measure(kernel, args)) return error;
        }
        return Error{};
      });
  if (failed) return failed;
  TotalArgs totals;
  totals.sums = step.chunk_sums;
  for (size_t first = 0; first < step.measured_count; first += totals.count) {
    totals.measured = step.measured + first;
    totals.count = uint32_t(std::min<size_t>(TotalArgs::kCapacity, step.measured_count - first));
    std::copy_n(step.measured_chunks + first, totals.count, totals.chunks);
    if (Error error = launcher.total(totals)) return error;
  }
  return Error{};
}

// What can be known before anything is launched: a device that lacks a kernel.
template <class Error, class Launcher>
Error find_unready(const DeviceStep& step, Launcher& launcher) {
  for (size_t i = 0; i < step.source_count; ++i) {
    const int rule = step.source_rules[i];
    if (i > 0 && rule == step.source_rules[i - 1]) continue;
    if (Error error = launcher.find_unready_prepare(rule)) return error;
  }
  for (size_t i = 0; i < step.span_count; ++i) {
    const int kernel = step.spans[i].kernel;
    const bool measures = step.spans[i].measured >= 0;
    if (i > 0 && kernel == step.spans[i - 1].kernel &&
        measures == (step.spans[i - 1].measured >= 0))
      continue;
    if (Error error = launcher.find_unready(kernel)) return error;
    if (!measures) continue;
    if (Error error = launcher.find_unready_measure(kernel)) return error;
  }
  return Error{};
}

// What comes between the norm, whose factor is taken from control where it clips, and the update,
// if parameters are measured. Nothing is changed yet: counts are advanced by the update.
template <class Error, class Launcher>
Error launch_measure(const DeviceStep& step, Launcher& launcher) {
  if (Error error = find_unready<Error>(step, launcher)) return error;
  DeviceStep rows = step;
  rows.count_ranges = 0;
  if (Error error = launch_prepare<Error>(rows, launcher)) return error;
  return launch_chunks<Error>(step, launcher);
}

// The step after the norm and, where parameters are measured, after that.
template <class Error, class Launcher>
Error launch_update(const DeviceStep& step, Launcher& launcher) {
  DeviceStep counts = step;
  if (step.measured_count > 0) {
    counts.source_count = 0;  // their rows have been made, and control is set
    counts.control = nullptr;
  } else if (Error error = find_unready<Error>(step, launcher)) {
    return error;
  }
  if (Error error = launch_prepare<Error>(counts, launcher)) return error;
  return launch_spans<Error>(step, launcher);
}

}  // namespace fusedopt
