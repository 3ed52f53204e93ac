// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Cross-entropy of a linear layer as an operator, from the logits of some rows at a time.
#pragma once

#include "cross_entropy.h"

namespace fusedopt {
namespace {

// The chunks' memory is this part of that of all logits at most, but for the rows that products
// need to be quick, and not more than so many bytes.
constexpr int64_t kLogitParts = 9;
constexpr int64_t kLeastRows = 112;
constexpr int64_t kMostLogitBytes = int64_t(1) << 30;
// Products of a number of rows that is a multiple of this are the quickest.
constexpr int64_t kRowsOfBlock = 16;
// Columns of logits that are worked out at a time on a CPU: for few rows and many columns at once,
// MKL's product takes a third longer.
constexpr int64_t kColumns = 1024;
// MKL works out the transpose of a product of whole blocks of rows in up to a fifth less time, from
// so many rows and so long ones on.
constexpr int64_t kLeastTransposedRows = 64;
constexpr int64_t kLeastTransposedHidden = 256;
// Columns of a chunk's gradient that are widened at a time.
constexpr int64_t kWidenedColumns = 4096;

// The rows before which a chunk begins or ends: 0, ..., rows. Chunks are about equally long.
std::vector<int64_t> bounds_of_chunks(int64_t chunk_size, int64_t rows, int64_t row_bytes) {
  std::vector<int64_t> bounds{0};
  if (chunk_size > 0) {
    while (bounds.back() < rows) bounds.push_back(std::min(bounds.back() + chunk_size, rows));
    return bounds;
  }
  const int64_t wanted = std::max(kLeastRows, rows / kLogitParts);
  const int64_t most =
      std::max<int64_t>(1, std::min(wanted, kMostLogitBytes / std::max<int64_t>(1, row_bytes)));
  const int64_t unit = std::min(kRowsOfBlock, most);
  const int64_t units = (rows + unit - 1) / unit, in_chunk = most / unit;
  const int64_t chunks = (units + in_chunk - 1) / in_chunk;
  for (int64_t i = 1; i <= chunks; ++i) bounds.push_back(std::min(units * i / chunks * unit, rows));
  return bounds;
}

struct LinearArguments {
  Tensor input, linear_weight, bias;
  Tensor targets, probabilities;  // one of them is defined
  Tensor weight;                  // of classes, or undefined
  CrossEntropyOptions options;
  MeanOf mean;
  int64_t chunk_size;
};

LinearArguments linear_arguments(const Tensor& input, const Tensor& linear_weight,
                                 const Tensor& target, const std::optional<Tensor>& bias,
                                 const std::optional<Tensor>& weight,
                                 const CrossEntropyOptions& options, int64_t chunk_size) {
  const double rows = double(input.size(0));
  LinearArguments a{
      input,    linear_weight,      bias.value_or(Tensor()),
      Tensor(), Tensor(),           converted_weight(weight.value_or(Tensor()), input),
      options,  {{rows, rows}, {}}, chunk_size};
  if (target.dim() == 2) {
    a.probabilities = target.to(input.scalar_type()).contiguous();
  } else {
    a.targets = converted_targets(target);
    a.mean = check_targets(a.targets, linear_weight.size(0), options.ignore_index, a.weight);
  }
  return a;
}

struct LinearGradients {
  Tensor input, linear_weight, bias;  // undefined where none is wanted
  bool any() const { return input.defined() || linear_weight.defined() || bias.defined(); }
};

// Adds the product of a chunk's gradient and its input to a gradient of float32, or its own dtype.
void add_product(const Tensor& sum, const Tensor& gradient, const Tensor& input, bool first) {
  if (sum.scalar_type() == gradient.scalar_type()) {
    at::addmm_out(const_cast<Tensor&>(sum), sum, gradient.t(), input, first ? 0 : 1, 1);
    return;
  }
  const Tensor widened = input.to(sum.scalar_type());
  for (int64_t at = 0; at < gradient.size(1); at += kWidenedColumns) {
    const int64_t count = std::min(kWidenedColumns, gradient.size(1) - at);
    Tensor part = sum.narrow(0, at, count);
    at::addmm_out(part, part, gradient.narrow(1, at, count).t().to(sum.scalar_type()), widened,
                  first ? 0 : 1, 1);
  }
}

// What the products of a chunk are worked out in on a CPU, where the transposed ones are quicker.
struct TransposedProducts {
  Tensor logits, grad_input;  // [kColumns, rows], [hidden, rows]; undefined: as they are

