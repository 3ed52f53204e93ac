// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What one optimizer walks over in a step.
#pragma once

#include <deque>
#include <limits>
#include <memory>
#include <unordered_set>

#include "flat.h"
#include "instruction_set.h"
#include "member.h"
#include "options.h"
#include "rows.h"
#include "workspace.h"

namespace fusedopt {
namespace {

// What one optimizer walks over in a step. It is built anew whenever parameters, their state or the
// set of buffers change; gradients are looked up in every step.
class Plan {
 public:
  Plan(std::string optimizer, const std::string& rule, std::shared_ptr<Workspace> workspace)
      : optimizer_(std::move(optimizer)),
        rule_(find_rule(rule)),
        option_reader_(rule_),
        params_key_("params"),
        workspace_(std::move(workspace)) {}

  void add_group(const py::dict& group, bool capturable) {
    group_sizes_.push_back(0);
    options_.emplace_back();
    rows_of_group_.emplace_back();
    capturable_.push_back(capturable);
    option_reader_.read(optimizer_, group.ptr(), group_sizes_.size() - 1, options_.back());
    variants_.push_back(rule_.variant(options_.back().values.data()));
  }

  // Adds the next parameter of the group added last. states are in the order of state_names, codes
  // followed by their scales, and then the master, or none while there is no gradient yet;
  // flat_grad is where its gradient lies in a flat buffer.
  // on_device says that the host need not know its count of steps, which for a rule that has none
  // in its state is first_count, where it has just been made.
  void add(const py::object& param, const std::string& name, bool duplicate,
           const std::optional<py::tuple>& states, bool first, uintptr_t flat_grad,
           const Storage& storage, bool on_device, const std::optional<py::object>& first_count,
           int lineage) {
    const at::Tensor& tensor = THPVariable_Unpack(param.ptr());
    Record r;
    Entry e;
    r.param = param;
    r.name = name;
    r.scalar = tensor.scalar_type();
    r.dtype = *storage_dtype(r.scalar);
    r.state_type = storage.state;
    r.device = tensor.device();
    r.dense = tensor.is_non_overlapping_and_dense();
    r.contiguous = tensor.is_contiguous();
    r.strides = tensor.strides().vec();
    r.has_state = states.has_value();
    r.on_device = on_device;
    const int64_t reals = tensor.is_complex() ? 2 : 1;
    e.param = param.ptr();
    e.group = int(group_sizes_.size()) - 1;
    e.duplicate = duplicate;
    e.first = first;
    e.float64 = r.dtype == DType::float64;
    e.param_size = size_of(r.dtype);
    e.state_size = uint8_t(c10::elementSize(storage.state));
    e.coded = storage.is_coded(r.dtype);
    e.span.param = const_cast<void*>(tensor.unsafeGetTensorImpl()->data());
    e.span.numel = tensor.numel() * reals;
    bool in_slots = slots().holds(tensor);
    const auto set_count = [&](const py::object& count) {
      r.count = count;
      e.count = static_cast<float*>(address_of(count.ptr()));
      e.count_version = version_of(count.ptr());
      if (!duplicate) counts_are_shared_ = !counts_.insert(e.count).second || counts_are_shared_;
    };
    if (first_count && on_device) set_count(*first_count);
    if (states) {
      size_t next = 0;
      const auto take = [&] { return py::reinterpret_borrow<py::object>((*states)[next++]); };
      const auto take_part = [&] {
        r.parts.push_back(take());
        e.parts[e.part_count] = r.parts.back().ptr();
        void* const address = address_of(r.parts.back().ptr());
        e.part_addresses[e.part_count++] = address;
        return address;
      };
      if (storage.counts_steps) set_count(take());
      for (int k = 0; k < registry().variants[variant_of(e)].states; ++k) {
        const py::object state = take();
        e.span.states[k] = address_of(state.ptr());
        e.tensors[e.tensor_count++] = state.ptr();
        in_slots = in_slots && slots().holds(THPVariable_Unpack(state.ptr()));
        r.states.push_back(state);
        if (storage.in_codes()) e.coding.scales[k] = static_cast<float*>(take_part());
      }
      if (storage.master_bits != 0) e.coding.master = take_part();
    }
    if (e.coded) {
      in_slots = false;
      e.coding.param = storage.param_code(r.dtype);
      e.coding.state = storage.state_code();
      e.coding.key = random_key(storage.seed, storage.ordinal);
      if (storage.master_bits != 0 && r.dtype == DType::bfloat16)
        e.weights = &workspace_->weights_of(param.ptr());
    }
    if (r.count) e.tensors[e.tensor_count] = r.count.ptr();
    if (in_slots) {
      e.flat_grad = reinterpret_cast<const void*>(flat_grad);
      e.padding = padded(tensor.numel()) * reals - e.span.numel;
    }
    e.device_counts = on_device && e.count != nullptr;
    if (e.device_counts) e.coding.count = e.count;
    if (e.device_counts && !duplicate) {
      e.lineage = lineage;
      if (lineages_.size() <= size_t(lineage)) lineages_.resize(lineage + 1, {0, 0});
      ++lineages_[lineage].members;
    }
    if (!duplicate) {
      const bool without_state =
          !rule_.counts_steps && registry().variants[variant_of(e)].states == 0;
      device_decides_ = device_decides_ && (on_device || without_state);
      one_accelerator_ = one_accelerator_ && r.device.type() == kAccelerator &&
                         (records_.empty() || records_[0].device == r.device);
      elements_ += e.span.numel;
    }
    entries_.push_back(e);
    found_.push_back(nullptr);
    ++group_sizes_.back();
    records_.push_back(std::move(r));
  }

