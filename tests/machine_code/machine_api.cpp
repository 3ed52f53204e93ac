// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What an emulator of the machine code needs of the headers, as a C API for ctypes: the arguments
// of the launches that a step or a loss is made of, which kernel is which, and arithmetic that
// numpy lacks.
#include <cxxabi.h>

#include <cfenv>
#include <cmath>
#include <cstring>
#include <string>
#include <typeinfo>
#include <vector>

#include "../core/loss_call.h"
#include "../core/measured_spans.h"
#include "device/losses/launches.h"
#include "device/step.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

using namespace fusedopt;

std::string demangled(const char* name) {
  int status = 0;
  char* const text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string found = text == nullptr ? name : text;
  std::free(text);
  return found;
}

struct Packed {
  PackSpans pack;
  const char* (*name)();
};

template <class Variant, class Types>
struct MakePacked {
  static const char* name() {
    static const std::string text =
        demangled(typeid(Variant).name()) + ", " + demangled(typeid(Types).name());
    return text.c_str();
  }
  static constexpr Packed value = {Tile<Variant, Types>::pack, name};
};

const std::vector<Packed>& kernels() {
  static const auto table = kernel_table<MakePacked, Packed>();
  return table;
}

// Those that measure; null for rules that do not.
template <class Variant, class Types>
struct MakePackedChunks {
  static constexpr PackSpans make() {
    if constexpr (sums_of<typename Variant::Rule> > 0) {
      return MeasureTile<Variant, Types>::pack;
    } else {
      return nullptr;
    }
  }
  static constexpr PackSpans value = make();
};

// The numbers of kernels that are not a step's. What measures is behind all steps.
constexpr int kNorm = -1, kPrepare = -2, kTotal = -10, kMeasure = 1 << 20;
constexpr int kCrossEntropy = -3, kMse = -4, kScale = -5, kTargets = -6, kLoss = -7;
constexpr int kShortRows = -8, kRows = -9;
constexpr int kDTypes = 4;

// Keeps the arguments instead of launching anything.
struct Recorder {
  struct Launch {
    int kernel;
    uint32_t blocks;
    uint32_t first;  // block that runs: those before it have nothing to do
    uint32_t members;
    std::vector<unsigned char> argument;
  };

  int norm(const NormArgs& args) {
    return keep(kNorm, uint32_t(std::max<int64_t>(norm_blocks(args), 1)), 1, args);
  }
  int prepare(int rule, const PrepareArgs& args) { return keep(kPrepare, 1, 1u << rule, args); }
  int find_unready_prepare(int) { return 0; }
  int find_unready(int) { return 0; }
  int find_unready_measure(int) { return 0; }
  PackSpans pack(int kernel) { return kernels()[kernel].pack; }
  int step(int kernel, const LaunchArgs& args) {
    return keep(kernel, args.chunks, args.formats, args);
  }
  PackSpans pack_chunks(int kernel) {
    static const auto table = kernel_table<MakePackedChunks, PackSpans>();
    return table[kernel];
  }
  int measure(int kernel, const LaunchArgs& args) {
    return keep(kMeasure + kernel, (args.chunks + kWarps - 1) / kWarps, 1, args);
  }
  int total(const TotalArgs& args) { return keep(kTotal, args.count, 1, args); }
  // A kernel for each dtype.
  template <class Args>
  void loss(int kernel, int64_t blocks, DType dtype, const Args& args, int64_t first = 0) {
    keep(kernel, uint32_t(std::max<int64_t>(blocks, 1)), 1u << int(dtype), args, uint32_t(first));
  }

  // Likewise, and where accesses are of 16 bytes, another one.
  void cross_entropy(const CrossEntropyArgs& args, int64_t blocks, DType dtype, int64_t first) {
    const int kernel = args.form == Form::short_rows ? kShortRows
                       : args.form == Form::rows     ? kRows
                                                     : kCrossEntropy;
    const int member = int(dtype) + (args.wide && kernel != kShortRows ? kDTypes : 0);
    keep(kernel, uint32_t(std::max<int64_t>(blocks, 1)), 1u << member, args, uint32_t(first));
  }

  template <class Args>
  int keep(int kernel, uint32_t blocks, uint32_t members, const Args& args, uint32_t first = 0) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(&args);
    launches.push_back({kernel, blocks, first, members, {bytes, bytes + sizeof args}});
    return 0;
  }

  std::vector<Launch> launches;
};

Recorder recorder;

