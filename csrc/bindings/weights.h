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

  static Weights of(PyObject* param, const void* master) {
    return {THPVariable_Unpack(param).unsafeGetTensorImpl()->data(), version_of(param), master};
  }
  // Whether they are known for this master. Another one, that somebody has put in its place,
  // belongs to the weights that there are.
  bool are_known(const void* its_master) const {
    return address != nullptr && master == its_master;
  }
  bool are_those_of(PyObject* param) const {
    return address == THPVariable_Unpack(param).unsafeGetTensorImpl()->data() &&
           version == version_of(param);
  }
};

}  // namespace
}  // namespace fusedopt
