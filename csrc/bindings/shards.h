// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Gradients of sharded parameters, whose placements a step has to know.
#pragma once

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "member.h"

namespace fusedopt {
namespace {

// Stands for the address of a gradient that has to be checked first.
const void* unchecked() {
  static const char address = 0;
  return &address;
}
// Likewise of one of which it has to be found out how it is placed.
const void* unknown() {
  static const char address = 0;
  return &address;
}

class ShardedGradients {
 public:
  explicit ShardedGradients(const std::string& optimizer) : optimizer_(optimizer) {}

  // Plain tensors that are taken in place of these parameters' gradients.
  void give(const std::vector<std::pair<py::object, py::object>>& grads) {
    for (const auto& [param, grad] : grads) given_[param.ptr()] = grad.ptr();
  }

  // The gradient to be taken.
  Gradient of(const Entry& e) const {
    if (!given_.empty()) {
      const auto given = given_.find(e.param);
      if (given != given_.end()) return {&THPVariable_Unpack(given->second), nullptr};
    }
    return Gradient::of(e.param);
  }

  // Its address where all checks have let the same pass before; null: there is none.
  const void* look(const Entry& e, const Member& m) const {
    const Gradient grad = of(e);
    if (grad.local == nullptr) return nullptr;
    const c10::TensorImpl& impl = *grad.local->unsafeGetTensorImpl();
    if (given_.count(e.param) == 0) {
      const bool known = grad.spec == m.spec.ptr() || grad.spec == m.grad_spec.ptr();
      if (!known || grad.spec == nullptr || impl.is_python_dispatch()) return unknown();
    }
    if (!e.checked || !has_same_locals(e, m)) return unchecked();
    const c10::TensorImpl& local = *THPVariable_Unpack(e.local).unsafeGetTensorImpl();
    return is_as_checked(e, local, impl) && impl.data() != nullptr ? impl.data() : unchecked();
  }

  // Notes a gradient whose placements are unknown.
  void add_unknown(size_t at, const Entry& e, const Member& m) {
    const Gradient grad = Gradient::of(e.param);
    if (grad.spec == nullptr)
      throw py::type_error(optimizer_ + ": " + m.name +
                           " is sharded but its gradient is a plain tensor; expected a DTensor "
                           "(DTensor.from_local makes one of a shard)");
    unknown_.push_back({at, grad.local->unsafeGetTensorImpl()->is_python_dispatch(), m.spec,
                        py::reinterpret_borrow<py::object>(grad.spec)});
  }
  bool has_unknown() const { return !unknown_.empty(); }

  // Asks Python, while which other threads may run, and lists those that are not placed as their
  // parameters are, or have not arrived yet.
  void find_misplaced(std::vector<Member>& members, std::vector<int>& misplaced) {
    for (Unknown& each : unknown_) {
      if (!each.arrives && are_equal(each.spec, each.grad_spec)) {
        members[each.at].grad_spec = std::move(each.grad_spec);
        just_known_.push_back(each.at);
      } else {
        misplaced.push_back(int(each.at));
      }
    }
    unknown_.clear();
  }

  // Between steps nothing is held but placements that came twice: to free those of gradients that
  // are made anew for each step takes longer than to compare them.
  void release(std::vector<Member>& members) {
    given_.clear();
    unknown_.clear();
    for (const size_t at : just_known_) {
      Member& m = members[at];
      const void* const before = std::exchange(m.last_grad_spec, m.grad_spec.ptr());
      if (before != m.last_grad_spec) m.grad_spec = py::object();
    }
    just_known_.clear();
  }

 private:
  bool are_equal(const py::object& a, const py::object& b) const {
    return are_equal(a, b, mesh_) && are_equal(a, b, placements_);
  }
  static bool are_equal(const py::object& a, const py::object& b, const py::str& name) {
    const auto value = [&](const py::object& of) {
      PyObject* const value = PyObject_GetAttr(of.ptr(), name.ptr());
      if (value == nullptr) throw py::error_already_set();
      return py::reinterpret_steal<py::object>(value);
    };
    const py::object first = value(a), second = value(b);
    return first.is(second) || first.equal(second);
  }

  struct Unknown {
    size_t at;
    bool arrives;  // from other processes
    py::object spec, grad_spec;
  };

  std::string optimizer_;
  py::str mesh_{"mesh"}, placements_{"placements"};
  std::unordered_map<PyObject*, PyObject*> given_;  // by parameter
  std::vector<Unknown> unknown_;
  std::vector<size_t> just_known_;
};

}  // namespace
}  // namespace fusedopt
