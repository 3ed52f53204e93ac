// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The body of the CUDA kernel that works out rows of hyper-parameters.
#pragma once

#include "../core/control.h"
#include "../core/registry.h"
#include "update.h"

// What a step works out on the device where the host does not know its step counts or its options:
// rows of hyper-parameters. The step itself then only reads them.
namespace fusedopt {

enum class OptionKind : uint32_t { number, float32, float64 };

union OptionSource {
  double number;
  const void* address;  // of a float or a double on the device
};

// What a row of hyper-parameters is made from.
struct RowSource {
  OptionSource options[kMaxOptions];
  const float* count;  // of the steps taken; null: it is `taken`
  float taken;
  uint32_t kinds;  // kKindBits for each option
  uint32_t row;    // its place in the table
  bool first;      // with no step taken, this is the first one
  bool float64;

  void set(int option, double number) { options[option].number = number; }
  void set(int option, OptionKind kind, const void* address) {
    options[option].address = address;
    kinds |= uint32_t(kind) << (kKindBits * option);
  }
  FUSEDOPT_HD OptionKind kind(int option) const {
    return OptionKind((kinds >> (kKindBits * option)) & ((1u << kKindBits) - 1));
  }

  static constexpr int kKindBits = 2;
  static_assert(kKindBits * kMaxOptions <= 32, "kinds has too few bits");
};

// Step counts that lie one behind the other and are advanced by one, or numbers that become what
// stands in a row.
struct CountRange {
  float* counts;
  uint32_t size;
  uint32_t source = 0;  // 0: each becomes one more; else see from_row

  // The value of this place in a row of the table.
  static uint32_t from_row(uint32_t row, int place, bool float64) {
    constexpr uint32_t words = sizeof(HyperRow) / sizeof(float);
    return 2 * (row * words + uint32_t(place) * (float64 ? 2 : 1)) + (float64 ? 3 : 2);
  }
  FUSEDOPT_HD float next(const HyperRow* rows) const {
    const unsigned char* value = rows->bytes + size_t(source / 2 - 1) * sizeof(float);
    double wide = 0;
    float narrow = 0;
    if (source % 2 != 0) {
      memcpy(&wide, value, sizeof wide);
      return float(wide);
    }
    memcpy(&narrow, value, sizeof narrow);
    return narrow;
  }
};

// The kernel's whole argument: row sources from the front of data, ranges from its back.
struct PrepareArgs {
  static constexpr int kBytes = 25760;
  HyperRow* rows;
  Control* control;
  FactorSource factor;
  uint32_t sources;
  uint32_t ranges;
  uint32_t sets_control;
  alignas(16) unsigned char data[kBytes];

  FUSEDOPT_HD const RowSource& source(uint32_t i) const {
    return reinterpret_cast<const RowSource*>(data)[i];
  }
  FUSEDOPT_HD const CountRange& range(uint32_t i) const {
    return *(reinterpret_cast<const CountRange*>(data + kBytes) - (i + 1));
  }
};
static_assert(sizeof(PrepareArgs) <= kMaxArgumentBytes, "more than a launch takes");

template <class Rule>
FUSEDOPT_HD void prepare_row(const RowSource& source, HyperRow* rows) {
  double values[kMaxOptions];
  FUSEDOPT_UNROLL
  for (int i = 0; i < kMaxOptions; ++i) {
    const OptionSource& option = source.options[i];
    const OptionKind kind = source.kind(i);
    values[i] = option.number;
    if (kind == OptionKind::float32) values[i] = double(*static_cast<const float*>(option.address));
    if (kind == OptionKind::float64) values[i] = *static_cast<const double*>(option.address);
  }
  const float taken = source.count == nullptr ? source.taken : *source.count;
  HyperRow row = {};
  detail::fill_row<Rule>(values, double(taken) + 1, source.first && taken == 0, source.float64,
                         row);
  rows[source.row] = row;
}

// All rows come before any count or number changes: a barrier lies between the two phases.
template <class Rule>
FUSEDOPT_HD void prepare_rows(const PrepareArgs& args, uint32_t thread, uint32_t threads) {
  if (thread == 0 && args.sets_control != 0) set_control(args.factor, 0, *args.control);
  for (uint32_t i = thread; i < args.sources; i += threads)
    prepare_row<Rule>(args.source(i), args.rows);
}

FUSEDOPT_HD void advance_counts(const PrepareArgs& args, uint32_t thread, uint32_t threads) {
  if (skipped(args.factor)) return;
  for (uint32_t r = 0; r < args.ranges; ++r) {
    const CountRange& range = args.range(r);
    for (uint32_t i = thread; i < range.size; i += threads)
      range.counts[i] = range.source == 0 ? range.counts[i] + 1 : range.next(args.rows);
  }
}

}  // namespace fusedopt
