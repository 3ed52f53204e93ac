// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The losses as operators of torch: torch.ops.fusedopt. A translation unit of its own beside that
// of the module.
#include "cross_entropy.h"
#include "linear_cross_entropy.h"
#include "mse.h"

// An operator that users call is composite: it takes part in autograd by itself. What it calls has
// a kernel for each device, and one without data, for tracing.
namespace fusedopt {

TORCH_LIBRARY(fusedopt, m) {
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, float z_loss, bool with_lse, bool inplace) -> (Tensor, Tensor)");
  m.def(
      "_cross_entropy(Tensor input, Tensor target, Tensor? weight, int reduction, "
      "int ignore_index, float label_smoothing, float z_loss, bool widen, bool with_lse, "
      "bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_cross_entropy_(Tensor(a!) input, Tensor target, Tensor? weight, int reduction, "
      "int ignore_index, float label_smoothing, float z_loss, bool widen, bool with_lse) "
      "-> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor? linear_bias, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, float z_loss, bool with_lse, int chunk_size) -> (Tensor, Tensor)");
  m.def(
      "_linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor? linear_bias, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, float z_loss, bool widen, bool with_lse, int chunk_size, "
      "bool of_input, bool of_weight, bool of_bias) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_linear_cross_entropy_rows(Tensor grad, Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor? linear_bias, Tensor? weight, int ignore_index, float label_smoothing, "
      "float z_loss, int chunk_size, bool of_input, bool of_weight, bool of_bias) "
      "-> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def("mse_loss(Tensor input, Tensor target, int reduction) -> Tensor");
  m.def(
      "_mse_loss(Tensor input, Tensor target, int reduction, bool widen, bool with_gradient) "
      "-> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fusedopt, CompositeImplicitAutograd, m) {
  m.impl("cross_entropy", cross_entropy);
  m.impl("linear_cross_entropy", linear_cross_entropy);
  m.impl("mse_loss", mse_loss);
}

// Each does what the device of its tensors needs.
#define FUSEDOPT_KERNELS                                      \
  m.impl("_cross_entropy", forward);                          \
  m.impl("_cross_entropy_", forward_in_place);                \
  m.impl("_linear_cross_entropy", forward_linear);            \
  m.impl("_linear_cross_entropy_rows", backward_linear_rows); \
  m.impl("_mse_loss", forward_mse)

TORCH_LIBRARY_IMPL(fusedopt, CPU, m) { FUSEDOPT_KERNELS; }
TORCH_LIBRARY_IMPL(fusedopt, CUDA, m) { FUSEDOPT_KERNELS; }

TORCH_LIBRARY_IMPL(fusedopt, Meta, m) {
  m.impl("_cross_entropy", forward_meta);
  m.impl("_cross_entropy_", forward_in_place_meta);
  m.impl("_linear_cross_entropy", linear_meta);
  m.impl("_linear_cross_entropy_rows", linear_rows_meta);
  m.impl("_mse_loss", mse_meta);
}

}  // namespace fusedopt
