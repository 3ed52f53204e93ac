// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What every kernel of the CPU makes of the same memory, as a digest: to compare processors by.
// Prints a line for each instruction set and kernel.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "cpu/cpu.h"
#include "memory.h"

namespace {

using namespace fusedopt;

constexpr int64_t kSizes[] = {1, 3, 17, 256, 1000, 4099};
constexpr int kSteps = 3;

void all_at_once(int64_t size, int64_t, void* context, void (*body)(void*, int64_t, int64_t)) {
  body(context, 0, size);
}

HyperRow make_row(int rule, const std::vector<double>& options, bool wide) {
  HyperRow row;
  registry().rules[rule].row(options.data(), 3, false, wide, row);
  return row;
}

struct Memory {
  Random random;
  std::vector<std::unique_ptr<Stream>> streams;
  std::vector<std::unique_ptr<Coding>> codings;
  std::vector<Span> spans;

  Stream& add(DType dtype, int64_t numel, bool never_negative) {
    streams.push_back(std::make_unique<Stream>(Stream::of(dtype, numel)));
    Stream& made = *streams.back();
    for (int64_t i = 0; i < numel; ++i) {
      const double drawn = random.value();
      made.set(i, never_negative ? fabs(drawn) : drawn);
    }
    return made;
  }
  Stream& add_bytes(int64_t count) {
    streams.push_back(std::make_unique<Stream>());
    Stream& made = *streams.back();
    made = {DType::float32, true, std::vector<unsigned char>(size_t(count))};
    for (auto& byte : made.memory) byte = uint8_t(random.bits());
    return made;
  }
  void add(Span span, int64_t numel, int kernel) {
    span.numel = numel;
    span.offset = spans.empty() ? 0 : spans.back().offset + spans.back().numel;
    span.kernel = kernel;
    spans.push_back(span);
  }
  uint64_t step(const HyperRow& row, cpu::Isa isa) {
    uint64_t sum = kNoDigest;
    for (int i = 0; i < kSteps; ++i) {
      cpu::step(spans.data(), spans.size(), &row, nullptr, isa, all_at_once);
      for (auto& coding : codings) ++coding->step;
    }
    for (auto& stream : streams) sum = stream->digest(sum);
    return sum;
  }
};

bool is_never_negative(int variant, size_t k) {
  return fusedopt::is_never_negative(registry().variants[variant].states[k].kind);
}

uint64_t digest_of_kernel(int variant, int combination, const HyperRow& row, cpu::Isa isa) {
  Memory memory{Random(uint64_t(variant * 100 + combination)), {}, {}, {}};
  const auto& types = registry().combinations[combination];
  for (const int64_t numel : kSizes) {
    Span span = {};
    span.param = memory.add(types.param, numel, false).memory.data();
    span.grad = memory.add(types.grad, numel, false).memory.data();
    for (size_t k = 0; k < registry().variants[variant].states.size(); ++k)
      span.states[k] = memory.add(types.state, numel, is_never_negative(variant, k)).memory.data();
    memory.add(span, numel, registry().kernel(variant, combination));
  }
  return memory.step(row, isa);
}

uint64_t digest_of_coding(int variant, const Coding& like, const HyperRow& row, cpu::Isa isa) {
  Memory memory{Random(uint64_t(variant * 1000 + like.param * 100 + like.state)), {}, {}, {}};
  for (const int64_t numel : kSizes) {
    memory.codings.push_back(std::make_unique<Coding>(like));
    Coding& coding = *memory.codings.back();
    coding.row = numel;
    const StreamBytes bytes(coding);
    Span span = {};
    span.param = memory
                     .add(bytes.param == 4 ? DType::float32
                          : coding.param == param_format<Float16> ||
                                  coding.param == param_format<Float16And32>
                              ? DType::float16
                              : DType::bfloat16,
                          numel, false)
                     .memory.data();
    if (bytes.master > 0)
      coding.master = bytes.master == 4 ? memory.add(DType::float32, numel, false).memory.data()
                                        : memory.add_bytes(numel * bytes.master).memory.data();
    span.grad = memory.add(coding.grad, numel, false).memory.data();
    for (size_t k = 0; k < registry().variants[variant].states.size(); ++k) {
      const bool never_negative = is_never_negative(variant, k);
      if (coding.state == state_format<CodedState>) {
        const int64_t blocks = Blocks{numel, numel}.count();
        coding.scales[k] = memory.add(DType::float32, blocks, false).as<float>();
        for (int64_t i = 0; i < blocks; ++i) {
          const float scale = coding.scales[k][i];
          if (!is_finite(magnitude_bits(scale))) coding.scales[k][i] = 1;
        }
        span.states[k] = memory.add_bytes(numel).memory.data();
      } else {
        const DType dtype = bytes.state == 4 ? DType::float32 : DType::bfloat16;
        span.states[k] = memory.add(dtype, numel, never_negative).memory.data();
      }
    }
    span.coding = &coding;
    memory.add(span, numel, registry().coded_kernel(variant));
  }
  return memory.step(row, isa);
}

void print_norms(const char* name, cpu::Isa isa) {
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    Memory memory{Random(5), {}, {}, {}};
    std::vector<GradSpan> spans;
    int64_t chunk = 0;
    for (const int64_t numel : {1, 17, 4099, 100003}) {
      auto& stream = memory.add(dtype, numel, false);
      // Numbers whose squares' sum is one: a sign, and exponents near zero.
      for (int64_t i = 0; i < numel; ++i) {
        unsigned char& top = stream.memory[size_t((i + 1) * size_of(dtype) - 1)];
        top = uint8_t((top & 0x80) | 0x3c);
      }
      spans.push_back({stream.memory.data(), numel, chunk, dtype});
      chunk += norm_chunks(numel);
    }
    std::vector<double> sums(static_cast<size_t>(chunk));
    const double total =
        cpu::sum_of_squares(spans.data(), spans.size(), sums.data(), isa, all_at_once);
    uint64_t bits;
    memcpy(&bits, &total, sizeof bits);
    std::printf("%s norm-%d %016" PRIx64 "\n", name, int(dtype), bits);
  }
}

