// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The core without torch, as a C API for ctypes: what is registered, rows of hyper-parameters, the
// CPU loops cut into any pieces, and the body of the CUDA kernel run on the host in any order.
#include <algorithm>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/cpu.h"
#include "host_launcher.h"
#include "measured_spans.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

using namespace fusedopt;

// The order in which the pieces of a CPU step run in threads of their own; see host_launcher.h.
constexpr int kThreaded = -1;

const cpu::Loops* loops(int isa) {
  const cpu::Loops* (*const tables[])() = {cpu::baseline_loops, cpu::avx2_loops, cpu::avx512_loops};
  return tables[isa]();
}

using std::to_string;

std::string quote(const char* text) { return '"' + std::string(text) + '"'; }

std::string list(const std::vector<std::string>& items) {
  std::string text;
  for (const auto& item : items) text += (text.empty() ? "[" : ", ") + item;
  return items.empty() ? "[]" : text + "]";
}

template <class Items, class Write>
std::string list(const Items& items, Write write) {
  std::vector<std::string> texts;
  for (const auto& item : items) texts.push_back(write(item));
  return list(texts);
}

// All that there is, as JSON.
std::string describe_core() {
  const auto& r = registry();
  const std::string rules = list(r.rules, [](const RuleInfo& rule) {
    std::vector<std::string> keys;
    for (const OptionInfo& option : rule.options)
      keys.push_back(list({quote(option.key), to_string(option.element)}));
    return list({quote(rule.name), to_string(rule.first_variant), list(keys)});
  });
  const std::string variants = list(r.variants, [](const VariantInfo& variant) {
    std::vector<std::string> states;
    for (const State& state : variant.states)
      states.push_back(list({quote(state.key), to_string(int(is_never_negative(state.kind)))}));
    return list(states);
  });
  const std::string combinations = list(r.combinations, [](const CombinationInfo& c) {
    const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
    return list(
        {quote(names[int(c.param)]), quote(names[int(c.grad)]), quote(names[int(c.state)])});
  });
  std::vector<std::string> isas;
  const char* const names[] = {"baseline", "avx2", "avx512"};
  for (int isa = 0; isa < 3; ++isa)
    if (cpu::supported(cpu::Isa(isa)) && loops(isa) != nullptr)
      isas.push_back(list({quote(names[isa]), to_string(isa)}));
  // What library.py lays structs out by, and the sizes that it has to come to.
  const std::string layout =
      list({to_string(kMaxStates), to_string(kMaxOptions), to_string(sizeof(HyperRow)),
            to_string(sizeof(Span)), to_string(sizeof(Coding)), to_string(sizeof(GradSpan)),
            to_string(sizeof(RowSource)), to_string(sizeof(CountRange))});
  const auto chunk = [](const HostKernel& kernel) { return to_string(kernel.chunk); };
  return "{\"rules\": " + rules + ", \"variants\": " + variants +
         ", \"combinations\": " + combinations + ", \"chunks\": " + list(host_kernels(), chunk) +
         ", \"norm_chunk\": " + to_string(kNormChunk) + ", \"sums\": " + to_string(kMaxSums) +
         ", \"prepare_bytes\": " + to_string(PrepareArgs::kBytes) + ", \"isas\": " + list(isas) +
         ", \"layout\": " + layout + "}";
}

// How the next CPU step is cut: into pieces [cuts[i], cuts[i + 1]), or one piece for all.
struct {
  std::vector<int64_t> cuts;
  int order;
  int pieces = 0;  // not 0: so many of the same size, whatever is cut
} division;

void divided_for(int64_t size, int64_t, void* context, void (*body)(void*, int64_t, int64_t)) {
  if (division.pieces > 0) {
    division.cuts.clear();
    for (int i = 0; i <= division.pieces; ++i) division.cuts.push_back(size * i / division.pieces);
  }
  if (division.cuts.empty()) division.cuts = {0, size};
  const auto run = [=](size_t i) { body(context, division.cuts[i], division.cuts[i + 1]); };
  std::vector<size_t> pieces;
  for (size_t i = 0; i + 1 < division.cuts.size(); ++i) pieces.push_back(i);
  if (division.order == kThreaded) {
    std::vector<std::thread> threads;
    for (size_t i : pieces) threads.emplace_back(run, i);
    for (auto& thread : threads) thread.join();
  } else {
    arrange(pieces, division.order);
    for (size_t i : pieces) run(i);
  }
}

}  // namespace

