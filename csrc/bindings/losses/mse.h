// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The mean squared error as an operator.
#pragma once

#include "autograd.h"
#include "memory.h"
#include "run.h"

namespace fusedopt {
namespace {

// Whether the elements of both lie in the same order, without gaps.
bool lie_alike(const Tensor& input, const Tensor& target) {
  return input.is_non_overlapping_and_dense() && input.sym_strides() == target.sym_strides();
}

Tensor empty_mse_gradient(const Tensor& input, const Tensor& target) {
  return lie_alike(input, target) ? at::empty_like(input)
                                  : at::empty_like(input, at::MemoryFormat::Contiguous);
}

Tensor empty_mse_loss(const Tensor& input, bool widen) {
  return at::empty({}, widen ? input.options().dtype(at::kFloat) : input.options());
}

std::tuple<Tensor, Tensor, Tensor> forward_mse(const Tensor& input, const Tensor& target,
                                               int64_t reduction, bool widen, bool with_gradient) {
  const bool alike = lie_alike(input, target);
  const Tensor x = alike ? input : input.contiguous(), y = alike ? target : target.contiguous();
  const Tensor gradient = with_gradient ? on_large_pages(empty_mse_gradient(input, target))
                                        : at::empty({0}, input.options());
  const int64_t numel = input.numel();
  const c10::DeviceGuard guard(input.device());
  const Tensor sums =
      at::empty({norm_chunks(numel)}, input.options().dtype(at::kDouble).requires_grad(false));
  const double factor = reduction == kMean ? 1 / double(numel) : 1.0;
  // The gradient of a mean in float16 is kept as the difference itself.
  const bool divides = divides_later(input.scalar_type(), reduction);
  run_mse({x.const_data_ptr(), y.const_data_ptr(),
           with_gradient ? gradient.mutable_data_ptr() : nullptr, numel, divides ? 0.5 : factor,
           sums.mutable_data_ptr<double>()},
          input);
  const Tensor loss = empty_mse_loss(input, widen);
  finish_loss(loss, sums, factor, reduction == kMean, {{double(numel), double(numel)}, {}});
  const Tensor later = empty_number(input, divides);
  if (divides) later.fill_(2 * factor);
  return {loss, gradient, later};
}

std::tuple<Tensor, Tensor, Tensor> mse_meta(const Tensor& input, const Tensor& target,
                                            int64_t reduction, bool widen, bool with_gradient) {
  return {empty_mse_loss(input, widen),
          with_gradient ? empty_mse_gradient(input, target) : at::empty({0}, input.options()),
          empty_number(input, divides_later(input.scalar_type(), reduction))};
}

struct MseBackward : LossBackward {
  MseBackward() : LossBackward("mse_loss") {}

  void fill(const Tensor& grad, variable_list& results) override {
    const Tensor saved = gradient.unpack();
    const Tensor of_input = scaled(saved, grad, saved.scalar_type());
    if (task_should_compute_output(0)) results[0] = of_input;
    if (task_should_compute_output(1)) results[1] = of_input.neg();
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    gradient.reset_data();
  }

  std::string name() const override { return "FusedMseBackward"; }

  SavedVariable gradient;
};

// Of two tensors of one size.
Tensor mse_loss(const Tensor& input, const Tensor& target, int64_t reduction) {
  const auto type = at::result_type(input, target);
  if (!is_computed(type) || input.device() != target.device() ||
      input.sym_sizes() != target.sym_sizes() || !has_kernel(input))
    return at::mse_loss(input, target, reduction);  // which may say what is wrong
  const bool widen = at::isReducedFloatingType(type) && widens(input) && widens(target);
  if (input.scalar_type() != type || target.scalar_type() != type)
    return fusedopt::mse_loss(input.to(type), target.to(type), reduction);
  refuse_forward_mode("mse_loss", input);
  refuse_forward_mode("mse_loss", target);
  const bool with_gradient = wants_gradient(input) || wants_gradient(target);
  decltype(make_node<MseBackward>()) node;
  if (with_gradient) {
    node = make_node<MseBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(input, target));
  }
  Tensor loss, gradient, later;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fusedopt::_mse_loss", "")
                               .typed<decltype(forward_mse)>();
    std::tie(loss, gradient, later) =
        op.call(input.detach(), target.detach(), reduction, widen, with_gradient);
  }
  if (node) {
    torch::autograd::set_history(loss, node);
    node->save(gradient, node->gradient);
    if (divides_later(type, reduction)) node->later = later;
  }
  return loss;
}

}  // namespace
}  // namespace fusedopt
