// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Cross-entropy as an operator: its arguments, its memory, and its gradient.
#pragma once

#include "autograd.h"
#include "memory.h"
#include "run.h"

namespace fusedopt {
namespace {

int64_t class_dim(const Tensor& input) { return input.dim() == 1 ? 0 : 1; }

bool has_probabilities(const Tensor& input, const Tensor& target) {
  return input.sym_sizes() == target.sym_sizes();
}

bool is_class_index(at::ScalarType type) {
  return type == at::kLong || type == at::kByte || type == at::kInt;
}

// Weights are of the dtype of the logits, of the loss, or of what it is computed in. Autocast
// converts all of them.
bool takes_weights_of(at::ScalarType type, const Tensor& input, const Tensor& target,
                      bool autocast) {
  if (autocast) return is_computed(type);
  const auto of_input = input.scalar_type();
  const auto of_loss = has_probabilities(input, target)
                           ? at::promote_types(of_input, target.scalar_type())
                           : of_input;
  return type == of_input || type == of_loss || type == at::toOpMathType(of_loss);
}

// Whether these are as torch wants them, and this loss takes them.
bool can_take(const Tensor& input, const Tensor& target, const Tensor& weight, bool autocast) {
  if (input.dim() == 0 || !is_computed(input.scalar_type())) return false;
  if (target.device() != input.device()) return false;
  const auto& sizes = input.sym_sizes();
  const int64_t dim = class_dim(input);
  if (sizes[dim] == 0) return false;
  if (has_probabilities(input, target)) {
    if (!is_computed(target.scalar_type())) return false;
  } else {
    if (!is_class_index(target.scalar_type()) || target.dim() != input.dim() - 1) return false;
    for (int64_t i = 0, j = 0; i < input.dim(); ++i)
      if (i != dim && sizes[i] != target.sym_sizes()[j++]) return false;
  }
  if (!weight.defined()) return true;
  return takes_weights_of(weight.scalar_type(), input, target, autocast) && weight.dim() == 1 &&
         weight.sym_size(0) == sizes[dim] && weight.device() == input.device();
}

Tensor class_last(const Tensor& tensor) {
  return tensor.dim() < 3 ? tensor : tensor.movedim(1, -1);
}

// As many elements as the input has; those of a row lie side by side.
Tensor empty_gradient(const Tensor& input) {
  if (input.dim() < 3) return at::empty_symint(input.sym_sizes(), input.options());
  std::vector<c10::SymInt> sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  const c10::SymInt classes = sizes[1];
  sizes.erase(sizes.begin() + 1);
  sizes.push_back(classes);
  return at::empty_symint(sizes, input.options()).movedim(-1, 1);
}

std::vector<c10::SymInt> row_sizes(const Tensor& input) {
  std::vector<c10::SymInt> sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.erase(sizes.begin() + class_dim(input));
  return sizes;
}

Tensor empty_loss(const Tensor& input, int64_t reduction, bool widen) {
  const auto options = widen ? input.options().dtype(at::kFloat) : input.options();
  return reduction == kNone ? at::empty_symint(row_sizes(input), options) : at::empty({}, options);
}

Tensor empty_lse(const Tensor& input, bool with_lse) {
  const bool half = at::isReducedFloatingType(input.scalar_type());
  const auto options = half ? input.options().dtype(at::kFloat) : input.options();
  return with_lse ? at::empty_symint(row_sizes(input), options) : at::empty({0}, options);
}

// Whether the rows of a matrix are such as the loops walk along.
std::optional<Rows> find_rows(const Tensor& tensor) {
  const Tensor last = class_last(tensor);
  const int64_t dims = last.dim() - 1;
  if (last.stride(dims) != 1 && last.size(dims) != 1) return std::nullopt;
  const int64_t bytes = tensor.element_size();
  Rows rows;
  rows.first = static_cast<unsigned char*>(const_cast<void*>(tensor.const_data_ptr()));
  // Dimensions that follow one another without a gap, from the inside, are one.
  int64_t found = 0, sizes[2] = {1, 1}, strides[2] = {0, 0};
  for (int64_t i = dims - 1; i >= 0; --i) {
    if (last.size(i) == 1) continue;
    if (found > 0 && last.stride(i) == sizes[found - 1] * strides[found - 1]) {
      sizes[found - 1] *= last.size(i);
    } else {
      if (found == 2) return std::nullopt;
      sizes[found] = last.size(i);
      strides[found++] = last.stride(i);
    }
  }
  rows.inner = found == 2 ? sizes[0] : std::max<int64_t>(1, tensor.numel());
  rows.inner_bytes = strides[0] * bytes;
  rows.outer_bytes = strides[1] * bytes;
  return rows;
}

// Whether two elements may lie at one address: none do where each dimension's stride leaves room
// for all dimensions of smaller strides.
bool may_overlap_itself(const Tensor& tensor) {
  if (is_traced(tensor)) return false;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t i = 0; i < tensor.dim(); ++i)
    if (tensor.size(i) > 1) dims.emplace_back(tensor.stride(i), tensor.size(i));
  std::sort(dims.begin(), dims.end());
  int64_t room = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < room) return true;
    room += (size - 1) * stride;
  }
  return false;
}

