// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of Adan.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// Adan (Xie et al., 2022, arXiv:2208.06677), with the betas of the authors' code, which are 1 minus
// those of the paper, and the states that it has:
//
//   diff         = g + neg_pre_grad                      (in the first step 0)
//   exp_avg      = beta1 * exp_avg      + (1 - beta1) * g
//   exp_avg_diff = beta2 * exp_avg_diff + (1 - beta2) * diff
//   exp_avg_sq   = beta3 * exp_avg_sq   + (1 - beta3) * (g + beta2 * diff)^2
//   m_hat        = exp_avg / (1 - beta1^step)
//   d_hat        = exp_avg_diff / (1 - beta2^step)
//   v_hat        = exp_avg_sq / (1 - beta3^step)
//   change       = lr * (m_hat + beta2 * d_hat) / (sqrt(v_hat) + eps)
//   p            = (p - change) / (1 + lr * weight_decay)
//                  or, no_prox, (1 - lr * weight_decay) * p - change
//   neg_pre_grad = -g
//
// Both forms of p are p - (size * change + decay * p): of the first, size = 1 - decay is
// 1 / (1 + lr * weight_decay). It is folded into the sizes of the steps.
struct Adan {
  static constexpr const char* name = "adan";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, beta1, beta2, beta3, eps, weight_decay, no_prox, maximize;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},
      {&Options::beta1, "betas", 0, true},
      {&Options::beta2, "betas", 1, true},
      {&Options::beta3, "betas", 2, true},
      {&Options::eps, "eps"},
      {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::no_prox, "no_prox"},
      {&Options::maximize, "maximize"},
  };

  template <class T>
  struct Row {
    T grad_factor, first, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
    T beta3, one_minus_beta3, step_size, diff_step_size, eps;
  };

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.first == 0 && row.one_minus_beta1 < T(0.5) && row.one_minus_beta2 < T(0.5) &&
           row.one_minus_beta3 < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double step, bool) {
    const double correction1 = one_minus_power(o.beta1, (long long)(step));
    const double correction2 = one_minus_power(o.beta2, (long long)(step));
    const double correction3 = square_root(one_minus_power(o.beta3, (long long)(step)));
    const double decay = o.lr * o.weight_decay;
    const double shrunk = o.no_prox != 0 ? 1 : 1 + decay;
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.first = step <= 1 ? 1 : 0;
    row.decay = decay / shrunk;
    row.beta1 = o.beta1;
    row.one_minus_beta1 = 1 - o.beta1;
    row.beta2 = o.beta2;
    row.one_minus_beta2 = 1 - o.beta2;
    row.beta3 = o.beta3;
    row.one_minus_beta3 = 1 - o.beta3;
    row.step_size = o.lr * correction3 / (correction1 * shrunk);
    row.diff_step_size = o.lr * o.beta2 * correction3 / (correction2 * shrunk);
    row.eps = corrected_eps(o.eps, correction3);
    return row;
  }

  struct Variant {
    using Rule = Adan;
    static constexpr int state_count = 4;
    static constexpr State states[] = {
        {"exp_avg", StateKind::average},
        {"exp_avg_sq", StateKind::average_of_squares},
        {"exp_avg_diff", StateKind::average},
        // Not an average, but the next gradient takes its place: errors of codes do not add up.
        {"neg_pre_grad", StateKind::average},
    };

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math& math) {
      T& exp_avg = state[0];
      T& exp_avg_sq = state[1];
      T& exp_avg_diff = state[2];
      T& neg_pre_grad = state[3];

      g = row.grad_factor * g;
      T diff = g + neg_pre_grad;
      if (!usual) diff = row.first != 0 ? T(0) : diff;
      neg_pre_grad = -g;

      exp_avg = moving_average<usual>(exp_avg, g, row.one_minus_beta1, row.beta1);
      exp_avg_diff = moving_average<usual>(exp_avg_diff, diff, row.one_minus_beta2, row.beta2);
      exp_avg_sq = moving_average_of_square<usual, Math>(
          exp_avg_sq, multiply_add(row.beta2, diff, g), row.one_minus_beta3, row.beta3);

      const T mixed = multiply_add(row.diff_step_size, exp_avg_diff, row.step_size * exp_avg);
      T change = math.divide_by_root(mixed, exp_avg_sq, row.eps);
      if (row.decay != 0) change = multiply_add(row.decay, p, change);
      p -= change;
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
