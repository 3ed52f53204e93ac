// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of RAdam.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// RAdam (Liu et al., 2020, arXiv:1908.03265), with eps where torch has it:
//
//   exp_avg    = beta1 * exp_avg    + (1 - beta1) * g
//   exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
//   m_hat      = exp_avg / (1 - beta1^step)
//   rho_inf    = 2 / (1 - beta2) - 1
//   rho        = rho_inf - 2 * step * beta2^step / (1 - beta2^step)
//   r          = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))
//   change     = r * m_hat * sqrt(1 - beta2^step) / (sqrt(exp_avg_sq) + eps)
//                or, where rho is no more than 5, m_hat
//   p          = p - lr * change
//
// All factors of exp_avg are folded into step_size, which is the same for all elements. Where the
// second moment is left out, 0 and 1 stand in place of it and of eps.
struct RAdam {
  static constexpr const char* name = "radam";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, maximize;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},
      {&Options::beta1, "betas", 0, true},
      {&Options::beta2, "betas", 1, true},
      {&Options::eps, "eps"},
      {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::decoupled_weight_decay, "decoupled_weight_decay"},
      {&Options::maximize, "maximize"},
  };

  template <class T>
  struct Row {
    T grad_factor, coupled_decay, decoupled_decay;
    T beta1, one_minus_beta1, beta2, one_minus_beta2;
    T rectified, step_size, eps;
  };

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.rectified != 0 && row.coupled_decay == 0 && row.one_minus_beta1 < T(0.5) &&
           row.one_minus_beta2 < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double step, bool) {
    const double correction1 = one_minus_power(o.beta1, (long long)(step));
    const double correction2 = one_minus_power(o.beta2, (long long)(step));
    const double rho_inf = 2 / (1 - o.beta2) - 1;
    const double rho = rho_inf - 2 * step * (1 - correction2) / correction2;
    const bool rectified = rho > 5;
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.coupled_decay = o.decoupled_weight_decay != 0 ? 0 : o.weight_decay;
    row.decoupled_decay = o.decoupled_weight_decay != 0 ? o.lr * o.weight_decay : 0;
    row.beta1 = o.beta1;
    row.one_minus_beta1 = 1 - o.beta1;
    row.beta2 = o.beta2;
    row.one_minus_beta2 = 1 - o.beta2;
    row.rectified = rectified ? 1 : 0;
    row.step_size = o.lr / correction1;
    row.eps = 1;
    if (rectified) {
      row.step_size *= square_root(correction2 * (rho - 4) * (rho - 2) * rho_inf /
                                   ((rho_inf - 4) * (rho_inf - 2) * rho));
      row.eps = o.eps;
    }
    return row;
  }

  struct Variant {
    using Rule = RAdam;
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

      exp_avg = moving_average<usual>(exp_avg, g, row.one_minus_beta1, row.beta1);
      exp_avg_sq =
          moving_average_of_square<usual, Math>(exp_avg_sq, g, row.one_minus_beta2, row.beta2);

      const T second_moment = usual || row.rectified != 0 ? exp_avg_sq : T(0);
      T change = math.divide_by_root(row.step_size * exp_avg, second_moment, row.eps);
      if (row.decoupled_decay != 0) change = multiply_add(row.decoupled_decay, p, change);
      p -= change;
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
