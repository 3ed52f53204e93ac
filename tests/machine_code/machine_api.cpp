// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What an emulator of the machine code needs of the headers, as a C API for ctypes: the arguments
// of the launches that a step is made of, which kernel is which, and arithmetic that numpy lacks.
#include <cxxabi.h>

#include <cfenv>
#include <cmath>
#include <cstring>
#include <string>
#include <typeinfo>
#include <vector>

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

// Keeps the arguments instead of launching anything.
struct Recorder {
  struct Launch {
    int kernel;
    LaunchArgs args;
  };

  int norm(const NormArgs&) { return 1; }
  int prepare(int, const PrepareArgs&) { return 1; }
  int find_unready_prepare(int) { return 0; }
  int find_unready(int) { return 0; }
  PackSpans pack(int kernel) { return kernels()[kernel].pack; }
  int step(int kernel, const LaunchArgs& args) {
    launches.push_back({kernel, args});
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

template <class Real>
void multiply_add(const Real* a, const Real* b, const Real* c, size_t count, int mode, Real* to) {
  const Rounding rounding(mode);
  for (size_t i = 0; i < count; ++i) to[i] = std::fma(a[i], b[i], c[i]);
}

}  // namespace

API size_t argument_bytes() { return sizeof(LaunchArgs); }
API size_t kernel_count() { return kernels().size(); }
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
API const char* demangle(const char* symbol) {
  static std::string text;
  text = demangled(symbol);
  return text.c_str();
}

API size_t control_bytes() { return sizeof(Control); }
API void make_control(double factor, int skip, Control* control) {
  const float found_inf = float(skip);
  FactorSource source;
  source.factor = factor;
  source.found_inf = &found_inf;
  set_control(source, 0, *control);
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
API int launched_kernel(size_t launch) { return recorder.launches[launch].kernel; }
API uint32_t launched_chunks(size_t launch) { return recorder.launches[launch].args.chunks; }
// Which formats of states its spans have: a bit for each kernel that is launched.
API uint32_t launched_formats(size_t launch) { return recorder.launches[launch].args.formats; }
API const void* launched_arguments(size_t launch) { return &recorder.launches[launch].args; }

API void fma32(const float* a, const float* b, const float* c, size_t count, int mode, float* to) {
  multiply_add(a, b, c, count, mode, to);
}
API void fma64(const double* a, const double* b, const double* c, size_t count, int mode,
               double* to) {
  multiply_add(a, b, c, count, mode, to);
}