  // One step over all parameters that have a gradient. Returns None when it is done. A list means
  // that nothing was changed and the plan has to be built anew first, with state for the
  // parameters listed (by position).
  std::optional<std::vector<int>> step(const py::list& groups, const py::object& grad_scale,
                                       const py::object& found_inf,
                                       const std::optional<double>& max_grad_norm) {
    const at::NoGradGuard no_grad;
    if (records_.empty()) one_accelerator_ = false;
    factor_ = FactorSource{};
    clips_ = max_grad_norm.has_value();
    factor_.max_grad_norm = max_grad_norm.value_or(0);
    if (!grad_scale.is_none()) {
      factor_.grad_scale = on_the_accelerator(grad_scale);
      if (factor_.grad_scale == nullptr)
        factor_.factor = 1 / number(grad_scale.ptr(), [&] { return optimizer_ + ": grad_scale"; });
    }
    if (!found_inf.is_none()) {
      // Where a count of steps is the host's, it has to know whether there is a step.
      if (device_decides_) factor_.found_inf = on_the_accelerator(found_inf);
      if (factor_.found_inf == nullptr &&
          number(found_inf.ptr(), [&] { return optimizer_ + ": found_inf"; }) != 0) {
        // Nobody looks at the gradients then; their norm is not finite.
        if (clips_) workspace_->note_norm(norm_device(), NAN);
        return std::nullopt;
      }
    }

    if (!prepare(groups)) return std::move(missing_);
    check_capture();
    run();
    finish();
    return std::nullopt;
  }

  // For the garbage collector: a parameter may refer to its optimizer, which holds its plan.
  int traverse(visitproc visit, void* arg) const {
    for (const Record& r : records_) {
      Py_VISIT(r.param.ptr());
      for (const auto& state : r.states) Py_VISIT(state.ptr());
      for (const auto& part : r.parts) Py_VISIT(part.ptr());
      if (r.count) Py_VISIT(r.count.ptr());
    }
    return 0;
  }
  void clear() {
    group_sizes_.clear();  // so that a step, should there be one yet, asks for another plan
    entries_.clear();
    std::vector<Record>().swap(records_);
  }

  // Spans walked by the last step.
  int64_t span_count() const {
    size_t count = 0;
    for (const auto& work : work_) count += work.spans.size();
    return int64_t(count);
  }

