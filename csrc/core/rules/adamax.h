// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of Adamax.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// Adamax (Kingma and Ba, 2015, arXiv:1412.6980, section 7.1), with eps where torch has it:
//
//   exp_avg = beta1 * exp_avg + (1 - beta1) * g
//   exp_inf = max(beta2 * exp_inf, |g| + eps)
//   p       = p - lr / (1 - beta1^step) * exp_avg / exp_inf
struct Adamax {
  static constexpr const char* name = "adamax";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, maximize;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},
      {&Options::beta1, "betas", 0, true},
      {&Options::beta2, "betas", 1, true},
      {&Options::eps, "eps"},
      {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::maximize, "maximize"},
  };

  template <class T>
  struct Row {
    T grad_factor, weight_decay, beta1, one_minus_beta1, beta2, eps, step_size;
  };

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.weight_decay == 0 && row.one_minus_beta1 < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double step, bool) {
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.weight_decay = o.weight_decay;
    row.beta1 = o.beta1;
    row.one_minus_beta1 = 1 - o.beta1;
    row.beta2 = o.beta2;
    row.eps = o.eps;
    row.step_size = o.lr / one_minus_power(o.beta1, (long long)(step));
    return row;
  }

  struct Variant {
    using Rule = Adamax;
    static constexpr int state_count = 2;
    // A norm is stored like an average of squares: as what is never negative.
    static constexpr State states[] = {
        {"exp_avg", StateKind::average},
        {"exp_inf", StateKind::average_of_squares},
    };

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math& math) {
      T& exp_avg = state[0];
      T& exp_inf = state[1];

      g = row.grad_factor * g;
      if (!usual && row.weight_decay != 0) g = multiply_add(row.weight_decay, p, g);

      exp_avg = moving_average<usual>(exp_avg, g, row.one_minus_beta1, row.beta1);
      const T decayed = row.beta2 * exp_inf;
      const T magnitude = absolute(g) + row.eps;
      // Written so that a NaN on either side stays.
      const bool keep = (decayed > magnitude) | (decayed != decayed);
      exp_inf = keep ? decayed : magnitude;

      p = multiply_add(-row.step_size, math.divide(exp_avg, exp_inf), p);
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
