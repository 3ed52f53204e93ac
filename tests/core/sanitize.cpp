// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Every kernel over heap buffers of exactly the size it may touch, for AddressSanitizer and
// UndefinedBehaviorSanitizer to watch: the CPU loops and the body of the CUDA kernel.
#include <sanitizer/asan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "core_api.cpp"

namespace {

size_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// The elements of one stream, at a multiple of 16 bytes plus shift elements. Their end is the end
// of the allocation; in front of them is poison as far as its granularity of 8 bytes goes.
class Buffer {
 public:
  Buffer(DType dtype, int64_t numel, int shift) : front_(size_of(dtype) * shift) {
    const size_t size = front_ + size_of(dtype) * numel;
    memory_ = static_cast<unsigned char*>(malloc(size));
    // Small positive numbers in every dtype.
    for (size_t i = 0; i < size; ++i) memory_[i] = i % size_of(dtype) % 2 == 1 ? 0x3c : i % 128;
    ASAN_POISON_MEMORY_REGION(memory_, front_);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    ASAN_UNPOISON_MEMORY_REGION(memory_, front_);
    free(memory_);
  }
  void* data() const { return memory_ + front_; }

 private:
  size_t front_;
  unsigned char* memory_;
};

struct Work {
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::vector<Span> spans;

  void add(int variant, int combination, int64_t numel, int shift, bool equally, int row) {
    const auto& types = registry().combinations[combination];
    int stream = 0;
    const auto make = [&](DType dtype) {
      const int own = equally ? shift : (shift + 3 * stream) % 16;
      ++stream;
      buffers.push_back(std::make_unique<Buffer>(dtype, numel, own));
      return buffers.back()->data();
    };
    Span span = {};
    span.param = make(types.param);
    span.grad = make(types.grad);
    for (int k = 0; k < registry().variants[variant].states; ++k)
      span.states[k] = make(types.state);
    span.numel = numel;
    span.offset = spans.empty() ? 0 : spans.back().offset + spans.back().numel;
    span.kernel = registry().kernel(variant, combination);
    span.row = row;
    spans.push_back(span);
  }

  void run(const std::vector<HyperRow>& rows) const {
    for (int isa = 0; isa < 3; ++isa) {
      if (!cpu::supported(cpu::Isa(isa)) || loops(isa) == nullptr) continue;
      const int64_t total = spans.back().offset + spans.back().numel;
      const int64_t cuts[] = {0, total / 3, total / 2 + 1, total};
      cpu_step(spans.data(), spans.size(), rows.data(), isa, cuts, 4, kThreaded);
    }
    for (uint32_t blocks : {0, 3})
      tile_step(spans.data(), spans.size(), rows.data(), blocks, kForward);
  }
};

void run_kernel(int rule, int variant, int combination) {
  const auto& info = registry().rules[rule];
  const bool wide = registry().combinations[combination].param == DType::float64;
  const std::vector<double> options(info.option_count, 0.25);
  std::vector<HyperRow> rows(5);
  for (size_t i = 0; i < rows.size(); ++i)
    make_row(rule, options.data(), double(i + 1), i == 0, 1, wide, &rows[i]);

  const int chunk = host_kernels()[registry().kernel(variant, combination)].chunk;
  Work sizes;
  for (int64_t numel : {0, 1, 3, 15, 17, 1000, chunk - 1, chunk, chunk + 1, 2 * chunk + 3})
    for (int shift : {0, 1, 4, 8})
      for (bool equally : {true, false}) sizes.add(variant, combination, numel, shift, equally, 0);
  sizes.run(rows);

  Work many;  // more than one launch takes
  for (int i = 0; i < 900; ++i) many.add(variant, combination, i % 7, i % 16, i % 2, i % 5);
  many.run(rows);

  if (combination < 4) {
    Work large;
    large.add(variant, combination, 100003, 1, true, 0);
    large.run(rows);
  }
}

}  // namespace

int main() {
  const auto& r = registry();
  int kernels = 0;
  for (int rule = 0; rule < int(r.rules.size()); ++rule) {
    const int end =
        rule + 1 < int(r.rules.size()) ? r.rules[rule + 1].first_variant : int(r.variants.size());
    for (int variant = r.rules[rule].first_variant; variant < end; ++variant)
      for (int combination = 0; combination < int(r.combinations.size()); ++combination, ++kernels)
        run_kernel(rule, variant, combination);
  }
  printf("%d kernels: %s\n", kernels, describe());
}
