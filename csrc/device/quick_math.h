// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Division and roots on a device, without a branch, which holds for nearly all operands.
#pragma once

#include "../core/arithmetic.h"
#include "../core/dtype.h"

namespace fusedopt {

// 1 / value and 1 / sqrt(value) of normal numbers, within two units in the last place.
struct Approximate {
  FUSEDOPT_HD static float reciprocal(float value) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
#else
    return 1 / value;
#endif
  }
  FUSEDOPT_HD static float reciprocal_root(float value) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
#else
    return float(1 / sqrt(double(value)));
#endif
  }
};

// Rounded correctly, of normal numbers that are not near the ends of their range, and of zero: by
// what compilers make of a division and a root themselves (Markstein, 1990), but for their branches
// to what does for all others. Like theirs, it needs approximations that are no further off than
// those of the hardware are for the operands that are hardest to round, see
// tests/core/quick_math.cpp.
template <class Approximate>
FUSEDOPT_HD float quick_root(float value) {
  // Nothing but zero changes by so little: its root is zero.
  const float inverse = Approximate::reciprocal_root(value + 0x1p-126f);
  const float root = value * inverse;
  return multiply_add(multiply_add(-root, root, value), 0.5f * inverse, root);
}
template <class Approximate>
FUSEDOPT_HD float quick_quotient(float a, float b) {
  float reciprocal = Approximate::reciprocal(b);
  reciprocal = multiply_add(reciprocal, multiply_add(-b, reciprocal, 1.0f), reciprocal);
  float quotient = a * reciprocal;
  quotient = multiply_add(multiply_add(-b, quotient, a), reciprocal, quotient);
  return multiply_add(multiply_add(-b, quotient, a), reciprocal, quotient);
}

// The bits of PlainMath, unless is_rare() afterwards: then some result was denormal, no number, or
// out of the range in which these hold. Zeros are in it. So one test does for many elements, and
// nothing keeps their instructions from overlapping.
template <class Approximate>
class BasicQuickMath {
 public:
  // Whether what is no number is done again.
  template <class T>
  static constexpr bool redoes_nan = std::is_same<T, float>::value;

  FUSEDOPT_HD bool is_rare() const { return !(doubt_ == 0); }
  FUSEDOPT_HD void note_if(bool rare) { doubt_ = rare ? 1 : doubt_; }
  // A number, which is rare if it is none.
  FUSEDOPT_HD void note(float value) {
#if defined(__CUDA_ARCH__)
    asm volatile("fma.rn.f32 %0, %1, 0f00000000, %0;" : "+f"(doubt_) : "f"(value));
#else
    doubt_ = multiply_add(value, 0.0f, doubt_);
#endif
  }
  FUSEDOPT_HD void note(double) {}

  // a / (sqrt(value) + eps). Operands are scaled so far that even the smallest ones are no
  // denormals: the root's by 2^48, then the dividend's. Out of range are Inf and what overflows on
  // the way, which end as NaN, by Inf - Inf or 0 * Inf; negative values, of which hardware makes
  // NaN; a divisor of zero, likewise; and a quotient that is rounded once more where it becomes
  // denormal.
  FUSEDOPT_HD float divide_by_root(float a, float value, float eps) {
    const float root = quick_root<Approximate>(value * 0x1p48f);
    return quotient_of(a, multiply_add(root, 0x1p-24f, divisor(eps)));
  }
  FUSEDOPT_HD double divide_by_root(double a, double value, double eps) {
    return a / (square_root(value) + eps);
  }

  // a / b of a divisor that is not negative. Out of range is the same, and a denormal divisor.
  FUSEDOPT_HD float divide(float a, float b) { return quotient_of(a, divisor(b)); }
  FUSEDOPT_HD double divide(double a, double b) { return a / b; }

  // sqrt(value), scaled likewise.
  FUSEDOPT_HD float root(float value) {
    const float result = quick_root<Approximate>(value * 0x1p48f) * 0x1p-24f;
    note(result);
    return result;
  }
  FUSEDOPT_HD double root(double value) { return square_root(value); }

 private:
  // Of a larger divisor the reciprocal would be zero; a negative one changes signs.
  FUSEDOPT_HD static float divisor(float value) {
    return value >= 0 && value < 0x1p100f ? value : NAN;
  }
  FUSEDOPT_HD float quotient_of(float a, float b) {
    const float quotient = quick_quotient<Approximate>(a * 0x1p48f, b);
    // A negative zero has lost its sign.
    const uint32_t sign = float_to_bits(a) & 0x80000000u;
    const float result = bits_to_float((float_to_bits(quotient) & 0x7fffffffu) | sign) * 0x1p-48f;
    note_unless_scaled(result, quotient);
    return result;
  }

  // On the device it keeps its place: compilers would put all of them at the end, and what they
  // look at into registers until then.
  FUSEDOPT_HD void note_unless_scaled(float result, float scaled) {
#if defined(__CUDA_ARCH__)
    asm volatile(
        "{.reg .f32 d;\n neg.f32 d, %2;\n fma.rn.f32 d, %1, 0f57800000, d;\n abs.f32 d, d;\n"
        " add.rn.f32 %0, %0, d;}"
        : "+f"(doubt_)
        : "f"(result), "f"(scaled));
#else
    doubt_ += absolute(multiply_add(result, 0x1p48f, -scaled));
#endif
  }

  float doubt_ = 0;  // any other number, or none: something was rare
};
using QuickMath = BasicQuickMath<Approximate>;

}  // namespace fusedopt