struct CrossEntropyOptions {
  int64_t reduction, ignore_index;
  double label_smoothing, z_loss;
};

Tensor converted_targets(const Tensor& target) { return target.to(at::kLong).contiguous(); }

Tensor converted_weight(const Tensor& weight, const Tensor& input) {
  if (!weight.defined()) return weight;
  return weight.to(at::toOpMathType(input.scalar_type())).contiguous();
}

// Losses and gradients of rows, into memory that is there.
void run_rows(const Tensor& logits, const Rows& rows, const Rows& gradient, const Tensor& targets,
              const Tensor& probabilities, const Tensor& weight, const CrossEntropyOptions& options,
              const MeanOf& mean, const Tensor& losses, const Tensor& lse) {
  CrossEntropyWork work;
  const int64_t classes = logits.size(class_dim(logits));
  work.loss.classes = classes;
  work.loss.smoothing = std::max(0.0, options.label_smoothing);
  work.loss.z_loss = options.z_loss;
  work.rows = logits.numel() / classes;
  work.logits = rows;
  work.gradient = gradient;
  if (targets.defined()) work.targets = targets.const_data_ptr<int64_t>();
  work.ignore_index = options.ignore_index;
  if (probabilities.defined()) work.probabilities = *find_rows(probabilities);
  if (weight.defined()) work.weights = weight.const_data_ptr();
  work.losses = losses.mutable_data_ptr<double>();
  if (lse.defined()) work.lse = lse.mutable_data_ptr();
  run_cross_entropy(work, logits, options.reduction == kMean,
                    divides_later(logits.scalar_type(), options.reduction), mean);
}

Tensor empty_losses(const Tensor& like, int64_t count) {
  return at::empty({count}, like.options().dtype(at::kDouble).requires_grad(false));
}

// Returns by what gradients have to be multiplied later, or a tensor without elements.
Tensor fill_loss(const Tensor& loss, const Tensor& losses, const CrossEntropyOptions& options,
                 const MeanOf& mean, at::ScalarType type) {
  if (divides_later(type, options.reduction)) {
    const Tensor factor = mean.factor(losses);
    if (mean.is_nothing())
      finish_loss(loss, losses, 1, true, mean);
    else
      finish_divided_loss(loss, losses, factor, mean);
    return factor;
  }
  if (options.reduction == kNone)
    loss.copy_(losses.view(loss.sizes()));
  else
    finish_loss(loss, losses, 1, options.reduction == kMean, mean);
  return empty_number(losses, false);
}

// The loss, lse, the gradient, and by what it has to be multiplied; what there is not has no
// elements.
using ForwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

