// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// One parameter as a plan has it, and what has to stay as it was.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "names.h"
#include "weights.h"
#include "work.h"

namespace fusedopt {
namespace {

// How a parameter and its states are stored, as its group wants it.
struct Storage {
  at::ScalarType state;  // a byte: codes and scales
  int master_bits;       // 0: no master
  bool stochastic;       // how parameters are rounded
  bool counts_steps;     // whether there is a count of steps among the tensors of its state
  uint64_t seed, ordinal;

  bool in_codes() const { return state == at::kByte; }
  bool is_coded(DType param) const {
    return in_codes() || master_bits != 0 || stochastic ||
           (param == DType::float32 && state == at::kBFloat16);
  }
  ParamCode param_code(DType param) const {
    if (param == DType::float32) return ParamCode::float32;
    if (param == DType::float16)
      return master_bits == 0 ? ParamCode::float16 : ParamCode::float16_and_float32;
    return stochastic          ? ParamCode::bfloat16_stochastic
           : master_bits == 32 ? ParamCode::bfloat16_and_16
           : master_bits == 24 ? ParamCode::bfloat16_and_8
                               : ParamCode::bfloat16;
  }
  StateCode state_code() const {
    return in_codes()               ? StateCode::int8
           : state == at::kBFloat16 ? StateCode::bfloat16
                                    : StateCode::float32;
  }
};

// One parameter of an optimizer, with what a step has to find unchanged, or else builds anew.
// It is held as a Python object: torch.utils.swap_tensors may exchange the tensor behind it.
struct Record {
  py::object param;
  std::vector<py::object> states;  // in the variant's order; empty while there is no gradient yet
  std::vector<py::object> parts;   // of a Coding: scales of the states, then the master
  py::object count;                // of its steps; on the device, kernels count
  std::string name;
  bool has_state = false;
  bool on_device = false;  // the count, or that there is none, is the device's affair
  bool dense = true;       // its elements fill one run of memory
  bool contiguous = true;

  at::ScalarType scalar;
  DType dtype = DType::float32;
  at::ScalarType state_type = at::kFloat;
  c10::Device device = c10::kCPU;
  std::vector<int64_t> strides;
};

// What every step reads of one parameter, apart from its record as it is read by all steps. Where
// a step finds the parameter and its gradient as they were when all was checked, this is all that
// it needs.
struct Entry {
  PyObject* param = nullptr;
  std::array<PyObject*, kMaxStates + 1> tensors{};  // its states and, behind them, the count
  int tensor_count = 0;                             // without the count
  int part_count = 0;                               // tensors of the coding
  int group = 0;
  Span span{};             // but for what the step finds: grad, row and offset
  float* count = nullptr;  // of its steps
  DeviceWork* work = nullptr;
  const void* flat_grad = nullptr;  // where its gradient lies in a flat buffer, else null
  int64_t padding = 0;              // reals behind it, where it and its states lie in slots
  uint32_t count_version = 0;  // kernels do not change it, so that it tells of others who wrote
  int lineage = 0;             // parameters of one lineage have taken the same steps on the device
  uint8_t param_size = 0, grad_size = 0, state_size = 0;  // bytes of a real
  DType grad_dtype = DType::float32;
  bool duplicate = false;  // the same parameter again: it is stepped once
  bool first = false;      // its state was made for this very step
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

}  // namespace
}  // namespace fusedopt
