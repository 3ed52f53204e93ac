// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Random bits and fractions to round by, without a state.
#pragma once

#include <cstdint>

#include "macros.h"

// They are a function of the seed, the parameter, its step and the element's place in it, so that
// they depend on no thread, no device and no order.
namespace fusedopt {

// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
FUSEDOPT_HD uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;  // 2^64 divided by the golden ratio

FUSEDOPT_HD uint64_t random_key(uint64_t seed, uint64_t ordinal) {
  return mix(mix(seed + kGolden) + ordinal * kGolden);
}

// One hash has the random bits of two elements of a block, so many places apart.
constexpr int kRandomPairs = 128;

// Those of one block of a parameter in one step.
struct RandomBlock {
  uint32_t first, second;

  FUSEDOPT_HD RandomBlock(uint64_t key, uint32_t step, int64_t block) {
    const uint64_t bits = mix(mix(key + step * kGolden) + uint64_t(block) * kGolden);
    first = uint32_t(bits);
    second = uint32_t(bits >> 32);
  }

  // 32 random bits for an i below 2^16: a permutation of i (Mueller's and Wellons' kind of hash,
  // two multiplications between shifts) into which the second word is mixed on the way.
  FUSEDOPT_HD uint32_t bits(uint32_t i) const {
    uint32_t x = first + i * 0x9e3779b9u;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ second ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
  }

  // The 16 bits of an element.
  FUSEDOPT_HD uint32_t of_place(int place) const {
    const uint32_t both = bits(uint32_t(place) % kRandomPairs);
    return place < kRandomPairs ? both & 0xffffu : both >> 16;
  }
};

// The bits of an integer in reverse: the beginning of a sequence that fills the interval evenly.
FUSEDOPT_HD constexpr uint32_t reversed(uint32_t x) {
  x = (x >> 16) | (x << 16);
  x = (x >> 8 & 0x00ff00ffu) | (x & 0x00ff00ffu) << 8;
  x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  return (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
}

// Bits of a fraction to round by, as many as a float32's fraction has.
constexpr int kDitherBits = 23;

// Thresholds in [0, 2^kDitherBits): a number is rounded up where threshold and cut-off fraction sum
// to a whole. Over 2^n steps of an element, or over a block in one step, one lies in each of 2^n
// equal parts. So a value that stays is right on average, with far less noise than random
// thresholds have.
FUSEDOPT_HD uint32_t dither_of_block(int64_t block, uint32_t step) {
  return (reversed(step) ^ uint32_t(mix(uint64_t(block) * kGolden))) >> (32 - kDitherBits);
}
FUSEDOPT_HD constexpr uint32_t dither(uint32_t of_block, uint32_t place) {
  return of_block ^ (reversed(place) >> (32 - kDitherBits));
}

}  // namespace fusedopt