ForwardResults run_forward(const Tensor& input, const Tensor& target,
                           const std::optional<Tensor>& weight_or_none, int64_t reduction,
                           int64_t ignore_index, double label_smoothing, double z_loss, bool widen,
                           bool with_lse, bool with_gradient, Tensor in_place) {
  const CrossEntropyOptions options{reduction, ignore_index, label_smoothing, z_loss};
  const Tensor weight = converted_weight(weight_or_none.value_or(Tensor()), input);
  const int64_t classes = input.size(class_dim(input));
  const int64_t count = input.numel() / classes;
  Tensor targets, probabilities;
  MeanOf mean{{double(count), double(count)}, {}};
  const c10::DeviceGuard guard(input.device());
  if (has_probabilities(input, target)) {
    probabilities = class_last(target).contiguous();
    if (probabilities.dim() > 2) probabilities = probabilities.movedim(-1, 1);
  } else {
    targets = converted_targets(target);
    mean = check_targets(targets, classes, ignore_index, weight);
  }
  const Tensor loss = empty_loss(input, reduction, widen);
  const Tensor lse = empty_lse(input, with_lse);
  // Rows that cannot be walked along are copied, and the copy becomes the gradient.
  Tensor logits = input, gradient;
  auto rows = find_rows(input);
  if (!rows) {
    logits = on_large_pages(empty_gradient(input)).copy_(input);
    rows = find_rows(logits);
  }
  Rows gradient_rows;
  if (in_place.defined() || with_gradient) {
    const bool copied = !logits.is_same(input);
    gradient = copied || in_place.defined() ? logits : on_large_pages(empty_gradient(input));
    gradient_rows = gradient.is_same(logits) ? *rows : *find_rows(gradient);
  }
  const Tensor losses = empty_losses(input, count);
  run_rows(logits, *rows, gradient_rows, targets, probabilities, weight, options, mean, losses,
           with_lse ? lse : Tensor());
  if (in_place.defined() && !logits.is_same(input)) in_place.copy_(logits);
  const Tensor later = fill_loss(loss, losses, options, mean, input.scalar_type());
  if (!with_gradient) gradient = at::empty({0}, input.options());
  return {loss, lse, gradient, later};
}

ForwardResults forward(const Tensor& input, const Tensor& target,
                       const std::optional<Tensor>& weight, int64_t reduction, int64_t ignore_index,
                       double label_smoothing, double z_loss, bool widen, bool with_lse,
                       bool with_gradient) {
  return run_forward(input, target, weight, reduction, ignore_index, label_smoothing, z_loss, widen,
                     with_lse, with_gradient, Tensor());
}

ForwardResults forward_meta(const Tensor& input, const Tensor&, const std::optional<Tensor>&,
                            int64_t reduction, int64_t, double, double, bool widen, bool with_lse,
                            bool with_gradient) {
  return {empty_loss(input, reduction, widen), empty_lse(input, with_lse),
          with_gradient ? empty_gradient(input) : at::empty({0}, input.options()),
          empty_number(input, divides_later(input.scalar_type(), reduction))};
}

std::tuple<Tensor, Tensor, Tensor> forward_in_place(Tensor& input, const Tensor& target,
                                                    const std::optional<Tensor>& weight,
                                                    int64_t reduction, int64_t ignore_index,
                                                    double label_smoothing, double z_loss,
                                                    bool widen, bool with_lse) {
  const auto result = run_forward(input, target, weight, reduction, ignore_index, label_smoothing,
                                  z_loss, widen, with_lse, false, input);
  return {std::get<0>(result), std::get<1>(result), std::get<3>(result)};
}

std::tuple<Tensor, Tensor, Tensor> forward_in_place_meta(Tensor& input, const Tensor&,
                                                         const std::optional<Tensor>&,
                                                         int64_t reduction, int64_t, double, double,
                                                         bool widen, bool with_lse) {
  return {empty_loss(input, reduction, widen), empty_lse(input, with_lse),
          empty_number(input, divides_later(input.scalar_type(), reduction))};
}

constexpr const char* kForward = "fusedopt::_cross_entropy";
constexpr const char* kForwardInPlace = "fusedopt::_cross_entropy_";

