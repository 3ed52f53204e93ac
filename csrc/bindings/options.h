// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Options out of parameter groups: numbers, or tensors that kernels read where they are.
#pragma once

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "accelerator.h"
#include "names.h"

namespace fusedopt {
namespace {

// A number out of a parameter group: a float, an int, a bool, or a tensor of one element. what()
// says which, in errors.
template <class What>
double number(PyObject* value, const What& what) {
  if (PyFloat_Check(value)) return PyFloat_AS_DOUBLE(value);
  if (value == Py_True) return 1;
  if (value == Py_False || value == Py_None) return 0;
  if (THPVariable_Check(value)) {
    const at::Tensor& tensor = THPVariable_Unpack(value);
    if (tensor.numel() != 1)
      throw py::value_error(what() + " is a tensor of " + text(tensor.numel()) +
                            " elements; expected a number or a tensor of one element");
    return tensor.item<double>();
  }
  const double result = PyFloat_AsDouble(value);
  if (PyErr_Occurred()) {
    PyErr_Clear();
    throw py::type_error(what() + " is " + py::repr(value).cast<std::string>() +
                         "; expected a number or a tensor of one element");
  }
  return result;
}

template <class What>
void check_no_nan(double value, const What& what) {
  if (std::isnan(value)) throw py::value_error(what() + " is NaN; expected a number");
}

// A rule's options in a parameter group. Where one lies on a device, values has a placeholder.
struct GroupOptions {
  std::array<double, kMaxOptions> values{};
  std::array<py::object, kMaxOptions> on_device;
  bool any_on_device = false;
};

// Reads the options of a rule.
class OptionReader {
 public:
  explicit OptionReader(const RuleInfo& rule) : rule_(rule) {
    // Interned once: a look-up by a C string would make a Python string each time.
    for (const OptionInfo& option : rule.options) keys_.emplace_back(option.key);
  }

  // That of a rule, which lives as long as the process.
  static const OptionReader& of(const RuleInfo& rule) {
    static auto* const readers = [] {
      auto* made = new std::vector<OptionReader>;
      for (const RuleInfo& each : registry().rules) made->emplace_back(each);
      return made;
    }();
    return (*readers)[number_of(rule)];
  }

  void read(const std::string& optimizer, PyObject* group, size_t g, GroupOptions& options) const {
    options.any_on_device = false;
    for (size_t i = 0; i < rule_.options.size(); ++i) {
      const OptionInfo& option = rule_.options[i];
      if (option.in_state) {
        options.values[i] = option.initial;
        continue;
      }
      const auto what = [&] { return describe(optimizer, g, i); };
      PyObject* value = PyDict_GetItem(group, keys_[i].ptr());
      if (value == nullptr && option.may_be_missing) {
        options.values[i] = option.initial;
        continue;
      }
      if (value == nullptr) throw py::key_error(what() + " is missing");
      py::object element;
      if (option.element >= 0) {
        element = py::reinterpret_steal<py::object>(PySequence_GetItem(value, option.element));
        if (!element) {
          PyErr_Clear();
          throw py::value_error(what() + " is missing in " + py::repr(value).cast<std::string>());
        }
        value = element.ptr();
      }
      if (options.on_device[i]) options.on_device[i] = py::object();
      if (PyFloat_CheckExact(value)) {
        options.values[i] = PyFloat_AS_DOUBLE(value);
      } else if (option.on_device && is_on_accelerator(value)) {
        options.values[i] = 0.5;  // any number that makes a row in which zero stays zero
        options.on_device[i] = py::reinterpret_borrow<py::object>(value);
        options.any_on_device = true;
      } else {
        options.values[i] = number(value, what);
      }
      check_no_nan(options.values[i], what);
    }
  }

  // Fetches what lies on a device, which waits for it.
  void fetch(const std::string& optimizer, size_t g, GroupOptions& options) const {
    for (size_t i = 0; i < rule_.options.size(); ++i) {
      if (!options.on_device[i]) continue;
      const auto what = [&] { return describe(optimizer, g, i); };
      options.values[i] = number(options.on_device[i].ptr(), what);
      check_no_nan(options.values[i], what);
    }
    options.on_device.fill(py::object());
    options.any_on_device = false;
  }

 private:
  std::string describe(const std::string& optimizer, size_t g, size_t i) const {
    const OptionInfo& option = rule_.options[i];
    const std::string name = optimizer + ": group " + text(g) + ": " + option.key;
    return option.element < 0 ? name : name + "[" + text(option.element) + "]";
  }

  const RuleInfo& rule_;
  std::vector<py::str> keys_;
};

}  // namespace
}  // namespace fusedopt
