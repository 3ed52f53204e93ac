// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Dtypes, their conversions to and from what a rule computes in, and which go together.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "macros.h"

// All conversions on the host are integer code without branches: they vectorise on every
// instruction set, and do not depend on the denormal mode. They give the same bits on every device,
// but for those of a NaN that has been widened. NaN is stored as the canonical quiet NaN.
namespace fusedopt {

enum class DType : uint8_t { float32, float64, bfloat16, float16 };

FUSEDOPT_HD int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class Element>
struct ElementTraits;
template <>
struct ElementTraits<float> {
  using Compute = float;
  static constexpr DType dtype = DType::float32;
};
template <>
struct ElementTraits<double> {
  using Compute = double;
  static constexpr DType dtype = DType::float64;
};
template <>
struct ElementTraits<bfloat16> {
  using Compute = float;
  static constexpr DType dtype = DType::bfloat16;
};
template <>
struct ElementTraits<float16> {
  using Compute = float;
  static constexpr DType dtype = DType::float16;
};

FUSEDOPT_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FUSEDOPT_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
FUSEDOPT_HD uint32_t magnitude_bits(float value) { return float_to_bits(value) & 0x7fffffffu; }
FUSEDOPT_HD float absolute(float value) { return bits_to_float(magnitude_bits(value)); }
FUSEDOPT_HD double absolute(double value) { return fabs(value); }

FUSEDOPT_HD float widen(float value) { return value; }
FUSEDOPT_HD double widen(double value) { return value; }
FUSEDOPT_HD float widen(bfloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
FUSEDOPT_HD float widen(float16 value) {
#if defined(__CUDA_ARCH__)
  float widened;
  asm("cvt.f32.f16 %0, %1;" : "=f"(widened) : "h"(value.bits));
  return widened;
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (uint32_t(127 - 15) << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // Inf and NaN
  // An integer conversion, exact, rather than a product that has a denormal factor.
  const uint32_t subnormal = float_to_bits(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t bits = magnitude < 0x0400u ? subnormal : magnitude < 0x7c00u ? normal : special;
  return bits_to_float(sign | bits);
#endif
}

FUSEDOPT_HD void narrow(float value, float& out) { out = value; }
FUSEDOPT_HD void narrow(double value, double& out) { out = value; }

// To nearest, ties to even.
FUSEDOPT_HD void narrow(float value, bfloat16& out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t(value != value ? 0x7fc0u : rounded);
}

FUSEDOPT_HD void narrow(float value, float16& out) {
#if defined(__CUDA_ARCH__)
  uint16_t rounded;
#if __CUDA_ARCH__ >= 800  // of two, which is the quicker one
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(0.0f), "f"(value));
  rounded = uint16_t(both);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
#endif
  out.bits = value != value ? uint16_t(0x7e00) : rounded;
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal =
      (magnitude - (uint32_t(127 - 15) << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 moves a magnitude below 2^-14 to where one ulp is 2^-24, so the addition rounds it.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t signed_bits = sign | (magnitude < 0x47800000u ? finite : special);
  out.bits = uint16_t(magnitude > 0x7f800000u ? 0x7e00u : signed_bits);
#endif
}

// Adds the square of a number, in float64.
template <class Element>
FUSEDOPT_HD void add_square(double& sum, Element element) {
  const double value = double(widen(element));
#if defined(__CUDA_ARCH__)
  // The square of a float is exact: rounded once or twice, the sum is the same.
  if (sizeof(Element) < sizeof(double)) {
    sum = fma(value, value, sum);
    return;
  }
#endif
  sum += value * value;
}

// The dtype of spans whose Coding says how elements are stored, see codes.h.
struct coded {};
template <>
struct ElementTraits<coded> {
  using Compute = float;
};

// The dtypes of one kernel. Only the combinations listed here are instantiated.
template <class Param_, class Grad_, class State_>
struct Types {
  using Param = Param_;
  using Grad = Grad_;
  using State = State_;
  using Compute = typename ElementTraits<Param>::Compute;
};

template <class... Members>
struct TypeList {
  static constexpr int size = sizeof...(Members);
};

// Calls visit(Member{}) for each member of a TypeList, in order.
template <class... Members, class Visitor>
void for_each_type(TypeList<Members...>, Visitor visit) {
  (visit(Members{}), ...);
}

// The place of a type in a list.
template <class Type, class... Members>
constexpr int place_in(TypeList<Members...>) {
  int place = 0;
  bool found = false;
  ((found = found || std::is_same<Type, Members>::value, place += found ? 0 : 1), ...);
  return place;
}

using Combinations = TypeList<
    // parameter, gradient, states
    Types<float, float, float>,           //
    Types<double, double, double>,        //
    Types<double, float, double>,         //
    Types<bfloat16, bfloat16, float>,     //
    Types<bfloat16, float, float>,        //
    Types<bfloat16, bfloat16, bfloat16>,  //
    Types<bfloat16, float, bfloat16>,     //
    Types<float16, float16, float>,       //
    Types<float16, float, float>,         //
    Types<float16, float16, float16>,     //
    Types<float16, float, float16>>;

// Besides, each variant has a kernel for whatever a Coding says.
using Coded = Types<coded, coded, coded>;

}  // namespace fusedopt
