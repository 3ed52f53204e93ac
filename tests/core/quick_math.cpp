// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// csrc/device/quick_math.h beside the host's own division and root: all roots, the quotients that
// are hardest to round, and any. With approximations that are rounded correctly, and a unit off.
// Prints what differs: how much, and the first of each.
#include "device/quick_math.h"

#include <cinttypes>
#include <cstdio>
#include <random>

namespace {

using namespace fusedopt;

template <int units>
struct Moved {
  static float moved(float value) { return bits_to_float(float_to_bits(value) + uint32_t(units)); }
  static float reciprocal(float value) { return moved(Approximate::reciprocal(value)); }
  static float reciprocal_root(float value) { return moved(Approximate::reciprocal_root(value)); }
};

int64_t wrong = 0, seen = 0;

void compare(float a, float b, float got, float want) {
  ++seen;
  if (float_to_bits(got) == float_to_bits(want)) return;
  if (wrong++ < 10)
    std::printf("  %a, %a: %a, not %a\n", double(a), double(b), double(got), double(want));
}
void tell(const char* what, int units) {
  std::printf("%s %d %" PRId64 " %" PRId64 "\n", what, units, seen, wrong);
  wrong = seen = 0;
}

// Of all numbers from 1 to 4: others have the same mantissas, times a power of four.
template <int units>
void check_roots() {
  for (uint32_t bits = 127 << 23; bits < 129 << 23; ++bits) {
    const float value = bits_to_float(bits);
    compare(value, 0, quick_root<Moved<units>>(value), sqrtf(value));
  }
}

// Divisors with any mantissa (an even one is an odd one, shifted), and dividends whose quotients
// lie next to the middle between two floats, or to one: a b-th of 2^-25 of a unit away, or a little
// more.
template <int units>
void check_hard_quotients() {
  for (uint64_t b = (1 << 23) + 1; b < 1 << 24; b += 2) {
    uint64_t inverse = b;  // modulo 2^64, by Newton's method
    for (int i = 0; i < 5; ++i) inverse *= 2 - b * inverse;
    for (int64_t distance : {-5, -3, -2, -1, 1, 2, 3, 5}) {
      for (int shift : {24, 25}) {
        // quotient * b + distance = a * 2^shift, of a quotient with a bit more than floats have
        const uint64_t modulus = uint64_t(1) << shift;
        uint64_t quotient = uint64_t(-distance) * inverse % modulus;
        const uint64_t a = (quotient * b + uint64_t(distance)) >> shift;
        if (quotient < modulus / 2 || a < 1 << 22 || a >= 1 << 24) continue;
        const float dividend = float(a), divisor = float(b);
        compare(dividend, divisor, quick_quotient<Moved<units>>(dividend, divisor),
                dividend / divisor);
      }
    }
  }
}

// A division, and a root, by themselves.
template <int units>
void check_alone(bool usual, float a, float b) {
  BasicQuickMath<Moved<units>> division, root;
  const float quotient = division.divide(a, b), length = root.root(b);
  if (usual || !division.is_rare())
    compare(a, b, division.is_rare() ? NAN : quotient, PlainMath().divide(a, b));
  if (usual || !root.is_rare()) compare(b, 0, root.is_rare() ? NAN : length, PlainMath().root(b));
}

// Any bits, and those of training; what is not rare is right, and what is usual is not rare.
template <int units>
void check_any() {
  std::mt19937_64 random(units + 10);
  for (int i = 0; i < 3000000; ++i) {
    const uint64_t bits = random();
    const bool usual = i % 2 == 0;
    float a = bits_to_float(uint32_t(bits)), value = bits_to_float(uint32_t(bits >> 32));
    float eps = i % 3 == 0 ? 1e-8f : i % 3 == 1 ? 0 : bits_to_float(uint32_t(random()));
    if (usual) {
      a = std::normal_distribution<float>()(random) * 1e-3f;
      value = a * a * bits_to_float(uint32_t((120 + bits % 16) << 23));
      eps = 1e-8f;
      if (i % 16 == 0) a = i % 32 == 0 ? 0 : -0.0f;
      if (i % 64 == 0) value = 0;
    }
    BasicQuickMath<Moved<units>> math;
    const float got = math.divide_by_root(a, value, eps);
    const float want = PlainMath().divide_by_root(a, value, eps);
    if (usual || !math.is_rare()) compare(a, value, math.is_rare() ? NAN : got, want);
    check_alone<units>(usual, a, usual ? sqrtf(value) + eps : value);
  }
}

template <int... units>
void check_all(std::integer_sequence<int, units...>) {
  ((check_roots<units - 1>(), tell("root", units - 1)), ...);
  ((check_hard_quotients<units - 1>(), tell("quotient", units - 1)), ...);
  ((check_any<units - 1>(), tell("any", units - 1)), ...);
}

}  // namespace

int main() { check_all(std::make_integer_sequence<int, 3>{}); }
