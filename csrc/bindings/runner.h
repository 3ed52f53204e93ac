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
  // Python's, see Plan::step; null: no other process has a part of the gradients.
  PyObject* add_up = nullptr;
  c10::impl::LocalDispatchKeySet called_with{c10::impl::PODLocalDispatchKeySet{}};

  // The sums of the squares of all gradients. Where all are on one accelerator it works out the
  // factor, too, and nobody waits for it; else the host has the sum of all devices afterwards.
  void norm(Works& works, std::optional<c10::Device> one_accelerator) {
    source.clips = clips && one_accelerator;
    sum_of_squares_ = 0;
    if (!clips) return;
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

  void update(Works& works, const HyperTable& table) {
    const bool control = source.clips || source.grad_scale || source.found_inf;
    const bool scales = source.factor != 1;
    if (scales && !control) scale_rows(works);
    for (auto& work : works) {
      if (work.device.type() == kAccelerator) {
        update_on_accelerator(work, control || (scales && table.makes_rows(work.device)));
      } else if (!work.spans.empty()) {
        cpu::step(work.spans.data(), work.spans.size(), work.rows.data(), active_isa,
                  run_in_parallel);
      }
    }
  }

 private:
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
    if (control || !work.sources.empty()) {
      const c10::DeviceGuard guard(work.device);
      const auto memory = workspace_->get(work.device, work.sources.size(), work.chunks(gradients));
      if (control) step.control = memory.control;
      step.device_rows = memory.rows;
      step.sums = memory.sums;
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
  double sum_of_squares_ = 0;    // of the step at hand
  std::vector<double> sums_;     // of chunks
  std::vector<double> of_cuts_;  // of all gradients cut among the same processes
};

}  // namespace
}  // namespace fusedopt