struct Rounding {
  explicit Rounding(int mode) : before(fegetround()) {
    constexpr int kModes[] = {FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO};
    fesetround(kModes[mode]);
  }
  ~Rounding() { fesetround(before); }
  int before;
};

// Addresses wrap.
template <class T>
void move_back(T*& address, uint64_t bytes) {
  if (address != nullptr)
    address = reinterpret_cast<T*>(reinterpret_cast<uint64_t>(address) - bytes);
}

// Has the rows come after so many others, which nobody touches; these fill all of the inner
// dimensions that they have a part in. Returns where the RowFactors of the first one are then.
uint64_t put_behind(CrossEntropyArgs& args, uint64_t before, bool float64) {
  CrossEntropyWork& work = args.work;
  const uint64_t chunks = uint64_t(loss_chunks(work.loss.classes));
  for (Rows* rows : {&work.logits, &work.gradient, &work.probabilities})
    move_back(rows->first, before / uint64_t(rows->inner) * uint64_t(rows->outer_bytes));
  move_back(work.targets, before * sizeof *work.targets);
  move_back(work.losses, before * sizeof *work.losses);
  move_back(work.lse, before * (float64 ? sizeof(double) : sizeof(float)));
  const uint64_t of_chunk = float64 ? sizeof(ChunkTerms<double>) : sizeof(ChunkTerms<float>);
  move_back(args.terms, before * chunks * of_chunk);
  work.rows += int64_t(before);
  return uint64_t(factors_of(args, int64_t(before), int64_t(chunks)));
}

template <class Real>
void multiply_add(const Real* a, const Real* b, const Real* c, size_t count, int mode, Real* to) {
  const Rounding rounding(mode);
  for (size_t i = 0; i < count; ++i) to[i] = std::fma(a[i], b[i], c[i]);
}

}  // namespace

API size_t kernel_count() { return kernels().size(); }
API int measures(int kernel) { return Recorder().pack_chunks(kernel) != nullptr; }
// Its types, as the name of its symbol has them.
API const char* kernel_name(int kernel) { return kernels()[kernel].name(); }
// The formats that states of spans with a Coding may be in, likewise, one to a line.
API const char* state_formats() {
  static const std::string text = [] {
    std::string names;
    for_each_type(StateFormats{},
                  [&](auto format) { names += demangled(typeid(format).name()) + "\n"; });
    return names;
  }();
  return text.c_str();
}
// The types of rules, each of which has a kernel that makes its rows, likewise.
API const char* rules() {
  static const std::string text = [] {
    std::string names;
    for_each_type(Rules{}, [&](auto rule) { names += demangled(typeid(rule).name()) + "\n"; });
    return names;
  }();
  return text.c_str();
}
API const char* demangle(const char* symbol) {
  static std::string text;
  text = demangled(symbol);
  return text.c_str();
}

API size_t control_bytes() { return sizeof(Control); }
API size_t factor_bytes() { return sizeof(FactorSource); }
API void make_factor(double factor, const float* grad_scale, const float* found_inf,
                     double max_grad_norm, FactorSource* to) {
  *to = FactorSource();
  to->factor = factor;
  to->grad_scale = grad_scale;
  to->found_inf = found_inf;
  to->clips = max_grad_norm > 0;
  to->max_grad_norm = max_grad_norm;
}
API void make_control(const FactorSource* factor, double sum_of_squares, Control* control) {
  set_control(*factor, sum_of_squares, *control);
}

// Records the launches of a step, with the rows in the arguments or, where asked for, in memory;
// returns how many there are.
API size_t record(const Span* spans, size_t count, HyperRow* rows, int rows_in_memory,
                  Control* control) {
  DeviceStep step;
  step.spans = spans;
  step.span_count = count;
  step.control = control;
  if (rows_in_memory) {
    step.device_rows = rows;
  } else {
    step.rows = rows;
  }
  recorder.launches.clear();
  launch_spans<int>(step, recorder);
  return recorder.launches.size();
}
// Likewise of a step that measures the parameters which spans name, one for each that does.
API size_t record_measured(const Span* spans, size_t count, HyperRow* rows, double* sums,
                           Measured* measured) {
  std::vector<Span> numbered(spans, spans + count);
  const std::vector<MeasuredChunks> chunks = number_chunks(numbered);
  DeviceStep step;
  step.spans = numbered.data();
  step.span_count = count;
  step.rows = rows;
  step.measured_chunks = chunks.data();
  step.measured_count = chunks.size();
  step.chunk_sums = sums;
  step.measured = measured;
  recorder.launches.clear();
  launch_chunks<int>(step, recorder);
  launch_spans<int>(step, recorder);
  return recorder.launches.size();
}
API int launched_kernel(size_t launch) { return recorder.launches[launch].kernel; }
API uint32_t launched_blocks(size_t launch) { return recorder.launches[launch].blocks; }
API uint32_t launched_first(size_t launch) { return recorder.launches[launch].first; }
// Which formats of states its spans have, or which rule: a bit for each kernel that is launched.
API uint32_t launched_members(size_t launch) { return recorder.launches[launch].members; }
API const void* launched_argument(size_t launch) {
  return recorder.launches[launch].argument.data();
}
API size_t launched_bytes(size_t launch) { return recorder.launches[launch].argument.size(); }

