// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What a step walks over: runs of elements, and rows of hyper-parameters for them.
#pragma once

#include <cstdint>

#include "rules/list.h"

namespace fusedopt {

// Room for what the rule that needs most of it needs.
namespace detail {

constexpr int larger(int a, int b) { return a > b ? a : b; }

template <class... Variants>
constexpr int most_states(TypeList<Variants...>) {
  int most = 0;
  ((most = larger(most, Variants::state_count)), ...);
  return most;
}

template <class... Members>
constexpr int most_states_of_rules(TypeList<Members...>) {
  int most = 0;
  ((most = larger(most, most_states(typename Members::Variants{}))), ...);
  return most;
}

template <class... Members>
constexpr int most_options(TypeList<Members...>) {
  int most = 0;
  ((most = larger(most, option_count<Members>)), ...);
  return most;
}

template <class... Members>
constexpr int most_numbers(TypeList<Members...>) {
  int most = 0;
  ((most = larger(most, number_count<Members>)), ...);
  return most;
}

template <class... Members>
constexpr int most_sums(TypeList<Members...>) {
  int most = 1;
  ((most = larger(most, sums_of<Members>)), ...);
  return most;
}

template <class... Members>
constexpr int most_row_bytes(TypeList<Members...>) {
  int most = 0;
  ((most = larger(most, int(sizeof(typename Members::template Row<double>)))), ...);
  return most;
}

}  // namespace detail

constexpr int kMaxStates = detail::most_states_of_rules(Rules{});
constexpr int kMaxOptions = detail::most_options(Rules{});
constexpr int kMaxNumbers = detail::most_numbers(Rules{});
constexpr int kMaxSums = detail::most_sums(Rules{});
constexpr int kRowAlignment = 16;
constexpr int kRowBytes =
    (detail::most_row_bytes(Rules{}) + kRowAlignment - 1) / kRowAlignment * kRowAlignment;

struct Coding;

// What rules make rows of: each sum by the number of elements, and the root of each sum.
template <class T>
struct MeasuredAs {
  T means[kMaxSums], norms[kMaxSums];
};

// The sums of a parameter that is measured, the elements that they are of, and what follows.
struct Measured {
  double sums[kMaxSums];
  double numel;
  MeasuredAs<double> wide;
  MeasuredAs<float> narrow;
};
FUSEDOPT_HD const MeasuredAs<double>& measured_as(const Measured& measured, double) {
  return measured.wide;
}
FUSEDOPT_HD const MeasuredAs<float>& measured_as(const Measured& measured, float) {
  return measured.narrow;
}

// A run of consecutive elements with the same dtypes and the same row of hyper-parameters.
struct Span {
  void* param;
  const void* grad;
  void* states[kMaxStates];
  int64_t numel;
  int64_t offset;            // elements in the spans before this one
  int32_t kernel;            // see registry.h
  int32_t row;               // index into the hyper table
  const Coding* coding;      // see codes.h; null: stored in the kernel's dtypes
  int32_t measured = -1;     // which parameter's sums complete the row, see measure.h; -1: none
  uint32_t first_chunk = 0;  // of those that are measured, in the spans before this one
};

// One row of the hyper table, as bytes: a Rule::Row<float> or, for float64 parameters, <double>.
struct alignas(kRowAlignment) HyperRow {
  unsigned char bytes[kRowBytes];
};

}  // namespace fusedopt
