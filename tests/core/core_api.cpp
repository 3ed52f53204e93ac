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

#include "core/tile.h"
#include "cpu/cpu.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

using namespace fusedopt;

static_assert(sizeof(Span) == 64 && sizeof(HyperRow) == 128, "core.py lays them out as well");

// In which order the pieces of a step run, or the (block, thread) pairs of a launch. Any number
// above these is the seed of a shuffle.
constexpr int kForward = 0, kBackward = 1, kThreaded = -1;

template <class T>
void arrange(std::vector<T>& items, int order) {
  if (order == kBackward) std::reverse(items.begin(), items.end());
  if (order <= kBackward) return;
  uint64_t random = order;
  for (size_t left = items.size(); left > 1; --left) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    std::swap(items[left - 1], items[(random >> 33) % left]);
  }
}

const cpu::SpanLoop* loops(int isa) {
  const cpu::SpanLoop* (*const tables[])() = {cpu::baseline_loops, cpu::avx2_loops,
                                              cpu::avx512_loops};
  return tables[isa]();
}

// One kernel of the CUDA build, on the host.
struct HostKernel {
  size_t (*pack)(const Span*, size_t, size_t, int, const HyperRow*, LaunchArgs&);
  void (*run)(const LaunchArgs&, uint32_t block, uint32_t blocks, uint32_t thread);
  int chunk;
};

template <class Variant, class Types>
struct MakeHostKernel {
  using Body = Tile<Variant, Types>;
  static void run(const LaunchArgs& args, uint32_t block, uint32_t blocks, uint32_t thread) {
    Body::run(args, block, blocks, thread);
  }
  static constexpr HostKernel value = {Body::pack, run, Body::kChunk};
};

const std::vector<HostKernel>& host_kernels() {
  static const auto table = kernel_table<MakeHostKernel, HostKernel>();
  return table;
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
    for (int i = 0; i < rule.option_count; ++i)
      keys.push_back(list({quote(rule.options[i].key), to_string(rule.options[i].element)}));
    return list({quote(rule.name), to_string(rule.first_variant), list(keys)});
  });
  const std::string variants = list(r.variants, [](const VariantInfo& variant) {
    std::vector<std::string> names;
    for (int k = 0; k < variant.states; ++k) names.push_back(quote(variant.state_names[k]));
    return list(names);
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
  const auto chunk = [](const HostKernel& kernel) { return to_string(kernel.chunk); };
  return "{\"rules\": " + rules + ", \"variants\": " + variants +
         ", \"combinations\": " + combinations + ", \"chunks\": " + list(host_kernels(), chunk) +
         ", \"isas\": " + list(isas) + "}";
}

// How the next CPU step is cut: into pieces [cuts[i], cuts[i + 1]), or one piece for all.
struct {
  std::vector<int64_t> cuts;
  int order;
} division;

void divided_for(int64_t size, int64_t, void* context, void (*body)(void*, int64_t, int64_t)) {
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

void launch(const HostKernel& kernel, const LaunchArgs& args, uint32_t blocks, int order) {
  std::vector<std::pair<uint32_t, uint32_t>> places;
  places.reserve(size_t(blocks) * kThreads);
  for (uint32_t block = 0; block < blocks; ++block)
    for (uint32_t thread = 0; thread < uint32_t(kThreads); ++thread)
      places.emplace_back(block, thread);
  arrange(places, order);
  for (const auto& place : places) kernel.run(args, place.first, blocks, place.second);
}

}  // namespace

API const char* describe() {
  static const std::string text = describe_core();
  return text.c_str();
}

API int choose_variant(int rule, const double* options) {
  return registry().rules[rule].variant(options);
}

API void make_row(int rule, const double* options, double step, int first, double grad_factor,
                  int float64, HyperRow* out) {
  registry().rules[rule].row(options, step, first, grad_factor, float64, *out);
}

API void cpu_step(const Span* spans, size_t count, const HyperRow* rows, int isa,
                  const int64_t* cuts, size_t cut_count, int order) {
  division.cuts.assign(cuts, cuts + cut_count);
  division.order = order;
  cpu::step(spans, count, rows, cpu::Isa(isa), divided_for);
}

// What cuda::step does, on the host; returns the number of launches. With no number of blocks
// given, it is one for each chunk.
API int tile_step(const Span* spans, size_t count, const HyperRow* rows, uint32_t blocks,
                  int order) {
  int launches = 0;
  for (int k = 0; k < int(host_kernels().size()); ++k) {
    const HostKernel& kernel = host_kernels()[k];
    for (size_t next = 0; next < count;) {
      LaunchArgs args;
      next = kernel.pack(spans, count, next, k, rows, args);
      if (args.spans == 0) break;
      launch(kernel, args, blocks == 0 ? args.chunks : blocks, order);
      ++launches;
    }
  }
  return launches;
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
