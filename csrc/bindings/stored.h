// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The tensors of a parameter's state, found by their keys in the dictionary that has them.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "../core/span.h"
#include "torch.h"

namespace fusedopt {
namespace {

// A count, numbers, the states with their scales, and a master.
constexpr int kMostTensors = 2 * kMaxStates + kMaxNumbers + 2;
using StateTensors = std::array<PyObject*, kMostTensors>;  // borrowed from the dictionary

// What a tensor is, so that another one in its place can be walked over likewise.
struct TensorKind {
  c10::DispatchKeySet keys;
  caffe2::TypeMeta dtype;
  c10::Device device = c10::kCPU;
  std::vector<int64_t> sizes, strides;

  static TensorKind of(PyObject* object) {
    const at::Tensor& tensor = THPVariable_Unpack(object);
    return {tensor.key_set(), tensor.dtype(), tensor.device(), tensor.sizes().vec(),
            tensor.strides().vec()};
  }
  bool is_that_of(PyObject* object) const {
    const at::Tensor& tensor = THPVariable_Unpack(object);
    return tensor.key_set() == keys && tensor.dtype() == dtype && tensor.device() == device &&
           !tensor.requires_grad() && tensor.sizes() == at::IntArrayRef(sizes) &&
           tensor.strides() == at::IntArrayRef(strides);
  }
};

// The value of a key, borrowed; null where there is none.
PyObject* value_of(PyObject* dict, PyObject* key) {
  if (!PyDict_Check(dict)) return nullptr;
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Finds the tensors of a state; false where it lacks one.
bool find_tensors(PyObject* values, const py::tuple& keys, StateTensors& to) {
  for (size_t i = 0; i < keys.size(); ++i) {
    to[i] = value_of(values, PyTuple_GET_ITEM(keys.ptr(), i));
    if (to[i] == nullptr || !THPVariable_Check(to[i])) return false;
  }
  return true;
}

}  // namespace
}  // namespace fusedopt
