// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Every kernel over heap buffers of exactly the size it may touch, for AddressSanitizer and
// UndefinedBehaviorSanitizer to watch: the CPU loops and the bodies of the CUDA kernels.
#include <sanitizer/asan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "core_api.cpp"

namespace {

// The elements of one stream, at a multiple of 16 bytes plus shift elements. Their end is the end
// of the allocation; in front of them is poison as far as its granularity of 8 bytes goes.
class Buffer {
 public:
  Buffer(int64_t element, int64_t numel, int shift) : front_(element * shift) {
    const size_t size = front_ + element * numel;
    memory_ = static_cast<unsigned char*>(malloc(size));
    // Small positive numbers in every dtype.
    for (size_t i = 0; i < size; ++i) memory_[i] = i % element % 2 == 1 ? 0x3c : i % 128;
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
  std::vector<std::unique_ptr<Coding>> codings;

  void add(Span span, int64_t numel, int kernel, int row) {
    span.numel = numel;
    span.offset = spans.empty() ? 0 : spans.back().offset + spans.back().numel;
    span.kernel = kernel;
    span.row = row;
    spans.push_back(span);
  }

  void add(int variant, int combination, int64_t numel, int shift, bool equally, int row) {
    const auto& types = registry().combinations[combination];
    int stream = 0;
    const auto make = [&](DType dtype) {
      const int own = equally ? shift : (shift + 3 * stream) % 16;
      ++stream;
      buffers.push_back(std::make_unique<Buffer>(size_of(dtype), numel, own));
      return buffers.back()->data();
    };
    Span span = {};
    span.param = make(types.param);
    span.grad = make(types.grad);
    for (size_t k = 0; k < registry().variants[variant].states.size(); ++k)
      span.states[k] = make(types.state);
    add(span, numel, registry().kernel(variant, combination), row);
  }

  // A span with a Coding, in rows of so many elements.
  void add_coded(int variant, const Coding& like, int64_t numel, int64_t elements, int shift,
                 int row) {
    const auto make = [&](int64_t element, int64_t count) {
      buffers.push_back(std::make_unique<Buffer>(element, count, shift));
      return buffers.back()->data();
    };
    auto coding = std::make_unique<Coding>(like);
    coding->row = elements;
    Span span = {};
    const StreamBytes bytes(*coding);
    span.param = make(bytes.param, numel);
    if (bytes.master > 0) coding->master = make(bytes.master, numel);
    span.grad = make(bytes.grad, numel);
    for (size_t k = 0; k < registry().variants[variant].states.size(); ++k) {
      if (coding->state == state_format<CodedState>) {
        const int64_t blocks = Blocks{numel, elements}.count();
        coding->scales[k] = static_cast<float*>(make(4, blocks));
      }
      span.states[k] = make(bytes.state, numel);
    }
    if (shift % 2 == 1) coding->count = static_cast<const float*>(make(4, 1));
    span.coding = coding.get();
    codings.push_back(std::move(coding));
    add(span, numel, registry().coded_kernel(variant), row);
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
    const double factor = 0.5;
    auto in_memory = rows;  // of which there are no more than the spans name
    for (int skip : {0, 1})
      tile_step_from_memory(spans.data(), spans.size(), in_memory.data(), true, &factor, skip, 3,
                            kForward);
    tile_step_from_memory(spans.data(), spans.size(), in_memory.data(), false, &factor, 0, 3,
                          kForward);
  }
};

void run_kernel(int rule, int variant, int combination) {
  const auto& info = registry().rules[rule];
  const bool wide = registry().combinations[combination].param == DType::float64;
  const std::vector<double> options(info.options.size(), 0.25);
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

void run_coded(int rule, int variant) {
  const std::vector<double> options(registry().rules[rule].options.size(), 0.25);
  std::vector<HyperRow> rows(5);
  for (size_t i = 0; i < rows.size(); ++i)
    make_row(rule, options.data(), double(i + 1), i == 0, 1, false, &rows[i]);
  Work all;
  int shift = 0;
  for (int param = 0; param < ParamFormats::size; ++param)
    for (DType grad : {DType::float32, DType::bfloat16, DType::float16})
      for (int state = 0; state < StateFormats::size; ++state)
        for (int64_t numel : {0, 1, 3, 255, 256, 257, 2047, 2048, 2049, 5000}) {
          Coding coding = {};
          coding.key = 1;
          coding.step = 7;
          coding.param = uint8_t(param);
          coding.grad = grad;
          coding.state = uint8_t(state);
          ++shift;
          all.add_coded(variant, coding, numel, numel, shift % 8, shift % 5);
          // Rows of whole blocks, and others; shorter ones than those of parameters, too.
          if (state != state_format<CodedState> || numel % 2 == 0) continue;
          for (int64_t row : {numel % 100 + 1, int64_t(kBlock)})
            all.add_coded(variant, coding, 9 * row, row, shift % 8, shift % 5);
        }
  all.run(rows);
}

struct Gradients {
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::vector<GradSpan> spans;

  void add(DType dtype, int64_t numel, int shift) {
    buffers.push_back(std::make_unique<Buffer>(size_of(dtype), numel, shift));
    spans.push_back({buffers.back()->data(), numel, chunks(), dtype});
  }
  int64_t chunks() const {
    return spans.empty() ? 0 : spans.back().first_chunk + norm_chunks(spans.back().numel);
  }
  // The sum by each instruction set and by the tile, which must agree.
  void run() const {
    const std::unique_ptr<double[]> sums(new double[chunks()]);
    const double total = tile_sum_of_squares(spans.data(), spans.size(), sums.get());
    for (int isa = 0; isa < 3; ++isa) {
      if (!cpu::supported(cpu::Isa(isa)) || loops(isa) == nullptr) continue;
      const int64_t cuts[] = {0, chunks() / 3, chunks() / 2, chunks()};
      if (cpu_sum_of_squares(spans.data(), spans.size(), sums.get(), isa, cuts, 4, kThreaded) !=
          total)
        abort();
    }
  }
};

void run_norm() {
  Gradients all;
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16})
    for (int64_t numel : {1, 3, 127, 128, 129, 255, 257, 1023, 1025, 16383, 16384, 16385, 49169, 0})
      for (int shift : {0, 1, 3, 8}) {
        all.add(dtype, numel, shift);
        if (numel == 0) continue;
        Gradients one;
        one.add(dtype, numel, shift);
        one.run();
      }
  all.run();

