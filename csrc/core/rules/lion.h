// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of Lion.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// Lion (Chen et al., 2023, arXiv:2302.06675):
//
//   change  = sign(beta1 * exp_avg + (1 - beta1) * g) + weight_decay * p
//   exp_avg = beta2 * exp_avg + (1 - beta2) * g
//   p       = p - lr * change
//
// If it is cautious, signs against g are left out.
struct Lion {
  static constexpr const char* name = "lion";
  static constexpr bool counts_steps = false;

  struct Options {
    double lr, beta1, beta2, weight_decay, maximize, cautious_weight_decay, cautious;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},
      {&Options::beta1, "betas", 0, true},
      {&Options::beta2, "betas", 1, true},
      {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::maximize, "maximize"},
      optional(&Options::cautious_weight_decay, "cautious_weight_decay"),
      optional(&Options::cautious, "cautious"),
  };

  template <class T>
  struct Row {
    T grad_factor, decay, decay_against, beta1, one_minus_beta1, beta2, one_minus_beta2, lr;
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
    return row.decay_against == row.decay && row.one_minus_beta1 < T(0.5) &&
           row.one_minus_beta2 < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double, bool) {
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.decay = o.lr * o.weight_decay;
    row.decay_against = o.cautious_weight_decay != 0 ? 0 : row.decay;
    row.beta1 = o.beta1;
    row.one_minus_beta1 = 1 - o.beta1;
    row.beta2 = o.beta2;
    row.one_minus_beta2 = 1 - o.beta2;
    row.lr = o.lr;
    row.with = 1;
    row.against = o.cautious != 0 ? 0 : 1;
    return row;
  }

  template <bool is_cautious = false>
  struct Variant {
    using Rule = Lion;
    using Cautious = Variant<true>;
    static constexpr int state_count = 1;
    static constexpr State states[] = {{"exp_avg", StateKind::average}};

    template <bool usual, class T>
    FUSEDOPT_HD static T direction_of(const Row<T>& row, T g, const T* state) {
      return moving_average<usual>(state[0], g, row.one_minus_beta1, row.beta1);
    }

    // How many elements are changed, if it is cautious.
    template <class T, class Math>
    FUSEDOPT_HD static void measure(const Row<T>& row, T, T g, const T* state, Math&,
                                    double* sums) {
      g = row.grad_factor * g;
      sums[0] += agree(direction_of<false>(row, g, state), g) ? 1 : 0;
    }

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math&) {
      T& exp_avg = state[0];

      g = row.grad_factor * g;
      const T direction = direction_of<usual>(row, g, state);
      exp_avg = moving_average<usual>(exp_avg, g, row.one_minus_beta2, row.beta2);

      // The sign of zero is zero, that of NaN is NaN.
      T change = direction > 0 ? row.lr : direction < 0 ? -row.lr : direction;
      if (is_cautious || !usual)
        change = cautious(change, agree(direction, g), row.with, row.against);
      if (row.decay != 0) change = with_decay<usual>(row.decay, row.decay_against, p, change);
      p -= change;
    }
  };

  using Variants = TypeList<Variant<>>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
