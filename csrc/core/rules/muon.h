// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What Muon orthogonalises: the momentum of gradients.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// The momentum of Muon (Jordan et al., 2024), as torch defines it:
//
//   m = momentum * m + (1 - momentum) * g
//   d = momentum * m + (1 - momentum) * g  with nesterov, else m
//
// The parameter that it writes is d: no weight, but what is orthogonalised before Sgd's rule takes
// it for a gradient. What d was before is not read.
struct Muon {
  static constexpr const char* name = "muon";
  static constexpr bool counts_steps = false;

  struct Options {
    double momentum, nesterov, maximize;
  };
  static constexpr Option<Options> options[] = {
      {&Options::momentum, "momentum"},
      {&Options::nesterov, "nesterov"},
      optional(&Options::maximize, "maximize"),
  };

  template <class T>
  struct Row {
    T grad_factor, momentum, one_minus_momentum, nesterov;
  };

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.nesterov != 0 && row.one_minus_momentum < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double, bool) {
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.momentum = o.momentum;
    row.one_minus_momentum = 1 - o.momentum;
    row.nesterov = o.nesterov;
    return row;
  }

  struct Variant {
    using Rule = Muon;
    static constexpr int state_count = 1;
    static constexpr State states[] = {{"momentum_buffer", StateKind::average}};

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math&) {
      T& momentum_buffer = state[0];

      g = row.grad_factor * g;
      const T weight = row.one_minus_momentum;
      momentum_buffer = moving_average<usual>(momentum_buffer, g, weight, row.momentum);
      p = usual || row.nesterov != 0
              ? moving_average<usual>(momentum_buffer, g, weight, row.momentum)
              : momentum_buffer;
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
