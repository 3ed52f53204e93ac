// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of NAdam.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// NAdam (Dozat, 2016, Incorporating Nesterov Momentum into Adam), as torch defines it:
//
//   mu(t)      = beta1 * (1 - 0.96^(t * momentum_decay) / 2)
//   mu_product = mu_product * mu(step)                                   (mu_product begins as 1)
//   exp_avg    = beta1 * exp_avg    + (1 - beta1) * g
//   exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
//   m_hat      = mu(step + 1) * exp_avg / (1 - mu_product * mu(step + 1))
//                + (1 - mu(step)) * g / (1 - mu_product)
//   v_hat      = exp_avg_sq / (1 - beta2^step)
//   p          = p - lr * m_hat / (sqrt(v_hat) + eps)
struct NAdam {
  static constexpr const char* name = "nadam";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, momentum_decay, decoupled_weight_decay, maximize;
    double mu_product;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},
      {&Options::beta1, "betas", 0, true},
      {&Options::beta2, "betas", 1, true},
      {&Options::eps, "eps"},
      {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::momentum_decay, "momentum_decay"},
      {&Options::decoupled_weight_decay, "decoupled_weight_decay"},
      {&Options::maximize, "maximize"},
      in_state(&Options::mu_product, "mu_product", 1),
  };

  template <class T>
  struct Row {
    T grad_factor, coupled_decay, decoupled_decay;
    T beta1, one_minus_beta1, beta2, one_minus_beta2;
    T moment_size, grad_size, eps;
    T mu_product;
  };

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.coupled_decay == 0 && row.one_minus_beta1 < T(0.5) && row.one_minus_beta2 < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double step, bool) {
    const double correction2 = square_root(one_minus_power(o.beta2, (long long)(step)));
    const double mu = momentum(o, step), next_mu = momentum(o, step + 1);
    const double product = o.mu_product * mu;
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.coupled_decay = o.decoupled_weight_decay != 0 ? 0 : o.weight_decay;
    row.decoupled_decay = o.decoupled_weight_decay != 0 ? o.lr * o.weight_decay : 0;
    row.beta1 = o.beta1;
    row.one_minus_beta1 = 1 - o.beta1;
    row.beta2 = o.beta2;
    row.one_minus_beta2 = 1 - o.beta2;
    row.moment_size = o.lr * correction2 * next_mu / (1 - product * next_mu);
    row.grad_size = o.lr * correction2 * (1 - mu) / (1 - product);
    row.eps = corrected_eps(o.eps, correction2);
    row.mu_product = product;
    return row;
  }

  FUSEDOPT_HD static double momentum(const Options& o, double step) {
    return o.beta1 * (1 - 0.5 * power(0.96, step * o.momentum_decay));
  }

  struct Variant {
    using Rule = NAdam;
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

      const T mixed = multiply_add(row.moment_size, exp_avg, row.grad_size * g);
      T change = math.divide_by_root(mixed, exp_avg_sq, row.eps);
      if (row.decoupled_decay != 0) change = multiply_add(row.decoupled_decay, p, change);
      p -= change;
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