  Gradients many;  // more than two launches take
  for (int i = 0; i < 2500; ++i) many.add(DType(i % 4), i % 7, i % 16);
  many.run();
}

// Options, counts and rows in allocations of their own.
void run_prepare(int rule, size_t source_count, size_t range_count) {
  std::vector<std::unique_ptr<double>> wide;
  std::vector<std::unique_ptr<float>> narrow;
  std::vector<std::unique_ptr<float[]>> counts;
  std::vector<RowSource> sources(source_count);
  std::vector<CountRange> ranges(range_count);
  std::vector<HyperRow> rows(source_count);
  for (size_t i = 0; i < range_count; ++i) {
    const uint32_t size = i == 0 ? 1000 : i % 4;
    counts.emplace_back(new float[size]());
    const uint32_t row = uint32_t(i % std::max<size_t>(source_count, 1));
    const bool wide = (source_count - 1 - row) % 5 == 0;
    const uint32_t source = i % 3 == 2 && source_count > 0 ? CountRange::from_row(row, 1, wide) : 0;
    ranges[i] = {counts.back().get(), size, source};
  }
  for (size_t i = 0; i < source_count; ++i) {
    RowSource& source = sources[i];
    for (int option = 0; option < int(registry().rules[rule].options.size()); ++option) {
      const auto kind = OptionKind((i + size_t(option)) % 3);
      if (kind == OptionKind::number) {
        source.set(option, 0.25);
      } else if (kind == OptionKind::float32) {
        narrow.emplace_back(new float(0.25f));
        source.set(option, kind, narrow.back().get());
      } else {
        wide.emplace_back(new double(0.25));
        source.set(option, kind, wide.back().get());
      }
    }
    const size_t range = 4 * i + 1;
    if (i % 2 == 0 && range < range_count) source.count = counts[range].get();
    source.taken = 7;
    source.row = uint32_t(source_count - 1 - i);
    source.first = i % 3 == 0;
    source.float64 = i % 5 == 0;
  }
  for (int skip : {0, 1})
    prepare_rows(rule, sources.data(), sources.size(), ranges.data(), ranges.size(), skip,
                 rows.data());
}

}  // namespace

int main() {
  const auto& r = registry();
  int kernels = 0;
  run_norm();
  for (int rule = 0; rule < int(r.rules.size()); ++rule) {
    for (size_t sources : {0, 1, 371, 1000})
      for (size_t ranges : {0, 1, 2, 3000}) run_prepare(rule, sources, ranges);
    const int end =
        rule + 1 < int(r.rules.size()) ? r.rules[rule + 1].first_variant : int(r.variants.size());
    for (int variant = r.rules[rule].first_variant; variant < end; ++variant) {
      for (int combination = 0; combination < int(r.combinations.size()); ++combination, ++kernels)
        run_kernel(rule, variant, combination);
      run_coded(rule, variant);
      ++kernels;
    }
  }
  printf("%d kernels: %s\n", kernels, describe());
}
