// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// How elements are stored where that takes more than a dtype: each way is one struct that decodes
// and encodes.
#pragma once

#include "blocks.h"
#include "dtype.h"
#include "span.h"

// A rule sees none of it: blocks of elements are decoded to float32, updated, and encoded again.
namespace fusedopt {

// How the elements of a span are stored. Blocks, and elements in random numbers, are counted from
// where the whole parameter begins, of which this may be a shard.
struct Coding {
  float* scales[kMaxStates];  // of the blocks, for states in codes
  void* master;               // the part of the master that is not in the parameter
  const float* count;         // of the steps with this one, on the device; null: it is `step`
  int64_t row;                // elements, see Blocks
  int64_t first_block;        // the blocks before the span
  int32_t first_place;        // the elements of its first block before it; not 0: it has no other
  uint64_t key;               // see random_key
  uint32_t step;
  uint8_t param;  // the place of its format in ParamFormats
  DType grad;
  uint8_t state;  // the place of its format in StateFormats
};

FUSEDOPT_HD uint32_t canonical_bits(float value) {
  return value != value ? 0x7fc00000u : float_to_bits(value);
}

// Cuts a float32 to bfloat16 after adding 16 bits: it is rounded up where these and the bits cut
// off carry. At random for weights; dithered for averages of squares, which change by less than
// half a step and would never move.
FUSEDOPT_HD bfloat16 cut_to_bfloat16(float value, uint32_t addend) {
  return {uint16_t((canonical_bits(value) + addend) >> 16)};  // nothing is carried out of a NaN
}

template <class Element>
FUSEDOPT_HD Element narrowed(float value) {
  Element element;
  narrow(value, element);
  return element;
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

// The remainder, in units, that takes a bfloat16 as near to a master as it can; zero where they are
// different numbers, as one of them has been changed.
template <int unit, class Remainder>
FUSEDOPT_HD Remainder remainder_between(float master, bfloat16 param) {
  constexpr int64_t least = -(int64_t(1) << (8 * sizeof(Remainder) - 1)), most = -least - 1;
  const int64_t difference = int64_t(float_to_bits(master)) - (int64_t(param.bits) << 16);
  const int64_t units = (difference + unit / 2) >> (unit == 1 ? 0 : 8);
  static_assert(unit == 1 || unit == 256, "a shift by the bits of a unit");
  if (difference < -0x8000 || difference > 0x8000) return 0;
  return Remainder(units < least ? least : units > most ? most : units);
}

// -- parameters ----------------------------------------------------------------------------------

// A format says what it needs (the parameter's dtype, bits of the master weight, rounding), which
// elements it has for a parameter and for what of the master is not in it, the key of the latter in
// a state, and how both become a float32 and come of it.
struct NoMaster {};
template <class Master>
constexpr int64_t master_bytes = sizeof(Master);
template <>
inline constexpr int64_t master_bytes<NoMaster> = 0;

template <class Param_, class Master_ = NoMaster>
struct ParamFormat {
  using Param = Param_;
  using Master = Master_;
  static constexpr int master_bits = 0;
  static constexpr bool stochastic = false;
  static constexpr const char* master_key = "";

  FUSEDOPT_HD static float decode(Param param, NoMaster) { return widen(param); }
  FUSEDOPT_HD static void encode(float value, Param& param, NoMaster&) { narrow(value, param); }
};

struct Float32 : ParamFormat<float> {};
struct Bfloat16 : ParamFormat<bfloat16> {};
struct Float16 : ParamFormat<float16> {};

// With the lower 16 bits of the master.
struct Bfloat16And16 : ParamFormat<bfloat16, int16_t> {
  static constexpr int master_bits = 32;
  static constexpr const char* master_key = "master_remainder";

  FUSEDOPT_HD static float decode(bfloat16 param, int16_t remainder) {
    return bits_to_float(join(param.bits, remainder));
  }
  FUSEDOPT_HD static void encode(float value, bfloat16& param, int16_t& remainder) {
    const Split parts = split(canonical_bits(value));
    param.bits = parts.high;
    remainder = parts.remainder;
  }
  FUSEDOPT_HD static int16_t remainder_of(float master, bfloat16 param) {
    return remainder_between<1, int16_t>(master, param);
  }
};

// With the next 8 bits of the master.
struct Bfloat16And8 : ParamFormat<bfloat16, int8_t> {
  static constexpr int master_bits = 24;
  static constexpr const char* master_key = "master_remainder";

  FUSEDOPT_HD static float decode(bfloat16 param, int8_t remainder) {
    return bits_to_float(join(param.bits, int16_t(remainder * 256)));
  }
  FUSEDOPT_HD static void encode(float value, bfloat16& param, int8_t& remainder) {
    const Split parts = split(round_to_24(canonical_bits(value)));
    param.bits = parts.high;
    remainder = int8_t(parts.remainder >> 8);
  }
  FUSEDOPT_HD static int8_t remainder_of(float master, bfloat16 param) {
    return remainder_between<256, int8_t>(master, param);
  }
};

// Rounded at random, by 16 random bits.
struct Bfloat16Stochastic : ParamFormat<bfloat16> {
  static constexpr bool stochastic = true;

  FUSEDOPT_HD static void encode(float value, uint32_t random, bfloat16& param) {
    param = cut_to_bfloat16(value, random);
  }
};

// With the whole master. A parameter is its master rounded; where it is not, somebody has changed
// it.
struct Float16And32 : ParamFormat<float16, float> {
  static constexpr int master_bits = 32;
  static constexpr const char* master_key = "master";

  FUSEDOPT_HD static float of(float param, float rounded_master, float master) {
    return float_to_bits(param) == float_to_bits(rounded_master) ? master : param;
  }
  FUSEDOPT_HD static float decode(float16 param, float master) {
    return of(widen(param), widen(narrowed<float16>(master)), master);
  }
  FUSEDOPT_HD static void encode(float value, float16& param, float& master) {
    narrow(value, param);
    master = value;
  }
};

using ParamFormats = TypeList<Float32, Bfloat16, Float16, Bfloat16And16, Bfloat16And8,
                              Bfloat16Stochastic, Float16And32>;
template <class Format>
constexpr uint8_t param_format = place_in<Format>(ParamFormats{});

// -- states in codes -----------------------------------------------------------------------------

// A code stands for a root, q / 128 with a sign or (q + 2) / 256 without, of a multiple of the
// block's scale. In place of a fourth root it is a quarter of a float32's bits (less an offset):
// straight lines with a bend at each power of two. So it takes a shift, and small numbers lose
// precision as slowly as with a fourth root. Between two codes a number and its root have the same
// relative place, so dithering one dithers the other. The offset is that of 2^n times the root.
template <int n>
constexpr uint32_t root_offset = 0x3f800000 - (0x3f800000 >> 2) + (n << 23);

template <int n>
FUSEDOPT_HD float root_of(float ratio) {
  return bits_to_float((float_to_bits(ratio) >> 2) + root_offset<n>);
}
// Of a root that is not below that of zero.
template <int n>
FUSEDOPT_HD float power_of(float root) {
  return bits_to_float((float_to_bits(root) - root_offset<n>) << 2);
}

// What devices have shorter ways for than shifts and masks, and conversions, which are slow there.

// A byte of a word, and more.
template <int more>
FUSEDOPT_HD float float_of_byte(uint32_t word, int byte) {
#if defined(__CUDA_ARCH__)
  const float above = bits_to_float(__byte_perm(word, 0x4b000000u, 0x7440u | uint32_t(byte)));
  return above - (0x1p23f - float(more));
#else
  return float(int32_t(word >> (8 * byte) & 0xffu) + more);
#endif
}
// The lowest byte is that of value - less, cut to an integer, for less <= value < 512.
template <int less>
FUSEDOPT_HD uint32_t cut(float value) {
#if defined(__CUDA_ARCH__)
  return float_to_bits(__fadd_rz(value, 0x1p23f - float(less)));
#else
  return uint32_t(int32_t(value) - less);
#endif
}
// A word of one byte, 0 the lowest, of each of four words.
template <int byte>
FUSEDOPT_HD uint32_t bytes_of(const uint32_t* words) {
#if defined(__CUDA_ARCH__)
  constexpr uint32_t of_two = uint32_t(byte) | uint32_t(byte + 4) << 4;
  return __byte_perm(__byte_perm(words[0], words[1], of_two),
                     __byte_perm(words[2], words[3], of_two), 0x5410u);
#else
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) found |= (words[i] >> (8 * byte) & 0xffu) << (8 * i);
  return found;
#endif
}

// What to encode a block with, from its largest magnitude.
struct Scale {
  float scale, inverse;
};

// Where a block has an Inf or NaN its scale is negative, the block is "careful", and the code below
// stands for such an element, which so affects no other one. An average of squares is then stored
// as Inf: it has overflowed, or the other state is NaN. What is so large that its scale would
// overflow counts as infinite.
FUSEDOPT_HD bool is_careful(float scale) { return (float_to_bits(scale) >> 31) != 0; }
FUSEDOPT_HD bool is_finite(uint32_t magnitude) { return magnitude < 0x7f770000u; }

FUSEDOPT_HD Scale scale_from(uint32_t largest, float largest_root, bool careful) {
  // The inverse of a smaller one might overflow.
  constexpr float smallest = 0x1p-100f;
  const float magnitude = bits_to_float(largest);
  const float least = largest == 0 ? 0 : magnitude < smallest ? smallest : magnitude;
  const float scale = least * largest_root;
  return {careful ? -scale : scale, largest == 0 ? 0 : 1 / scale};
}

// A state of either sign. Rounded to nearest.
struct SignedCode {
  static constexpr uint32_t kNaN = 0x80;

