// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What the digests of all loops are made of: random numbers, streams of them, and their digests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/dtype.h"

namespace fusedopt {

// A digest of nothing.
constexpr uint64_t kNoDigest = 0xcbf29ce484222325u;

// Every bit reaches lower ones, too: the highest ones would else cancel each other.
inline uint64_t digest_with(uint64_t sum, uint64_t bits) {
  sum = (sum ^ bits) * 0x100000001b3u;
  return sum ^ (sum >> 29);
}

// NaNs may differ in their bits.
inline uint64_t bits_of(double value) {
  uint64_t bits = 0;
  if (value == value) memcpy(&bits, &value, sizeof value);
  return bits;
}
inline uint64_t bits_of(float value) { return value == value ? float_to_bits(value) : 0; }

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}

  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 32);
  }
  // Many magnitudes of either sign; some are no usual number.
  double value() {
    constexpr double special[] = {0, -0.0, INFINITY, -INFINITY, NAN, 1e-42, -1e-310, 7e4, 3.3e38};
    const uint32_t kind = bits() % 64;
    if (kind < sizeof special / sizeof special[0]) return special[kind];
    const int exponent = int(bits() % 40) - 60;  // in an order that compilers have no choice of
    return ldexp(double(int32_t(bits())), exponent);
  }
  // From [-1, 1).
  double fraction() { return ldexp(double(int32_t(bits())), -31); }

 private:
  uint64_t state_;
};

// A stream of floating-point numbers, or of bytes.
struct Stream {
  DType dtype;
  bool is_bytes;
  std::vector<unsigned char> memory;

  static Stream of(DType dtype, int64_t numel) {
    return {dtype, false, std::vector<unsigned char>(size_t(numel * size_of(dtype)))};
  }

  template <class Element>
  Element* as() {
    return reinterpret_cast<Element*>(memory.data());
  }
  int64_t size() const { return int64_t(memory.size()) / (is_bytes ? 1 : size_of(dtype)); }

  void set(int64_t i, double value) {
    if (dtype == DType::float64) as<double>()[i] = value;
    if (dtype == DType::float32) as<float>()[i] = float(value);
    if (dtype == DType::bfloat16) narrow(float(value), as<bfloat16>()[i]);
    if (dtype == DType::float16) narrow(float(value), as<float16>()[i]);
  }

  uint64_t digest(uint64_t sum) {
    for (int64_t i = 0; i < size(); ++i) {
      uint64_t bits = 0;
      if (is_bytes) {
        bits = memory[i];
      } else if (dtype == DType::float64) {
        bits = bits_of(as<double>()[i]);
      } else if (dtype == DType::float32) {
        bits = bits_of(as<float>()[i]);
      } else {
        bits = as<uint16_t>()[i];
        const uint64_t infinity = dtype == DType::bfloat16 ? 0x7f80 : 0x7c00;
        if ((bits & 0x7fff) > infinity) bits = 0;
      }
      sum = digest_with(sum, bits);
    }
    return sum;
  }
};

}  // namespace fusedopt