 private:
  std::string describe(const Record& r) const { return optimizer_ + ": " + r.name; }

  int variant_of(const Entry& e) const { return rule_.first_variant + variants_[e.group]; }

  // Where kernels can read a scaler's tensor, else null.
  const float* on_the_accelerator(const py::object& value) const {
    if (!one_accelerator_ || !is_on_accelerator(value.ptr())) return nullptr;
    const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
    if (tensor.scalar_type() != at::kFloat || tensor.device() != records_[0].device) return nullptr;
    return tensor.const_data_ptr<float>();
  }

  c10::Device norm_device() const {
    return one_accelerator_ ? records_[0].device : c10::Device(c10::kCPU);
  }

  // Whether all the spans could be made; if not, missing_ tells for whom state has to be made.
  bool prepare(const py::list& groups) {
    missing_.clear();
    active_.clear();
    temporaries_.clear();
    copy_back_.clear();
    outdated_.clear();
    for (auto& work : work_) work.clear();
    if (groups.size() != group_sizes_.size()) return false;

    // A device makes all of its rows, or none.
    rows_on_device_ = !lineages_.empty();
    for (size_t g = 0; g < group_sizes_.size(); ++g) {
      option_reader_.read(optimizer_, PyList_GET_ITEM(groups.ptr(), g), g, options_[g]);
      rows_on_device_ = rows_on_device_ || options_[g].any_on_device;
      rows_of_group_[g].clear();
      if (rule_.variant(options_[g].values.data()) != variants_[g]) return false;
    }

    params_.clear();
    for (size_t g = 0; g < group_sizes_.size(); ++g) {
      PyObject* params = PyDict_GetItem(PyList_GET_ITEM(groups.ptr(), g), params_key_.ptr());
      if (params == nullptr || !(PyList_Check(params) || PyTuple_Check(params)))
        throw py::type_error(optimizer_ + ": group " + text(g) +
                             ": params is not a list of parameters");
      if (size_t(PySequence_Fast_GET_SIZE(params)) != group_sizes_[g]) return false;
      params_.insert(params_.end(), PySequence_Fast_ITEMS(params),
                     PySequence_Fast_ITEMS(params) + group_sizes_[g]);
    }

    share<&Plan::look>();
    for (size_t i = 0; i < entries_.size(); ++i) {
      const void* grad = found_[i];
      if (grad == nullptr) continue;
      Entry& e = entries_[i];
      if (grad != unchecked()) {
        add_span(e, i, grad);
        continue;
      }
      if (params_[i] != e.param) return false;
      const at::Tensor& param = THPVariable_Unpack(e.param);
      if (!unchanged(e, records_[i], param)) return false;
      if (!check_and_add(e, i, param, param.unsafeGetTensorImpl()->grad()))
        missing_.push_back(int(i));
    }
    return missing_.empty();
  }

  // Calls a method with ranges of parameters, in several threads where there is work for them.
  template <void (Plan::*method)(int64_t begin, int64_t end)>
  void share() {
    const int64_t size = int64_t(entries_.size());
    const bool alone = elements_ < kManyElements || one_accelerator_;
    run_in_parallel(size, alone ? size : kShareGrain, this,
                    [](void* plan, int64_t begin, int64_t end) {
                      (static_cast<Plan*>(plan)->*method)(begin, end);
                    });
  }

  // Stands for the address of a gradient that has to be checked first.
  static const void* unchecked() {
    static const char address = 0;
    return &address;
  }

  // Looks up the gradients of the parameters [begin, end): their addresses where all checks have
  // let the same pass before, null for those to leave out. Changes nothing else, so that several
  // threads can share the work.
  void look(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Entry& e = entries_[i];
      found_[i] = unchecked();
      if (params_[i] != e.param) continue;
      const c10::TensorImpl& param = *THPVariable_Unpack(e.param).unsafeGetTensorImpl();
      const at::Tensor& grad = param.grad();
      if (!grad.defined() || e.duplicate) {
        found_[i] = nullptr;
      } else if (e.checked && is_as_checked(e, param, *grad.unsafeGetTensorImpl())) {
        const void* address = grad.unsafeGetTensorImpl()->data();
        if (address != nullptr) found_[i] = address;
      }
    }
  }

