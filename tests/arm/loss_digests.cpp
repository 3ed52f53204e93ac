// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What every loop of the losses makes of the same memory, as a digest, like digests.cpp; and exp
// and log by themselves. The instruction sets are arguments.
#include <cinttypes>
#include <cstdio>
#include <string>

#include "cpu/losses/losses.h"
#include "memory.h"

namespace {

using namespace fusedopt;

constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};
const char* const kDTypeNames[] = {"float32", "float64", "bfloat16", "float16"};

// Of rows that are worked out side by side, also more than fit into a tile; of one chunk, and of
// several, with tails of all sorts; and of one row that threads share, with more chunks than lanes.
struct Shape {
  int64_t rows, classes;
};
constexpr Shape kShapes[] = {{3, 1},    {70, 2},    {130, 3},  {64, 10},  {65, 63},
                             {7, 64},   {6, 65},    {6, 257},  {6, 1000}, {6, 1024},
                             {6, 1025}, {12, 1300}, {6, 2049}, {6, 3333}, {1, 50257}};
constexpr int kThreads = 4;
constexpr double kInfinity = INFINITY;

enum Fill { usual, wide, masked, special, large, fills };
const char* const kFillNames[] = {"usual", "wide", "masked", "special", "large"};

// One piece after the other, as small as they may be.
void in_turn(int64_t size, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t)) {
  for (int64_t i = 0; i < size; i += grain) body(context, i, std::min(size, i + grain));
}

struct Case {
  DType dtype;
  Shape shape;
  Fill fill;
  bool probable, weighted, smoothed, z_loss;
  // Drawn.
  bool is_mean, in_place, with_gradient, with_lse;
  int64_t padding;  // elements between rows
  int64_t ignore_index;

  std::string name() const {
    std::string text = std::string("cross-entropy-") + kDTypeNames[int(dtype)] + "-" +
                       std::to_string(shape.rows) + "x" + std::to_string(shape.classes) + "-" +
                       kFillNames[fill];
    const auto add = [&](bool is_so, const char* word) { text += is_so ? word : ""; };
    add(probable, "-probable");
    add(weighted, "-weighted");
    add(smoothed, "-smoothed");
    add(z_loss, "-z_loss");
    add(is_mean, "-mean");
    add(in_place, "-in_place");
    add(with_gradient, "-gradient");
    add(with_lse, "-lse");
    return text;
  }
};

double logit(Random& random, const Case& of, int64_t i) {
  const double fraction = random.fraction();
  switch (of.fill) {
    case wide:  // down to exponentials that are denormals, or zero
      return fraction * (of.dtype == DType::float64 ? 400 : 55);
    case masked:
      return random.bits() % 5 < 2 || i / kLossChunk == 1 ? -kInfinity : fraction * 8;
    case large:
      return fraction * 9000;
    default:
      return fraction * 8;
  }
}

// One logit of a row that is no number, or a whole row of what is hard to work with.
void make_special(Random& random, Stream& logits, int64_t begin, int64_t classes) {
  constexpr double ones[] = {NAN, kInfinity, -kInfinity};
  const uint32_t kind = random.bits() % 7;
  if (kind < 3) logits.set(begin + int64_t(random.bits() % classes), ones[kind]);
  for (int64_t i = 0; i < classes; ++i) {
    const double fraction = random.fraction();
    if (kind == 3) logits.set(begin + i, -kInfinity);
    if (kind == 4) logits.set(begin + i, fraction * 1e-38);
    if (kind == 5) logits.set(begin + i, fraction < 0 ? -6e4 : 6e4);
    if (kind == 6)
      logits.set(begin + i, fraction * (logits.dtype == DType::float64 ? 1.7e308 : 3.4e38));
  }
}

