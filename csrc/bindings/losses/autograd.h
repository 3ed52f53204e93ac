// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// How a loss, whose gradient is there with it, takes part in autograd: by a Node of its own.
#pragma once

#include "run.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdouble-promotion"
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/OpMathType.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>
#pragma GCC diagnostic pop

namespace fusedopt {
namespace {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Shared by a std::shared_ptr until torch 2.12, by torch's own pointer since.
using NodePointer = decltype(torch::autograd::Edge::function);

template <class Pointer, class T, class... Args>
auto make_node_for(Args&&... args) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return std::make_shared<T>(std::forward<Args>(args)...);
  else
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
}
template <class T, class... Args>
auto make_node(Args&&... args) {
  return make_node_for<NodePointer, T>(std::forward<Args>(args)...);
}

// Of torch::Reduction.
constexpr int64_t kNone = 0, kMean = 1;

bool is_traced(const Tensor& tensor) {
  const auto keys = tensor.key_set();
  const bool is_wrapped = keys.has(c10::DispatchKey::FuncTorchBatched) ||
                          keys.has(c10::DispatchKey::FuncTorchGradWrapper) ||
                          keys.has(c10::DispatchKey::Batched);
  return is_wrapped || tensor.unsafeGetTensorImpl()->is_python_dispatch() || tensor.is_meta() ||
         at::functionalization::impl::isFunctionalTensor(tensor) ||
         c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// Takes the place of a gradient's derivative, which would be taken for zero without.
struct NoSecondDerivative : Node {
  NoSecondDerivative(const char* loss, torch::autograd::edge_list edges)
      : Node(std::move(edges)), loss(loss) {}
  variable_list apply(variable_list&&) override {
    TORCH_CHECK(false, "fusedopt: ", loss, " has no second derivative; torch.nn.functional.", loss,
                " has one");
  }
  const char* loss;
};

// A loss in the graph of autograd. Its gradient is that of a loss whose own gradient is 1.
struct LossBackward : Node {
  explicit LossBackward(const char* loss) : loss(loss) {}

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list results(num_outputs());
    if (!grads[0].defined()) return results;
    {
      const at::AutoGradMode off(false);
      fill(grads[0], results);
    }
    if (!at::GradMode::is_enabled()) return results;
    auto edges = next_edges();
    if (grads[0].requires_grad()) edges.push_back(torch::autograd::impl::gradient_edge(grads[0]));
    const auto node = make_node<NoSecondDerivative>(loss, std::move(edges));
    for (auto& result : results)
      if (result.defined()) {
        result = result.detach();
        torch::autograd::set_history(result, node);
      }
    return results;
  }

  virtual void fill(const Tensor& grad, variable_list& results) = 0;

  // The product with the gradient of the loss, which is a number or, along dim, one of each row,
  // and with what a mean has still to be divided by. What was worked out is returned as it is where
  // it would be multiplied by one. It is changed only where nobody can ask for it again.
  Tensor scaled(const Tensor& gradient, const Tensor& grad, at::ScalarType type, int64_t dim = -1) {
    const bool is_number = grad.dim() == 0 || dim < 0;
    Tensor factor = is_number ? grad : grad.unsqueeze(dim);
    if (later.defined()) factor = factor.to(at::kDouble) * later;
    if (is_traced(grad) || is_traced(gradient)) return gradient.mul(factor).to(type);
    const bool keeps = torch::autograd::get_current_graph_task_keep_graph();
    const bool may_change = !keeps && !hooked_ && !returned_ && gradient.scalar_type() == type;
    if (on_accelerator(gradient) && is_number && may_change &&
        gradient.is_non_overlapping_and_dense()) {
      const c10::DeviceGuard guard(gradient.device());
      scale_in_place(gradient, factor);
      torch::autograd::impl::bump_version(gradient);
      return gradient;
    }
    const bool is_one = factor.is_cpu() && gradient.scalar_type() == type &&
                        (is_number ? factor.item<double>() == 1 : factor.eq(1).all().item<bool>());
    if (is_one && keeps && !in_place) return gradient.clone();  // the caller may change it
    if (is_one) {
      returned_ = returned_ || keeps;
      return gradient;
    }
    if (may_change) return gradient.mul_(factor);
    Tensor result = at::empty_like(gradient, gradient.options().dtype(type));
    return at::mul_out(result, gradient, factor);
  }

  // Where somebody's hooks have packed it, what is unpacked may be theirs.
  void save(const Tensor& gradient, SavedVariable& saved) {
    hooked_ = hooked_ || at::SavedTensorDefaultHooks::get_hooks().has_value();
    saved = SavedVariable(gradient, false);
  }

  const char* loss;
  bool in_place = false;  // whether the gradient has the memory of the logits
  // Of a mean in float16: its gradients are kept as those of a sum, as they would vanish in that
  // dtype before a scaled loss could save them. By what they have to be multiplied, or undefined.
  Tensor later;

 private:
  bool hooked_ = false, returned_ = false;
};

bool wants_gradient(const Tensor& tensor) {
  return at::GradMode::is_enabled() && tensor.defined() && tensor.requires_grad();
}

void refuse_forward_mode(const char* loss, const Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !tensor.defined() || !tensor._fw_grad(0).defined(), "fusedopt: ", loss,
      " has no forward-mode derivative; torch.nn.functional.", loss, " has one");
}

bool has_kernel(const Tensor& tensor) {
#if defined(FUSEDOPT_WITH_CUDA)
  if (tensor.is_cuda()) return true;
#endif
  return tensor.is_cpu() || is_traced(tensor);
}

// Whether the gradients of a mean are kept as those of a sum.
bool divides_later(at::ScalarType type, int64_t reduction) {
  return type == at::kHalf && reduction == kMean;
}

bool is_computed(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// Of the devices that have an autocast.
bool autocasts(const Tensor& input) {
  const auto device = input.device().type();
  return at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
}

bool widens(const Tensor& input) {
  return at::isReducedFloatingType(input.scalar_type()) && autocasts(input);
}

}  // namespace
}  // namespace fusedopt