  static bool is_as_checked(const Entry& e, const c10::TensorImpl& param,
                            const c10::TensorImpl& grad) {
    // First the keys, which tell of subclasses whose other properties only Python knows.
    return param.key_set() == e.keys && grad.key_set() == e.grad_keys &&
           param.data() == e.span.param && param.numel() == e.numel && param.is_contiguous() &&
           param.dtype() == e.type && grad.is_contiguous() && grad.dtype() == e.grad_type &&
           grad.device() == e.device && grad.sizes() == param.sizes() && has_same_state(e) &&
           (e.weights == nullptr || e.weights->are_those_of(e.param));
  }

  static bool has_same_state(const Entry& e) {
    for (int k = 0; k < e.tensor_count; ++k)
      if (address_of(e.tensors[k]) != e.span.states[k]) return false;
    for (int k = 0; k < e.part_count; ++k)
      if (address_of(e.parts[k]) != e.part_addresses[k]) return false;
    if (e.count == nullptr) return true;
    PyObject* count = e.tensors[e.tensor_count];
    return address_of(count) == e.count &&
           (!e.device_counts || version_of(count) == e.count_version);
  }

  static bool unchanged(const Entry& e, const Record& r, const at::Tensor& param) {
    const c10::TensorImpl* impl = param.unsafeGetTensorImpl();
    if (impl->data() != e.span.param || param.scalar_type() != r.scalar ||
        impl->is_contiguous() != r.contiguous ||
        impl->numel() * (param.is_complex() ? 2 : 1) != e.span.numel)
      return false;
    if (!r.contiguous && param.strides() != at::IntArrayRef(r.strides)) return false;
    return has_same_state(e);
  }

  // Adds the span of one parameter; false where it has no state yet. Throws on a gradient that
  // cannot be taken.
  bool check_and_add(Entry& e, size_t position, const at::Tensor& param, const at::Tensor& grad) {
    const Record& r = records_[position];
    e.checked = false;
    e.span.kernel = check_gradient(e, r, param, grad);
    if (!r.has_state) return false;
    e.work = &work_of(r.device);
    e.grad_dtype = *storage_dtype(grad.scalar_type());
    e.grad_size = size_of(e.grad_dtype);
    e.coding.grad = e.grad_dtype;
    if (e.weights != nullptr && e.weights->address != nullptr && !e.weights->are_those_of(e.param))
      outdated_.push_back(position);
    if (e.span.numel == 0) {
      active_.push_back(position);
      count_on_device(e);
    } else if (!r.dense) {
      // States of such a parameter are dense; it is gathered and put back afterwards.
      const at::Tensor gathered = gather(param, dense_like(r, param));
      copy_back_.push_back({param, gathered});
      Entry there = e;
      there.span.param = gathered.mutable_data_ptr();
      add_span(there, position, dense_gradient(gathered, grad));
    } else if (!in_place(param, grad)) {
      add_span(e, position, dense_gradient(param, grad));
    } else {
      e.checked = param.is_contiguous() && grad.is_contiguous() &&
                  !param.unsafeGetTensorImpl()->is_python_dispatch() &&
                  !grad.unsafeGetTensorImpl()->is_python_dispatch();
      e.numel = param.numel();
      e.keys = param.key_set();
      e.grad_keys = grad.key_set();
      e.type = param.dtype();
      e.grad_type = grad.dtype();
      e.device = r.device;
      add_span(e, position, grad.unsafeGetTensorImpl()->data());
    }
    return true;
  }

  void count_on_device(const Entry& e) {
    if (!e.device_counts) return;
    auto& counts = e.work->counts;
    if (counts.empty() || counts.back().counts + counts.back().size != e.count)
      counts.push_back({e.count, 0});
    ++counts.back().size;
  }