// Records the launches of a norm.
API size_t record_norm(const GradSpan* gradients, size_t count, double* sums,
                       const FactorSource* factor, Control* control) {
  DeviceStep step;
  step.gradients = gradients;
  step.gradient_count = count;
  step.sums = sums;
  step.factor = *factor;
  step.control = control;
  recorder.launches.clear();
  launch_norm<int>(step, recorder);
  return recorder.launches.size();
}
// Records the launches that make rows from their sources and advance counts.
API size_t record_prepare(int rule, const RowSource* sources, size_t source_count,
                          const CountRange* counts, size_t count_ranges, const FactorSource* factor,
                          Control* control, HyperRow* rows) {
  DeviceStep step;
  const std::vector<int> source_rules(source_count, rule);
  step.sources = sources;
  step.source_rules = source_rules.data();
  step.source_count = source_count;
  step.counts = counts;
  step.count_ranges = count_ranges;
  step.factor = *factor;
  step.control = control;
  step.device_rows = rows;
  recorder.launches.clear();
  launch_prepare<int>(step, recorder);
  return recorder.launches.size();
}

// Records the launches of a loss. What is there for a mean, and for cross-entropy besides, is the
// caller's. As if the rows were so many at least, which decides on how they are shared out, and
// came after so many others: see put_behind().
API size_t record_cross_entropy(const CrossEntropyCall* call, Divisors* divisors, void* terms,
                                int64_t least_rows, int64_t before, uint64_t* row_factors) {
  recorder.launches.clear();
  CrossEntropyWork work = call->work();
  if (call->is_mean) work.divisors = divisors;
  if (work.targets != nullptr) recorder.keep(kTargets, 1, 1, target_args(*call, divisors));
  work.rows = std::max(work.rows, least_rows);
  launch_cross_entropy(
      work, size_of(call->type()), terms, [&](CrossEntropyArgs args) -> const char* {
        args.work.rows = call->row_count;
        const int64_t blocks = blocks_of(args);
        CrossEntropyArgs all = args;
        all.work.rows = before;
        *row_factors = put_behind(args, uint64_t(before), call->type() == DType::float64);
        recorder.cross_entropy(args, blocks, call->type(), blocks_of(all));
        return nullptr;
      });
  recorder.keep(kLoss, 1, 1, call->total(divisors));
  return recorder.launches.size();
}
// Of so many rows a block takes each.
API size_t rows_that_fill() { return size_t(kRowsThatFill); }
API size_t bytes_of_cross_entropy(const CrossEntropyCall* call) {
  return size_t(bytes_of_terms(call->work()));
}
API size_t record_mse(const MseCall* call, const Divisors* divisors) {
  recorder.launches.clear();
  const int64_t warps = norm_chunks(call->numel);
  recorder.loss(kMse, (warps * kWarp + kThreads - 1) / kThreads, call->type(), call->work());
  recorder.keep(kLoss, 1, 1, call->total(divisors));
  return recorder.launches.size();
}
API size_t record_scale(void* values, int64_t count, int dtype, const void* factor,
                        int factor_dtype) {
  recorder.launches.clear();
  const ScaleArgs args{values, count, factor, DType(factor_dtype)};
  const int64_t of_block = kThreads * 16 / size_of(DType(dtype));
  recorder.loss(kScale, (count + of_block - 1) / of_block, DType(dtype), args);
  return recorder.launches.size();
}

API void fma32(const float* a, const float* b, const float* c, size_t count, int mode, float* to) {
  multiply_add(a, b, c, count, mode, to);
}
API void fma64(const double* a, const double* b, const double* c, size_t count, int mode,
               double* to) {
  multiply_add(a, b, c, count, mode, to);
}
