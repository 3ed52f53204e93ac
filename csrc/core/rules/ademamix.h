// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of AdEMAMix.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// AdEMAMix (Pagliardini, Ablin and Grangier, 2024, arXiv:2409.03137), with the states' names of the
// authors' code:
//
//   exp_avg_fast = beta1 * exp_avg_fast + (1 - beta1) * g
//   exp_avg_slow = slow * exp_avg_slow  + (1 - slow) * g
//   exp_avg_sq   = beta2 * exp_avg_sq   + (1 - beta2) * g^2
//   m_hat        = exp_avg_fast / (1 - beta1^step)
//   v_hat        = exp_avg_sq / (1 - beta2^step)
//   change       = (m_hat + share * exp_avg_slow) / (sqrt(v_hat) + eps)
//   p            = p - lr * (change + weight_decay * p)
//
// where share is alpha and slow is beta3 or, for the first alpha_warmup and beta3_warmup steps,
//
//   share = alpha * step / alpha_warmup
//   slow  = min(beta3, exp(log(beta1) * log(beta3) / ((1 - t) * log(beta3) + t * log(beta1))))
//
// with t = step / beta3_warmup, by which its half-life grows linearly from beta1's to beta3's.
struct AdEMAMix {
  static constexpr const char* name = "ademamix";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, beta1, beta2, beta3, alpha, beta3_warmup, alpha_warmup, eps, weight_decay, maximize;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},
      {&Options::beta1, "betas", 0, true},
      {&Options::beta2, "betas", 1, true},
      {&Options::beta3, "betas", 2, true},
      {&Options::alpha, "alpha"},
      {&Options::beta3_warmup, "beta3_warmup"},
      {&Options::alpha_warmup, "alpha_warmup"},
      {&Options::eps, "eps"},
      {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::maximize, "maximize"},
  };

  template <class T>
  struct Row {
    T grad_factor, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, slow, one_minus_slow;
    T fast_size, slow_size, eps;
  };

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.one_minus_beta1 < T(0.5) && row.one_minus_beta2 < T(0.5) &&
           row.one_minus_slow < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double step, bool) {
    const double correction1 = one_minus_power(o.beta1, (long long)(step));
    const double correction2 = square_root(one_minus_power(o.beta2, (long long)(step)));
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.decay = o.lr * o.weight_decay;
    row.beta1 = o.beta1;
    row.one_minus_beta1 = 1 - o.beta1;
    row.beta2 = o.beta2;
    row.one_minus_beta2 = 1 - o.beta2;
    row.one_minus_slow = one_minus_slow(o, step);
    row.slow = 1 - row.one_minus_slow;
    row.fast_size = o.lr * correction2 / correction1;
    row.slow_size = o.lr * correction2 * o.alpha;
    if (step < o.alpha_warmup) row.slow_size *= step / o.alpha_warmup;
    row.eps = corrected_eps(o.eps, correction2);
    return row;
  }

  // The logarithm of a beta of 0 is -Inf, its half-life 0.
  FUSEDOPT_HD static double one_minus_slow(const Options& o, double step) {
    const double least = 1 - o.beta3;
    if (!(step < o.beta3_warmup)) return least;
    const double t = step / o.beta3_warmup;
    const double half_life = (1 - t) / logarithm(o.beta1) + t / logarithm(o.beta3);
    const double result = one_minus_exponential(1 / half_life);
    return result > least ? result : least;
  }

  struct Variant {
    using Rule = AdEMAMix;
    static constexpr int state_count = 3;
    static constexpr State states[] = {
        {"exp_avg_fast", StateKind::average},
        // A step changes it by so little that codes, and roundings that add up, would lose it.
        {"exp_avg_slow", StateKind::weight},
        {"exp_avg_sq", StateKind::average_of_squares},
    };

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math& math) {
      T& exp_avg_fast = state[0];
      T& exp_avg_slow = state[1];
      T& exp_avg_sq = state[2];

      g = row.grad_factor * g;
      exp_avg_fast = moving_average<usual>(exp_avg_fast, g, row.one_minus_beta1, row.beta1);
      exp_avg_slow = moving_average<usual>(exp_avg_slow, g, row.one_minus_slow, row.slow);
      exp_avg_sq =
          moving_average_of_square<usual, Math>(exp_avg_sq, g, row.one_minus_beta2, row.beta2);

      // Without a share a slow average that is infinite does no harm.
      T mixed = row.fast_size * exp_avg_fast;
      if (row.slow_size != 0) mixed = multiply_add(row.slow_size, exp_avg_slow, mixed);
      T change = math.divide_by_root(mixed, exp_avg_sq, row.eps);
      if (row.decay != 0) change = multiply_add(row.decay, p, change);
      p -= change;
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
