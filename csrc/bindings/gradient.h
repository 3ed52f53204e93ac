// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Whether a gradient can be taken.
#pragma once

#include <string>

#include "member.h"

namespace fusedopt {
namespace {

bool has_gradient(const py::object& param) {
  return THPVariable_Unpack(param.ptr()).unsafeGetTensorImpl()->grad().defined();
}

// The kernel for a gradient of a parameter. Throws where there is none.
int kernel_for(const Entry& e, const Member& m, int variant, const at::Tensor& param,
               const at::Tensor& grad, const std::string& optimizer) {
  const auto what = [&] { return optimizer + ": " + m.name; };
  if (grad.layout() != at::kStrided)
    throw std::runtime_error(what() + " has a gradient of layout " + text(grad.layout()) + "; " +
                             optimizer +
                             " supports dense gradients only (for an embedding: sparse=False)");
  if (grad.device() != m.device)
    throw py::value_error(what() + " is on " + text(m.device) + " but its gradient is on " +
                          text(grad.device()) + "; move one of them");
  if (grad.numel() > 0 && grad.unsafeGetTensorImpl()->data() == nullptr)
    throw py::value_error(what() +
                          " has a gradient without memory (its storage was resized "
                          "or it was made on the meta device); give it one with memory, or None");
  if (grad.sizes() != param.sizes())
    throw py::value_error(what() + " has shape " + text(param.sizes()) +
                          " but its gradient has shape " + text(grad.sizes()));
  const auto grad_dtype = dtype_of(grad.scalar_type());
  // Without states, averages of weights take any of these for a gradient.
  const bool any = e.tensor_count == 0 && grad_dtype && size_of(*grad_dtype) == 2;
  if (e.coded && (grad_dtype == m.dtype || grad_dtype == DType::float32 || any))
    return registry().coded_kernel(variant);
  const int index = grad_dtype && !e.coded && grad.is_complex() == param.is_complex()
                        ? combination(m.dtype, *grad_dtype, *dtype_of(m.state_type))
                        : -1;
  if (index < 0)
    throw py::type_error(what() + ": a " + text(param.scalar_type()) + " parameter with a " +
                         text(grad.scalar_type()) + " gradient and " + text(m.state_type) +
                         " states is not supported; a gradient has its parameter's dtype or "
                         "float32");
  return registry().kernel(variant, index);
}

// Whether a kernel can read a gradient where it is, beside a dense parameter.
bool is_in_order(const at::Tensor& param, const at::Tensor& grad) {
  if (grad.is_conj() || grad.is_neg()) return false;
  return (grad.is_contiguous() && param.is_contiguous()) ||
         same_strides(param.sizes(), param.strides(), grad.strides());
}

}  // namespace
}  // namespace fusedopt