  void add_span(const Entry& e, size_t position, const void* grad) {
    DeviceWork& work = *e.work;
    active_.push_back(position);
    count_on_device(e);
    Span span = e.span;
    span.grad = grad;
    span.row = row(e, work);
    if (e.coded) {
      Coding& coding = entries_[position].coding;
      if (e.count != nullptr && !e.device_counts) coding.step = uint32_t(*e.count) + 1;
      span.coding = &coding;
    }
    if (clips_) work.gradients.push_back({grad, span.numel, work.chunks(), e.grad_dtype});
    if (work.spans.empty() || !extend(work.spans.back(), span, e)) {
      span.offset = work.spans.empty() ? 0 : work.spans.back().offset + work.spans.back().numel;
      work.spans.push_back(span);
    }
    // Padding belongs to a flat buffer only where all of the streams are in one.
    open_padding_ =
        e.padding > 0 && grad == e.flat_grad && work.keeps_zero[span.row] ? e.padding : 0;
  }

  int check_gradient(const Entry& e, const Record& r, const at::Tensor& param,
                     const at::Tensor& grad) const {
    if (grad.layout() != at::kStrided)
      throw std::runtime_error(describe(r) + " has a gradient of layout " + text(grad.layout()) +
                               "; " + optimizer_ +
                               " supports dense gradients only (for an embedding: sparse=False)");
    if (grad.device() != r.device)
      throw py::value_error(describe(r) + " is on " + text(r.device) + " but its gradient is on " +
                            text(grad.device()) + "; move one of them");
    if (grad.numel() > 0 && grad.unsafeGetTensorImpl()->data() == nullptr)
      throw py::value_error(describe(r) +
                            " has a gradient without memory (its storage was resized "
                            "or it was made on the meta device); give it one with memory, or None");
    if (grad.sizes() != param.sizes())
      throw py::value_error(describe(r) + " has shape " + text(param.sizes()) +
                            " but its gradient has shape " + text(grad.sizes()));
    const auto grad_dtype = storage_dtype(grad.scalar_type());
    if (e.coded && (grad_dtype == r.dtype || grad_dtype == DType::float32))
      return registry().coded_kernel(variant_of(e));
    const int index = grad_dtype && !e.coded && grad.is_complex() == param.is_complex()
                          ? combination(r.dtype, *grad_dtype, *storage_dtype(r.state_type))
                          : -1;
    if (index < 0)
      throw py::type_error(describe(r) + ": a " + text(param.scalar_type()) + " parameter with a " +
                           text(grad.scalar_type()) + " gradient and " + text(r.state_type) +
                           " states is not supported; a gradient has its parameter's dtype or "
                           "float32");
    return registry().kernel(variant_of(e), index);
  }

  static bool in_place(const at::Tensor& like, const at::Tensor& grad) {
    if (grad.is_conj() || grad.is_neg()) return false;
    return (grad.is_contiguous() && like.is_contiguous()) ||
           same_strides(like.sizes(), like.strides(), grad.strides());
  }

  static at::Tensor gather(const at::Tensor& from, at::Tensor to) {
    to.copy_(from.detach());
    return to;
  }

  const void* dense_gradient(const at::Tensor& like, const at::Tensor& grad) {
    temporaries_.push_back(
        gather(grad, at::empty_strided(like.sizes(), like.strides(), grad.options())));
    return temporaries_.back().const_data_ptr();
  }

  static at::Tensor dense_like(const Record& r, const at::Tensor& param) {
    if (r.states.empty() || r.state_type == at::kByte) return at::empty_like(param);
    return at::empty_strided(param.sizes(), THPVariable_Unpack(r.states[0].ptr()).strides(),
                             param.options());
  }

