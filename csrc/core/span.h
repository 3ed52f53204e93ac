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
constexpr int most_row_bytes(TypeList<Members...>) {
  int most = 0;
  ((most = larger(most, int(sizeof(typename Members::template Row<double>)))), ...);
  return most;
}

}  // namespace detail

constexpr int kMaxStates = detail::most_states_of_rules(Rules{});
constexpr int kMaxOptions = detail::most_options(Rules{});
constexpr int kMaxNumbers = detail::most_numbers(Rules{});
constexpr int kRowAlignment = 16;
constexpr int kRowBytes =
    (detail::most_row_bytes(Rules{}) + kRowAlignment - 1) / kRowAlignment * kRowAlignment;

struct Coding;

// A run of consecutive elements with the same dtypes and the same row of hyper-parameters.
struct Span {
  void* param;
  const void* grad;
  void* states[kMaxStates];
  int64_t numel;
  int64_t offset;        // elements in the spans before this one
  int32_t kernel;        // see registry.h
  int32_t row;           // index into the hyper table
  const Coding* coding;  // see codes.h; null: stored in the kernel's dtypes
};

// One row of the hyper table, as bytes: a Rule::Row<float> or, for float64 parameters, <double>.
struct alignas(kRowAlignment) HyperRow {
  unsigned char bytes[kRowBytes];
};

}  // namespace fusedopt
