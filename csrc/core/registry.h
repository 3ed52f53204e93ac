// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The lists of rules and of dtypes without their types: names and numbers of all kernels.
#pragma once

#include <cstring>
#include <vector>

#include "dtype.h"
#include "rules/list.h"
#include "span.h"

// A kernel is one (variant, combination of dtypes), numbered variant by variant in the order of the
// lists; behind the combinations comes the kernel of spans with a Coding.
namespace fusedopt {

// An Option, for callers that know a rule only by its name.
struct OptionInfo {
  const char* key;
  int element;
  bool on_device, may_be_missing, in_state;
  double initial;
  const char* begins_as;
};

struct VariantInfo {
  int rule;
  std::vector<State> states;
  // Whether a parameter stays zero, as padding has to, whose gradient and states are zero at first.
  bool (*zero_stays_zero)(const HyperRow& row, bool float64);
};

struct RuleInfo {
  const char* name;
  bool counts_steps;
  std::vector<OptionInfo> options;
  int first_variant, variant_count;  // in Registry::variants
  int (*variant)(const double* options);
  std::vector<int> numbers;  // those of the options that stand in the parameter's state
  int row_values;            // how many a row has
  void (*row)(const double* options, double step, bool first, bool float64, HyperRow& out);
  bool can_measure;
  // Whether parameters are measured with these options, and what completes a row by their sums.
  bool (*measures)(const double* options);
  void (*use_measured)(const Measured& measured, bool float64, HyperRow& row);
  // Multiplies what the row multiplies gradients by.
  void (*scale_gradient)(double factor, bool float64, HyperRow& row);

  // The place, among the values of a row, of what a number becomes.
  int place_of_next(int number) const { return row_values - int(numbers.size()) + number; }
  float next(int number, bool float64, const HyperRow& row) const {
    const int place = place_of_next(number);
    double wide;
    float narrow;
    if (float64) {
      memcpy(&wide, row.bytes + place * sizeof wide, sizeof wide);
      return float(wide);
    }
    memcpy(&narrow, row.bytes + place * sizeof narrow, sizeof narrow);
    return narrow;
  }
};

struct CombinationInfo {
  DType param, grad, state;
};

struct Registry {
  std::vector<RuleInfo> rules;
  std::vector<VariantInfo> variants;
  std::vector<CombinationInfo> combinations;

  int kernel(int variant, int combination) const {
    return variant * (int(combinations.size()) + 1) + combination;
  }
  int coded_kernel(int variant) const { return kernel(variant, int(combinations.size())); }