API const char* describe() {
  static const std::string text = describe_core();
  return text.c_str();
}

API int measures(int rule, const double* options) {
  return registry().rules[rule].measures(options);
}

API int choose_variant(int rule, const double* options) {
  return registry().rules[rule].variant(options);
}

API void make_row(int rule, const double* options, double step, int first, double grad_factor,
                  int float64, HyperRow* out) {
  registry().rules[rule].row(options, step, first, float64, *out);
  registry().rules[rule].scale_gradient(grad_factor, float64, *out);
}

API void cpu_step(const Span* spans, size_t count, const HyperRow* rows, int isa,
                  const int64_t* cuts, size_t cut_count, int order) {
  division.cuts.assign(cuts, cuts + cut_count);
  division.order = order;
  cpu::step(spans, count, rows, nullptr, cpu::Isa(isa), divided_for);
}

// A step whose parameters are measured first, which are the spans that name one: by an instruction
// set in so many pieces, measured and updated one after the other or together, or by the tile.
API void measured_step(const Span* spans, size_t count, const HyperRow* rows, int isa, int together,
                       int pieces, int order, Measured* measured) {
  std::vector<Span> numbered(spans, spans + count);
  const std::vector<MeasuredChunks> chunks = number_chunks(numbered);
  std::vector<double> sums(size_t(count_of(chunks)) * kMaxSums, std::nan(""));
  if (isa < 0) {
    DeviceStep step;
    step.spans = numbered.data();
    step.span_count = count;
    step.rows = rows;
    step.measured_chunks = chunks.data();
    step.measured_count = chunks.size();
    step.chunk_sums = sums.data();
    step.measured = measured;
    HostLauncher launcher(0, order);
    launch_measure<int>(step, launcher);
    launch_update<int>(step, launcher);
    return;
  }
  division.pieces = pieces;
  division.order = order;
  if (together) {
    cpu::measure_and_step(numbered.data(), count, rows, cpu::Isa(isa), divided_for);
  } else {
    cpu::measure(numbered.data(), count, rows, chunks.data(), chunks.size(), sums.data(), measured,
                 cpu::Isa(isa), divided_for);
    cpu::step(numbered.data(), count, rows, measured, cpu::Isa(isa), divided_for);
  }
  division.pieces = 0;
}

// What cuda::step does, on the host; returns the number of launches. With no number of blocks
// given, it is one for each chunk.
API int tile_step(const Span* spans, size_t count, const HyperRow* rows, uint32_t blocks,
                  int order) {
  DeviceStep step;
  step.spans = spans;
  step.span_count = count;
  step.rows = rows;
  HostLauncher launcher(blocks, order);
  launch_update<int>(step, launcher);
  return launcher.launches();
}

// The same with rows in the memory of the device, a factor of the gradients there, or both. Without
// a factor, nothing can be skipped.
API int tile_step_from_memory(const Span* spans, size_t count, HyperRow* rows, int rows_in_memory,
                              const double* grad_factor, int skip, uint32_t blocks, int order) {
  const float found_inf = float(skip);
  Control control = {};
  DeviceStep step;
  step.spans = spans;
  step.span_count = count;
  if (rows_in_memory) {
    step.device_rows = rows;
  } else {
    step.rows = rows;
  }
  if (grad_factor != nullptr) {
    step.factor.factor = *grad_factor;
    step.factor.found_inf = &found_inf;
    step.control = &control;
  }
  HostLauncher launcher(blocks, order);
  launch_update<int>(step, launcher);
  return launcher.launches();
}

// Works out rows from their sources and advances counts, as a device does before a step.
API void prepare_rows(int rule, const RowSource* sources, size_t source_count,
                      const CountRange* counts, size_t count_ranges, int skip, HyperRow* rows) {
  const float found_inf = float(skip);
  DeviceStep step;
  const std::vector<int> rules(source_count, rule);
  step.sources = sources;
  step.source_rules = rules.data();
  step.source_count = source_count;
  step.counts = counts;
  step.count_ranges = count_ranges;
  step.factor.found_inf = &found_inf;
  step.device_rows = rows;
  HostLauncher launcher;
  launch_update<int>(step, launcher);
}

