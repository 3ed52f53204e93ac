// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The maths of the mean squared error, forward and backward.
#pragma once

#include "../arithmetic.h"
#include "../dtype.h"
#include "../norm.h"

// loss = factor * sum((x_i - y_i)^2), gradient = 2 factor (x_i - y_i). The sum is in float64, in
// the order of a norm of gradients, see norm.h: by chunks of kNormChunk elements.
namespace fusedopt {

template <class T>
FUSEDOPT_HD T squared_error(T input, T target, double& sum) {
  const T difference = input - target;
  add_square(sum, difference);
  return difference;
}

template <class T>
FUSEDOPT_HD T squared_error_gradient(T difference, T twice_factor) {
  return difference * twice_factor;
}

}  // namespace fusedopt