  // Lengthens the last span by one that adjoins it in every stream.
  bool extend(Span& last, const Span& span, const Entry& e) const {
    if (last.kernel != span.kernel || last.row != span.row || e.coded) return false;
    const int64_t length = last.numel + open_padding_;
    const auto adjoins = [&](const void* a, const void* b, int64_t size) {
      return static_cast<const char*>(a) + length * size == static_cast<const char*>(b);
    };
    if (!adjoins(last.param, span.param, e.param_size) ||
        !adjoins(last.grad, span.grad, e.grad_size))
      return false;
    for (int k = 0; k < e.tensor_count; ++k)
      if (!adjoins(last.states[k], span.states[k], e.state_size)) return false;
    last.numel = length + span.numel;
    return true;
  }

  DeviceWork& work_of(c10::Device device) {
    for (auto& work : work_)
      if (work.device == device) return work;
    work_.push_back({device});
    return work_.back();
  }

  bool makes_rows(c10::Device device) const {
    return rows_on_device_ && device.type() == kAccelerator;
  }

  // The row of the hyper table for a parameter's group and step count.
  int row(const Entry& e, DeviceWork& work) {
    const float taken = e.count == nullptr || e.device_counts ? 0 : *e.count;
    const bool first = e.device_counts || e.first;
    const int lineage = e.device_counts ? e.lineage : -1;
    auto& cached = rows_of_group_[e.group];
    for (auto it = cached.rbegin(); it != cached.rend() && it - cached.rbegin() < 8; ++it)
      if (it->taken == taken && it->lineage == lineage && it->first == first &&
          it->float64 == e.float64 && it->work == &work)
        return it->index;
    GroupOptions& options = options_[e.group];
    if (options.any_on_device && !all_on(work.device, options))
      option_reader_.fetch(optimizer_, e.group, options);
    const int index = int(work.float64.size());
    const bool source_of_row = makes_rows(work.device);
    HyperRow row{};
    // What a device is to make differs from this in no way that matters for zeros.
    rule_.row(options.values.data(), source_of_row ? 1 : double(taken) + 1,
              source_of_row ? e.first : first, e.float64, row);
    work.float64.push_back(e.float64);
    work.keeps_zero.push_back(registry().variants[variant_of(e)].zero_stays_zero(row, e.float64));
    if (source_of_row) {
      RowSource source{};
      for (int i = 0; i < rule_.option_count; ++i) set_option(source, options, i);
      source.count = e.device_counts ? e.count : nullptr;
      source.taken = taken;
      source.row = uint32_t(index);
      source.first = first;
      source.float64 = e.float64;
      work.sources.push_back(source);
    } else {
      work.rows.push_back(row);
    }
    cached.push_back({&work, taken, first, e.float64, lineage, index});
    return index;
  }

  static bool all_on(c10::Device device, const GroupOptions& options) {
    for (const py::object& value : options.on_device)
      if (value && THPVariable_Unpack(value.ptr()).device() != device) return false;
    return true;
  }

  static void set_option(RowSource& source, const GroupOptions& options, int i) {
    if (!options.on_device[i]) {
      source.set(i, options.values[i]);
      return;
    }
    const at::Tensor& tensor = THPVariable_Unpack(options.on_device[i].ptr());
    const bool wide = tensor.scalar_type() == at::kDouble;
    source.set(i, wide ? OptionKind::float64 : OptionKind::float32, tensor.const_data_ptr());
  }

  // Captured, a step is replayed as it was. What the host knows of it would stay for ever.
  void check_capture() {
    std::optional<c10::Device> capturing;
    for (const auto& work : work_)
      if (!work.spans.empty() && is_capturing(work.device)) capturing = work.device;
    if (!capturing) return;
    for (const size_t position : active_) {
      const Entry& e = entries_[position];
      const Record& r = records_[position];
      if (!capturable_[e.group] || (r.count && !r.on_device))
        throw std::runtime_error(
            describe(r) +
            " is to be stepped in a CUDA graph, which would replay today's step count for ever; "
            "construct " +
            optimizer_ + " with capturable=True, and a tensor as lr where a scheduler changes it");
      if (r.device != *capturing)
        throw std::runtime_error(describe(r) + " is on " + text(r.device) +
                                 " and no part of the CUDA graph that is captured on " +
                                 text(*capturing) + "; give it an optimizer of its own");
    }
    for (const size_t position : outdated_)
      throw std::runtime_error(describe(records_[position]) +
                               " was changed since the last step, which a CUDA graph would find at "
                               "each replay; take a step before capture begins");
    workspace_->captured = true;
  }

