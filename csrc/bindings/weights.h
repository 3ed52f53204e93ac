// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Where weights are, and whether somebody has changed them.
#pragma once

#include "dtensor.h"

namespace fusedopt {
namespace {

// Of a plain tensor.
void* address_of(PyObject* tensor) {
  return THPVariable_Unpack(tensor).unsafeGetTensorImpl()->mutable_data();
}
uint32_t version_of(PyObject* tensor) {
  c10::TensorImpl* impl = THPVariable_Unpack(tensor).unsafeGetTensorImpl();
  return impl->is_inference() ? 0 : impl->version_counter().current_version();
}

// Of any tensor, as it was when somebody last wrote it. A sharded one and its plain one count
// apart.
struct Content {
  const void* address = nullptr;
  uint32_t version = 0;

  static Content of(PyObject* tensor) {
    PyObject* const local = dtensors.local(tensor);
    if (local == nullptr) return {};
    return {THPVariable_Unpack(local).unsafeGetTensorImpl()->data(),
            version_of(tensor) + (local == tensor ? 0 : version_of(local))};
  }
  bool operator==(const Content& other) const {
    return address == other.address && version == other.version;
  }
};

// A parameter's weights as the last step left them, and the master that belongs to them.
struct Weights {
  Content param;  // address null: not known
  Content master;

  static Weights of(PyObject* param, PyObject* master) {
    return {Content::of(param), Content::of(master)};
  }
  // Whether they are known for this master. Another one, or one that somebody has written,
  // belongs to the weights that there are: a checkpoint may be read into both.
  bool are_known(PyObject* its_master) const {
    return param.address != nullptr && master == Content::of(its_master);
  }
  bool are_those_of(PyObject* its_param) const { return param == Content::of(its_param); }
};

}  // namespace
}  // namespace fusedopt
