// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of Rprop.
#pragma once

#include "rule.h"

namespace fusedopt {

// Rprop (Riedmiller and Braun, 1993, A direct adaptive method for faster backpropagation learning),
// as torch defines it: where a gradient has changed its sign, no step is taken, nor is one back.
//
//   g * prev > 0:  step_size = min(step_size * etas[1], step_sizes[1])
//   g * prev < 0:  step_size = max(step_size * etas[0], step_sizes[0]), and g = 0
//   p    = p - sign(g) * step_size                                   (step_size begins as lr)
//   prev = g
struct Rprop {
  static constexpr const char* name = "rprop";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, shorter, longer, shortest, longest, maximize;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},       {&Options::shorter, "etas", 0},
      {&Options::longer, "etas", 1},        {&Options::shortest, "step_sizes", 0},
      {&Options::longest, "step_sizes", 1}, {&Options::maximize, "maximize"},
  };

  template <class T>
  struct Row {
    T grad_factor, shorter, longer, shortest, longest;
  };

  // No row is common enough for a loop of its own.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>&) {
    return false;
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double, bool) {
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.shorter = o.shorter;
    row.longer = o.longer;
    row.shortest = o.shortest;
    row.longest = o.longest;
    return row;
  }

  struct Variant {
    using Rule = Rprop;
    static constexpr int state_count = 2;
    static constexpr State states[] = {
        {"prev", StateKind::average},
        {"step_size", StateKind::weight, Begins::as_option, "lr"},
    };

    template <bool, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math&) {
      T& prev = state[0];
      T& step_size = state[1];

      g = row.grad_factor * g;
      const T agreement = g * prev;  // neither, if it is no number
      const T factor = agreement > 0 ? row.longer : agreement < 0 ? row.shorter : T(1);
      // Written so that a NaN stays.
      T length = factor * step_size;
      length = length < row.shortest ? row.shortest : length;
      length = length > row.longest ? row.longest : length;
      step_size = length;

      g = agreement < 0 ? T(0) : g;
      // The sign of a NaN is zero, as in torch. Of a product with it, nvcc loses a zero's sign.
      p -= g > 0 ? step_size : g < 0 ? -step_size : T(0);
      prev = g;
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