  void run() {
    // Others' weights are their own masters.
    for (const size_t position : outdated_)
      THPVariable_Unpack(records_[position].parts.back().ptr()).zero_();
    py::gil_scoped_release release;
    // With one accelerator the factor can be worked out there.
    factor_.clips = clips_ && one_accelerator_;
    if (clips_ && !factor_.clips) clip_on_host();
    if (factor_.clips && work_.empty()) workspace_->note_norm(norm_device(), 0);
    const bool control = factor_.clips || factor_.grad_scale || factor_.found_inf;
    if (factor_.factor != 1 && !control) scale_rows();
    for (auto& work : work_) {
      if (work.device.type() == kAccelerator) {
        run_on_accelerator(work, control || (factor_.factor != 1 && makes_rows(work.device)));
      } else if (!work.spans.empty()) {
        cpu::step(work.spans.data(), work.spans.size(), work.rows.data(), active_isa,
                  run_in_parallel);
      }
    }
  }

  void scale_rows() {
    // rounded() in cpu/update.h wants to see no NaN but those of arithmetic.
    if (std::isnan(factor_.factor)) factor_.factor = std::numeric_limits<double>::quiet_NaN();
    for (auto& work : work_)
      for (size_t i = 0; i < work.rows.size(); ++i)
        rule_.scale_gradient(factor_.factor, work.float64[i], work.rows[i]);
  }

  // The norm over all devices. Those that are accelerators are waited for.
  void clip_on_host() {
    double sum = 0;
    for (auto& work : work_) {
      if (work.gradients.empty()) continue;
      if (work.device.type() == kAccelerator) {
        DeviceStep step = step_on(work, true);
        step.factor.clips = true;
        step.span_count = 0;
        step.source_count = 0;
        step.count_ranges = 0;
        launch(work, step);
        sum += workspace_->sum_of_squares(work.device);
      } else {
        sums_.resize(work.chunks());
        sum += cpu::sum_of_squares(work.gradients.data(), work.gradients.size(), sums_.data(),
                                   active_isa, run_in_parallel);
      }
    }
    double norm;
    FactorSource source = factor_;
    source.clips = true;
    factor_.factor = grad_factor(source, sum, norm);
    workspace_->note_norm(c10::kCPU, norm);
  }

  DeviceStep step_on(const DeviceWork& work, bool control) const {
    DeviceStep step;
    step.rule = int(&rule_ - registry().rules.data());
    step.spans = work.spans.data();
    step.span_count = work.spans.size();
    step.rows = makes_rows(work.device) ? nullptr : work.rows.data();
    step.sources = work.sources.data();
    step.source_count = work.sources.size();
    step.counts = work.counts.data();
    step.count_ranges = work.counts.size();
    step.gradients = work.gradients.data();
    step.gradient_count = work.gradients.size();
    if (control || !work.sources.empty()) {
      const c10::DeviceGuard guard(work.device);
      const auto memory = workspace_->get(work.device, work.sources.size(), work.chunks());
      if (control) step.control = memory.control;
      step.device_rows = memory.rows;
      step.sums = memory.sums;
    }
    return step;
  }

  void run_on_accelerator(const DeviceWork& work, bool control) {
    if (work.spans.empty() && work.counts.empty() && !control) return;
    DeviceStep step = step_on(work, control);
    step.factor = factor_;
    if (factor_.clips) workspace_->note_norm(work.device);
    launch(work, step);
  }

  void launch(const DeviceWork& work, const DeviceStep& step) const {
    const c10::DeviceGuard guard(work.device);
    if (const char* error = cuda::step(step, stream_of(work.device)))
      throw std::runtime_error(optimizer_ + ": the step on " + text(work.device) +
                               " failed: " + error);
  }

