// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of Adadelta.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// Adadelta (Zeiler, 2012, arXiv:1212.5701), with a learning rate, which is 1 in the paper:
//
//   square_avg = rho * square_avg + (1 - rho) * g^2
//   delta      = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g
//   acc_delta  = rho * acc_delta + (1 - rho) * delta^2
//   p          = p - lr * delta
struct Adadelta {
  static constexpr const char* name = "adadelta";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, rho, eps, weight_decay, maximize;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},   {&Options::rho, "rho"},
      {&Options::eps, "eps"},           {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::maximize, "maximize"},
  };

  template <class T>
  struct Row {
    T grad_factor, weight_decay, rho, one_minus_rho, eps, lr;
  };

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.weight_decay == 0 && row.one_minus_rho < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double, bool) {
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.weight_decay = o.weight_decay;
    row.rho = o.rho;
    row.one_minus_rho = 1 - o.rho;
    row.eps = o.eps;
    row.lr = o.lr;
    return row;
  }

  struct Variant {
    using Rule = Adadelta;
    static constexpr int state_count = 2;
    static constexpr State states[] = {
        {"square_avg", StateKind::average_of_squares},
        {"acc_delta", StateKind::average_of_squares},
    };

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math& math) {
      T& square_avg = state[0];
      T& acc_delta = state[1];

      g = row.grad_factor * g;
      if (!usual && row.weight_decay != 0) g = multiply_add(row.weight_decay, p, g);

      square_avg = moving_average_of_square<usual, Math>(square_avg, g, row.one_minus_rho, row.rho);
      const T length = math.root(acc_delta + row.eps);
      const T delta = math.divide_by_root(length, square_avg + row.eps, T(0)) * g;
      acc_delta =
          moving_average_of_square<usual, Math>(acc_delta, delta, row.one_minus_rho, row.rho);
      p = multiply_add(-row.lr, delta, p);
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