struct CrossEntropyBackward : LossBackward {
  CrossEntropyBackward() : LossBackward("cross_entropy") {}

  void fill(const Tensor& grad, variable_list& results) override {
    if (task_should_compute_output(0)) {
      // The gradient of an ignored row is zero, whatever that of its loss is.
      const Tensor classes = target.unpack();
      const Tensor of_loss =
          classes.defined() ? grad.masked_fill(classes.to(at::kLong).eq(ignore_index), 1) : grad;
      const Tensor saved = gradient.unpack();
      results[0] =
          scaled(saved, of_loss, saved.scalar_type(), reduction == kNone ? class_axis : -1);
    }
    if (num_outputs() < 2 || !task_should_compute_output(1)) return;
    // Of a probability: weight (1 - label_smoothing) (lse - logit). Few need it: by torch.
    const Tensor logits = input.unpack();
    Tensor result = at::log_softmax(logits, class_axis, at::toOpMathType(logits.scalar_type())) *
                    (label_smoothing - 1);
    const Tensor weights = weight.unpack();
    if (weights.defined()) {
      std::vector<int64_t> sizes(logits.dim(), 1);
      sizes[class_axis] = -1;
      result = result * weights.reshape(sizes);
    }
    if (reduction == kMean) result = result * (class_count / c10::SymFloat(logits.sym_numel()));
    result = result * (reduction == kNone ? grad.unsqueeze(class_axis) : grad);
    results[1] = result.to(target_type);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    gradient.reset_data();
    target.reset_data();
    input.reset_data();
    weight.reset_data();
  }

  std::string name() const override { return "FusedCrossEntropyBackward"; }

  SavedVariable gradient;
  int64_t reduction = kMean, class_axis = 0;
  SavedVariable target;  // where rows have losses of their own
  int64_t ignore_index = 0;
  // For the gradient of probabilities.
  SavedVariable input, weight;
  double label_smoothing = 0;
  c10::SymFloat class_count = 0.0;
  at::ScalarType target_type = at::kFloat;
};