  void finish() {
    for (auto& back : copy_back_) {
      at::Tensor param = back.param.detach();
      param.copy_(back.contiguous);
    }
    if (counts_are_shared_) {
      count_steps(0, int64_t(entries_.size()));
    } else {
      share<&Plan::count_steps>();
    }
    if (!lineages_.empty()) part_lineages();
    temporaries_.clear();
    copy_back_.clear();
  }

  // Counts the step of those parameters in [begin, end) that took one.
  void count_steps(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (found_[i] == nullptr) continue;
      Entry& e = entries_[i];
      if (e.count != nullptr && !e.device_counts) *e.count += 1;
      e.first = false;
      c10::TensorImpl* impl = THPVariable_Unpack(e.param).unsafeGetTensorImpl();
      if (!impl->is_inference()) impl->bump_version();
      if (e.weights != nullptr) *e.weights = Weights::of(e.param);
    }
  }

  // Where not all of a lineage took a step, those that did are a lineage of their own from now on.
  void part_lineages() {
    for (const size_t position : active_)
      if (entries_[position].device_counts) ++lineages_[entries_[position].lineage].active;
    const size_t before = lineages_.size();
    std::vector<int> successor(before, -1);
    for (const size_t position : active_) {
      Entry& e = entries_[position];
      if (!e.device_counts) continue;
      const Lineage from = lineages_[e.lineage];
      if (from.active == from.members) continue;
      int& to = successor[e.lineage];
      if (to < 0) {
        to = int(lineages_.size());
        lineages_.push_back({from.active, 0});
      }
      e.lineage = to;
    }
    for (size_t i = 0; i < before; ++i) {
      if (successor[i] >= 0) lineages_[i].members -= lineages_[i].active;
      lineages_[i].active = 0;
    }
  }

  std::string optimizer_;
  const RuleInfo& rule_;
  OptionReader option_reader_;
  py::str params_key_;
  std::shared_ptr<Workspace> workspace_;
  std::vector<Record> records_;
  std::vector<Entry> entries_;  // one for each record
  int64_t elements_ = 0;        // of all parameters, in reals
  std::unordered_set<const float*> counts_;
  bool counts_are_shared_ = false;  // somebody gave several parameters the same count
  std::vector<size_t> group_sizes_;
  std::vector<int> variants_;
  std::vector<bool> capturable_;  // of each group
  std::vector<GroupOptions> options_;
  std::vector<std::vector<CachedRow>> rows_of_group_;
  std::vector<Lineage> lineages_;  // empty: the host counts all steps
  bool device_decides_ = true;     // whether a step takes place need not be known to the host
  bool one_accelerator_ = true;    // all parameters are on the same one

  // Of the step at hand; kept so that a step allocates nothing.
  FactorSource factor_;
  bool clips_ = false;
  bool rows_on_device_ = false;
  int64_t open_padding_ = 0;  // padding behind the last span that may be walked along
  std::vector<int> missing_;
  std::vector<PyObject*> params_;   // of all groups
  std::vector<const void*> found_;  // see look()
  std::vector<size_t> active_;      // positions
  std::vector<size_t> outdated_;    // those whose master belongs to other weights
  std::deque<DeviceWork> work_;     // whose members stay where they are
  std::vector<double> sums_;
  std::vector<at::Tensor> temporaries_;
  std::vector<CopyBack> copy_back_;
};

Plan* plan_of(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  const bool constructed = instance->get_value_and_holder().holder_constructed();
  return constructed ? py::cast<Plan*>(py::handle(self)) : nullptr;
}

// Lets the garbage collector look through a Plan.
void collect_plans(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const Plan* plan = plan_of(self);
    return plan == nullptr ? 0 : plan->traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    if (Plan* plan = plan_of(self)) plan->clear();
    return 0;
  };
}

}  // namespace
}  // namespace fusedopt