  FUSEDOPT_HD static Scale scale_of(uint32_t largest, bool careful) {
    return scale_from(largest, 32.0f / 31, careful);  // the largest code stands for 31 / 32
  }
  // Of a word of four codes, one.
  FUSEDOPT_HD static float decode(uint32_t codes, int byte, float scale, bool careful) {
    const float q = float_of_byte<0>(codes & 0x7f7f7f7fu, byte);
    const float zero = bits_to_float(root_offset<7>);
    const float magnitude = power_of<7>(q > zero ? q : zero) * scale;
    const uint32_t bits = float_to_bits(magnitude) | (codes << (24 - 8 * byte) & 0x80000000u);
    const bool special = careful && (codes >> (8 * byte) & 0xffu) == kNaN;
    return bits_to_float(special ? 0x7fc00000u : bits);
  }
  // In the lowest seven bits, the code without its sign.
  FUSEDOPT_HD static uint32_t encode_magnitude(float magnitude, float inverse) {
    return cut<0>(root_of<7>(magnitude * inverse) + 0.5f);
  }
  // The code is the lowest byte.
  FUSEDOPT_HD static uint32_t encode(float value, float inverse, uint32_t, bool careful) {
    const bool special = careful && !is_finite(magnitude_bits(value));
    const float magnitude = bits_to_float(special ? 0 : magnitude_bits(value));
    const uint32_t q = encode_magnitude(magnitude, inverse) & 0x7fu;
    const uint32_t code = q | (float_to_bits(value) >> 24 & 0x80u);
    if (!careful) return code;
    return special ? kNaN : q == 0 ? 0 : code;
  }
};

// A state that is never negative. It has no zero, and is dithered.
struct SquareCode {
  static constexpr uint32_t kInf = 0xff;

