// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What Python has to know of the rules: their states, and which dtypes go together.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "options.h"

namespace fusedopt {
namespace {

// The keys of a parameter's state, as the options of its group want it.
py::tuple state_names(const std::string& optimizer, const std::string& rule_name,
                      const py::dict& group, size_t index) {
  const RuleInfo& rule = find_rule(rule_name);
  GroupOptions options;
  OptionReader::of(rule).read(optimizer, group.ptr(), index, options);
  py::list names;
  if (rule.counts_steps) names.append("step");
  for (const int number : rule.numbers) names.append(rule.options[number].key);
  const int variant = rule.first_variant + rule.variant(options.values.data());
  for (const State& state : registry().variants[variant].states) names.append(state.key);
  return py::tuple(names);
}

// Whether parameters of a group are measured before they are stepped. Of options that are wrong
// others have to hear, with whom these are measured: they count as given.
bool measures(const std::string& rule_name, const py::dict& group) {
  const RuleInfo& rule = find_rule(rule_name);
  if (!rule.can_measure) return false;
  GroupOptions options;
  for (size_t i = 0; i < rule.options.size(); ++i) {
    const OptionInfo& option = rule.options[i];
    options.values[i] = option.initial;
    if (option.in_state || option.on_device || option.element >= 0 || !group.contains(option.key))
      continue;
    try {
      const py::object value = group[option.key];
      options.values[i] = number(value.ptr(), [] { return std::string(); });
    } catch (const std::exception&) {
      options.values[i] = 1;
    }
  }
  return rule.measures(options.values.data());
}

const char* name_of(StateKind kind) {
  return kind == StateKind::average              ? "average"
         : kind == StateKind::average_of_squares ? "average_of_squares"
                                                 : "weight";
}

// What a state begins with: "zero", "parameter", or the key of an option.
const char* beginning_of(const State& state) {
  return state.begins == Begins::with_zero      ? "zero"
         : state.begins == Begins::as_parameter ? "parameter"
                                                : state.option;
}

// Of each rule by name: whether it counts steps, the keys of each variant's states, of each state
// its kind and what it begins with, and what each number begins as: a number, or the key of an
// option.
py::dict rules() {
  py::dict result;
  for (const auto& rule : registry().rules) {
    py::list variants;
    py::dict kinds, beginnings, numbers;
    for (const int number : rule.numbers) {
      const OptionInfo& option = rule.options[number];
      numbers[option.key] = option.begins_as == nullptr ? py::object(py::float_(option.initial))
                                                        : py::object(py::str(option.begins_as));
    }
    for (int v = 0; v < rule.variant_count; ++v) {
      py::list keys;
      for (const State& state : registry().variants[rule.first_variant + v].states) {
        keys.append(state.key);
        kinds[state.key] = name_of(state.kind);
        beginnings[state.key] = beginning_of(state);
      }
      variants.append(py::tuple(keys));
    }
    py::dict info;
    info["counts_steps"] = rule.counts_steps;
    info["variants"] = py::tuple(variants);
    info["kinds"] = kinds;
    info["beginnings"] = beginnings;
    info["numbers"] = numbers;
    result[rule.name] = info;
  }
  return result;
}

std::vector<std::array<at::ScalarType, 3>> combinations() {
  std::vector<std::array<at::ScalarType, 3>> result;
  for (const auto& c : registry().combinations)
    result.push_back({scalar_type(c.param), scalar_type(c.grad), scalar_type(c.state)});
  return result;
}

}  // namespace
}  // namespace fusedopt