API double cpu_sum_of_squares(const GradSpan* gradients, size_t count, double* sums, int isa,
                              const int64_t* cuts, size_t cut_count, int order) {
  division.cuts.assign(cuts, cuts + cut_count);
  division.order = order;
  return cpu::sum_of_squares(gradients, count, sums, cpu::Isa(isa), divided_for);
}

API double tile_sum_of_squares(const GradSpan* gradients, size_t count, double* sums) {
  Control control = {};
  DeviceStep step;
  step.gradients = gradients;
  step.gradient_count = count;
  step.factor.clips = true;
  step.control = &control;
  step.sums = sums;
  HostLauncher launcher;
  launch_norm<int>(step, launcher);
  return control.sum_of_squares;
}

// Runs only these chunks of the first launch; returns how many chunks that launch has.
API uint32_t tile_chunks(const Span* spans, size_t count, const HyperRow* rows,
                         const uint32_t* chunks, size_t chunk_count) {
  const HostKernel& kernel = host_kernels()[spans[0].kernel];
  LaunchArgs args;
  kernel.pack(spans, count, 0, spans[0].kernel, rows, args);
  for (size_t i = 0; i < chunk_count; ++i)
    for (uint32_t thread = 0; thread < uint32_t(kThreads); ++thread)
      kernel.run(args, chunks[i], args.chunks, thread);
  return args.chunks;
}

// -- codes and random bits by themselves ---------------------------------------------------------

API void split_floats(const uint32_t* bits, size_t count, int to_24, uint16_t* high,
                      int16_t* remainder) {
  for (size_t i = 0; i < count; ++i) {
    const Split parts = split(to_24 ? round_to_24(bits[i]) : bits[i]);
    high[i] = parts.high;
    remainder[i] = parts.remainder;
  }
}
API void join_floats(const uint16_t* high, const int16_t* remainder, size_t count, uint32_t* bits) {
  for (size_t i = 0; i < count; ++i) bits[i] = join(high[i], remainder[i]);
}
API void cut_floats(const float* values, const uint32_t* addends, size_t count, uint16_t* to) {
  for (size_t i = 0; i < count; ++i) to[i] = cut_to_bfloat16(values[i], addends[i]).bits;
}

API uint64_t make_random_key(uint64_t seed, uint64_t ordinal) { return random_key(seed, ordinal); }
// The bits of all elements of so many steps' same block.
API void random_bits(uint64_t key, uint32_t step, int64_t block, size_t steps, uint32_t* to) {
  for (size_t i = 0; i < steps; ++i) {
    const RandomBlock random(key, step + uint32_t(i), block);
    for (int place = 0; place < kBlock; ++place) *to++ = random.of_place(place);
  }
}
API void dithers(int64_t block, uint32_t step, size_t steps, uint32_t* to) {
  for (size_t i = 0; i < steps; ++i) {
    const uint32_t of_block = dither_of_block(block, step + uint32_t(i));
    for (uint32_t place = 0; place < uint32_t(kBlock); ++place) *to++ = dither(of_block, place);
  }
}

API void encode_blocks(const float* values, int64_t count, int never_negative, uint8_t* codes,
                       float* scales) {
  const auto encode = never_negative ? to_codes<true> : to_codes<false>;
  for (int64_t i = 0; i < count; i += kBlock)
    encode(values + i, std::min<int64_t>(kBlock, count - i), codes + i, scales + i / kBlock);
}
API void decode_blocks(const uint8_t* codes, const float* scales, int64_t count, int never_negative,
                       float* values) {
  const auto decode = never_negative ? from_codes<true> : from_codes<false>;
  for (int64_t i = 0; i < count; i += kBlock)
    decode(codes + i, scales[i / kBlock], std::min<int64_t>(kBlock, count - i), values + i);
}
// With dithers of their own, from the scales of their blocks.
API void encode_squares(const float* values, const float* scales, const uint32_t* dithers,
                        int64_t count, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    const float scale = scales[i / kBlock];
    codes[i / kBlock * kBlock + byte_of(int(i % kBlock), kBlock)] = uint8_t(SquareCode::encode(
        values[i], scale == 0 ? 0 : 1 / absolute(scale), dithers[i], is_careful(scale)));
  }
}
