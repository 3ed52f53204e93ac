// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
#pragma once

#include <cmath>

#include "../macros.h"

// A float that silently became a double would cost speed and, as nvcc and g++ pick different
// overloads of sqrt, the same bits on every device.
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC diagnostic error "-Wdouble-promotion"
#endif

// Pieces that several rules share.
namespace fusedopt {

FUSEDOPT_HD float square_root(float value) { return sqrtf(value); }
FUSEDOPT_HD double square_root(double value) { return sqrt(value); }

// weight * value + (1 - weight) * average. The first form rounds once at the average's magnitude
// and keeps the two weights summing to exactly one; the second is exact for weight = 1.
template <class T>
FUSEDOPT_HD T moving_average(T average, T value, T weight, T one_minus_weight) {
  return weight < T(0.5) ? average + weight * (value - average)
                         : one_minus_weight * average + weight * value;
}

// The moving average of value^2. An average that has overflowed stays Inf, as in torch, where the
// difference in moving_average would make it NaN.
template <class T>
FUSEDOPT_HD T moving_average_of_square(T average, T value, T weight, T one_minus_weight) {
  const T square = value * value;
  const T updated = moving_average(average, square, weight, one_minus_weight);
  return average == T(INFINITY) ? average + square : updated;
}

// momentum * buffer + value; the first form rounds only once at the buffer's magnitude.
template <class T>
FUSEDOPT_HD T accumulate(T buffer, T value, T momentum, T one_minus_momentum) {
  return momentum > T(0.5) ? buffer + (value - one_minus_momentum * buffer)
                           : momentum * buffer + value;
}

// base^exponent by repeated squaring: the same bits on every device, which no libm's pow promises.
FUSEDOPT_HD double integer_power(double base, long long exponent) {
  double power = 1;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) power *= base;
    base *= base;
  }
  return power;
}

}  // namespace fusedopt
