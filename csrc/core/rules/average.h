// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Moving averages, which several rules share.
#pragma once

#include "../arithmetic.h"

namespace fusedopt {

// weight * value + (1 - weight) * average. The first form rounds once at the average's magnitude
// and keeps the two weights summing to exactly one; the second is exact for weight = 1.
// small: the caller knows that the weight is below 0.5.
template <bool small, class T>
FUSEDOPT_HD T moving_average(T average, T value, T weight, T one_minus_weight) {
  return small || weight < T(0.5) ? multiply_add(weight, value - average, average)
                                  : multiply_add(one_minus_weight, average - value, value);
}

// The moving average of value^2. The weight comes first, as in torch: the square of 1e20 overflows,
// its share in the average does not. An average that has overflowed stays Inf, as in torch, where a
// difference would make it NaN.
template <bool small, class T>
FUSEDOPT_HD T moving_average_of_square(T average, T value, T weight, T one_minus_weight) {
  const T weighted = weight * value;
  const T updated = small || weight < T(0.5)
                        ? average + multiply_add(weighted, value, -(weight * average))
                        : multiply_add(weighted, value, one_minus_weight * average);
  return average == T(INFINITY) ? average + weighted * value : updated;
}

}  // namespace fusedopt
