// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Which instruction set the CPU uses, and how their work is shared by threads.
#pragma once

#include <string>

#include "../cpu/cpu.h"
#include "torch.h"

namespace fusedopt {

inline cpu::Isa active_isa = cpu::best_isa();  // one for steps and losses

namespace {

// What every processor of the architecture has.
#if defined(__aarch64__)
constexpr const char* kBaselineName = "neon";
#else
constexpr const char* kBaselineName = "baseline";
#endif

inline const char* isa_name(cpu::Isa isa) {
  return isa == cpu::Isa::avx512 ? "avx512" : isa == cpu::Isa::avx2 ? "avx2" : kBaselineName;
}

inline std::string get_isa() { return isa_name(active_isa); }

inline void set_isa(const std::string& name) {
  for (auto isa : {cpu::Isa::baseline, cpu::Isa::avx2, cpu::Isa::avx512}) {
    if (name != isa_name(isa)) continue;
    if (!cpu::supported(isa))
      throw py::value_error("fusedopt: this processor does not support FUSEDOPT_ISA=" + name +
                            "; the best it supports is " + isa_name(cpu::best_isa()));
    active_isa = isa;
    return;
  }
  throw py::value_error("fusedopt: FUSEDOPT_ISA=" + name + " is unknown; it can be " +
                        kBaselineName + ", avx2 or avx512");
}

// With fewer elements than this a step is not worth a second thread. With more, threads share what
// has to be done for each parameter, too, and take at least so many of them.
constexpr int64_t kManyElements = 65536;
constexpr int64_t kShareGrain = 256;

inline void run_in_parallel(int64_t size, int64_t grain, void* context,
                            void (*body)(void*, int64_t, int64_t)) {
  at::parallel_for(0, size, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace
}  // namespace fusedopt