void print_rule(const char* name, cpu::Isa isa, int rule) {
  const auto& info = registry().rules[rule];
  std::vector<double> options(info.options.size(), 0.25);
  for (size_t i = 0; i < options.size(); ++i) options[i] = 0.1 + 0.07 * double(i % 5);
  for (int variant = info.first_variant; variant < info.first_variant + info.variant_count;
       ++variant) {
    for (size_t c = 0; c < registry().combinations.size(); ++c) {
      const bool wide = registry().combinations[c].param == DType::float64;
      const HyperRow row = make_row(rule, options, wide);
      std::printf("%s %s-%d-%d %016" PRIx64 "\n", name, info.name, variant, int(c),
                  digest_of_kernel(variant, int(c), row, isa));
    }
    const HyperRow row = make_row(rule, options, false);
    for (int param = 0; param < ParamFormats::size; ++param)
      for (DType grad : {DType::float32, DType::bfloat16, DType::float16})
        for (int state = 0; state < StateFormats::size; ++state) {
          Coding coding = {};
          coding.key = 11;
          coding.step = 7;
          coding.param = uint8_t(param);
          coding.grad = grad;
          coding.state = uint8_t(state);
          std::printf("%s %s-%d-coded-%d-%d-%d %016" PRIx64 "\n", name, info.name, variant, param,
                      int(grad), state, digest_of_coding(variant, coding, row, isa));
        }
  }
}

}  // namespace

int main() {
  const char* const names[] = {"baseline", "avx2", "avx512"};
  for (cpu::Isa isa : {cpu::Isa::baseline, cpu::Isa::avx2, cpu::Isa::avx512}) {
    if (!cpu::supported(isa)) continue;
    const char* const name = names[int(isa)];
    for (size_t rule = 0; rule < registry().rules.size(); ++rule) print_rule(name, isa, int(rule));
    print_norms(name, isa);
  }
}
