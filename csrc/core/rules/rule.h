// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What an update rule declares of its options and of its states.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../dtype.h"
#include "../macros.h"

namespace fusedopt {

// An option of a rule: its member of Rule::Options, and where it stands in a parameter group, which
// is group[key] or, for a tuple, group[key][element]; or a number of each parameter's state, which
// steps change.
template <class Options>
struct Option {
  using Member = double Options::*;
  Member value;
  const char* key;
  int element = -1;
  // May be a tensor on the device that its parameters are on, so that a captured graph follows it.
  // Never an option that variant() or measures() looks at.
  bool on_device = false;
  // May be missing in a group, as torch.optim does not have it, and is `initial` then.
  bool may_be_missing = false;
  // state[key] of a parameter, which begins as `initial` or as the option of another key. The last
  // values of a Row are what all of these become in a step, in their order.
  bool in_state = false;
  double initial = 0;
  const char* begins_as = nullptr;
};

template <class Options>
constexpr Option<Options> optional(double Options::* value, const char* key, double initial = 0) {
  return {value, key, -1, false, true, false, initial};
}

template <class Options>
constexpr Option<Options> in_state(double Options::* value, const char* key, double initial,
                                   const char* begins_as = nullptr) {
  return {value, key, -1, false, false, true, initial, begins_as};
}

// What a rule needs to know of a whole parameter before any of its elements is updated: so many
// sums over these. Such a rule has
//   sum_count
//   measures(options)           whether it needs them with these options
//   use(means, norms, row)      completes a row by them: by their means over all elements, and
//   roots
// and its variants have
//   measure(row, p, g, state, math, sums)   which adds an element's share to them
template <class Rule, class = void>
constexpr int sums_of = 0;
template <class Rule>
constexpr int sums_of<Rule, std::void_t<decltype(Rule::sum_count)>> = Rule::sum_count;

// A variant may name another one, Cautious, for rows that Rule::usual_but_cautious() tells: the CPU
// has loops for it, as update<true>() of that one takes fewer instructions than update<false>().
template <class Variant, class = void>
constexpr bool has_cautious = false;
template <class Variant>
constexpr bool has_cautious<Variant, std::void_t<typename Variant::Cautious>> = true;

// What a state is, which decides how it may be stored.
enum class StateKind : uint8_t {
  average,             // of gradients: any sign, kept small by new ones
  average_of_squares,  // never negative
  weight,              // like a parameter, or growing for ever: no codes, as errors would add up
};

enum class Begins : uint8_t { with_zero, as_parameter, as_option };

// A state of a variant: its key in optimizer.state[param], what it is, and what it begins with.
struct State {
  const char* key;
  StateKind kind;
  Begins begins = Begins::with_zero;
  const char* option = nullptr;  // the key of the option that it begins as
};

FUSEDOPT_HD constexpr bool is_never_negative(StateKind kind) {
  return kind == StateKind::average_of_squares;
}

template <class Rule>
constexpr int option_count = int(sizeof(Rule::options) / sizeof(Rule::options[0]));

template <class Rule>
constexpr int count_numbers() {
  int count = 0;
  for (const auto& option : Rule::options) count += option.in_state ? 1 : 0;
  return count;
}
// The numbers that a parameter's state has besides a count of steps.
template <class Rule>
constexpr int number_count = count_numbers<Rule>();

// Whether every member of Options is named by exactly one Option.
template <class Rule>
constexpr bool names_each_option_once() {
  constexpr int count = option_count<Rule>;
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < i; ++j)
      if (Rule::options[i].value == Rule::options[j].value) return false;
  return sizeof(typename Rule::Options) == count * sizeof(double);
}
template <class Rule>
constexpr bool has_each_option_once = names_each_option_once<Rule>();

}  // namespace fusedopt