uint64_t digest_of(const Case& of, Random random, cpu::Isa isa) {
  const int64_t rows = of.shape.rows, classes = of.shape.classes, stride = classes + of.padding;
  const DType compute = of.dtype == DType::float64 ? DType::float64 : DType::float32;
  Stream logits = Stream::of(of.dtype, rows * stride), gradient = logits;
  Stream probabilities = Stream::of(of.dtype, rows * classes);
  Stream weights = Stream::of(compute, classes), lse = Stream::of(compute, rows);
  Stream losses = Stream::of(DType::float64, rows), loss = Stream::of(of.dtype, 1);
  std::vector<int64_t> targets;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < classes; ++i) {
      logits.set(row * stride + i, logit(random, of, i));
      const double fraction = random.fraction();
      probabilities.set(row * classes + i, fraction < -0.8 ? 0 : (1 + fraction) / double(classes));
    }
    if (of.fill == special) make_special(random, logits, row * stride, classes);
    const bool ignored = random.bits() % 5 == 0;
    targets.push_back(ignored ? of.ignore_index : int64_t(random.bits() % uint32_t(classes)));
  }
  for (int64_t i = 0; i < classes; ++i) {
    const double fraction = random.fraction();
    weights.set(i, fraction < -0.9 ? 0 : 1.25 + fraction);
  }

  CrossEntropyWork work;
  work.loss.classes = classes;
  work.loss.smoothing = of.smoothed ? 0.1 : 0;
  work.loss.z_loss = of.z_loss ? 1e-3 : 0;
  work.rows = rows;
  const int64_t stride_bytes = stride * size_of(of.dtype);
  work.logits = {logits.memory.data(), rows + 1, 0, stride_bytes};
  Stream& written = of.in_place ? logits : gradient;
  if (of.with_gradient) work.gradient = {written.memory.data(), rows + 1, 0, stride_bytes};
  Divisors divisors{double(rows), double(rows)};
  if (of.probable) {
    work.probabilities = {probabilities.memory.data(), rows + 1, 0, classes * size_of(of.dtype)};
  } else {
    work.targets = targets.data();
    work.ignore_index = of.ignore_index;
    const auto found = cpu::check_targets(targets.data(), rows, classes, of.ignore_index,
                                          of.weighted ? weights.memory.data() : nullptr, compute);
    divisors = {found.weight, double(found.valid)};
  }
  if (of.weighted) work.weights = weights.memory.data();
  if (of.is_mean) {
    work.loss.factor = 1 / divisors.weight;
    work.loss.z_factor = 1 / divisors.valid;
  }
  work.losses = losses.as<double>();
  if (of.with_lse) work.lse = lse.memory.data();
  cpu::cross_entropy(work, of.dtype, isa, kThreads, in_turn);
  finish_loss({work.losses, rows, 1, of.is_mean ? &divisors : nullptr, loss.memory.data(), of.dtype,
               of.is_mean},
              cpu::total(work.losses, rows));
  uint64_t sum = kNoDigest;
  for (Stream* stream : {&loss, &losses, &lse, &written}) sum = stream->digest(sum);
  return sum;
}

void print(const char* name, const std::string& what, uint64_t digest) {
  std::printf("%s %s %016" PRIx64 "\n", name, what.c_str(), digest);
}

void print_cross_entropy(const char* name, cpu::Isa isa) {
  uint64_t seed = 0;
  for (DType dtype : kDTypes)
    for (const Shape shape : kShapes)
      for (int fill = 0; fill < fills; ++fill)
        for (int options = 0; options < 16; ++options) {
          Random random(++seed);
          const auto drawn = [&](uint32_t count) { return random.bits() % count; };
          Case of;
          of.dtype = dtype;
          of.shape = shape;
          of.fill = Fill(fill);
          of.probable = (options & 1) != 0;
          of.weighted = (options & 2) != 0;
          of.smoothed = (options & 4) != 0;
          of.z_loss = (options & 8) != 0;
          of.is_mean = drawn(2) == 0;
          of.with_gradient = drawn(4) != 0;
          of.in_place = of.with_gradient && drawn(2) == 0;
          of.with_lse = drawn(2) == 0;
          of.padding = drawn(3);
          of.ignore_index = drawn(2) == 0 ? 0 : -100;
          print(name, of.name(), digest_of(of, random, isa));
        }
}