  TransposedProducts(const LinearArguments& a, int64_t rows, bool of_input) {
    if (!a.input.is_cpu() || a.input.scalar_type() != at::kFloat || rows < kLeastTransposedRows ||
        a.input.size(1) < kLeastTransposedHidden)
      return;
    logits = at::empty({kColumns, rows}, a.input.options());
    if (of_input) grad_input = at::empty({a.input.size(1), rows}, a.input.options());
  }
  bool takes(int64_t rows) const {
    return logits.defined() && rows >= kLeastTransposedRows && rows % kRowsOfBlock == 0;
  }
};

// The logits of some rows.
void fill_logits(const LinearArguments& a, const Tensor& input, const TransposedProducts& by,
                 const Tensor& logits) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const bool by_columns = input.is_cpu() && !at::isReducedFloatingType(input.scalar_type());
  const int64_t step = by_columns ? kColumns : classes;
  for (int64_t at = 0; at < classes; at += step) {
    const int64_t count = std::min(step, classes - at);
    Tensor part = logits.narrow(1, at, count);
    const Tensor weight = a.linear_weight.narrow(0, at, count);
    const Tensor bias = a.bias.defined() ? a.bias.narrow(0, at, count) : a.bias;
    if (by.takes(rows)) {
      Tensor transposed = by.logits.narrow(0, 0, count).narrow(1, 0, rows);
      at::mm_out(transposed, weight, input.t());
      bias.defined() ? at::add_out(part, transposed.t(), bias) : part.copy_(transposed.t());
    } else if (bias.defined()) {
      at::addmm_out(part, bias, input, weight.t());
    } else {
      at::mm_out(part, input, weight.t());
    }
  }
}

// The gradient of the input of some rows, from that of their logits.
void fill_grad_input(const LinearArguments& a, const Tensor& gradient, const TransposedProducts& by,
                     Tensor part) {
  const int64_t rows = gradient.size(0);
  if (!by.takes(rows)) {
    at::mm_out(part, gradient, a.linear_weight);
    return;
  }
  Tensor transposed = by.grad_input.narrow(1, 0, rows);
  at::mm_out(transposed, a.linear_weight.t(), gradient.t());
  part.copy_(transposed.t());
}

// The losses of all rows, and the gradients. With row_grad, gradients of rows are multiplied by it.
void run_chunks(const LinearArguments& a, const Tensor& row_grad, const Tensor& losses,
                const Tensor& lse, const LinearGradients& gradients) {
  const int64_t rows = a.input.size(0), classes = a.linear_weight.size(0);
  const auto bounds = bounds_of_chunks(a.chunk_size, rows, classes * a.input.element_size());
  int64_t most = 0;
  for (size_t i = 1; i < bounds.size(); ++i) most = std::max(most, bounds[i] - bounds[i - 1]);
  const Tensor buffer = at::empty({most, classes}, a.input.options());
  const TransposedProducts by(a, most, gradients.input.defined());
  Tensor sum_of_weight = gradients.linear_weight, sum_of_bias = gradients.bias;
  const bool half = at::isReducedFloatingType(a.input.scalar_type());
  if (half && most < rows && sum_of_weight.defined() &&
      at::isReducedFloatingType(sum_of_weight.scalar_type()))
    sum_of_weight = at::empty_like(sum_of_weight, sum_of_weight.options().dtype(at::kFloat));
  if (half && sum_of_bias.defined() && at::isReducedFloatingType(sum_of_bias.scalar_type()))
    sum_of_bias = at::empty_like(sum_of_bias, sum_of_bias.options().dtype(at::kFloat));
  for (size_t i = 1; i < bounds.size(); ++i) {
    const int64_t at = bounds[i - 1], count = bounds[i] - at;
    const Tensor input = a.input.narrow(0, at, count);
    Tensor logits = buffer.narrow(0, 0, count);
    fill_logits(a, input, by, logits);
    const Rows walked = *find_rows(logits);
    run_rows(logits, walked, gradients.any() ? walked : Rows(),
             a.targets.defined() ? a.targets.narrow(0, at, count) : a.targets,
             a.probabilities.defined() ? a.probabilities.narrow(0, at, count) : a.probabilities,
             a.weight, a.options, a.mean, losses.narrow(0, at, count),
             lse.defined() ? lse.narrow(0, at, count) : Tensor());
    if (row_grad.defined()) logits.mul_(row_grad.narrow(0, at, count).unsqueeze(1));
    if (gradients.input.defined())
      fill_grad_input(a, logits, by, gradients.input.narrow(0, at, count));
    if (sum_of_weight.defined()) add_product(sum_of_weight, logits, input, at == 0);
    if (sum_of_bias.defined()) {
      const Tensor of_chunk = logits.sum(0, false, sum_of_bias.scalar_type());
      at == 0 ? sum_of_bias.copy_(of_chunk) : sum_of_bias.add_(of_chunk);
    }
  }
  for (const auto& [from, to] : {std::pair{sum_of_weight, gradients.linear_weight},
                                 std::pair{sum_of_bias, gradients.bias}}) {
    if (!to.defined()) continue;
    if (rows == 0) to.zero_();
    if (rows != 0 && !from.is_same(to)) to.copy_(from);
  }
}

Tensor empty_like_if(bool wanted, const Tensor& tensor, bool as_float = false) {
  const auto options = as_float ? tensor.options().dtype(at::kFloat) : tensor.options();
  return wanted ? at::empty_symint(tensor.sym_sizes(), options) : at::empty({0}, options);
}

Tensor defined_if(bool wanted, const Tensor& tensor) { return wanted ? tensor : Tensor(); }

using LinearResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A tensor with the shape, dtype and device of all logits, and no memory.
Tensor logits_like(const Tensor& input, const Tensor& linear_weight) {
  return at::empty_symint({input.sym_size(0), linear_weight.sym_size(0)},
                          input.options().device(at::kMeta));
}

LinearResults forward_linear(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                             const std::optional<Tensor>& bias, const std::optional<Tensor>& weight,
                             int64_t reduction, int64_t ignore_index, double label_smoothing,
                             double z_loss, bool widen, bool with_lse, int64_t chunk_size,
                             bool of_input, bool of_weight, bool of_bias) {
  const c10::DeviceGuard guard(input.device());
  const auto a = linear_arguments(input, linear_weight, target, bias, weight,
                                  {reduction, ignore_index, label_smoothing, z_loss}, chunk_size);
  const int64_t rows = input.size(0);
  const auto options = widen ? input.options().dtype(at::kFloat) : input.options();
  const Tensor loss = reduction == kNone ? at::empty({rows}, options) : at::empty({}, options);
  const Tensor lse = empty_lse(at::empty({with_lse ? rows : 0, 1}, input.options()), with_lse);
  const Tensor grad_input = empty_like_if(of_input, input);
  // Sums over many rows, which float16 may not hold before they are divided.
  const bool divides = divides_later(input.scalar_type(), reduction);
  const Tensor grad_weight = empty_like_if(of_weight, linear_weight, divides);
  const Tensor grad_bias = empty_like_if(of_bias, a.bias.defined() ? a.bias : input, divides);
  const Tensor losses = empty_losses(input, rows);
  run_chunks(a, Tensor(), losses, defined_if(with_lse, lse),
             {defined_if(of_input, grad_input), defined_if(of_weight, grad_weight),
              defined_if(of_bias, grad_bias)});
  const Tensor later = fill_loss(loss, losses, a.options, a.mean, input.scalar_type());
  return {loss, lse, grad_input, grad_weight, grad_bias, later};
}

LinearResults linear_meta(const Tensor& input, const Tensor& linear_weight, const Tensor&,
                          const std::optional<Tensor>& bias, const std::optional<Tensor>&,
                          int64_t reduction, int64_t, double, double, bool widen, bool with_lse,
                          int64_t, bool of_input, bool of_weight, bool of_bias) {
  const Tensor rows = at::empty_symint({input.sym_size(0), 1}, input.options());
  const bool divides = divides_later(input.scalar_type(), reduction);
  return {empty_loss(rows, reduction, widen),
          empty_lse(rows, with_lse),
          empty_like_if(of_input, input),
          empty_like_if(of_weight, linear_weight, divides),
          empty_like_if(of_bias, bias && bias->defined() ? *bias : input, divides),
          empty_number(input, divides)};
}

// The gradients where each row's loss has one of its own: from logits that are worked out again.
std::tuple<Tensor, Tensor, Tensor> backward_linear_rows(
    const Tensor& grad, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& weight, int64_t ignore_index,
    double label_smoothing, double z_loss, int64_t chunk_size, bool of_input, bool of_weight,
    bool of_bias) {
  const c10::DeviceGuard guard(input.device());
  const auto a = linear_arguments(input, linear_weight, target, bias, weight,
                                  {kNone, ignore_index, label_smoothing, z_loss}, chunk_size);
  const Tensor grad_input = empty_like_if(of_input, input);
  const Tensor grad_weight = empty_like_if(of_weight, linear_weight);
  const Tensor grad_bias = empty_like_if(of_bias, a.bias.defined() ? a.bias : input);
  const Tensor losses = empty_losses(input, input.size(0));
  // An ignored row has no gradient, whatever that of its loss is.
  const Tensor of_loss =
      a.targets.defined() ? grad.masked_fill(a.targets.eq(ignore_index), 0) : grad;
  run_chunks(a, of_loss, losses, Tensor(),
             {defined_if(of_input, grad_input), defined_if(of_weight, grad_weight),
              defined_if(of_bias, grad_bias)});
  return {grad_input, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_rows_meta(const Tensor&, const Tensor& input,
                                                    const Tensor& linear_weight, const Tensor&,
                                                    const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>&, int64_t, double,
                                                    double, int64_t, bool of_input, bool of_weight,
                                                    bool of_bias) {
  return {empty_like_if(of_input, input), empty_like_if(of_weight, linear_weight),
          empty_like_if(of_bias, bias && bias->defined() ? *bias : input)};
}

struct LinearCrossEntropyBackward : LossBackward {
  LinearCrossEntropyBackward() : LossBackward("linear_cross_entropy") {}

  void fill(const Tensor& grad, variable_list& results) override {
    if (reduction != kNone) {
      for (int i = 0; i < 3; ++i)
        if (of[i] && task_should_compute_output(i))
          results[i] = scaled(gradients[i].unpack(), grad, type);
      return;
    }
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fusedopt::_linear_cross_entropy_rows", "")
                               .typed<decltype(backward_linear_rows)>();
    bool wanted[3];
    for (int i = 0; i < 3; ++i) wanted[i] = of[i] && task_should_compute_output(i);
    const auto optional = [](const SavedVariable& saved) {
      const Tensor tensor = saved.unpack();
      return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
    };
    const auto [of_input, of_weight, of_bias] =
        op.call(grad.contiguous(), input.unpack(), linear_weight.unpack(), target.unpack(),
                optional(bias), optional(weight), ignore_index, label_smoothing, z_loss, chunk_size,
                wanted[0], wanted[1], wanted[2]);
    if (wanted[0]) results[0] = of_input;
    if (wanted[1]) results[1] = of_weight;
    if (wanted[2]) results[2] = of_bias;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& gradient : gradients) gradient.reset_data();
    for (auto* saved : {&input, &linear_weight, &target, &bias, &weight}) saved->reset_data();
  }

  std::string name() const override { return "FusedLinearCrossEntropyBackward"; }

  SavedVariable gradients[3];
  bool of[3] = {};
  int64_t reduction = kMean;
  at::ScalarType type = at::kFloat;
  // For the gradients of single rows.
  SavedVariable input, linear_weight, target, bias, weight;
  int64_t ignore_index = 0, chunk_size = 0;
  double label_smoothing = 0, z_loss = 0;
};

std::tuple<Tensor, Tensor> linear_cross_entropy(const Tensor& input, const Tensor& linear_weight,
                                                const Tensor& target,
                                                const std::optional<Tensor>& bias_or_none,
                                                const std::optional<Tensor>& weight_or_none,
                                                int64_t reduction, int64_t ignore_index,
                                                double label_smoothing, double z_loss,
                                                bool with_lse, int64_t chunk_size) {
  const auto device = input.device().type();
  const auto casts = [&](const Tensor& tensor) {
    return tensor.defined() && at::autocast::is_eligible(tensor, device) &&
           tensor.scalar_type() != at::kDouble;
  };
  Tensor x = input, w = linear_weight, bias = bias_or_none.value_or(Tensor());
  const bool autocast = autocasts(input);
  if (autocast) {
    const auto type = at::autocast::get_autocast_dtype(device);
    for (Tensor* each : {&x, &w, &bias})
      if (casts(*each)) *each = at::autocast::cached_cast(type, *each, device);
  }
  const Tensor weight = weight_or_none.value_or(Tensor());
  const bool same =
      w.scalar_type() == x.scalar_type() && w.device() == x.device() &&
      (!bias.defined() || (bias.scalar_type() == x.scalar_type() && bias.device() == x.device()));
  // What the linear layer would have to say, torch says.
  if (!same) at::linear(x.detach(), w.detach(), bias.defined() ? bias.detach() : bias);
  TORCH_CHECK(same, "fusedopt: linear_cross_entropy got an input of ", x.scalar_type(),
              " and a linear_weight of ", w.scalar_type(), "; expected one dtype and device");
  const Tensor like = logits_like(x, w);
  const auto on_meta = [](const Tensor& tensor) {
    return tensor.defined()
               ? at::empty_symint(tensor.sym_sizes(), tensor.options().device(at::kMeta))
               : tensor;
  };
  if (target.device() != x.device() || (weight.defined() && weight.device() != x.device()) ||
      !can_take(like, on_meta(target), on_meta(weight), autocast))
    refuse_cross_entropy(at::linear(x.detach(), w.detach()), target, weight_or_none, reduction,
                         ignore_index, label_smoothing);
  TORCH_CHECK(label_smoothing <= 1.0,
              "label_smoothing must be between 0.0 and 1.0. Got: ", label_smoothing);
  TORCH_CHECK_NOT_IMPLEMENTED(has_kernel(x), "fusedopt: linear_cross_entropy has no kernel for ",
                              x.device(), "; torch.nn.functional.cross_entropy may have one");
  const Tensor* const all[] = {&x, &w, &bias, &target, &weight};
  for (const Tensor* each : all) refuse_forward_mode("linear_cross_entropy", *each);
  TORCH_CHECK(!wants_gradient(weight),
              "fusedopt: linear_cross_entropy has no gradient for its weights of classes; expected "
              "a weight that requires none");
  const bool of[3] = {wants_gradient(x), wants_gradient(w), wants_gradient(bias)};
  const bool widen = autocast && at::isReducedFloatingType(x.scalar_type());
  decltype(make_node<LinearCrossEntropyBackward>()) node;
  if (of[0] || of[1] || of[2]) {
    node = make_node<LinearCrossEntropyBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, w, bias));
  }
  const bool now = reduction != kNone;
  Tensor loss, lse, gradients[3], later;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fusedopt::_linear_cross_entropy", "")
                               .typed<decltype(forward_linear)>();
    std::tie(loss, lse, gradients[0], gradients[1], gradients[2], later) =
        op.call(x.detach(), w.detach(), target.detach(),
                bias.defined() ? std::optional<Tensor>(bias.detach()) : std::nullopt,
                weight_or_none, reduction, ignore_index, label_smoothing, z_loss, widen, with_lse,
                chunk_size, now && of[0], now && of[1], now && of[2]);
  }
  if (!node) return {loss, lse};
  torch::autograd::set_history(loss, node);
  node->reduction = reduction;
  node->type = x.scalar_type();
  if (divides_later(x.scalar_type(), reduction)) node->later = later;
  for (int i = 0; i < 3; ++i) {
    node->of[i] = of[i];
    if (now && of[i]) node->save(gradients[i], node->gradients[i]);
  }
  if (!now) {
    node->input = SavedVariable(x, false);
    node->linear_weight = SavedVariable(w, false);
    node->target = SavedVariable(target, false);
    if (bias.defined()) node->bias = SavedVariable(bias, false);
    if (weight.defined()) node->weight = SavedVariable(weight, false);
    node->ignore_index = ignore_index;
    node->chunk_size = chunk_size;
    node->label_smoothing = label_smoothing;
    node->z_loss = z_loss;
  }
  return {loss, lse};
}

}  // namespace
}  // namespace fusedopt