  FUSEDOPT_HD static Scale scale_of(uint32_t largest, bool careful) {
    return scale_from(largest, 1, careful);
  }
  FUSEDOPT_HD static float decode(uint32_t codes, int byte, float scale, bool careful) {
    const uint32_t bits = float_to_bits(power_of<8>(float_of_byte<2>(codes, byte)) * scale);
    const bool special = careful && (codes >> (8 * byte) & 0xffu) == kInf;
    return bits_to_float(special ? 0x7f800000u : bits);
  }
  FUSEDOPT_HD static uint32_t encode(float value, float inverse, uint32_t dither, bool careful) {
    const bool special = careful && !is_finite(magnitude_bits(value));
    const float threshold = bits_to_float(0x3f800000u ^ dither);  // from 1 to 2
    const float q = root_of<8>((special ? 0 : value) * inverse) + threshold;
    const uint32_t code = cut<3>(q < 3 ? 3 : q);
    if (!careful) return code;
    return special ? kInf : (code & 0xffu) > 254 ? 254 : code;
  }
};

template <bool never_negative>
using Code = typename std::conditional<never_negative, SquareCode, SignedCode>::type;

// -- states --------------------------------------------------------------------------------------

struct Float32State {
  using Element = float;
  static constexpr bool in_codes = false;

