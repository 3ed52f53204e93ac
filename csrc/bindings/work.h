// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What a step has to do on one device.
#pragma once

#include <array>
#include <deque>
#include <vector>

#include "../device/step.h"
#include "torch.h"

namespace fusedopt {
namespace {

// What the host knows of a row of hyper-parameters.
struct RowNote {
  const RuleInfo* rule;
  bool float64;
  bool keeps_zero;  // whether parameters that are zero stay so, as padding has to
  std::array<float, kMaxNumbers> next_numbers{};  // what those with the host become
};

// Of a parameter that is measured: where the plan has it, and whether other processes have parts.
struct MeasuredNote {
  int position;
  bool cut;
};

struct DeviceWork {
  explicit DeviceWork(c10::Device device) : device(device) { last_ranges_.fill(-1); }

  c10::Device device;
  std::vector<Span> spans;
  std::vector<RowNote> notes;      // of each row
  std::vector<HyperRow> rows;      // empty where the device makes them
  std::vector<RowSource> sources;  // in place of rows, where the device makes them
  std::vector<int> source_rules;   // of each source
  std::vector<CountRange> counts;
  // For the norm, by the processes that parameters are cut among.
  std::vector<std::vector<GradSpan>> gradients;
  int64_t open_padding = 0;  // reals behind the last span that may be walked along
  // Parameters that are measured, by the numbers that their spans have.
  std::vector<MeasuredChunks> measured;
  std::vector<MeasuredNote> measured_notes;
  int64_t measured_chunks = 0;

  void clear() {
    spans.clear();
    notes.clear();
    rows.clear();
    sources.clear();
    source_rules.clear();
    counts.clear();
    for (auto& of_cut : gradients) of_cut.clear();
    open_padding = 0;
    measured.clear();
    measured_notes.clear();
    measured_chunks = 0;
    last_ranges_.fill(-1);
  }

  static int64_t chunks(const std::vector<GradSpan>& of_cut) {
    return of_cut.empty() ? 0 : of_cut.back().first_chunk + norm_chunks(of_cut.back().numel);
  }

  void add_gradient(int cut, const void* grad, int64_t numel, DType dtype) {
    if (size_t(cut) >= gradients.size()) gradients.resize(cut + 1);
    auto& of_cut = gradients[cut];
    of_cut.push_back({grad, numel, chunks(of_cut), dtype});
  }

  void add_measured(int position, bool cut) {
    measured.push_back({measured_chunks, 0, 0});
    measured_notes.push_back({position, cut});
  }
  // Adds a span of the parameter that was added last to what is measured.
  void measure(Span& span) {
    const int64_t chunks = norm_chunks(span.numel);
    span.measured = int32_t(measured.size()) - 1;
    span.first_chunk = uint32_t(measured_chunks);
    measured.back().count += chunks;
    measured.back().numel += span.numel;
    measured_chunks += chunks;
  }

  void advance(float* count) { change(count, 0, 0); }
  // One of the numbers of a state becomes the value of a place in a row.
  void set_from_row(int number, float* address, int row, int place, bool float64) {
    change(address, CountRange::from_row(uint32_t(row), place, float64), 1 + number);
  }

 private:
  void change(float* address, uint32_t source, int which) {
    int& last = last_ranges_[which];
    if (last < 0 || counts[last].counts + counts[last].size != address ||
        counts[last].source != source) {
      last = int(counts.size());
      counts.push_back({address, 0, source});
    }
    ++counts[last].size;
  }

  std::array<int, 1 + kMaxNumbers> last_ranges_;  // of counts, and of each number; -1: none
};

// A step looks its devices up often, and holds pointers to them.
using Works = std::deque<DeviceWork>;

DeviceWork& work_on(c10::Device device, Works& works) {
  for (auto& work : works)
    if (work.device == device) return work;
  works.emplace_back(device);
  return works.back();
}

}  // namespace
}  // namespace fusedopt
