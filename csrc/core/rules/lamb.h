// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of LAMB.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// LAMB (You et al., 2020, arXiv:1904.00962), whose steps are as long as its weights are large:
//
//   exp_avg    = beta1 * exp_avg    + (1 - beta1) * g
//   exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
//   r          = m_hat / (sqrt(v_hat) + eps) + weight_decay * p     (see adam.h)
//   p          = p - lr * |p| / |r| * r
//
// with the norms of the whole parameter; their quotient is 1 where one of them is zero and, unless
// always_adapt, where there is no decay.
struct Lamb {
  static constexpr const char* name = "lamb";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, maximize, always_adapt;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},           {&Options::beta1, "betas", 0, true},
      {&Options::beta2, "betas", 1, true},      {&Options::eps, "eps"},
      {&Options::weight_decay, "weight_decay"}, {&Options::maximize, "maximize"},
      {&Options::always_adapt, "always_adapt"},
  };

  template <class T>
  struct Row {
    T grad_factor, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2;
    T moment_scale, eps, step_size;
  };

  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.one_minus_beta1 < T(0.5) && row.one_minus_beta2 < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double step, bool) {
    const double correction1 = one_minus_power(o.beta1, (long long)(step));
    const double correction2 = square_root(one_minus_power(o.beta2, (long long)(step)));
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.weight_decay = o.weight_decay;
    row.beta1 = o.beta1;
    row.one_minus_beta1 = 1 - o.beta1;
    row.beta2 = o.beta2;
    row.one_minus_beta2 = 1 - o.beta2;
    row.moment_scale = correction2 / correction1;
    row.eps = corrected_eps(o.eps, correction2);
    row.step_size = o.lr;
    return row;
  }

  static constexpr int sum_count = 2;  // the squares of p, and of r
  static bool measures(const Options& o) { return o.weight_decay != 0 || o.always_adapt != 0; }
  template <class T>
  FUSEDOPT_HD static void use(const T*, const T* norms, Row<T>& row) {
    if (norms[0] > 0 && norms[1] > 0) row.step_size *= norms[0] / norms[1];
  }

  struct Variant {
    using Rule = Lamb;
    static constexpr int state_count = 2;
    static constexpr State states[] = {{"exp_avg", StateKind::average},
                                       {"exp_avg_sq", StateKind::average_of_squares}};

    // r, with the states that it is made of.
    template <bool usual, class T, class Math>
    FUSEDOPT_HD static T direction(const Row<T>& row, T p, T g, T* state, Math& math) {
      g = row.grad_factor * g;
      state[0] = moving_average<usual>(state[0], g, row.one_minus_beta1, row.beta1);
      state[1] = moving_average_of_square<usual, Math>(state[1], g, row.one_minus_beta2, row.beta2);
      const T adapted = math.divide_by_root(row.moment_scale * state[0], state[1], row.eps);
      return row.weight_decay != 0 ? multiply_add(row.weight_decay, p, adapted) : adapted;
    }

    template <class T, class Math>
    FUSEDOPT_HD static void measure(const Row<T>& row, T p, T g, const T* state, Math& math,
                                    double* sums) {
      T own[] = {state[0], state[1]};
      add_square(sums[0], p);
      add_square(sums[1], direction<false>(row, p, g, own, math));
    }

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math& math) {
      p = multiply_add(-row.step_size, direction<usual>(row, p, g, state, math), p);
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