// What is wrong with the arguments is said by torch.
[[noreturn]] void refuse_cross_entropy(const Tensor& input, const Tensor& target,
                                       const std::optional<Tensor>& weight, int64_t reduction,
                                       int64_t ignore_index, double label_smoothing) {
  const at::AutoGradMode off(false);
  at::cross_entropy_loss(input, target, weight, reduction, ignore_index, label_smoothing);
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "fusedopt: cross_entropy got logits of ", input.scalar_type(), ", a target of ",
      target.scalar_type(), " and a weight of ",
      weight && weight->defined() ? c10::toString(weight->scalar_type()) : "nothing",
      "; expected logits of float32, float64, bfloat16 or float16 and a weight of their dtype or "
      "float32; torch.nn.functional.cross_entropy takes these");
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& input, const Tensor& target,
                                         const std::optional<Tensor>& weight_or_none,
                                         int64_t reduction, int64_t ignore_index,
                                         double label_smoothing, double z_loss, bool with_lse,
                                         bool in_place) {
  const Tensor weight = weight_or_none.value_or(Tensor());
  if (input.dim() > 0 && !in_place && input.sym_size(class_dim(input)) == 0)  // NaN, or an error
    return {at::cross_entropy_loss(input, target, weight_or_none, reduction, ignore_index,
                                   label_smoothing),
            at::empty({0}, input.options())};
  if (!can_take(input, target, weight, autocasts(input)))
    refuse_cross_entropy(input, target, weight_or_none, reduction, ignore_index, label_smoothing);
  const bool probable = has_probabilities(input, target);
  TORCH_CHECK(!probable || ignore_index < 0,
              "ignore_index is not supported for floating point target");
  TORCH_CHECK(label_smoothing <= 1.0,
              "label_smoothing must be between 0.0 and 1.0. Got: ", label_smoothing);
  TORCH_CHECK_NOT_IMPLEMENTED(has_kernel(input), "fusedopt: cross_entropy has no kernel for ",
                              input.device(), "; torch.nn.functional.cross_entropy may have one");
  for (const Tensor* each : {&input, &target, &weight}) refuse_forward_mode("cross_entropy", *each);
  TORCH_CHECK(!wants_gradient(weight),
              "fusedopt: cross_entropy has no gradient for its weights; expected a weight that "
              "requires none");
  if (probable && target.scalar_type() != input.scalar_type()) {
    const auto type = at::promote_types(input.scalar_type(), target.scalar_type());
    TORCH_CHECK(!in_place || type == input.scalar_type(),
                "fusedopt: cross_entropy with inplace=True does not take probabilities");
    const auto of_type =
        weight.defined() ? std::optional<Tensor>(weight.to(at::toOpMathType(type))) : std::nullopt;
    return fusedopt::cross_entropy(input.to(type), target.to(type), of_type, reduction,
                                   ignore_index, label_smoothing, z_loss, with_lse, in_place);
  }
  const bool of_input = wants_gradient(input), of_target = probable && wants_gradient(target);
  const bool widen = widens(input);
  if (in_place) {
    TORCH_CHECK(!probable,
                "fusedopt: cross_entropy with inplace=True does not take probabilities as target; "
                "leave inplace out");
    TORCH_CHECK(!(of_input && input.is_leaf()),
                "fusedopt: cross_entropy with inplace=True would overwrite a leaf that requires a "
                "gradient; leave inplace out");
    TORCH_CHECK(!may_overlap_itself(input),
                "fusedopt: cross_entropy with inplace=True got logits of which several lie at one "
                "address, as expand() makes them; leave inplace out, or clone() them");
    TORCH_CHECK(
        !(of_input && input.is_view() && input._base().is_leaf() && input._base().requires_grad()),
        "fusedopt: cross_entropy with inplace=True would overwrite a view of a leaf that "
        "requires a gradient; leave inplace out");
  }
  decltype(make_node<CrossEntropyBackward>()) node;
  if (of_input || of_target) {
    node = make_node<CrossEntropyBackward>();
    if (probable)
      node->set_next_edges(torch::autograd::collect_next_edges(input, target));
    else
      node->set_next_edges(torch::autograd::collect_next_edges(input));
  }
  Tensor loss, lse, gradient, later;
  const Tensor logits = input.detach();  // it shares the version, which a gradient is checked by
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    if (in_place) {
      static const auto op = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow(kForwardInPlace, "")
                                 .typed<decltype(forward_in_place)>();
      gradient = logits;
      std::tie(loss, lse, later) = op.call(gradient, target, weight_or_none, reduction,
                                           ignore_index, label_smoothing, z_loss, widen, with_lse);
    } else {
      static const auto op =
          c10::Dispatcher::singleton().findSchemaOrThrow(kForward, "").typed<decltype(forward)>();
      std::tie(loss, lse, gradient, later) =
          op.call(logits, target.detach(), weight_or_none, reduction, ignore_index, label_smoothing,
                  z_loss, widen, with_lse, of_input);
    }
  }
  if (in_place && !input.is_inference()) torch::autograd::impl::bump_version(input);
  if (node) {
    torch::autograd::set_history(loss, node);
    node->in_place = in_place;
    if (of_input) node->save(gradient, node->gradient);
    if (divides_later(input.scalar_type(), reduction)) node->later = later;
    node->reduction = reduction;
    node->class_axis = class_dim(input);
    if (reduction == kNone && !probable) {
      node->target = SavedVariable(target, false);
      node->ignore_index = ignore_index;
    }
    if (of_target) {
      node->input = SavedVariable(input, false);
      if (weight.defined()) node->weight = SavedVariable(weight, false);
      node->label_smoothing = std::max(0.0, label_smoothing);
      node->class_count = c10::SymFloat(input.sym_size(class_dim(input)));
      node->target_type = target.scalar_type();
    }
  }
  return {loss, lse};
}

}  // namespace
}  // namespace fusedopt
