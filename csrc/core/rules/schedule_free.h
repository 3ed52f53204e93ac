// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The rules of schedule-free AdamW and SGD.
#pragma once

#include "average.h"
#include "rule.h"

namespace fusedopt {

// Schedule-free learning (Defazio et al., 2024, arXiv:2405.15682), as the authors' code has it.
// While training, p is y, between z, which is stepped, and x, their average, which is never stored:
//
//   lr_t       = lr * min(1, step / warmup_steps)
//   lr_max     = max(lr_max, lr_t)                                         (lr_max begins as 0)
//   weight     = step^r * lr_max^weight_lr_power
//   weight_sum = weight_sum + weight                                       (weight_sum begins as 0)
//   share      = weight / weight_sum
//   p          = (1 - share) * p + share * z - lr_t * (1 - momentum * (1 - share)) * change
//   z          = z - lr_t * change                                         (z begins as p)
namespace schedule_free {

// What an average takes of z in a step, and how far both go.
struct Share {
  double share, step_size, z_size, lr_max, weight_sum;
};

template <class Options>
FUSEDOPT_HD Share share_of(const Options& o, double momentum, double step) {
  const double lr = step < o.warmup_steps ? o.lr * (step / o.warmup_steps) : o.lr;
  Share result;
  result.lr_max = lr > o.lr_max ? lr : o.lr_max;
  const double weight = power(step, o.r) * power(result.lr_max, o.weight_lr_power);
  result.weight_sum = o.weight_sum + weight;
  result.share = result.weight_sum > 0 ? weight / result.weight_sum : 0;
  result.z_size = lr;
  result.step_size = lr * (1 - momentum * (1 - result.share));
  return result;
}

// Moves both by a change; share and the others are of a Row.
template <class Row, class T>
FUSEDOPT_HD void move(const Row& row, T change, T& p, T& z) {
  p = multiply_add(-row.step_size, change, moving_average<false>(p, z, row.share, row.rest));
  z = multiply_add(-row.z_size, change, z);
}

}  // namespace schedule_free

// With, where moments are corrected as in Adam,
//
//   exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
//   change     = g / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps) + weight_decay * p
//
// and beta1 as momentum.
struct ScheduleFreeAdamW {
  static constexpr const char* name = "schedule_free_adamw";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, beta1, beta2, eps, weight_decay, warmup_steps, r, weight_lr_power, maximize;
    double lr_max, weight_sum;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},
      {&Options::beta1, "betas", 0, true},
      {&Options::beta2, "betas", 1, true},
      {&Options::eps, "eps"},
      {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::warmup_steps, "warmup_steps"},
      {&Options::r, "r"},
      {&Options::weight_lr_power, "weight_lr_power"},
      {&Options::maximize, "maximize"},
      in_state(&Options::lr_max, "lr_max", 0),
      in_state(&Options::weight_sum, "weight_sum", 0),
  };

  template <class T>
  struct Row {
    T grad_factor, decay, beta2, one_minus_beta2, correction, eps;
    T share, rest, step_size, z_size;
    T lr_max, weight_sum;
  };

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.one_minus_beta2 < T(0.5);
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double step, bool) {
    const schedule_free::Share share = schedule_free::share_of(o, o.beta1, step);
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.decay = o.weight_decay;
    row.beta2 = o.beta2;
    row.one_minus_beta2 = 1 - o.beta2;
    row.correction = square_root(one_minus_power(o.beta2, (long long)(step)));
    row.eps = corrected_eps(o.eps, row.correction);
    row.share = share.share;
    row.rest = 1 - share.share;
    row.step_size = share.step_size;
    row.z_size = share.z_size;
    row.lr_max = share.lr_max;
    row.weight_sum = share.weight_sum;
    return row;
  }

  struct Variant {
    using Rule = ScheduleFreeAdamW;
    static constexpr int state_count = 2;
    static constexpr State states[] = {
        {"z", StateKind::weight, Begins::as_parameter},
        {"exp_avg_sq", StateKind::average_of_squares},
    };

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math& math) {
      T& z = state[0];
      T& exp_avg_sq = state[1];

      g = row.grad_factor * g;
      exp_avg_sq =
          moving_average_of_square<usual, Math>(exp_avg_sq, g, row.one_minus_beta2, row.beta2);
      T change = math.divide_by_root(row.correction * g, exp_avg_sq, row.eps);
      if (row.decay != 0) change = multiply_add(row.decay, p, change);
      schedule_free::move(row, change, p, z);
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

// With change = g + weight_decay * p.
struct ScheduleFreeSgd {
  static constexpr const char* name = "schedule_free_sgd";
  static constexpr bool counts_steps = true;

  struct Options {
    double lr, momentum, weight_decay, warmup_steps, r, weight_lr_power, maximize;
    double lr_max, weight_sum;
  };
  static constexpr Option<Options> options[] = {
      {&Options::lr, "lr", -1, true},
      {&Options::momentum, "momentum", -1, true},
      {&Options::weight_decay, "weight_decay", -1, true},
      {&Options::warmup_steps, "warmup_steps"},
      {&Options::r, "r"},
      {&Options::weight_lr_power, "weight_lr_power"},
      {&Options::maximize, "maximize"},
      in_state(&Options::lr_max, "lr_max", 0),
      in_state(&Options::weight_sum, "weight_sum", 0),
  };

  template <class T>
  struct Row {
    T grad_factor, decay, share, rest, step_size, z_size;
    T lr_max, weight_sum;
  };

  // What nearly all rows have in common; with it known, update() takes fewer instructions.
  template <class T>
  FUSEDOPT_HD static bool usual(const Row<T>& row) {
    return row.decay == 0;
  }

  FUSEDOPT_HD static Row<double> row(const Options& o, double step, bool) {
    const schedule_free::Share share = schedule_free::share_of(o, o.momentum, step);
    Row<double> row;
    row.grad_factor = o.maximize != 0 ? -1 : 1;
    row.decay = o.weight_decay;
    row.share = share.share;
    row.rest = 1 - share.share;
    row.step_size = share.step_size;
    row.z_size = share.z_size;
    row.lr_max = share.lr_max;
    row.weight_sum = share.weight_sum;
    return row;
  }

  struct Variant {
    using Rule = ScheduleFreeSgd;
    static constexpr int state_count = 1;
    static constexpr State states[] = {{"z", StateKind::weight, Begins::as_parameter}};

    template <bool usual, class T, class Math>
    FUSEDOPT_HD static void update(const Row<T>& row, T& p, T g, T* state, Math&) {
      g = row.grad_factor * g;
      if (!usual && row.decay != 0) g = multiply_add(row.decay, p, g);
      schedule_free::move(row, g, p, state[0]);
    }
  };

  using Variants = TypeList<Variant>;
  static int variant(const Options&) { return 0; }
};

}  // namespace fusedopt
