// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rule of stochastic gradient descent.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// Stochastic gradient descent with momentum as torch defines it (Sutskever et al., 2013, without
// the learning rate inside the buffer):
//
//   g               = g + weight_decay * p
//   momentum_buffer = momentum * momentum_buffer + (1 - dampening) * g   (the first time: g)
//   p               = p - lr * momentum_buffer    or, nesterov:  p - lr * (g + momentum * buffer)
struct Sgd {
  static constexpr const char* name = "sgd";
  static constexpr bool counts_steps = false;

  struct Options {
    double lr, momentum, dampening, weight_decay, nesterov, maximize;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},     {&Options::momentum, "momentum"},
      {&Options::dampening, "dampening"}, {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::nesterov, "nesterov"},   {&Options::maximize, "maximize"},
  };

  template <class T>
  struct Row {
    T grad_factor, weight_decay, momentum, one_minus_dampening, lr;
    T nesterov, first;
  };

  // No row is common enough for a loop of its own.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>&) {
    return false;
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double, bool first) {
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.weight_decay = o.weight_decay;
    row.momentum = o.momentum;
    row.one_minus_dampening = 1 - o.dampening;
    row.lr = o.lr;
    row.nesterov = o.nesterov;
    row.first = first ? 1 : 0;
    return row;
  }

  template <bool momentum>
  struct Variant {
    using Rule = Sgd;
    static constexpr int state_count = momentum ? 1 : 0;
    static constexpr State states[] = {{"momentum_buffer", StateKind::average}};

    template <bool, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math&) {
      g = row.grad_factor * g;
      if (row.weight_decay != 0) g = multiply_add(row.weight_decay, p, g);
      if (momentum) {
        T& buffer = state[0];
        const T continued = multiply_add(row.momentum, buffer, row.one_minus_dampening * g);
        buffer = row.first != 0 ? g : continued;
        g = row.nesterov != 0 ? multiply_add(row.momentum, buffer, g) : buffer;
      }
      p = multiply_add(-row.lr, g, p);
    }
  };

  using Variants = TypeList<Variant<false>, Variant<true>>;
  static int variant(const Options& o) { return o.momentum != 0 ? 1 : 0; }
};

}  // namespace fusedopt
