// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Losses of tensors: in CPU loops, or as launches of kernels.
#pragma once

#include "../../cpu/losses/losses.h"
#include "../../cuda/losses.h"
#include "../accelerator.h"
#include "../dtypes.h"
#include "../instruction_set.h"

namespace fusedopt {
namespace {

bool on_accelerator(const at::Tensor& tensor) { return tensor.device().type() == kAccelerator; }

void check_launch(const char* error, const char* loss, const at::Tensor& tensor) {
  TORCH_CHECK(error == nullptr, "fusedopt: ", loss, " on ", tensor.device(), " failed: ", error);
}

bool is_double(const at::Tensor& tensor) {
  return tensor.defined() && tensor.scalar_type() == at::kDouble;
}

// What the mean of a loss divides by. Where only the device knows, it is a tensor of two.
struct MeanOf {
  Divisors known{0, 0};
  at::Tensor on_device;

  // Waits for the device.
  Divisors of_host() const {
    if (!on_device.defined()) return known;
    const at::Tensor here = on_device.cpu();
    return {here[0].item<double>(), here[1].item<double>()};
  }
  // Nothing to divide by: all weights are zero, or all rows ignored, whose gradient stays zero.
  bool is_nothing() const { return !on_device.defined() && known.weight == 0; }
  // By what a sum has to be multiplied, a number of float64 where like is.
  at::Tensor factor(const at::Tensor& like) const {
    if (on_device.defined())
      return at::where(on_device[0].eq(0), at::ones_like(on_device[0]), on_device[0].reciprocal());
    const double value = is_nothing() ? 1 : 1 / known.weight;
    return at::full({}, value, like.options().dtype(at::kDouble).requires_grad(false));
  }
};

// Targets that are neither classes nor ignored are told of on a CPU, before anything is written; a
// device makes NaN of them.
MeanOf check_targets(const at::Tensor& targets, int64_t classes, int64_t ignore_index,
                     const at::Tensor& weight) {
  const auto* first = targets.const_data_ptr<int64_t>();
  const void* weights = weight.defined() ? weight.const_data_ptr() : nullptr;
  if (on_accelerator(targets)) {
    MeanOf mean;
    mean.on_device = at::empty({2}, targets.options().dtype(at::kDouble));
    const TargetArgs args{first,
                          weights,
                          targets.numel(),
                          classes,
                          ignore_index,
                          is_double(weight),
                          static_cast<Divisors*>(mean.on_device.mutable_data_ptr())};
    check_launch(cuda::check_targets(args, stream_of(targets.device())), "cross_entropy", targets);
    return mean;
  }
  const auto found = cpu::check_targets(first, targets.numel(), classes, ignore_index, weights,
                                        is_double(weight) ? DType::float64 : DType::float32);
  if (found.first_wrong < targets.numel())
    TORCH_CHECK_INDEX(false, "Target ", first[found.first_wrong],
                      " is out of bounds. It is that of row ", found.first_wrong, " of ",
                      targets.numel(), "; expected at least 0 and less than ", classes,
                      " classes, or ignore_index=", ignore_index);
  return {{found.weight, double(found.valid)}, {}};
}

// Losses and gradients of rows, whose targets have been checked.
//
// With later, their mean is still to be divided: gradients are those of a sum.
void run_cross_entropy(CrossEntropyWork work, const at::Tensor& logits, bool is_mean, bool later,
                       const MeanOf& mean) {
  if (is_mean && later && !mean.is_nothing()) {
    if (work.loss.z_loss != 0) {
      const Divisors known = mean.of_host();
      work.loss.z_factor = known.weight / known.valid;
    }
    is_mean = false;
  }
  if (is_mean && !mean.on_device.defined()) {
    work.loss.factor = 1 / mean.known.weight;
    work.loss.z_factor = 1 / mean.known.valid;
  }
  const DType dtype = *dtype_of(logits.scalar_type());
  if (!on_accelerator(logits)) {
    cpu::cross_entropy(work, dtype, active_isa, at::get_num_threads(), run_in_parallel);
    return;
  }
  if (work.rows == 0) return;
  if (is_mean && mean.on_device.defined())
    work.divisors = static_cast<const Divisors*>(mean.on_device.const_data_ptr());
  const at::Tensor terms =
      at::empty({bytes_of_terms(work)}, logits.options().dtype(at::kByte).requires_grad(false));
  const char* const error = launch_cross_entropy(
      work, logits.element_size(), terms.mutable_data_ptr(), [&](const CrossEntropyArgs& args) {
        return cuda::cross_entropy(args, dtype, stream_of(logits.device()));
      });
  check_launch(error, "cross_entropy", logits);
}

// A squared error, before its sum is known.
void run_mse(const MseWork& work, const at::Tensor& input) {
  const DType dtype = *dtype_of(input.scalar_type());
  if (on_accelerator(input)) {
    if (work.numel != 0)
      check_launch(cuda::mse(work, dtype, stream_of(input.device())), "mse_loss", input);
  } else {
    cpu::mse(work, dtype, active_isa, run_in_parallel);
  }
}

// Multiplies a gradient of one memory by that of its loss, a number, where it lies. A device knows
// only by then whether there is something to do.
void scale_in_place(const at::Tensor& gradient, const at::Tensor& grad) {
  const ScaleArgs args{gradient.mutable_data_ptr(), gradient.numel(), grad.const_data_ptr(),
                       *dtype_of(grad.scalar_type())};
  if (args.count == 0) return;
  check_launch(cuda::scale(args, *dtype_of(gradient.scalar_type()), stream_of(gradient.device())),
               "the gradient of a loss", gradient);
}

// The loss of all rows, or chunks: a number. A mean of nothing is NaN.
void finish_loss(const at::Tensor& loss, const at::Tensor& losses, double factor, bool is_mean,
                 const MeanOf& mean) {
  LossArgs args{static_cast<const double*>(losses.const_data_ptr()),
                losses.numel(),
                factor,
                nullptr,
                loss.mutable_data_ptr(),
                *dtype_of(loss.scalar_type()),
                is_mean};
  if (on_accelerator(loss)) {
    if (mean.on_device.defined())
      args.divisors = static_cast<const Divisors*>(mean.on_device.const_data_ptr());
    check_launch(cuda::finish_loss(args, stream_of(loss.device())), "the loss", loss);
  } else {
    if (is_mean) args.divisors = &mean.known;
    finish_loss(args, cpu::total(args.losses, args.count));
  }
}

// Likewise, of losses that are still to be divided.
void finish_divided_loss(const at::Tensor& loss, const at::Tensor& losses, const at::Tensor& factor,
                         const MeanOf& mean) {
  const at::Tensor sum = at::empty({}, losses.options());
  finish_loss(sum, losses, 1, true, mean);
  loss.copy_(sum * factor);
}

// A number of float64 that an operator returns where it is wanted.
at::Tensor empty_number(const at::Tensor& like, bool wanted) {
  const auto options = like.options().dtype(at::kDouble).requires_grad(false);
  return wanted ? at::empty({}, options) : at::empty({0}, options);
}

}  // namespace
}  // namespace fusedopt
