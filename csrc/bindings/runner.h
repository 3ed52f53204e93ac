// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Norm, factor and update of a step: in CPU loops, or as launches of kernels.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/floating_point.h"
#include "hyper_table.h"
#include "instruction_set.h"
#include "work.h"
#include "workspace.h"

namespace fusedopt {
namespace {

class Runner {
 public:
  Runner(std::string optimizer, std::shared_ptr<Workspace> workspace)
      : optimizer_(std::move(optimizer)), workspace_(std::move(workspace)) {}

  // What the gradients of the step at hand are multiplied by, and whether clipping has a say.
  FactorSource source;
  bool clips = false;
  // Python's, see Plan::step; null: no other process has a part of the parameters.
  PyObject* add_up = nullptr;
  PyObject* add_up_measured = nullptr;
  c10::impl::LocalDispatchKeySet called_with{c10::impl::PODLocalDispatchKeySet{}};

  // Which of Python's functions a step needs, None: none.
  void join(const py::object& others, const py::object& others_measured, bool clips_or_measures,
            bool measures) {
    const bool joins = clips_or_measures && !others.is_none();
    add_up = joins ? others.ptr() : nullptr;
    add_up_measured = joins && measures ? others_measured.ptr() : nullptr;
  }

  // The sums of the squares of all gradients. Where all are on one accelerator it works out the
  // factor, too, and nobody waits for it; else the host has the sum of all devices afterwards.
  void norm(Works& works, std::optional<c10::Device> one_accelerator) {
    source.clips = clips && one_accelerator;
    sum_of_squares_ = 0;
    if (!clips && add_up == nullptr) return;
    if (one_accelerator) {
      if (works.empty()) workspace_->note_norm(*one_accelerator, 0);
      for (auto& work : works) {
        workspace_->note_norm(work.device);
        if (work.gradients.empty()) work.gradients.resize(1);
        launch(cuda::norm, work, step_on(work, true, work.gradients[0]));
      }
      return;
    }
    of_cuts_.clear();
    for (auto& work : works) {
      if (of_cuts_.size() < work.gradients.size()) of_cuts_.resize(work.gradients.size());
      for (size_t cut = 0; cut < work.gradients.size(); ++cut)
        of_cuts_[cut] += sum_of_squares(work, work.gradients[cut]);
    }
    if (add_up == nullptr) {
      for (const double sum : of_cuts_) sum_of_squares_ += sum;
    } else {
      const py::gil_scoped_acquire acquire;
      // What is seen from Python is everybody's business again, such as a collective.
      const c10::impl::ForceDispatchKeyGuard as_called(called_with);
      sum_of_squares_ = py::handle(add_up)(of_cuts_).cast<double>();
    }
  }

  // The factor, where the host works it out.
  void factor() {
    if (!clips || source.clips) return;
    FactorSource clipping = source;
    clipping.clips = true;
    double norm;
    source.factor = grad_factor(clipping, sum_of_squares_, norm);
    workspace_->note_norm(c10::kCPU, norm);
  }

  void scale(Works& works) {
    if (source.factor != 1 && !has_control()) scale_rows(works);
  }

  // What rules have to know of whole parameters, of all processes that have parts of these.
  // Positions: how many the plan has.
  void measure(Works& works, const HyperTable& table, size_t positions) {
    bool cut = false;
    measured_.resize(works.size());
    for (size_t i = 0; i < works.size(); ++i) {
      DeviceWork& work = works[i];
      measured_[i].resize(work.measured.size());
      if (work.measured.empty()) continue;
      const bool on_cpu = work.device.type() != kAccelerator;
      if (on_cpu && add_up_measured == nullptr) continue;  // see update()
      for (const MeasuredNote& note : work.measured_notes) cut = cut || note.cut;
      if (!on_cpu) {
        launch(cuda::measure, work, step_on(work, needs_control(work, table), {}));
      } else {
        chunk_sums_.resize(size_t(work.measured_chunks) * kMaxSums);
        cpu::measure(work.spans.data(), work.spans.size(), work.rows.data(), work.measured.data(),
                     work.measured.size(), chunk_sums_.data(), measured_[i].data(), active_isa,
                     run_in_parallel);
      }
    }
    if (add_up_measured != nullptr) gather_measured(works, positions, cut);
  }

  void update(Works& works, const HyperTable& table) {
    for (size_t i = 0; i < works.size(); ++i) {
      DeviceWork& work = works[i];
      if (work.device.type() == kAccelerator) {
        update_on_accelerator(work, needs_control(work, table));
      } else if (!work.measured.empty() && add_up_measured == nullptr) {
        cpu::measure_and_step(work.spans.data(), work.spans.size(), work.rows.data(), active_isa,
                              run_in_parallel);
      } else if (!work.spans.empty()) {
        cpu::step(work.spans.data(), work.spans.size(), work.rows.data(), measured_[i].data(),
                  active_isa, run_in_parallel);
      }
    }
  }

 private:
  bool has_control() const { return source.clips || source.grad_scale || source.found_inf; }
  bool needs_control(const DeviceWork& work, const HyperTable& table) const {
    return has_control() || (source.factor != 1 && table.makes_rows(work.device));
  }

