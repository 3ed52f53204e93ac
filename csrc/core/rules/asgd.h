// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of averaged stochastic gradient descent.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// ASGD (Polyak and Juditsky, 1992, Acceleration of stochastic approximation by averaging), as torch
// defines it:
//
//   p   = p - eta * (lambd * p + g)
//   ax  = ax + mu * (p - ax)
//   eta = lr / (1 + lambd * lr * step)^alpha                                  (eta begins as lr)
//   mu  = 1 / max(1, step - t0)                                                (mu begins as 1)
struct Asgd {
  static constexpr const char* name = "asgd";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, lambd, alpha, t0, weight_decay, maximize, eta, mu;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},
      {&Options::lambd, "lambd"},
      {&Options::alpha, "alpha"},
      {&Options::t0, "t0"},
      {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::maximize, "maximize"},
      in_state(&Options::eta, "eta", 0, "lr"),
      in_state(&Options::mu, "mu", 1),
  };

  template <class T>
  struct Row {
    T grad_factor, weight_decay, decay, lr, mu, one_minus_mu;
    T next_eta, next_mu;
  };

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.weight_decay == 0 && row.mu == 1;
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double step, bool) {
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.weight_decay = o.weight_decay;
    row.decay = o.lambd * o.eta;
    row.lr = o.eta;
    row.mu = o.mu;
    row.one_minus_mu = 1 - o.mu;
    row.next_eta = o.lr / power(1 + o.lambd * o.lr * step, o.alpha);
    const double averaged = step - o.t0;
    row.next_mu = 1 / (averaged > 1 ? averaged : 1);
    return row;
  }

  struct Variant {
    using Rule = Asgd;
    static constexpr int state_count = 1;
    static constexpr State states[] = {{"ax", StateKind::weight}};

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math&) {
      T& ax = state[0];

      g = row.grad_factor * g;
      if (!usual && row.weight_decay != 0) g = multiply_add(row.weight_decay, p, g);
      T change = row.lr * g;
      if (row.decay != 0) change = multiply_add(row.decay, p, change);
      p -= change;
      ax = usual || row.mu == 1 ? p : moving_average<false>(ax, p, row.mu, row.one_minus_mu);
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
