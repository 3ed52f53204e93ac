// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// One parameter as a plan has it, and whether it is as it was when the plan was made.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "flat.h"
#include "formats.h"
#include "work.h"
#include "workspace.h"

namespace fusedopt {
namespace {

// What Python says of a parameter when it makes a plan.
struct MemberInfo {
  py::object param;  // the user's
  py::object local;  // the plain tensor that is stepped
  std::string name;
  bool duplicate;  // the same parameter again: it is stepped once
  // The tensors of its state, none while there was no gradient yet: the count of steps, where there
  // is one, the rule's states in order, codes followed by their scales, and then the master.
  std::optional<py::tuple> states;
  bool first;                 // its state was made for this very step
  uintptr_t flat_grad;        // where its gradient lies in a flat buffer, else 0
  at::ScalarType state_type;  // a byte: codes and scales
  int master_bits;            // 0: no master
  bool stochastic;            // how it is rounded
  bool counts_steps;          // whether a count of steps is among the tensors of its state
  uint64_t seed, ordinal;     // of its random bits
  bool on_device;             // whether the host need not know its count of steps
  // That count where a rule has none in its state and the device counts.
  std::optional<py::object> first_count;
  int lineage;
};

// A member, and what a step has to find unchanged, or else a plan is made anew. Tensors are held as
// Python objects: torch.utils.swap_tensors may exchange the tensor behind one.
struct Member {
  py::object param, local;
  std::vector<py::object> states;  // in the variant's order; empty while there is no gradient yet
  std::vector<py::object> parts;   // of a Coding: scales of the states, then the master
  py::object count;                // of its steps; on the device, kernels count
  std::string name;
  bool has_state = false;
  bool on_device = false;  // the count, or that there is none, is the device's affair
  bool dense = true;       // its elements, as they are, fill one run of memory
  bool contiguous = true;

  at::ScalarType scalar = at::kFloat;
  DType dtype = DType::float32;
  at::ScalarType state_type = at::kFloat;
  c10::Device device = c10::kCPU;
  std::vector<int64_t> strides;
};

// What every step reads of one parameter, apart from its Member as it is read by all steps. Where a
// step finds the parameter and its gradient as they were when all was checked, this is all that it
// needs.
struct Entry {
  PyObject* param = nullptr;
  PyObject* local = nullptr;
  std::array<PyObject*, kMaxStates + 1> tensors{};  // its states and, behind them, the count
  int tensor_count = 0;                             // without the count
  int part_count = 0;                               // tensors of the coding
  int group = 0;
  int in_group = 0;
  Span span{};             // but for what the step finds: grad, row and offset
  float* count = nullptr;  // of its steps
  DeviceWork* work = nullptr;
  const void* flat_grad = nullptr;  // where its gradient lies in a flat buffer, else null
  int64_t padding = 0;              // reals behind it, where it and its states lie in slots
  uint32_t count_version = 0;  // kernels do not change it, so that it tells of others who wrote
  int lineage = 0;             // parameters of one lineage have taken the same steps on the device
  uint8_t param_size = 0, grad_size = 0, state_size = 0;  // bytes of a real
  DType grad_dtype = DType::float32;
  bool duplicate = false;
  bool first = false;
  bool float64 = false;
  bool device_counts = false;  // its steps

  // What all checks have let pass.
  bool checked = false;
  int64_t numel = 0;
  c10::DispatchKeySet keys, grad_keys;
  caffe2::TypeMeta type, grad_type;
  c10::Device device = c10::kCPU;

