// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of Adam, AMSGrad and AdamW.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// Adam (Kingma and Ba, 2015, arXiv:1412.6980), AMSGrad (Reddi et al., 2018) and, with
// decoupled_weight_decay, AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101):
//
//   exp_avg    = beta1 * exp_avg    + (1 - beta1) * g
//   exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
//   m_hat      = exp_avg / (1 - beta1^step)
//   v_hat      = exp_avg_sq / (1 - beta2^step)
//   p          = p - lr * m_hat / (sqrt(v_hat) + eps)
//
// Without a first moment, m_hat is g. If it is cautious, changes against g are left out.
// Both corrections are folded into step_size and eps, which are the same for all elements:
//   lr * m_hat / (sqrt(v_hat) + eps) = step_size * exp_avg / (sqrt(exp_avg_sq) + corrected_eps)
struct Adam {
  static constexpr const char* name = "adam";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, amsgrad, maximize;
    double cautious_weight_decay, first_moment, cautious;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},
      {&Options::beta1, "betas", 0, true},
      {&Options::beta2, "betas", 1, true},
      {&Options::eps, "eps"},
      {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::decoupled_weight_decay, "decoupled_weight_decay"},
      {&Options::amsgrad, "amsgrad"},
      {&Options::maximize, "maximize"},
      optional(&Options::cautious_weight_decay, "cautious_weight_decay"),
      optional(&Options::first_moment, "first_moment", 1),
      optional(&Options::cautious, "cautious"),
  };

  template <class T>
  struct Row {
    T grad_factor, coupled_decay, decoupled_decay, decay_against;
    T beta1, one_minus_beta1, beta2, one_minus_beta2;
    T step_size, eps;
    T with, against;  // what changes with the gradient, and against it, are multiplied by
  };

  static constexpr int sum_count = 1;
  static bool measures(const Options& o) { return o.cautious != 0; }
  template <class T>
  FUSEDOPT_HD static void use(const T* means, const T*, Row<T>& row) {
    row.with = cautious_scale(means[0]);
  }

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return usual_but_cautious(row) && row.against == 1;
  }
  template <class T>
  FUSEDOPT_HD static bool usual_but_cautious(const Row<T>& row) {
    return row.coupled_decay == 0 && row.decay_against == row.decoupled_decay &&
           row.one_minus_beta1 < T(0.5) && row.one_minus_beta2 < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double step, bool) {
    const double correction1 =
        o.first_moment != 0 ? one_minus_power(o.beta1, (long long)(step)) : 1;
    const double correction2 = square_root(one_minus_power(o.beta2, (long long)(step)));
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.coupled_decay = o.decoupled_weight_decay != 0 ? 0 : o.weight_decay;
    row.decoupled_decay = o.decoupled_weight_decay != 0 ? o.lr * o.weight_decay : 0;
    row.decay_against = o.cautious_weight_decay != 0 ? 0 : row.decoupled_decay;
    row.beta1 = o.beta1;
    row.one_minus_beta1 = 1 - o.beta1;
    row.beta2 = o.beta2;
    row.one_minus_beta2 = 1 - o.beta2;
    row.step_size = o.lr * correction2 / correction1;
    row.eps = corrected_eps(o.eps, correction2);
    row.with = 1;
    row.against = o.cautious != 0 ? 0 : 1;
    return row;
  }

  static constexpr State all_states[] = {
      {"exp_avg", StateKind::average},
      {"exp_avg_sq", StateKind::average_of_squares},
      {"max_exp_avg_sq", StateKind::average_of_squares},
  };

  template <bool first_moment, bool amsgrad, bool is_cautious = false>
  struct Variant {
    using Rule = Adam;
    using Cautious = Variant<first_moment, amsgrad, true>;
    static constexpr int state_count = (first_moment ? 2 : 1) + (amsgrad ? 1 : 0);
    static constexpr const State* states = all_states + (first_moment ? 0 : 1);

    template <bool usual, class T>
    FUSEDOPT_HD static T gradient(const Row<T>& row, T p, T g) {
      g = row.grad_factor * g;
      return !usual && row.coupled_decay != 0 ? multiply_add(row.coupled_decay, p, g) : g;
    }
    template <bool usual, class T>
    FUSEDOPT_HD static T moment_of(const Row<T>& row, T g, const T* state) {
      return first_moment ? moving_average<usual>(state[0], g, row.one_minus_beta1, row.beta1) : g;
    }

    // How many elements are changed, if it is cautious.
    template <class T, class Math>
    FUSEDOPT_HD static void measure(const Row<T>& row, T p, T g, const T* state, Math&,
                                    double* sums) {
      g = gradient<false>(row, p, g);
      sums[0] += agree(moment_of<false>(row, g, state), g) ? 1 : 0;
    }

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math& math) {
      T& exp_avg_sq = state[first_moment ? 1 : 0];

      g = gradient<usual>(row, p, g);
      const T moment = moment_of<usual>(row, g, state);
      if (first_moment) state[0] = moment;
      exp_avg_sq =
          moving_average_of_square<usual, Math>(exp_avg_sq, g, row.one_minus_beta2, row.beta2);

      T second_moment = exp_avg_sq;
      if (amsgrad) {
        T& max_exp_avg_sq = state[first_moment ? 2 : 1];
        // Written so that a NaN on either side stays.
        const bool keep = (max_exp_avg_sq > exp_avg_sq) | (max_exp_avg_sq != max_exp_avg_sq);
        max_exp_avg_sq = keep ? max_exp_avg_sq : exp_avg_sq;
        second_moment = max_exp_avg_sq;
      }

      T change = math.divide_by_root(row.step_size * moment, second_moment, row.eps);
      if (is_cautious || !usual) change = cautious(change, agree(moment, g), row.with, row.against);
      if (row.decoupled_decay != 0)
        change = with_decay<usual>(row.decoupled_decay, row.decay_against, p, change);
      p -= change;
    }
  };

  using Variants = TypeList<Variant<true, false>, Variant<true, true>, Variant<false, false>,
                            Variant<false, true>>;
  static int variant(const Options& o) {
    return (o.first_moment != 0 ? 0 : 2) + (o.amsgrad != 0 ? 1 : 0);
  }
};

}  // namespace fusedopt
