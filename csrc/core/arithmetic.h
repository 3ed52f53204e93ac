// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Arithmetic that gives the same bits everywhere: roots, multiply-adds, powers, exp and log.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "macros.h"

// A float that silently became a double would cost speed and, as nvcc and g++ pick different
// overloads of sqrt, the same bits on every device.
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC diagnostic error "-Wdouble-promotion"
#endif

namespace fusedopt {

FUSEDOPT_HD float square_root(float value) { return sqrtf(value); }
FUSEDOPT_HD double square_root(double value) { return sqrt(value); }

// How a rule divides, and takes roots: rounded correctly in each step, whichever way that is done.
// This is compilers' own way; a device has a quicker one, see quick_math.h.
struct PlainMath {
  template <class T>
  static constexpr bool redoes_nan = false;

  template <class T>
  FUSEDOPT_HD T divide_by_root(T a, T value, T eps) {
    return a / (square_root(value) + eps);
  }
  // By what is not negative.
  template <class T>
  FUSEDOPT_HD T divide(T a, T b) {
    return a / b;
  }
  template <class T>
  FUSEDOPT_HD T root(T value) {
    return square_root(value);
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

// exp and log, without libm, whose bits differ between systems and devices.

// exp(x) of x <= 0, at most 0.89 ulp from the exact value, also where that is a denormal; of a
// positive x it is no use. x = n ln 2 + r with |r| <= ln 2 / 2; the polynomial is a minimax one for
// (exp(r) - 1 - r) / r^2. Adding 1.5 * 2^23 + 159 to n rounds it, and leaves in the lower bits of
// the sum what becomes the exponent of 2^(n + 32), a normal number for every n. Only the
// multiplication by 2^-32 can round to a denormal.
FUSEDOPT_HD float exponential(float x) {
  const float shift = 0x1.8p23f + 159;
  const float shifted = multiply_add(x, 0x1.715476p0f, shift);  // 1 / ln 2
  const float n = shifted - shift;
  const float nearly = multiply_add(n, -0x1.62e4p-1f, x);  // exact, of the first bits of ln 2
  const float rest = n * -0x1.7f7d1cp-20f;
  const float r = nearly + rest;
  float tail = 0x1.6db440p-10f;
  tail = multiply_add(tail, r, 0x1.123b64p-7f);
  tail = multiply_add(tail, r, 0x1.55545ep-5f);
  tail = multiply_add(tail, r, 0x1.55548ep-3f);
  tail = multiply_add(tail, r, 0.5f);
  const float power = 1.0f + (nearly + multiply_add(tail, r * r, rest));
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  const float result = power * scale * 0x1p-32f;
  return x < -105.0f ? 0.0f : result;  // NaN stays
}

// exp(x) is scale / 2^64 * (1 + rest), with |rest| < 0.42.
struct Exponential {
  double scale, rest;
};
FUSEDOPT_HD Exponential exponential_in_parts(double x) {
  const double shift = 0x1.8p52 + 1087;  // 2^(n + 64)
  const double shifted = multiply_add(x, 0x1.71547652b82fep0, shift);
  const double n = shifted - shift;
  const double nearly = multiply_add(n, -0x1.62e42fefp-1, x);
  const double rest = n * -0x1.473de6af278edp-34;
  const double r = nearly + rest;
  double tail = 0x1.af856c42f1819p-26;
  tail = multiply_add(tail, r, 0x1.28b0358cadd65p-22);
  tail = multiply_add(tail, r, 0x1.71dddfdf38d07p-19);
  tail = multiply_add(tail, r, 0x1.a01996ae128cap-16);
  tail = multiply_add(tail, r, 0x1.a01a01bad85c6p-13);
  tail = multiply_add(tail, r, 0x1.6c16c1859ae7dp-10);
  tail = multiply_add(tail, r, 0x1.111111110d65cp-7);
  tail = multiply_add(tail, r, 0x1.555555555007cp-5);
  tail = multiply_add(tail, r, 0x1.5555555555561p-3);
  tail = multiply_add(tail, r, 0x1.000000000000bp-1);
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits <<= 52;
  double scale;
  memcpy(&scale, &bits, sizeof scale);
  return {scale, nearly + multiply_add(tail, r * r, rest)};
}

FUSEDOPT_HD double exponential(double x) {
  const Exponential parts = exponential_in_parts(x);
  const double result = (1.0 + parts.rest) * parts.scale * 0x1p-64;
  return x < -746.0 ? 0.0 : result;
}

// 1 - exp(x) of x <= 0, to a unit in its own last place where it is nearly 0.
FUSEDOPT_HD double one_minus_exponential(double x) {
  const Exponential parts = exponential_in_parts(x);
  const double scale = parts.scale * 0x1p-64;
  const double result = multiply_add(-scale, parts.rest, 1.0 - scale);
  return x < -746.0 ? 1.0 : result;
}

// At most 1 ulp from the exact value. x = 2^k (1 + f) with 1 + f between the roots of 1/2 and of 2;
// with s = f / (2 + f) is log(1 + f) = 2s + s^3 * (2/3 + 2/5 s^2 ...), and 2s = f - s f. Of 0 and
// of denormals it is -Inf, of negative numbers NaN.
FUSEDOPT_HD double logarithm(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint64_t root_of_half = 0x3fe6a09e667f3bcd;
  const int64_t exponent = int64_t(uint64_t(bits) - root_of_half) >> 52;  // may wrap below zero
  bits -= int64_t(uint64_t(exponent) << 52);
  double mantissa;
  memcpy(&mantissa, &bits, sizeof mantissa);
  const double k = double(int32_t(exponent));
  const double f = mantissa - 1.0;
  const double s = f / (2.0 + f);
  const double z = s * s;
  double tail = 0x1.2b662c09ad932p-3;
  tail = multiply_add(tail, z, 0x1.39fd33e74cec3p-3);
  tail = multiply_add(tail, z, 0x1.7462be2db290dp-3);
  tail = multiply_add(tail, z, 0x1.c71c62c211a6ap-3);
  tail = multiply_add(tail, z, 0x1.2492492e0f0b5p-2);
  tail = multiply_add(tail, z, 0x1.99999999951bep-2);
  tail = multiply_add(tail, z, 0x1.5555555555558p-1);
  const double half_square = 0.5 * f * f;
  const double small =
      multiply_add(k, 0x1.473de6af278edp-34, s * multiply_add(tail, z, half_square));
  const double result = multiply_add(k, 0x1.62e42fefp-1, f - (half_square - small));
  const double infinity = __builtin_huge_val();
  const double of_special = x < 0 ? __builtin_nan("") : x < 0x1p-1022 ? -infinity : x;
  return (x >= 0x1p-1022) & (x < infinity) ? result : of_special;
}

// base^exponent of a base that is not negative, exact to a few units in the last place for each e
// that it is away from 1.
FUSEDOPT_HD double power(double base, double exponent) {
  if (exponent == 0) return 1;
  const double x = exponent * logarithm(base);
  return x > 0 ? 1 / exponential(-x) : exponential(x);
}

}  // namespace fusedopt