  // How it is stored, where that takes more than dtypes.
  bool coded = false;
  Coding coding{};
  std::array<PyObject*, kMaxStates + 1> parts{};
  std::array<const void*, kMaxStates + 1> part_addresses{};
  Weights* weights = nullptr;  // where a remainder is worth nothing once the weights are others
};

// Whether elements are stored in a way that takes more than dtypes.
bool is_coded(const MemberInfo& info, DType param) {
  if (info.state_type == at::kByte || info.master_bits != 0 || info.stochastic) return true;
  return combination(param, param, *dtype_of(info.state_type)) < 0;
}

void set_count(const py::object& count, Member& m, Entry& e) {
  m.count = count;
  e.count = static_cast<float*>(address_of(count.ptr()));
  e.count_version = version_of(count.ptr());
}

// Takes the tensors of a state in their order; returns whether all states lie in slots.
bool set_states(const MemberInfo& info, int state_count, Member& m, Entry& e) {
  size_t next = 0;
  bool in_slots = true;
  const auto take = [&] { return py::reinterpret_borrow<py::object>((*info.states)[next++]); };
  const auto take_part = [&] {
    m.parts.push_back(take());
    e.parts[e.part_count] = m.parts.back().ptr();
    void* const address = address_of(m.parts.back().ptr());
    e.part_addresses[e.part_count++] = address;
    return address;
  };
  if (info.counts_steps) set_count(take(), m, e);
  for (int k = 0; k < state_count; ++k) {
    const py::object state = take();
    e.span.states[k] = address_of(state.ptr());
    e.tensors[e.tensor_count++] = state.ptr();
    in_slots = in_slots && slots().holds(THPVariable_Unpack(state.ptr()));
    m.states.push_back(state);
    if (info.state_type == at::kByte) {
      e.coding.scales[k] = static_cast<float*>(take_part());
      e.coding.row = row_of(THPVariable_Unpack(m.parts.back().ptr()), e.span.numel);
    }
  }
  if (info.master_bits != 0) e.coding.master = take_part();
  return in_slots;
}

// A member and its entry, from what Python says of it. Of groups and lineages they know nothing
// yet.
std::pair<Member, Entry> make_member(const MemberInfo& info, int state_count,
                                     Workspace& workspace) {
  const at::Tensor& tensor = THPVariable_Unpack(info.local.ptr());
  const int64_t reals = tensor.is_complex() ? 2 : 1;
  Member m;
  m.param = info.param;
  m.local = info.local;
  m.name = info.name;
  m.scalar = tensor.scalar_type();
  m.dtype = *dtype_of(m.scalar);
  m.state_type = info.state_type;
  m.device = tensor.device();
  m.dense = tensor.is_non_overlapping_and_dense() && !tensor.is_conj() && !tensor.is_neg();
  m.contiguous = tensor.is_contiguous();
  m.strides = tensor.strides().vec();
  m.has_state = info.states.has_value();
  m.on_device = info.on_device;

  Entry e;
  e.param = info.param.ptr();
  e.local = info.local.ptr();
  e.duplicate = info.duplicate;
  e.first = info.first;
  e.float64 = m.dtype == DType::float64;
  e.param_size = uint8_t(size_of(m.dtype));
  e.state_size = uint8_t(c10::elementSize(info.state_type));
  e.coded = is_coded(info, m.dtype);
  e.span.param = const_cast<void*>(tensor.unsafeGetTensorImpl()->data());
  e.span.numel = e.coding.row = tensor.numel() * reals;
  bool in_slots = slots().holds(tensor);
  if (info.first_count && info.on_device) set_count(*info.first_count, m, e);
  if (info.states) in_slots = set_states(info, state_count, m, e) && in_slots;
  if (e.coded) {
    in_slots = false;
    const auto format = find_param_format(m.scalar, info.master_bits, info.stochastic);
    TORCH_INTERNAL_ASSERT(format.has_value(), "no kernel knows how ", m.name, " is stored");
    e.coding.param = *format;
    e.coding.state = find_state_format(info.state_type);
    e.coding.key = random_key(info.seed, info.ordinal);
    if (info.master_bits != 0 && m.dtype == DType::bfloat16)
      e.weights = &workspace.weights_of(info.param.ptr());
  }
  if (m.count) e.tensors[e.tensor_count] = m.count.ptr();
  if (in_slots) {
    e.flat_grad = reinterpret_cast<const void*>(info.flat_grad);
    e.padding = padded(tensor.numel()) * reals - e.span.numel;
  }
  e.device_counts = info.on_device && e.count != nullptr;
  if (e.device_counts) {
    e.coding.count = e.count;
    e.lineage = info.lineage;
  }
  return {std::move(m), e};
}

// -- whether all is as it was --------------------------------------------------------------------

bool has_same_state(const Entry& e) {
  for (int k = 0; k < e.tensor_count; ++k)
    if (address_of(e.tensors[k]) != e.span.states[k]) return false;
  for (int k = 0; k < e.part_count; ++k)
    if (address_of(e.parts[k]) != e.part_addresses[k]) return false;
  if (e.count == nullptr) return true;
  PyObject* count = e.tensors[e.tensor_count];
  return address_of(count) == e.count && (!e.device_counts || version_of(count) == e.count_version);
}

// As all checks have let it pass.
bool is_as_checked(const Entry& e, const c10::TensorImpl& param, const c10::TensorImpl& grad) {
  // First the keys, which tell of subclasses whose other properties only Python knows.
  return param.key_set() == e.keys && grad.key_set() == e.grad_keys &&
         param.data() == e.span.param && param.numel() == e.numel && param.is_contiguous() &&
         param.dtype() == e.type && grad.is_contiguous() && grad.dtype() == e.grad_type &&
         grad.device() == e.device && grad.sizes() == param.sizes() && has_same_state(e) &&
         (e.weights == nullptr || e.weights->are_those_of(e.local));
}

// As when the plan was made.
bool is_as_planned(const Entry& e, const Member& m, const at::Tensor& param) {
  const c10::TensorImpl* impl = param.unsafeGetTensorImpl();
  if (impl->data() != e.span.param || param.scalar_type() != m.scalar ||
      impl->is_contiguous() != m.contiguous ||
      impl->numel() * (param.is_complex() ? 2 : 1) != e.span.numel)
    return false;
  if (!m.contiguous && param.strides() != at::IntArrayRef(m.strides)) return false;
  return has_same_state(e);
}

}  // namespace
}  // namespace fusedopt
