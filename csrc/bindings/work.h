// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What a step has to do on one device.
#pragma once

#include <vector>

#include "../device/step.h"
#include "torch.h"

namespace fusedopt {
namespace {

// What a step has to do on one device.
struct DeviceWork {
  c10::Device device;
  std::vector<Span> spans;
  std::vector<HyperRow> rows;
  std::vector<RowSource> sources;  // in place of rows, where the device makes them
  std::vector<bool> float64;       // of each row
  std::vector<bool> keeps_zero;    // whether elements that are zero stay so, as padding has to
  std::vector<CountRange> counts;
  std::vector<GradSpan> gradients;  // for the norm

  void clear() {
    spans.clear();
    rows.clear();
    sources.clear();
    float64.clear();
    keeps_zero.clear();
    counts.clear();
    gradients.clear();
  }
  int64_t chunks() const {
    return gradients.empty() ? 0
                             : gradients.back().first_chunk + norm_chunks(gradients.back().numel);
  }
};

struct CopyBack {
  at::Tensor param, contiguous;
};

}  // namespace
}  // namespace fusedopt
