// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What Python has to know of the rules: their states, their dtypes.
#pragma once

#include "options.h"

namespace fusedopt {
namespace {

// The keys of a parameter's state, as the options of its group want it.
py::tuple state_names(const std::string& optimizer, const std::string& rule_name,
                      const py::dict& group, size_t index) {
  const RuleInfo& rule = find_rule(rule_name);
  GroupOptions options;
  OptionReader(rule).read(optimizer, group.ptr(), index, options);
  const VariantInfo& variant =
      registry().variants[rule.first_variant + rule.variant(options.values.data())];
  py::list names;
  if (rule.counts_steps) names.append("step");
  for (int k = 0; k < variant.states; ++k) names.append(variant.state_names[k]);
  return py::tuple(names);
}

py::dict rules() {
  py::dict result;
  for (const auto& rule : registry().rules) {
    const size_t index = size_t(&rule - registry().rules.data());
    const int end = index + 1 < registry().rules.size() ? registry().rules[index + 1].first_variant
                                                        : int(registry().variants.size());
    py::list variants;
    py::set never_negative;
    for (int v = rule.first_variant; v < end; ++v) {
      py::list names;
      for (int k = 0; k < registry().variants[v].states; ++k) {
        names.append(registry().variants[v].state_names[k]);
        if (registry().variants[v].never_negative(k))
          never_negative.add(registry().variants[v].state_names[k]);
      }
      variants.append(py::tuple(names));
    }
    py::dict info;
    info["counts_steps"] = rule.counts_steps;
    info["variants"] = py::tuple(variants);
    info["never_negative"] = never_negative;
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
