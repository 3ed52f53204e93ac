// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The plain memory of this process behind a sharded tensor, torch's DTensor, which is a class of
// Python's.
#pragma once

#include <structmember.h>

#include <stdexcept>

#include "torch.h"

namespace fusedopt {
namespace {

// A slot of a class, read where it lies in the object: any thread may do so while another one holds
// the GIL, and it costs what a field of C++ does.
class Slot {
 public:
  void find(py::handle type, const char* name) {
    const py::object slot = type.attr(name);
    if (Py_TYPE(slot.ptr()) != &PyMemberDescr_Type)
      throw std::runtime_error(std::string("torch's DTensor has no slot ") + name);
    offset_ = reinterpret_cast<PyMemberDescrObject*>(slot.ptr())->d_member->offset;
  }
  // Borrowed; null: nobody has set it.
  PyObject* of(PyObject* object) const {
    return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
  }

 private:
  Py_ssize_t offset_ = 0;
};

class DTensors {
 public:
  // Python says what the class is when it first meets one.
  void know(py::handle type) {
    local_.find(type, "_local_tensor");
    spec_.find(type, "_spec");
    type_ = type.inc_ref().ptr();
  }
  bool are(PyObject* tensor) const {
    return type_ != nullptr &&
           (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == type_ ||
            PyType_IsSubtype(Py_TYPE(tensor), reinterpret_cast<PyTypeObject*>(type_)));
  }
  // The plain tensor, which any other tensor is itself; null: there is none.
  PyObject* local(PyObject* tensor) const {
    if (!are(tensor)) return tensor;
    PyObject* const local = local_.of(tensor);
    return local != nullptr && THPVariable_Check(local) ? local : nullptr;
  }
  // Mesh, placements and whole shape; null: it is none.
  PyObject* spec(PyObject* tensor) const { return are(tensor) ? spec_.of(tensor) : nullptr; }

 private:
  PyObject* type_ = nullptr;
  Slot local_, spec_;
};

DTensors dtensors;

// torch has renamed it.
template <class Slot>
auto object_in(const Slot* slot, int) -> decltype(slot->load_pyobj()) {
  return slot->load_pyobj();
}
template <class Slot>
auto object_in(const Slot* slot, long) -> decltype(slot->_unchecked_untagged_pyobj()) {
  return slot->_unchecked_untagged_pyobj();
}

// A gradient as a step reads it; null where there is none.
struct Gradient {
  const at::Tensor* local = nullptr;
  PyObject* spec = nullptr;  // of a sharded one

  static Gradient of(PyObject* param) {
    const at::Tensor& grad = THPVariable_Unpack(param).unsafeGetTensorImpl()->grad();
    if (!grad.defined()) return {};
    PyObject* const object = object_in(grad.unsafeGetTensorImpl()->pyobj_slot(), 0);
    if (object == nullptr || !dtensors.are(object)) return {&grad, nullptr};
    PyObject* const local = dtensors.local(object);
    return {local == nullptr ? &grad : &THPVariable_Unpack(local), dtensors.spec(object)};
  }
};

}  // namespace
}  // namespace fusedopt
