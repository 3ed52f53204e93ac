// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Where weights are, and whether somebody has changed them.
#pragma once

#include "torch.h"

namespace fusedopt {
namespace {

void* address_of(PyObject* tensor) {
  return THPVariable_Unpack(tensor).unsafeGetTensorImpl()->mutable_data();
}

uint32_t version_of(PyObject* tensor) {
  c10::TensorImpl* impl = THPVariable_Unpack(tensor).unsafeGetTensorImpl();
  return impl->is_inference() ? 0 : impl->version_counter().current_version();
}

// A parameter's weights as the last step left them, and the master that belongs to them.
struct Weights {
  const void* address = nullptr;  // null: not known
  uint32_t version = 0;
  const void* master = nullptr;
  uint32_t master_version = 0;

  static Weights of(PyObject* param, PyObject* master) {
    return {address_of(param), version_of(param), address_of(master), version_of(master)};
  }
  // Whether they are known for this master. Another one, or one that somebody has written,
  // belongs to the weights that there are: a checkpoint may be read into both.
  bool are_known(PyObject* its_master) const {
    return address != nullptr && master == address_of(its_master) &&
           master_version == version_of(its_master);
  }
  bool are_those_of(PyObject* param) const {
    return address == THPVariable_Unpack(param).unsafeGetTensorImpl()->data() &&
           version == version_of(param);
  }
};

}  // namespace
}  // namespace fusedopt
