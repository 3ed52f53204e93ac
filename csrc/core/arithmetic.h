// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Arithmetic that gives the same bits everywhere: roots, multiply-adds, powers.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

// A float that silently became a double would cost speed and, as nvcc and g++ pick different
// overloads of sqrt, the same bits on every device.
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC diagnostic error "-Wdouble-promotion"
#endif

namespace fusedopt {

FUSEDOPT_HD float square_root(float value) { return sqrtf(value); }
FUSEDOPT_HD double square_root(double value) { return sqrt(value); }

// How a rule divides by a root: rounded correctly in each step, whichever way that is done. This is
// compilers' own way; a device has a quicker one, see quick_math.h.
struct PlainMath {
  template <class T>
  static constexpr bool redoes_nan = false;

  template <class T>
  FUSEDOPT_HD T divide_by_root(T a, T value, T eps) {
    return a / (square_root(value) + eps);
  }
};

// a * b + c, rounded once. It is exact IEEE arithmetic, so that it gives the same bits where there
// is an instruction for it and where there is none.
FUSEDOPT_HD double multiply_add(double a, double b, double c) { return fma(a, b, c); }
FUSEDOPT_HD float multiply_add(float a, float b, float c) {
#if defined(FUSEDOPT_EMULATE_FMA)
  // The product is exact in double, the sum has an error that is known exactly. It matters only
  // where the sum lies halfway between two floats, as rounding cannot tell then to which it is
  // nearer. In double throughout, so that it vectorises, where a call of fmaf would not. (A sum
  // within 2^-53 of halfway between the largest float and Inf becomes Inf on either side.)
  const double product = double(a) * double(b);
  const double sum = product + double(c);
  const double part = sum - product;
  const double error = (product - (sum - part)) + (double(c) - part);
  const double nearest = double(float(sum));
  const double beyond = sum - nearest;
  const double other = nearest + 2 * beyond;
  const bool halfway = double(float(other)) == other;
  const bool to_other = ((beyond > 0) & (error > 0)) | ((beyond < 0) & (error < 0));
  return float(halfway & to_other ? other : nearest);
#else
  return fmaf(a, b, c);
#endif
}

// 1 - base^exponent by repeated squaring in twice the precision of double: the same bits on every
// device, which no libm's pow promises, and exact to the last bit, however close the power is to 1.
FUSEDOPT_HD double one_minus_power(double base, long long exponent) {
  double power = 1, power_low = 0, base_low = 0;
  const auto multiply = [](double& a, double& a_low, double b, double b_low) {
    const double product = a * b;
    const double low = fma(a, b, -product) + (a * b_low + a_low * b);
    a = product + low;
    a_low = low - (a - product);
  };
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) multiply(power, power_low, base, base_low);
    multiply(base, base_low, base, base_low);
  }
  return (1 - power) - power_low;
}

}  // namespace fusedopt
