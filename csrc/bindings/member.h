// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// One parameter as a plan has it, and whether it is as it was when the plan was made.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "flat.h"
#include "formats.h"
#include "numbers.h"
#include "stored.h"
#include "workspace.h"

namespace fusedopt {
namespace {

// Where the elements of a shard lie in the whole parameter, in order: where a run of them begins,
// and how many they are.
using Runs = std::vector<std::pair<int64_t, int64_t>>;

// What Python says of a parameter when it makes a plan.
struct MemberInfo {
  py::object param;
  std::string name;
  bool duplicate;  // the same parameter again: it is stepped once
  // The keys of its state: the count of steps, where there is one, numbers, the rule's states in
  // order, codes followed by their scales, and then the master.
  py::tuple keys;
  uintptr_t flat_grad;        // where its gradient lies in a flat buffer, else 0
  at::ScalarType state_type;  // a byte: codes and scales
  int master_bits;            // 0: no master
  bool stochastic;            // how it is rounded
  bool counts_steps;          // whether a count of steps is the first of its keys
  uint64_t seed, ordinal;     // of its random bits
  bool on_device;             // whether the host need not know its count of steps
  // That count where a rule has none in its state and the device counts.
  std::optional<py::object> first_count;
  int lineage;
  Runs runs;
  int cut;  // the place of the process groups that it is cut among, in the plan's list of these
};

// A member, and what a step has to find unchanged, or else a plan is made anew. All tensors are
// borrowed: parameters from their group, which is looked up in each step, states from their
// dictionaries, which tell of changes or are looked up as well. They are known as Python objects,
// as torch.utils.swap_tensors may exchange the tensor behind one.
struct Member {
  PyObject* param = nullptr;
  std::string name;
  PyObject* values = nullptr;  // its state
  py::tuple keys;              // of that
  std::vector<TensorKind> kinds;
  StateTensors tensors{};  // as they are in the dictionary
  StateTensors locals{};   // the plain ones of these
  py::object spec;         // of a sharded one, which is not looked into while it is the same object
  py::object grad_spec;    // another one that is equal
  const void* last_grad_spec = nullptr;  // which may be gone
  Runs runs;
  std::vector<Coding> pieces;  // where it cannot be walked as one span in codes
  std::vector<int64_t> ends;   // the elements up to the end of each piece
  std::optional<py::object> first_count;
  uintptr_t flat_grad = 0;
  bool idle = false;  // it has had no gradient, and nobody has looked at it
  bool counts_steps = false;
  std::unique_ptr<Numbers> numbers;  // null: none
  bool in_order = true;              // states have the strides of a dense parameter
  bool on_device = false;            // the count, or that there is none, is the device's affair
  bool dense = true;                 // its elements, as they are, fill one run of memory
  bool contiguous = true;

  at::ScalarType scalar = at::kFloat;
  DType dtype = DType::float32;
  at::ScalarType state_type = at::kFloat;
  c10::Device device = c10::kCPU;
  std::vector<int64_t> strides;
  std::vector<int64_t> order;  // the strides of states that are not in codes

