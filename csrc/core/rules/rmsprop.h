// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of RMSprop.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// RMSprop (Tieleman and Hinton, 2012, lecture 6.5; centered: Graves, 2013, arXiv:1308.0850):
//
//   square_avg      = alpha * square_avg + (1 - alpha) * g^2
//   grad_avg        = alpha * grad_avg + (1 - alpha) * g                (centered)
//   variance        = square_avg  or, centered, square_avg - grad_avg^2
//   change          = g / (sqrt(variance) + eps)
//                     or, eps_inside_sqrt, g / sqrt(variance + eps)
//   momentum_buffer = momentum * momentum_buffer + change               (momentum)
//   p               = p - lr * change  or, momentum, p - lr * momentum_buffer
struct RmsProp {
  static constexpr const char* name = "rmsprop";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, alpha, eps, weight_decay, momentum, centered, maximize, eps_inside_sqrt;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},   {&Options::alpha, "alpha"},
      {&Options::eps, "eps"},           {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::momentum, "momentum"}, {&Options::centered, "centered"},
      {&Options::maximize, "maximize"}, optional(&Options::eps_inside_sqrt, "eps_inside_sqrt"),
  };

  template <class T>
  struct Row {
    T grad_factor, weight_decay, alpha, one_minus_alpha, momentum, lr;
    T eps_inside, eps_outside;
  };

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.weight_decay == 0 && row.one_minus_alpha < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double, bool) {
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.weight_decay = o.weight_decay;
    row.alpha = o.alpha;
    row.one_minus_alpha = 1 - o.alpha;
    row.momentum = o.momentum;
    row.lr = o.lr;
    row.eps_inside = o.eps_inside_sqrt != 0 ? o.eps : 0;
    row.eps_outside = o.eps_inside_sqrt != 0 ? 0 : o.eps;
    return row;
  }

  template <bool momentum, bool centered>
  struct Variant {
    using Rule = RmsProp;
    static constexpr int state_count = 1 + (momentum ? 1 : 0) + (centered ? 1 : 0);
    static constexpr State states[] = {
        {"square_avg", StateKind::average_of_squares},
        {momentum ? "momentum_buffer" : "grad_avg", StateKind::average},
        {"grad_avg", StateKind::average},
    };

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math& math) {
      T& square_avg = state[0];

      g = row.grad_factor * g;
      if (!usual && row.weight_decay != 0) g = multiply_add(row.weight_decay, p, g);
      square_avg =
          moving_average_of_square<usual, Math>(square_avg, g, row.one_minus_alpha, row.alpha);

      T variance = square_avg;
      if (centered) {
        T& grad_avg = state[momentum ? 2 : 1];
        grad_avg = moving_average<usual>(grad_avg, g, row.one_minus_alpha, row.alpha);
        variance = multiply_add(-grad_avg, grad_avg, variance);
        // Rounding can leave a tiny negative variance, whose root would be NaN.
        variance = variance < 0 ? T(0) : variance;
      }

      // One of the two eps is zero, and adding zero changes no bit of a number that is not
      // negative.
      T change = math.divide_by_root(g, variance + row.eps_inside, row.eps_outside);
      if (momentum) {
        T& buffer = state[1];
        buffer = multiply_add(row.momentum, buffer, change);
        change = buffer;
      }
      p = multiply_add(-row.lr, change, p);
    }
  };

  using Variants = TypeList<Variant<false, false>, Variant<true, false>, Variant<false, true>,
                            Variant<true, true>>;
  static int variant(const Options& o) {
    return (o.momentum > 0 ? 1 : 0) + (o.centered != 0 ? 2 : 0);
  }
};

}  // namespace fusedopt
