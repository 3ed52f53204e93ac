// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of ADOPT.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// ADOPT (Taniguchi et al., 2024, arXiv:2411.02853), whose square average does not know the gradient
// that is divided by its root. In the first step exp_avg_sq = g^2, and nothing else. Then:
//
//   change     = clamp(g / max(sqrt(exp_avg_sq), eps), (step - 1)^(1/4))
//   exp_avg    = beta1 * exp_avg + (1 - beta1) * change
//   p          = p - lr * exp_avg
//   exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
//
// The authors' code has clamp(x, c), which is x but from -c to c, since November 2024; as there, it
// counts the steps before this one. Weight decay is part of g or, decoupled, of p - lr * exp_avg.
struct Adopt {
  static constexpr const char* name = "adopt";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, decouple, clip, maximize;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},
      {&Options::beta1, "betas", 0, true},
      {&Options::beta2, "betas", 1, true},
      {&Options::eps, "eps"},
      {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::decouple, "decouple"},
      {&Options::clip, "clip"},
      {&Options::maximize, "maximize"},
  };

  template <class T>
  struct Row {
    T grad_factor, first, coupled_decay, decoupled_decay;
    T beta1, one_minus_beta1, beta2, one_minus_beta2, least_square, most, lr;
  };

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.first == 0 && row.coupled_decay == 0 && row.one_minus_beta1 < T(0.5) &&
           row.one_minus_beta2 < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double step, bool) {
    const bool first = step <= 1;
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.first = first ? 1 : 0;
    row.coupled_decay = o.decouple != 0 ? 0 : o.weight_decay;
    row.decoupled_decay = o.decouple != 0 ? o.lr * o.weight_decay : 0;
    row.beta1 = o.beta1;
    row.one_minus_beta1 = 1 - o.beta1;
    row.beta2 = first ? 0 : o.beta2;
    row.one_minus_beta2 = 1 - row.beta2;
    row.least_square = corrected_eps(o.eps, o.eps);
    row.most = o.clip != 0 ? square_root(square_root(step - 1)) : __builtin_huge_val();
    row.lr = o.lr;
    return row;
  }

  struct Variant {
    using Rule = Adopt;
    static constexpr int state_count = 2;
    static constexpr State states[] = {
        {"exp_avg", StateKind::average},
        {"exp_avg_sq", StateKind::average_of_squares},
    };

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math& math) {
      T& exp_avg = state[0];
      T& exp_avg_sq = state[1];

      g = row.grad_factor * g;
      if (!usual && row.coupled_decay != 0) g = multiply_add(row.coupled_decay, p, g);

      // Written so that a NaN stays.
      const T square = exp_avg_sq < row.least_square ? row.least_square : exp_avg_sq;
      T change = math.divide_by_root(g, square, T(0));
      change = change > row.most ? row.most : change;
      change = change < -row.most ? -row.most : change;
      const T updated = moving_average<usual>(exp_avg, change, row.one_minus_beta1, row.beta1);
      change = row.lr * updated;
      if (row.decoupled_decay != 0) change = multiply_add(row.decoupled_decay, p, change);

      // By a choice, as around all of it a branch would keep the loop from working on vectors.
      const bool first = !usual && row.first != 0;
      exp_avg = first ? exp_avg : updated;
      p -= first ? T(0) : change;
      exp_avg_sq =
          moving_average_of_square<usual, Math>(exp_avg_sq, g, row.one_minus_beta2, row.beta2);
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