  // Adds up, over all processes, what each of them has measured of the parameters that are cut: a
  // row for each position of the plan, of sums, the elements that they are of, and 1 where it has
  // been measured.
  void gather_measured(Works& works, size_t positions, bool cut) {
    constexpr size_t sums = offsetof(Measured, wide) / sizeof(double), columns = sums + 1;
    at::Tensor all = at::zeros({int64_t(positions), int64_t(columns)}, at::kDouble);
    auto* const rows = static_cast<double*>(all.mutable_data_ptr());
    const auto row_of = [&](const DeviceWork& work, size_t k) {
      return rows + columns * size_t(work.measured_notes[k].position);
    };
    for (size_t i = 0; cut && i < works.size(); ++i) {
      const DeviceWork& work = works[i];
      if (work.device.type() == kAccelerator && !work.measured.empty())
        on_accelerator(work, measured_[i], /*to_host=*/true);
      for (size_t k = 0; k < work.measured.size(); ++k) {
        if (!work.measured_notes[k].cut) continue;
        memcpy(row_of(work, k), &measured_[i][k], sums * sizeof(double));
        row_of(work, k)[sums] = 1;
      }
    }
    {
      const py::gil_scoped_acquire acquire;
      const c10::impl::ForceDispatchKeyGuard as_called(called_with);
      const py::handle call(add_up_measured);
      call(all);
    }
    const cpu::DefaultFloatingPoint guard;
    for (size_t i = 0; cut && i < works.size(); ++i) {
      const DeviceWork& work = works[i];
      for (size_t k = 0; k < work.measured.size(); ++k) {
        if (!work.measured_notes[k].cut) continue;
        memcpy(&measured_[i][k], row_of(work, k), sums * sizeof(double));
        finish(measured_[i][k]);
      }
      if (work.device.type() == kAccelerator && !work.measured.empty())
        on_accelerator(work, measured_[i], /*to_host=*/false);
    }
  }

  // Copies what was measured on a device to the host, or back.
  void on_accelerator(const DeviceWork& work, std::vector<Measured>& measured, bool to_host) {
    at::Tensor there = workspace_->doubles(work.device, step_on(work, false, {}).measured,
                                           measured.size() * sizeof(Measured) / sizeof(double));
    const at::Tensor here = at::from_blob(measured.data(), there.sizes(), at::kDouble);
    to_host ? here.copy_(there) : there.copy_(here);
  }

  void scale_rows(Works& works) {
    // rounded() in cpu/update.h wants to see no NaN but those of arithmetic.
    if (std::isnan(source.factor)) source.factor = std::numeric_limits<double>::quiet_NaN();
    for (auto& work : works)
      for (size_t i = 0; i < work.rows.size(); ++i)
        work.notes[i].rule->scale_gradient(source.factor, work.notes[i].float64, work.rows[i]);
  }

  double sum_of_squares(const DeviceWork& work, const std::vector<GradSpan>& gradients) {
    if (gradients.empty()) return 0;
    if (work.device.type() == kAccelerator) {
      launch(cuda::norm, work, step_on(work, true, gradients));
      return workspace_->sum_of_squares(work.device);
    }
    sums_.resize(work.chunks(gradients));
    return cpu::sum_of_squares(gradients.data(), gradients.size(), sums_.data(), active_isa,
                               run_in_parallel);
  }

  DeviceStep step_on(const DeviceWork& work, bool control,
                     const std::vector<GradSpan>& gradients) const {
    DeviceStep step;
    step.spans = work.spans.data();
    step.span_count = work.spans.size();
    step.rows = work.sources.empty() ? work.rows.data() : nullptr;
    step.sources = work.sources.data();
    step.source_rules = work.source_rules.data();
    step.source_count = work.sources.size();
    step.counts = work.counts.data();
    step.count_ranges = work.counts.size();
    step.gradients = gradients.data();
    step.gradient_count = gradients.size();
    step.factor = source;
    if (control || !work.sources.empty() || !work.measured.empty()) {
      const c10::DeviceGuard guard(work.device);
      // When parameters are measured, the norm is known.
      const int64_t of_chunks = work.measured_chunks * kMaxSums;
      const int64_t of_all = int64_t(work.measured.size() * sizeof(Measured) / sizeof(double));
      const auto memory = workspace_->get(work.device, work.sources.size(),
                                          std::max(work.chunks(gradients), of_chunks + of_all));
      if (control) step.control = memory.control;
      step.device_rows = memory.rows;
      step.sums = step.chunk_sums = memory.sums;
      step.measured = reinterpret_cast<Measured*>(memory.sums + of_chunks);
      step.measured_chunks = work.measured.data();
      step.measured_count = work.measured.size();
    }
    return step;
  }

  void update_on_accelerator(const DeviceWork& work, bool control) {
    if (work.spans.empty() && work.counts.empty() && !control) return;
    launch(cuda::update, work, step_on(work, control, {}));
  }

  template <class Call>
  void launch(Call call, const DeviceWork& work, const DeviceStep& step) const {
    const c10::DeviceGuard guard(work.device);
    if (const char* error = call(step, stream_of(work.device)))
      throw std::runtime_error(optimizer_ + ": the step on " + text(work.device) +
                               " failed: " + error);
  }

  std::string optimizer_;
  std::shared_ptr<Workspace> workspace_;
  double sum_of_squares_ = 0;  // of the step at hand
  std::vector<double> sums_;   // of chunks
  std::vector<double> chunk_sums_;
  std::vector<std::vector<Measured>> measured_;  // by device
  std::vector<double> of_cuts_;                  // of all gradients cut among the same processes
};

}  // namespace
}  // namespace fusedopt
