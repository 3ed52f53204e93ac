// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of StableAdamW.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// StableAdamW (Wortsman et al., 2023, arXiv:2304.13013), AdamW with shorter steps where gradients
// are larger than their average says:
//
//   exp_avg    = b1 * exp_avg    + (1 - b1) * g
//   exp_avg_sq = b2 * exp_avg_sq + (1 - b2) * g^2
//   p          = p - lr / max(1, rms) * (exp_avg / (sqrt(exp_avg_sq) + eps) + weight_decay * p)
//
// with b = beta * (1 - beta^(step - 1)) / (1 - beta^step), and rms the root of the mean, over the
// whole parameter, of g^2 / max(exp_avg_sq, eps^2).
struct StableAdamW {
  static constexpr const char* name = "stable_adamw";
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
    T grad_factor, beta1, one_minus_beta1, beta2, one_minus_beta2;
    T step_size, decay, eps, least_square;
  };

  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.one_minus_beta1 < T(0.5) && row.one_minus_beta2 < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double step, bool) {
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.one_minus_beta1 = (1 - o.beta1) / one_minus_power(o.beta1, (long long)(step));
    row.beta1 = 1 - row.one_minus_beta1;
    row.one_minus_beta2 = (1 - o.beta2) / one_minus_power(o.beta2, (long long)(step));
    row.beta2 = 1 - row.one_minus_beta2;
    row.step_size = o.lr;
    row.decay = o.lr * o.weight_decay;
    row.eps = o.eps;
    // Zero by zero is no number.
    constexpr double least = 0x1p-126;
    row.least_square = o.eps * o.eps > least ? o.eps * o.eps : least;
    return row;
  }

  static constexpr int sum_count = 1;
  static bool measures(const Options&) { return true; }
  template <class T>
  FUSEDOPT_HD static void use(const T* means, const T*, Row<T>& row) {
    const T rms = square_root(means[0]);
    if (!(rms > 1)) return;
    row.step_size /= rms;
    row.decay /= rms;
  }

  struct Variant {
    using Rule = StableAdamW;
    static constexpr int state_count = 2;
    static constexpr State states[] = {{"exp_avg", StateKind::average},
                                       {"exp_avg_sq", StateKind::average_of_squares}};

    template <bool usual, class Math, class T>
    FUSEDOPT_HD static T average_of_square(const Row<T>& row, T g, const T* state) {
      return moving_average_of_square<usual, Math>(state[1], g, row.one_minus_beta2, row.beta2);
    }

    template <class T, class Math>
    FUSEDOPT_HD static void measure(const Row<T>& row, T, T g, const T* state, Math& math,
                                    double* sums) {
      g = row.grad_factor * g;
      const T average = average_of_square<false, Math>(row, g, state);
      // A NaN stays one, as what is made of it is rare then.
      const T square = average < row.least_square ? row.least_square : average;
      add_square(sums[0], math.divide_by_root(g, square, T(0)));
    }

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math& math) {
      g = row.grad_factor * g;
      state[0] = moving_average<usual>(state[0], g, row.one_minus_beta1, row.beta1);
      state[1] = average_of_square<usual, Math>(row, g, state);
      T change = math.divide_by_root(row.step_size * state[0], state[1], row.eps);
      if (row.decay != 0) change = multiply_add(row.decay, p, change);
      p -= change;
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
