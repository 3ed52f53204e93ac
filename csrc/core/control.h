// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What a step multiplies its gradients by, and whether it takes place at all.
#pragma once

#include <cstdint>

#include "arithmetic.h"

// With a gradient scaler or clipping, the host may know neither.
namespace fusedopt {

// In the memory of the device.
struct Control {
  double sum_of_squares;
  double grad_factor;
  float narrow_grad_factor;
  float grad_norm;   // of the unscaled gradients, where they are clipped
  uint32_t skip;     // not zero: the step changes nothing
  uint32_t arrived;  // blocks of the norm's last launch that are done; zero between launches
};

FUSEDOPT_HD void get_grad_factor(const Control& control, float& factor) {
  factor = control.narrow_grad_factor;
}
FUSEDOPT_HD void get_grad_factor(const Control& control, double& factor) {
  factor = control.grad_factor;
}

// What the factor is made of. Addresses are those of the device; null: not used.
struct FactorSource {
  double factor = 1;                  // that of the host
  const float* grad_scale = nullptr;  // by which the gradients are too large
  const float* found_inf = nullptr;   // not zero: some gradient is Inf or NaN
  bool clips = false;
  double max_grad_norm = 0;
};

// As torch.nn.utils.clip_grad_norm_ has it: a norm that is NaN makes the factor NaN.
FUSEDOPT_HD double clip_factor(double norm, double max_norm) {
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1 ? 1 : factor;
}

// The factor, and the norm, from the sum of the squares of all gradients.
FUSEDOPT_HD double grad_factor(const FactorSource& source, double sum_of_squares, double& norm) {
  double factor = source.factor;
  if (source.grad_scale != nullptr) factor /= double(*source.grad_scale);
  norm = square_root(sum_of_squares) * factor;
  return source.clips ? factor * clip_factor(norm, source.max_grad_norm) : factor;
}

FUSEDOPT_HD bool skipped(const FactorSource& source) {
  return source.found_inf != nullptr && *source.found_inf != 0;
}

FUSEDOPT_HD void set_control(const FactorSource& source, double sum_of_squares, Control& control) {
  double norm;
  control.sum_of_squares = sum_of_squares;
  control.grad_factor = grad_factor(source, sum_of_squares, norm);
  control.narrow_grad_factor = float(control.grad_factor);
  control.grad_norm = float(norm);
  control.skip = skipped(source);
  control.arrived = 0;
}

}  // namespace fusedopt
