// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of Adagrad.
#pragma once

#include "rule.h"

namespace fusedopt {

// Adagrad (Duchi, Hazan and Singer, 2011, JMLR 12), with a learning rate that decays as in torch:
//
//   sum = sum + g^2                                    (it begins as initial_accumulator_value)
//   p   = p - lr / (1 + lr_decay * (step - 1)) * g / (sqrt(sum) + eps)
struct Adagrad {
  static constexpr const char* name = "adagrad";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, lr_decay, eps, weight_decay, initial_accumulator_value, maximize;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},
      {&Options::lr_decay, "lr_decay"},
      {&Options::eps, "eps"},
      {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::initial_accumulator_value, "initial_accumulator_value"},
      {&Options::maximize, "maximize"},
  };

  template <class T>
  struct Row {
    T grad_factor, weight_decay, eps, lr;
  };

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.weight_decay == 0;
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double step, bool) {
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.weight_decay = o.weight_decay;
    row.eps = o.eps;
    row.lr = o.lr / (1 + o.lr_decay * (step - 1));
    return row;
  }

  struct Variant {
    using Rule = Adagrad;
    static constexpr int state_count = 1;
    static constexpr State states[] = {
        {"sum", StateKind::weight, Begins::as_option, "initial_accumulator_value"},
    };

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math& math) {
      T& sum = state[0];

      g = row.grad_factor * g;
      if (!usual && row.weight_decay != 0) g = multiply_add(row.weight_decay, p, g);
      sum = multiply_add(g, g, sum);
      p = multiply_add(-row.lr, math.divide_by_root(g, sum, row.eps), p);
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