void print_mse(const char* name, cpu::Isa isa) {
  uint64_t seed = 0;
  for (DType dtype : kDTypes)
    for (const int64_t numel : {1, 7, 127, 128, 129, 1000, 16384, 16385, 40001})
      for (const bool any : {false, true})
        for (const bool with_gradient : {false, true})
          for (const bool is_mean : {false, true}) {
            Random random(++seed);
            const int64_t offset = random.bits() % 4;  // beside 16 bytes
            Stream input = Stream::of(dtype, numel + offset), target = input, gradient = input;
            for (int64_t i = 0; i < input.size(); ++i)
              for (Stream* stream : {&input, &target})
                stream->set(i, any ? random.value() : random.fraction() * 4);
            Stream sums = Stream::of(DType::float64, norm_chunks(numel));
            Stream loss = Stream::of(dtype, 1);
            const auto from = [=](Stream& stream) {
              return stream.memory.data() + offset * size_of(dtype);
            };
            const double factor = is_mean ? 1 / double(numel) : 1;
            cpu::mse({from(input), from(target), with_gradient ? from(gradient) : nullptr, numel,
                      factor, sums.as<double>()},
                     dtype, isa, in_turn);
            finish_loss({sums.as<double>(), sums.size(), factor, nullptr, loss.memory.data(), dtype,
                         is_mean},
                        cpu::total(sums.as<double>(), sums.size()));
            uint64_t sum = kNoDigest;
            for (Stream* stream : {&loss, &sums, &gradient}) sum = stream->digest(sum);
            print(name,
                  std::string("mse-") + kDTypeNames[int(dtype)] + "-" + std::to_string(numel) +
                      (any ? "-any" : "-usual") + (with_gradient ? "-gradient" : "") +
                      (is_mean ? "-mean" : ""),
                  sum);
          }
}

double to_double(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// As this program is compiled, for any processor of the architecture.
void print_arithmetic() {
  uint64_t by_bits = kNoDigest, by_steps = kNoDigest;
  // Negative numbers of all magnitudes, denormals among them, then Inf and some NaN.
  for (uint64_t bits = 0x80000000u; bits <= 0xffffffffu; bits += 2039)
    by_bits = digest_with(by_bits, bits_of(exponential(bits_to_float(uint32_t(bits)))));
  for (int i = 0; i <= 200000; ++i)
    by_steps = digest_with(by_steps, bits_of(exponential(float(i) * (-110.0f / 200000))));
  print("baseline", "exponential-float32-bits", by_bits);
  print("baseline", "exponential-float32-steps", by_steps);

  constexpr uint64_t places = 300007, stride = (uint64_t(1) << 63) / places;
  by_bits = by_steps = kNoDigest;
  for (uint64_t i = 0; i <= places; ++i)
    by_bits = digest_with(by_bits, bits_of(exponential(to_double((1ull << 63) + i * stride))));
  for (int i = 0; i <= 300000; ++i)
    by_steps = digest_with(by_steps, bits_of(exponential(i * (-750.0 / 300000))));
  print("baseline", "exponential-float64-bits", by_bits);
  print("baseline", "exponential-float64-steps", by_steps);

  by_bits = by_steps = kNoDigest;
  for (uint64_t i = 0; i <= 2 * places; ++i)
    by_bits = digest_with(by_bits, bits_of(logarithm(to_double(i * stride))));
  for (int i = 0; i <= 300000; ++i)  // what sums of exponentials are, and near the root of 1/2
    by_steps = digest_with(by_steps, bits_of(logarithm(0.5 + i * (100 / 300000.0))));
  print("baseline", "logarithm-bits", by_bits);
  print("baseline", "logarithm-steps", by_steps);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string names[] = {"baseline", "avx2", "avx512"};
  for (int i = 1; i < count; ++i)
    for (cpu::Isa isa : {cpu::Isa::baseline, cpu::Isa::avx2, cpu::Isa::avx512})
      if (names[int(isa)] == arguments[i]) {
        print_cross_entropy(arguments[i], isa);
        print_mse(arguments[i], isa);
      }
  print_arithmetic();
}
