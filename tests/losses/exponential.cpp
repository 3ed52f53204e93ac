// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// exp and log of csrc/core/arithmetic.h beside those of the host's libm with more digits: every
// so-manieth float32, and many float64. Prints the largest errors in units of the last place, and a
// digest of all results.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "core/arithmetic.h"

// libm's long double is of no product.
#pragma GCC diagnostic ignored "-Wdouble-promotion"

namespace {

using namespace fusedopt;
using Wide = long double;

uint64_t digest;
void take(double result) {
  uint64_t bits;
  memcpy(&bits, &result, sizeof bits);
  if (result != result) bits = 1;  // which NaN it is does not matter
  digest = (digest ^ bits) * 0x100000001b3 + (digest >> 29);
}

struct Worst {
  double error = 0, at = 0;
  int64_t seen = 0, odd = 0;  // odd: above 1, or not NaN where it has to be

  // digits: of the significand; least: the exponent of the smallest denormal.
  void compare(double x, double got, Wide want, int digits, int least) {
    ++seen;
    take(got);
    int exponent;
    frexpl(want, &exponent);
    const int last = want == 0 || exponent - digits < least ? least : exponent - digits;
    const double off = double(fabsl(ldexpl(Wide(got) - want, -last)));
    if (!(off <= error)) error = off, at = x;
  }
  void print(const char* what) const {
    std::printf("%s %.6f %a %" PRId64 " %" PRId64 " %016" PRIx64 "\n", what, error, at, seen, odd,
                digest);
  }
};

// All that are no greater than zero: -0 to -Inf, and the NaN behind; and +0.
void check_float(uint64_t step) {
  Worst worst;
  for (uint64_t bits = 0x80000000; bits <= 0xffffffff; bits += step) {
    const uint32_t low = uint32_t(bits);
    float x;
    memcpy(&x, &low, sizeof x);
    const float got = exponential(x);
    if (x != x) {
      worst.odd += got == got;
      take(double(got));
      continue;
    }
    worst.odd += !(got <= 1) | (got < 0);
    // Its own error is 2^-29 units of a float32.
    worst.compare(double(x), double(got), Wide(exp(double(x))), 24, -149);
  }
  worst.odd += exponential(0.0f) != 1 || exponential(-INFINITY) != 0;
  worst.print("float-exp");
}

void check_exp(int64_t count) {
  Worst worst;
  std::mt19937_64 random(1);
  for (int64_t i = 0; i < count; ++i) {
    const double part = double(random() >> 11) * 0x1p-53;
    // All of the range, the part next to zero on every scale, and what becomes denormal.
    const double x = i % 3 == 0   ? part * -746
                     : i % 3 == 1 ? -ldexp(1 + part, -int(random() % 64))
                                  : -708 - part * 40;
    const double got = exponential(x);
    worst.odd += !(got <= 1) | (got < 0);
    worst.compare(x, got, expl(x), 53, -1074);
  }
  const double infinity = __builtin_huge_val();
  worst.odd += exponential(0.0) != 1 || exponential(-0.0) != 1;
  worst.odd += exponential(-infinity) != 0 || exponential(-1e308) != 0;
  const double nan = exponential(__builtin_nan(""));
  worst.odd += nan == nan;
  worst.print("exp");
}

void check_one_minus_exp(int64_t count) {
  Worst worst;
  std::mt19937_64 random(3);
  for (int64_t i = 0; i < count; ++i) {
    const double part = double(random() >> 11) * 0x1p-53;
    // The range in which it is not 1, and the part next to zero on every scale.
    const double x = i % 2 == 0 ? part * -40 : -ldexp(1 + part, -int(random() % 1022));
    const double got = one_minus_exponential(x);
    worst.odd += !(got <= 1) | (got < 0);
    worst.compare(x, got, -expm1l(x), 53, -1074);
  }
  const double infinity = __builtin_huge_val();
  worst.odd += one_minus_exponential(0.0) != 0 || one_minus_exponential(-0.0) != 0;
  worst.odd += one_minus_exponential(-infinity) != 1 || one_minus_exponential(-1e308) != 1;
  const double nan = one_minus_exponential(__builtin_nan(""));
  worst.odd += nan == nan;
  worst.print("one-minus-exp");
}

void check_log(int64_t count) {
  Worst worst;
  std::mt19937_64 random(2);
  for (int64_t i = 0; i < count; ++i) {
    const double part = double(random() >> 11) * 0x1p-53;
    // Any normal number, sums of a few exponentials, and 1 from both sides on every scale.
    const double x = i % 3 == 0 ? ldexp(1 + part, int(random() % 2046) - 1022)
                     : i % 3 == 1
                         ? 1 + part * 100
                         : 1 + ldexp(i % 2 == 0 ? 1 + part : -1 - part, -2 - int(random() % 50));
    worst.compare(x, logarithm(x), logl(x), 53, -1074);
  }
  const double infinity = __builtin_huge_val();
  worst.odd += logarithm(1.0) != 0 || logarithm(infinity) != infinity;
  worst.odd += logarithm(0.0) != -infinity || logarithm(-0.0) != -infinity;
  for (const double nan : {logarithm(-1.0), logarithm(-infinity), logarithm(__builtin_nan(""))})
    worst.odd += nan == nan;
  worst.print("log");
}

}  // namespace

int main(int, char** arguments) {
  check_float(strtoull(arguments[1], nullptr, 10));
  check_exp(strtoll(arguments[2], nullptr, 10));
  check_one_minus_exp(strtoll(arguments[2], nullptr, 10));
  check_log(strtoll(arguments[2], nullptr, 10));
}