  template <bool never_negative>
  FUSEDOPT_HD static void encode(float value, uint32_t, float& to) {
    to = value;
  }
};

struct Bfloat16State {
  using Element = bfloat16;
  static constexpr bool in_codes = false;

  template <bool never_negative>
  FUSEDOPT_HD static void encode(float value, uint32_t dither, bfloat16& to) {
    static_assert(kDitherBits >= 16, "a bfloat16 lacks 16 bits of a float32");
    to = never_negative ? cut_to_bfloat16(value, dither >> (kDitherBits - 16))
                        : narrowed<bfloat16>(value);
  }
};

struct CodedState {
  using Element = uint8_t;  // a Code
  static constexpr bool in_codes = true;
};

using StateFormats = TypeList<Float32State, Bfloat16State, CodedState>;
template <class Format>
constexpr uint8_t state_format = place_in<Format>(StateFormats{});

// -- the format at a place of a list -------------------------------------------------------------

// Calls visit(Format{}) for the format at a place.
template <class... Formats, class Visit>
FUSEDOPT_HD void with_format(TypeList<Formats...>, int place, Visit visit) {
  int at = 0;
  ((at++ == place ? visit(Formats{}) : void()), ...);
}

// Bytes of an element of each stream; of a master's part, 0 where it has none.
struct StreamBytes {
  int64_t param = 0, master = 0, grad, state = 0;

  FUSEDOPT_HD explicit StreamBytes(const Coding& coding) : grad(size_of(coding.grad)) {
    set_param(ParamFormats{}, coding.param);
    set_state(StateFormats{}, coding.state);
  }

 private:
  template <class... Formats>
  FUSEDOPT_HD void set_param(TypeList<Formats...>, int place) {
    ((param = place == param_format<Formats> ? int64_t(sizeof(typename Formats::Param)) : param),
     ...);
    ((master = place == param_format<Formats> ? master_bytes<typename Formats::Master> : master),
     ...);
  }
  template <class... Formats>
  FUSEDOPT_HD void set_state(TypeList<Formats...>, int place) {
    ((state = place == state_format<Formats> ? int64_t(sizeof(typename Formats::Element)) : state),
     ...);
  }
};

// -- blocks of codes by themselves ---------------------------------------------------------------

// At most kBlock elements, each rounded to nearest: for states that come from elsewhere.
template <bool never_negative>
void to_codes(const float* from, int64_t count, uint8_t* codes, float* scale_to) {
  uint32_t largest = 0;
  bool careful = false;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = magnitude_bits(from[i]);
    careful = careful || !is_finite(magnitude);
    if (is_finite(magnitude) && magnitude > largest) largest = magnitude;
  }
  const Scale scale = Code<never_negative>::scale_of(largest, careful);
  constexpr uint32_t half = uint32_t(1) << (kDitherBits - 1);
  for (int64_t i = 0; i < count; ++i) {
    const float value = never_negative ? absolute(from[i]) : from[i];
    codes[byte_of(int(i), int(count))] =
        uint8_t(Code<never_negative>::encode(value, scale.inverse, half, careful));
  }
  *scale_to = scale.scale;
}

template <bool never_negative>
void from_codes(const uint8_t* codes, float scale, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = Code<never_negative>::decode(codes[byte_of(int(i), int(count))], 0, absolute(scale),
                                         is_careful(scale));
}

}  // namespace fusedopt
