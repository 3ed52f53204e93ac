// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Names and numbers of dtypes, kernels and rules, from those of torch and Python.
#pragma once

#include <array>
#include <sstream>
#include <string>

#include "../core/registry.h"
#include "dtypes.h"
#include "torch.h"

namespace fusedopt {
namespace {

// The index of a combination of dtypes, -1 where it is not in the list.
int combination(DType param, DType grad, DType state) {
  static const auto table = [] {
    std::array<int, 64> t;
    t.fill(-1);
    int index = 0;
    for (const auto& c : registry().combinations)
      t[int(c.param) * 16 + int(c.grad) * 4 + int(c.state)] = index++;
    return t;
  }();
  return table[int(param) * 16 + int(grad) * 4 + int(state)];
}

const RuleInfo& find_rule(const std::string& name) {
  for (const auto& rule : registry().rules)
    if (name == rule.name) return rule;
  throw py::value_error("fusedopt: unknown rule " + name);
}

int number_of(const RuleInfo& rule) { return int(&rule - registry().rules.data()); }

bool same_strides(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b) {
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] > 1 && a[i] != b[i]) return false;
  return true;
}

template <class T>
std::string text(const T& value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

}  // namespace
}  // namespace fusedopt