  // The place of the first state among the keys.
  size_t first_state() const {
    return (counts_steps ? 1 : 0) + (numbers ? size_t(numbers->count()) : 0);
  }
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
  Span span{};                 // but for what the step finds: grad, row and offset
  float* count = nullptr;      // of its steps
  Numbers* numbers = nullptr;  // of its member
  DeviceWork* work = nullptr;
  const void* flat_grad = nullptr;  // where its gradient lies in a flat buffer, else null
  int64_t padding = 0;              // reals behind it, where it and its states lie in slots
  uint32_t count_version = 0;  // kernels do not change it, so that it tells of others who wrote
  int lineage = 0;             // parameters of one lineage have taken the same steps on the device
  uint8_t param_size = 0, grad_size = 0, state_size = 0;  // bytes of a real
  DType grad_dtype = DType::float32;
  int cut = 0;
  int position = 0;  // in the plan
  bool duplicate = false;
  bool sharded = false;
  bool first = false;  // its state may have been made for a step that is still to come
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
  PyObject* master = nullptr;  // as it is in the dictionary
  Weights* weights = nullptr;  // where a remainder is worth nothing once the weights are others
};

// Whether elements are stored in a way that takes more than dtypes.
bool is_coded(const MemberInfo& info, DType param) {
  if (info.state_type == at::kByte || info.master_bits != 0 || info.stochastic) return true;
  return combination(param, param, *dtype_of(info.state_type)) < 0;
}

// Whether a tensor's elements lie as these strides say.
bool is_in(at::IntArrayRef order, const at::Tensor& tensor) {
  return !tensor.is_conj() && !tensor.is_neg() &&
         same_strides(tensor.sizes(), order, tensor.strides());
}

void set_count(PyObject* count, Entry& e) {
  e.tensors[e.tensor_count] = count;
  e.count = static_cast<float*>(address_of(count));
  if (e.device_counts) e.coding.count = e.count;
  e.count_version = version_of(count);
}

// Whether a tensor is what a member's key wants: another thread may have put it there since Python
// looked.
bool is_wanted(const Member& m, const Entry& e, size_t key, const at::Tensor& tensor) {
  const at::Tensor& local = THPVariable_Unpack(e.local);
  if (tensor.layout() != at::kStrided || tensor.requires_grad()) return false;
  if (key < m.first_state())
    return tensor.scalar_type() == at::kFloat && tensor.numel() == 1 &&
           tensor.device() == (m.on_device ? m.device : c10::Device(c10::kCPU));
  if (tensor.device() != m.device) return false;
  const size_t place = key - m.first_state(), states = size_t(e.tensor_count);
  const bool in_codes = m.state_type == at::kByte;
  if (in_codes && place < 2 * states && place % 2 == 1) {  // scales
    const Blocks blocks{e.span.numel, row_of(tensor, e.span.numel)};
    return tensor.scalar_type() == at::kFloat && tensor.is_contiguous() &&
           tensor.numel() == blocks.count();
  }
  if (tensor.sizes() != local.sizes()) return false;
  if (in_codes && place < 2 * states)
    return tensor.scalar_type() == at::kByte && tensor.is_contiguous();
  if (place < states)
    return c10::toRealValueType(tensor.scalar_type()) == m.state_type &&
           tensor.is_complex() == local.is_complex();
  return tensor.scalar_type() == param_formats()[e.coding.param].master && is_in(m.order, tensor);
}

// Where a span with a Coding has to be cut: at the ends of runs, and behind elements that complete
// a block which begins in another shard.
void set_pieces(bool by_rows, Member& m, Entry& e) {
  m.pieces.clear();
  m.ends.clear();
  const int64_t row = e.coding.row, in_row = Blocks{e.span.numel, row}.in_row();
  int64_t i = 0;
  for (auto [begin, left] : m.runs) {
    for (int64_t size; left > 0; i += size, begin += size, left -= size) {
      size = left;
      Coding piece = e.coding;
      piece.first_block = by_rows ? begin / row * in_row : begin / kBlock;
      piece.first_place = by_rows ? 0 : int32_t(begin % kBlock);
      if (piece.first_place != 0) size = std::min(size, int64_t(kBlock - piece.first_place));
      if (size == e.span.numel) {
        e.coding = piece;
        return;
      }
      if (!by_rows) piece.row = size;
      for (int k = 0; k < e.tensor_count; ++k)
        if (by_rows) piece.scales[k] += i / row * in_row;
      if (piece.master != nullptr)
        piece.master = static_cast<char*>(piece.master) + i * StreamBytes(piece).master;
      m.pieces.push_back(piece);
      m.ends.push_back(i + size);
    }
  }
}

// Takes the tensors of a member's state, whose order is that of its keys.
void set_tensors(const StateTensors& in_dictionary, const StateTensors& tensors, Member& m,
                 Entry& e) {
  m.tensors = in_dictionary;
  m.locals = tensors;
  bool by_rows = false;
  size_t next = m.first_state();
  e.part_count = 0;
  const auto take_part = [&] {
    PyObject* const part = tensors[next++];
    e.parts[e.part_count] = part;
    void* const address = address_of(part);
    e.part_addresses[e.part_count++] = address;
    return address;
  };
  m.in_order = true;
  for (int k = 0; k < e.tensor_count; ++k) {
    PyObject* const state = tensors[next++];
    const at::Tensor& tensor = THPVariable_Unpack(state);
    e.tensors[k] = state;
    e.span.states[k] = address_of(state);
    if (m.state_type == at::kByte) {
      e.coding.scales[k] = static_cast<float*>(take_part());
      const at::Tensor& scales = THPVariable_Unpack(e.parts[e.part_count - 1]);
      e.coding.row = row_of(scales, e.span.numel);
      by_rows = scales.dim() == 2;
    } else {
      m.in_order = m.in_order && is_in(m.order, tensor);
    }
  }
  if (next < m.keys.size()) {
    e.master = in_dictionary[next];
    e.coding.master = take_part();
  }
  if (m.counts_steps) set_count(tensors[0], e);
  if (m.numbers)
    for (int i = 0; i < m.numbers->count(); ++i) m.numbers->set(i, tensors[1 + i]);
  if (e.coded) set_pieces(by_rows, m, e);
}

// Where its gradient lies in a flat buffer and how much padding is behind it there, if it and its
// states lie in slots.
void set_padding(const Member& m, Entry& e) {
  const at::Tensor& local = THPVariable_Unpack(e.local);
  bool in_slots = !e.coded && slots().holds(local);
  for (int k = 0; k < e.tensor_count; ++k)
    in_slots = in_slots && slots().holds(THPVariable_Unpack(e.tensors[k]));
  const int64_t reals = local.is_complex() ? 2 : 1;
  e.flat_grad = in_slots ? reinterpret_cast<const void*>(m.flat_grad) : nullptr;
  e.padding = in_slots ? padded(local.numel()) * reals - e.span.numel : 0;
}

// A member that nobody has looked at.
std::pair<Member, Entry> make_idle_member(py::handle param) {
  std::pair<Member, Entry> made;
  made.first.param = made.second.param = made.second.local = param.ptr();
  made.first.idle = true;
  return made;
}

// A member and its entry, from what Python says of it. Of groups and lineages they know nothing
// yet, nor of states.
std::pair<Member, Entry> make_member(const MemberInfo& info, const RuleInfo& rule,
                                     const VariantInfo& variant, Workspace& workspace) {
  PyObject* const local = dtensors.local(info.param.ptr());
  TORCH_INTERNAL_ASSERT(local != nullptr, info.name, " has no memory");
  const at::Tensor& tensor = THPVariable_Unpack(local);
  Member m;
  m.param = info.param.ptr();
  m.name = info.name;
  m.keys = info.keys;
  m.counts_steps = info.counts_steps;
  if (!rule.numbers.empty()) m.numbers = std::make_unique<Numbers>(int(rule.numbers.size()));
  m.flat_grad = info.flat_grad;
  m.first_count = info.on_device ? info.first_count : std::nullopt;
  m.scalar = tensor.scalar_type();
  m.dtype = *dtype_of(m.scalar);
  m.state_type = info.state_type;
  m.device = tensor.device();
  m.dense = tensor.is_non_overlapping_and_dense() && !tensor.is_conj() && !tensor.is_neg();
  m.contiguous = tensor.is_contiguous();
  m.strides = tensor.strides().vec();
  m.order = tensor.is_non_overlapping_and_dense()
                ? m.strides
                : at::empty_like(tensor, at::TensorOptions(at::kMeta)).strides().vec();
  m.on_device = info.on_device;
  m.runs = info.runs;

  Entry e;
  e.param = info.param.ptr();
  e.local = local;
  e.duplicate = info.duplicate;
  e.cut = info.cut;
  e.sharded = local != e.param;
  if (e.sharded) m.spec = py::reinterpret_borrow<py::object>(dtensors.spec(e.param));
  e.first = workspace.may_be_begun(info.param.ptr());
  e.float64 = m.dtype == DType::float64;
  e.param_size = uint8_t(size_of(m.dtype));
  e.state_size = uint8_t(c10::elementSize(info.state_type));
  e.tensor_count = int(variant.states.size());
  e.numbers = m.numbers.get();
  e.coded = is_coded(info, m.dtype);
  e.span.param = const_cast<void*>(tensor.unsafeGetTensorImpl()->data());
  e.span.numel = e.coding.row = tensor.numel() * (tensor.is_complex() ? 2 : 1);
  if (e.coded) {
    const auto format = find_param_format(m.scalar, info.master_bits, info.stochastic);
    TORCH_INTERNAL_ASSERT(format.has_value(), "no kernel knows how ", m.name, " is stored");
    e.coding.param = *format;
    e.coding.state = find_state_format(info.state_type);
    e.coding.key = random_key(info.seed, info.ordinal);
    if (info.master_bits != 0 && m.dtype == DType::bfloat16)
      e.weights = &workspace.weights_of(info.param.ptr());
  }
  e.device_counts = info.on_device && (info.counts_steps || m.first_count);
  if (e.device_counts) e.lineage = info.lineage;
  return {std::move(m), e};
}

// -- whether all is as it was --------------------------------------------------------------------

bool has_same_state(const Entry& e) {
  for (int k = 0; k < e.tensor_count; ++k)
    if (address_of(e.tensors[k]) != e.span.states[k]) return false;
  for (int k = 0; k < e.part_count; ++k)
    if (address_of(e.parts[k]) != e.part_addresses[k]) return false;
  if (e.numbers != nullptr && !e.numbers->are_same(e.device_counts)) return false;
  if (e.count == nullptr) return true;
  PyObject* count = e.tensors[e.tensor_count];
  return address_of(count) == e.count && (!e.device_counts || version_of(count) == e.count_version);
}

// Counts, with the host, the step that a parameter has taken.
void count_step(Entry& e) {
  if (e.count == nullptr || e.device_counts) return;
  *e.count += 1;
  if (e.numbers != nullptr) e.numbers->advance();
}

void bump_version(PyObject* tensor) {
  c10::TensorImpl* impl = THPVariable_Unpack(tensor).unsafeGetTensorImpl();
  if (!impl->is_inference()) impl->bump_version();
}

// Whether a remainder belongs to other weights than those that there are.
bool is_outdated(const Entry& e) {
  return e.weights != nullptr && e.weights->are_known(e.master) &&
         !e.weights->are_those_of(e.param);
}

// Whether a sharded parameter, and its state, are wrapped around the same plain tensors.
bool has_same_locals(const Entry& e, const Member& m) {
  if (dtensors.local(e.param) != e.local || dtensors.spec(e.param) != m.spec.ptr()) return false;
  for (size_t i = 0; i < m.keys.size(); ++i)
    if (dtensors.local(m.tensors[i]) != m.locals[i]) return false;
  return true;
}

// As all checks have let it pass.
bool is_as_checked(const Entry& e, const c10::TensorImpl& param, const c10::TensorImpl& grad) {
  // First the keys, which tell of subclasses whose other properties only Python knows.
  return param.key_set() == e.keys && grad.key_set() == e.grad_keys &&
         param.data() == e.span.param && param.numel() == e.numel && param.is_contiguous() &&
         param.dtype() == e.type && grad.is_contiguous() && grad.dtype() == e.grad_type &&
         grad.device() == e.device && grad.sizes() == param.sizes() && has_same_state(e) &&
         (e.weights == nullptr || e.weights->are_those_of(e.param));
}

// As when the plan was made, but for where it is.
bool is_as_planned(const Entry& e, const Member& m, const at::Tensor& param) {
  const c10::TensorImpl* impl = param.unsafeGetTensorImpl();
  if (impl->layout() != at::kStrided || param.scalar_type() != m.scalar ||
      param.device() != m.device || impl->is_contiguous() != m.contiguous ||
      impl->numel() * (param.is_complex() ? 2 : 1) != e.span.numel)
    return false;
  // Padding belongs to the flat buffer that a parameter was in. Without memory it is no plain one.
  if (impl->data() != e.span.param && (e.padding > 0 || impl->data() == nullptr)) return false;
  if (!m.contiguous && param.strides() != at::IntArrayRef(m.strides)) return false;
  return has_same_state(e);
}

}  // namespace
}  // namespace fusedopt
