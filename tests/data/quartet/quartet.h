// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of Quartet.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// Quartet, which nobody has published: a step of Adam and a share of Adagrad's, with weights that
// decay towards where they have been:
//
//   exp_avg    = beta1 * exp_avg    + (1 - beta1) * g
//   exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
//   total      = total + g^2                                   (it begins as initial_total)
//   change     = exp_avg / (sqrt(exp_avg_sq) + eps) + share * g / (sqrt(total) + eps)
//   p          = p - lr / (1 + lr_decay * (step - 1)) * (change + weight_decay * (p - anchor))
//   anchor     = anchor + follow * (p - anchor)                (it begins as p)
struct Quartet {
  static constexpr const char* name = "quartet";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, lr_decay, initial_total, share, follow, maximize;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},
      {&Options::beta1, "betas", 0, true},
      {&Options::beta2, "betas", 1, true},
      {&Options::eps, "eps"},
      {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::lr_decay, "lr_decay"},
      {&Options::initial_total, "initial_total"},
      {&Options::share, "share"},
      {&Options::follow, "follow"},
      {&Options::maximize, "maximize"},
  };

  template <class T>
  struct Row {
    T grad_factor, beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
    T weight_decay, share, follow, one_minus_follow, lr;
  };

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.weight_decay == 0 && row.one_minus_beta1 < T(0.5) && row.one_minus_beta2 < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double step, bool) {
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.beta1 = o.beta1;
    row.one_minus_beta1 = 1 - o.beta1;
    row.beta2 = o.beta2;
    row.one_minus_beta2 = 1 - o.beta2;
    row.eps = o.eps;
    row.weight_decay = o.weight_decay;
    row.share = o.share;
    row.follow = o.follow;
    row.one_minus_follow = 1 - o.follow;
    row.lr = o.lr / (1 + o.lr_decay * (step - 1));
    return row;
  }

  struct Variant {
    using Rule = Quartet;
    static constexpr int state_count = 4;
    static constexpr State states[] = {
        {"exp_avg", StateKind::average},
        {"exp_avg_sq", StateKind::average_of_squares},
        {"anchor", StateKind::weight, Begins::as_parameter},
        {"total", StateKind::weight, Begins::as_option, "initial_total"},
    };

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math& math) {
      T& exp_avg = state[0];
      T& exp_avg_sq = state[1];
      T& anchor = state[2];
      T& total = state[3];

      g = row.grad_factor * g;
      exp_avg = moving_average<usual>(exp_avg, g, row.one_minus_beta1, row.beta1);
      exp_avg_sq =
          moving_average_of_square<usual, Math>(exp_avg_sq, g, row.one_minus_beta2, row.beta2);
      total = multiply_add(g, g, total);

      T change = math.divide_by_root(exp_avg, exp_avg_sq, row.eps);
      if (row.share != 0) {
        const T part = math.divide_by_root(g, total, row.eps);
        change = multiply_add(row.share, part, change);
      }
      if (!usual && row.weight_decay != 0) {
        change = multiply_add(row.weight_decay, p - anchor, change);
      }
      p = multiply_add(-row.lr, change, p);
      anchor = moving_average<false>(anchor, p, row.follow, row.one_minus_follow);
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
