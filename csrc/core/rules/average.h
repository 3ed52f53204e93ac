// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Moving averages, what is divided by their roots, and decay, which several rules share.
#pragma once

#include "../arithmetic.h"

namespace fusedopt {

// weight * value + (1 - weight) * average, from whichever of them weighs more: rounded once at its
// magnitude, the two weights sum to exactly one, and a weight of 1 is exact.
// small: the caller knows that the weight is below 0.5.
template <bool small, class T>
FUSEDOPT_HD T moving_average(T average, T value, T weight, T one_minus_weight) {
  const bool from_average = small || weight < T(0.5);
  return multiply_add(from_average ? weight : -one_minus_weight, value - average,
                      from_average ? average : value);
}

// The moving average of value^2. The weight comes first, as in torch: the square of 1e20 overflows,
// its share in the average does not. An average that has overflowed stays Inf, as in torch, where a
// difference would make it NaN.
template <bool small, class Math, class T>
FUSEDOPT_HD T moving_average_of_square(T average, T value, T weight, T one_minus_weight) {
  const T weighted = weight * value;
  const T updated = small || weight < T(0.5)
                        ? average + multiply_add(weighted, value, -(weight * average))
                        : multiply_add(weighted, value, one_minus_weight * average);
  if (Math::template redoes_nan<T>) return updated;
  return average == T(INFINITY) ? average + weighted * value : updated;
}

// The change with decoupled decay, and with another one where this goes against the change:
// cautious decay has none there (Chen et al., 2025, arXiv:2510.12402). same: the caller knows that
// both are the same.
template <bool same, class T>
FUSEDOPT_HD T with_decay(T decay, T decay_against, T p, T change) {
  if (same) return multiply_add(decay, p, change);
  const bool against = ((change > 0) & (p < 0)) | ((change < 0) & (p > 0));
  return multiply_add(against ? decay_against : decay, p, change);
}

// Cautious changes (Liang et al., 2024, arXiv:2411.16085): none where they go against the gradient,
// and longer elsewhere, by how few they are. Zero agrees with nothing.
template <class T>
FUSEDOPT_HD bool agree(T direction, T g) {
  return ((direction > 0) & (g > 0)) | ((direction < 0) & (g < 0));
}
// The change, by what those with the gradient are multiplied by, or those against it. A product, so
// that no NaN is lost.
template <class T>
FUSEDOPT_HD T cautious(T change, bool agrees, T with, T against) {
  return (agrees ? with : against) * change;
}
// From the mean of those that agree.
template <class T>
FUSEDOPT_HD T cautious_scale(T mean) {
  return 1 / (mean > T(1e-3) ? mean : T(1e-3));
}

// eps beside a root of which the factor that corrects its average stands elsewhere. Where beta is
// nearly 1 it would be zero in float32, and zero by zero is no number.
FUSEDOPT_HD double corrected_eps(double eps, double factor) {
  constexpr double least = 0x1p-149;
  const double corrected = eps * factor;
  return eps > least / 2 && corrected < least ? least : corrected;
}

}  // namespace fusedopt
