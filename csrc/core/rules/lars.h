// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of LARS.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// LARS (You et al., 2017, arXiv:1708.03888), SGD whose gradients are as large as its weights:
//
//   trust           = trust_coefficient * |p| / (|g| + weight_decay * |p| + eps)
//   momentum_buffer = momentum * momentum_buffer + trust * (g + weight_decay * p)
//   p               = p - lr * momentum_buffer     (nesterov: see sgd.h)
//
// with the norms of the whole parameter. trust is 1 where one of them is zero and, unless
// always_adapt, where there is no decay.
struct Lars {
  static constexpr const char* name = "lars";
  static constexpr bool counts_steps = false;

  struct Options {
    double lr, momentum, weight_decay, trust_coefficient, eps, nesterov, maximize, always_adapt;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},
      {&Options::momentum, "momentum"},
      {&Options::weight_decay, "weight_decay"},
      {&Options::trust_coefficient, "trust_coefficient"},
      {&Options::eps, "eps"},
      {&Options::nesterov, "nesterov"},
      {&Options::maximize, "maximize"},
      {&Options::always_adapt, "always_adapt"},
  };

  template <class T>
  struct Row {
    T grad_factor, weight_decay, trust, trust_coefficient, eps, momentum, nesterov, lr;
  };

  // No row is common enough for a loop of its own.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>&) {
    return false;
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double, bool) {
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.weight_decay = o.weight_decay;
    row.trust = 1;
    row.trust_coefficient = o.trust_coefficient;
    row.eps = o.eps;
    row.momentum = o.momentum;
    row.nesterov = o.nesterov;
    row.lr = o.lr;
    return row;
  }

  static constexpr int sum_count = 2;  // the squares of p, and of g
  static bool measures(const Options& o) { return o.weight_decay != 0 || o.always_adapt != 0; }
  template <class T>
  FUSEDOPT_HD static void use(const T*, const T* norms, Row<T>& row) {
    if (norms[0] > 0 && norms[1] > 0)
      row.trust =
          row.trust_coefficient * norms[0] / (norms[1] + row.weight_decay * norms[0] + row.eps);
  }

  struct Variant {
    using Rule = Lars;
    static constexpr int state_count = 1;
    static constexpr State states[] = {{"momentum_buffer", StateKind::average}};

    template <class T, class Math>
    FUSEDOPT_HD static void measure(const Row<T>& row, T p, T g, const T*, Math&, double* sums) {
      add_square(sums[0], p);
      add_square(sums[1], row.grad_factor * g);
    }

    template <bool, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math&) {
      T& buffer = state[0];
      g = row.grad_factor * g;
      if (row.weight_decay != 0) g = multiply_add(row.weight_decay, p, g);
      g = row.trust * g;
      buffer = multiply_add(row.momentum, buffer, g);
      const T change = row.nesterov != 0 ? multiply_add(row.momentum, buffer, g) : buffer;
      p = multiply_add(-row.lr, change, p);
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
