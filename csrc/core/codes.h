// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
#pragma once

#include "dtype.h"
#include "random.h"
#include "span.h"

// How elements are stored where that takes more than a dtype: float32 weights in two parts, weights
// that are rounded at random, states of one byte. A rule sees none of it: blocks of elements are
// decoded to float32, updated, and encoded again.
namespace fusedopt {

// Elements that share a scale. A span with a Coding is cut between blocks only.
constexpr int kBlock = 256;

// States of one byte come in whole blocks, of so many words: the least significant bytes of these
// are those of a block's first quarter, and so on. Thus bytes become lanes of 32 bits by shifts.
constexpr int kWords = kBlock / 4;

enum class ParamCode : uint8_t {
  float32,
  bfloat16,
  float16,
  bfloat16_and_16,      // with the lower 16 bits of the master
  bfloat16_and_8,       // with the next 8 bits of the master
  bfloat16_stochastic,  // rounded at random
  float16_and_float32,  // with the master
};

enum class StateCode : uint8_t { float32, bfloat16, int8 };

// Where a span with it begins, there a parameter begins: blocks, and elements in random numbers,
// are counted from there.
struct Coding {
  float* scales[kMaxStates];  // of the blocks, for states of one byte
  void* master;               // the part of the master that is not in the parameter
  const float* count;         // of the steps with this one, on the device; null: it is `step`
  uint64_t key;               // see random_key
  uint32_t step;
  ParamCode param;
  DType grad;
  StateCode state;
};

FUSEDOPT_HD int64_t size_of(ParamCode code) { return code == ParamCode::float32 ? 4 : 2; }
FUSEDOPT_HD int64_t size_of(StateCode code) {
  return code == StateCode::float32 ? 4 : code == StateCode::bfloat16 ? 2 : 1;
}
FUSEDOPT_HD int64_t size_of_master(ParamCode code) {
  return code == ParamCode::float16_and_float32 ? 4
         : code == ParamCode::bfloat16_and_16   ? 2
         : code == ParamCode::bfloat16_and_8    ? 1
                                                : 0;
}

// -- master weights ------------------------------------------------------------------------------

// A float32 as the nearest bfloat16, ties away from zero, and what has to be added to its bits.
// With ties to even, the remainder would have 2^16 + 1 values. Splitting and joining are the
// identity for all bits; a number from 0x7f7f8000 on is an Inf with a negative remainder.
struct Split {
  uint16_t high;
  int16_t remainder;
};

FUSEDOPT_HD Split split(uint32_t bits) {
  return {uint16_t((bits + 0x8000u) >> 16), int16_t(uint16_t(bits))};
}
FUSEDOPT_HD uint32_t join(uint16_t high, int16_t remainder) {
  return (uint32_t(high) << 16) + uint32_t(int32_t(remainder));
}

// A float32 rounded to 24 bits, ties away from zero, of which split() has a remainder of 8 bits.
FUSEDOPT_HD uint32_t round_to_24(uint32_t bits) { return (bits + 0x80u) & ~0xffu; }

FUSEDOPT_HD uint32_t canonical_bits(float value) {
  return value != value ? 0x7fc00000u : float_to_bits(value);
}

// The bfloat16 towards zero of a float32, or the one beyond it where the bits cut off and these 16
// bits make a whole: at random for weights, dithered for averages of squares, which move by less
// than half a distance in a step and would stay where they are.
FUSEDOPT_HD bfloat16 cut_to_bfloat16(float value, uint32_t addend) {
  return {uint16_t((canonical_bits(value) + addend) >> 16)};  // nothing is carried out of a NaN
}

// A float16 parameter is its master rounded; where it is not, somebody has changed it.
FUSEDOPT_HD float master_of(float param, float rounded_master, float master) {
  return float_to_bits(param) == float_to_bits(rounded_master) ? master : param;
}

// -- states of one byte --------------------------------------------------------------------------

// A byte is a root, q / 128 with a sign or (q + 2) / 256 without, of a multiple of the block's
// scale. It is no fourth root but what runs straight between those of two powers of two: a quarter
// of a float32's bits. So it takes a shift, precision tapers off with magnitude as a fourth root's
// does, and a place between two roots is the place between what they stand for: dithering one
// dithers the other. The offset is that of 2^n times the root.
constexpr int32_t root_offset(int n) { return 0x3f800000 - (0x3f800000 >> 2) + (n << 23); }

template <int n>
FUSEDOPT_HD float root_of(float ratio) {
  return bits_to_float((float_to_bits(ratio) >> 2) + uint32_t(root_offset(n)));
}
template <int n>
FUSEDOPT_HD float power_of(float root) {
  const int32_t bits = int32_t(float_to_bits(root)) - root_offset(n);
  return bits_to_float(uint32_t(bits > 0 ? bits : 0) << 2);
}

// Where a block has an Inf or NaN its scale is negative, and these bytes stand for such elements.
// Thus they do not reach others of the block. An average of squares is Inf then: it is one that has
// overflowed, or else the other state is NaN. What is so large that its scale would overflow counts
// as infinite.
constexpr uint32_t kNaN = 0x80;
constexpr uint32_t kInf = 0xff;

FUSEDOPT_HD float decode_signed(uint32_t code, float scale, bool careful) {
  const float magnitude = power_of<7>(float(int32_t(code & 0x7fu))) * scale;
  const uint32_t bits = float_to_bits(magnitude) | (code & 0x80u) << 24;
  return bits_to_float(careful && code == kNaN ? 0x7fc00000u : bits);
}

FUSEDOPT_HD float decode_square(uint32_t code, float scale, bool careful) {
  const float magnitude = power_of<8>(float(int32_t(code) + 2)) * scale;
  return bits_to_float(careful && code == kInf ? 0x7f800000u : float_to_bits(magnitude));
}

FUSEDOPT_HD uint32_t magnitude_bits(float value) { return float_to_bits(value) & 0x7fffffffu; }
FUSEDOPT_HD bool is_finite(uint32_t magnitude) { return magnitude < 0x7f770000u; }

FUSEDOPT_HD uint32_t encode_signed(float value, float inverse, bool careful) {
  const bool special = careful && !is_finite(magnitude_bits(value));
  const float magnitude = bits_to_float(special ? 0 : magnitude_bits(value));
  const uint32_t q = uint32_t(int32_t(root_of<7>(magnitude * inverse) + 0.5f));
  const uint32_t code = q | (float_to_bits(value) >> 24 & 0x80u);
  if (!careful) return code;
  return special ? kNaN : q == 0 ? 0 : code;
}

FUSEDOPT_HD uint32_t encode_square(float value, float inverse, uint32_t dither, bool careful) {
  const bool special = careful && !is_finite(magnitude_bits(value));
  const float threshold = bits_to_float(0x3f800000u ^ dither);  // from 1 to 2
  const int32_t q = int32_t(root_of<8>((special ? 0 : value) * inverse) + threshold);
  const uint32_t code = uint32_t((q < 3 ? 3 : q) - 3);
  if (!careful) return code;
  return special ? kInf : code > 254 ? 254 : code;
}

FUSEDOPT_HD float decode_code(bool never_negative, uint32_t code, float scale, bool careful) {
  return never_negative ? decode_square(code, scale, careful) : decode_signed(code, scale, careful);
}
FUSEDOPT_HD uint32_t encode_code(bool never_negative, float value, float inverse, uint32_t dither,
                                 bool careful) {
  return never_negative ? encode_square(value, inverse, dither, careful)
                        : encode_signed(value, inverse, careful);
}

// What to encode a block with, from its largest magnitude.
struct Scale {
  float scale, inverse;
};

template <bool never_negative>
FUSEDOPT_HD Scale scale_of(uint32_t largest, bool careful) {
  // The inverse of a smaller one might overflow.
  constexpr float smallest = 0x1p-100f;
  const float magnitude = bits_to_float(largest);
  const float least = largest == 0 ? 0 : magnitude < smallest ? smallest : magnitude;
  // The largest byte stands for 1, or for 31 / 32.
  const float scale = never_negative ? least : least * (32.0f / 31);
  return {careful ? -scale : scale, largest == 0 ? 0 : 1 / scale};
}

// Where the code of an element is in the bytes of its block.
FUSEDOPT_HD int byte_of(int place) { return place % kWords * 4 + place / kWords; }

FUSEDOPT_HD bool is_careful(float scale) { return (float_to_bits(scale) >> 31) != 0; }
FUSEDOPT_HD float absolute(float value) { return bits_to_float(magnitude_bits(value)); }

// One element of a block of codes.
FUSEDOPT_HD float decode_element(const uint8_t* codes, int place, float scale,
                                 bool never_negative) {
  return decode_code(never_negative, codes[byte_of(place)], absolute(scale), is_careful(scale));
}

// A block of at most kBlock elements, each rounded to nearest: for states that come from elsewhere.
inline void encode_block(const float* from, int64_t count, bool never_negative, uint8_t* codes,
                         float* scale_to) {
  uint32_t largest = 0;
  bool careful = false;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = magnitude_bits(from[i]);
    careful = careful || !is_finite(magnitude);
    if (is_finite(magnitude) && magnitude > largest) largest = magnitude;
  }
  const Scale scale =
      never_negative ? scale_of<true>(largest, careful) : scale_of<false>(largest, careful);
  constexpr uint32_t half = 0x400000;  // of the dither's range
  for (int64_t i = 0; i < count; ++i) {
    const float value = never_negative ? absolute(from[i]) : from[i];
    codes[byte_of(int(i))] =
        uint8_t(encode_code(never_negative, value, scale.inverse, half, careful));
  }
  *scale_to = scale.scale;
}

}  // namespace fusedopt