  const RuleInfo& rule_of(int kernel) const {
    return rules[variants[kernel / (int(combinations.size()) + 1)].rule];
  }
  bool is_float64(int kernel) const {
    const size_t combination = size_t(kernel) % (combinations.size() + 1);
    return combination < combinations.size() && combinations[combination].param == DType::float64;
  }
};

namespace detail {

template <class Rule, int i = 0>
FUSEDOPT_HD void set_options(const double* values, typename Rule::Options& options) {
  if constexpr (i < option_count<Rule>) {
    constexpr auto value = Rule::options[i].value;
    options.*value = values[i];
    set_options<Rule, i + 1>(values, options);
  }
}

template <class Rule>
FUSEDOPT_HD typename Rule::Options options_from(const double* values) {
  static_assert(has_each_option_once<Rule>, "an Option for each member of Options");
  typename Rule::Options options;
  set_options<Rule>(values, options);
  return options;
}

template <class Rule>
FUSEDOPT_HD void fill_row(const double* values, double step, bool first, bool float64,
                          HyperRow& out) {
  using Wide = typename Rule::template Row<double>;
  using Narrow = typename Rule::template Row<float>;
  constexpr size_t count = sizeof(Wide) / sizeof(double);
  static_assert(sizeof(Narrow) == count * sizeof(float), "a Row holds values of type T only");
  const Wide row = Rule::row(options_from<Rule>(values), step, first);
  double wide[count];
  memcpy(wide, &row, sizeof row);
  if (float64) {
    memcpy(out.bytes, wide, sizeof wide);
    return;
  }
  float narrow[count];
  FUSEDOPT_UNROLL
  for (size_t i = 0; i < count; ++i) narrow[i] = float(wide[i]);
  memcpy(out.bytes, narrow, sizeof narrow);
}

template <class Rule>
void make_row(const double* values, double step, bool first, bool float64, HyperRow& out) {
  fill_row<Rule>(values, step, first, float64, out);
}

template <class Row, class T>
void scale_gradient_of(T factor, HyperRow& packed_row) {
  Row row;
  memcpy(&row, packed_row.bytes, sizeof row);
  row.grad_factor *= factor;
  memcpy(packed_row.bytes, &row, sizeof row);
}

template <class Rule>
void scale_gradient(double factor, bool float64, HyperRow& row) {
  if (float64) {
    scale_gradient_of<typename Rule::template Row<double>>(factor, row);
  } else {
    scale_gradient_of<typename Rule::template Row<float>>(float(factor), row);
  }
}

template <class Rule>
bool measures(const double* values) {
  if constexpr (sums_of<Rule> > 0) {
    return Rule::measures(options_from<Rule>(values));
  } else {
    return false;
  }
}

template <class Rule, class T>
void use_measured_in(const Measured& measured, HyperRow& packed_row) {
  typename Rule::template Row<T> row;
  memcpy(&row, packed_row.bytes, sizeof row);
  const MeasuredAs<T>& as = measured_as(measured, T());
  Rule::use(as.means, as.norms, row);
  memcpy(packed_row.bytes, &row, sizeof row);
}

template <class Rule>
void use_measured(const Measured& measured, bool float64, HyperRow& row) {
  if constexpr (sums_of<Rule> > 0) {
    if (float64) {
      use_measured_in<Rule, double>(measured, row);
    } else {
      use_measured_in<Rule, float>(measured, row);
    }
  }
}

template <class Variant, class T>
bool zero_stays_zero_in(const HyperRow& packed_row) {
  typename Variant::Rule::template Row<T> row;
  memcpy(&row, packed_row.bytes, sizeof row);
  T p = 0;
  T state[kMaxStates] = {}, before[kMaxStates];
  PlainMath math;
  Variant::template update<false>(row, p, T(0), state, math);
  bool result = p == 0;
  memcpy(before, state, sizeof state);
  Variant::template update<false>(row, p, T(0), state, math);
  result = result && p == 0;
  // States may leave zero for a number at which they stay.
  for (int k = 0; k < kMaxStates; ++k)
    result = result && state[k] == before[k] && state[k] - state[k] == 0;
  return result;
}

template <class Variant>
bool zero_stays_zero(const HyperRow& row, bool float64) {
  return float64 ? zero_stays_zero_in<Variant, double>(row)
                 : zero_stays_zero_in<Variant, float>(row);
}

}  // namespace detail

inline const Registry& registry() {
  static const Registry instance = [] {
    Registry r;
    for_each_type(Combinations{}, [&](auto types) {
      using T = decltype(types);
      r.combinations.push_back({ElementTraits<typename T::Param>::dtype,
                                ElementTraits<typename T::Grad>::dtype,
                                ElementTraits<typename T::State>::dtype});
    });
    for_each_type(Rules{}, [&](auto rule) {
      using Rule = decltype(rule);
      RuleInfo info;
      info.name = Rule::name;
      info.counts_steps = Rule::counts_steps;
      for (const auto& option : Rule::options)
        info.options.push_back({option.key, option.element, option.on_device, option.may_be_missing,
                                option.in_state, option.initial, option.begins_as});
      for (int i = 0; i < int(info.options.size()); ++i)
        if (info.options[i].in_state) info.numbers.push_back(i);
      info.row_values = int(sizeof(typename Rule::template Row<double>) / sizeof(double));
      info.first_variant = int(r.variants.size());
      info.variant_count = Rule::Variants::size;
      info.variant = [](const double* o) { return Rule::variant(detail::options_from<Rule>(o)); };
      info.row = detail::make_row<Rule>;
      info.can_measure = sums_of<Rule> > 0;
      info.measures = detail::measures<Rule>;
      info.use_measured = detail::use_measured<Rule>;
      info.scale_gradient = detail::scale_gradient<Rule>;
      r.rules.push_back(info);
      for_each_type(typename Rule::Variants{}, [&](auto variant) {
        using Variant = decltype(variant);
        const State* const states = Variant::states;
        r.variants.push_back({int(r.rules.size()) - 1,
                              {states, states + Variant::state_count},
                              detail::zero_stays_zero<Variant>});
      });
    });
    return r;
  }();
  return instance;
}

// The entries of a kernel table: Make<Variant, Types>::value for every kernel, in kernel order.
template <template <class, class> class Make, class Entry>
std::vector<Entry> kernel_table() {
  std::vector<Entry> table;
  for_each_type(Rules{}, [&](auto rule) {
    for_each_type(typename decltype(rule)::Variants{}, [&](auto variant) {
      for_each_type(Combinations{}, [&](auto types) {
        table.push_back(Make<decltype(variant), decltype(types)>::value);
      });
      table.push_back(Make<decltype(variant), Coded>::value);
    });
  });
  return table;
}

}  // namespace fusedopt
