// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The parameters that the groups have in a step.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "hyper_table.h"

namespace fusedopt {
namespace {

class ParamList {
 public:
  explicit ParamList(const std::string& optimizer) : optimizer_(optimizer), key_("params") {}

  // By position; borrowed from the groups.
  std::vector<PyObject*> params;

  // Lists those of all groups; false where they are more or fewer than planned.
  bool all(const py::list& groups, const HyperTable& table) {
    if (groups.size() != table.groups().size()) return false;
    PyObject** next = params.data();
    for (size_t g = 0; g < table.groups().size(); ++g) {
      PyObject* const list = list_of(groups, g, table);
      if (list == nullptr) return false;
      next = std::copy_n(PySequence_Fast_ITEMS(list), table.groups()[g].size, next);
    }
    return true;
  }

  // Likewise those at some positions.
  bool some(const py::list& groups, const HyperTable& table, const std::vector<Entry>& entries,
            const std::vector<int>& positions) {
    if (groups.size() != table.groups().size()) return false;
    for (const int at : positions) {
      PyObject* const list = list_of(groups, entries[at].group, table);
      if (list == nullptr) return false;
      params[at] = PySequence_Fast_GET_ITEM(list, entries[at].in_group);
    }
    return true;
  }

 private:
  // That of a group; null where it is longer or shorter than planned.
  PyObject* list_of(const py::list& groups, size_t g, const HyperTable& table) const {
    PyObject* const list = PyDict_GetItem(PyList_GET_ITEM(groups.ptr(), g), key_.ptr());
    if (list == nullptr || !(PyList_Check(list) || PyTuple_Check(list)))
      throw py::type_error(optimizer_ + ": group " + text(g) +
                           ": params is not a list of parameters");
    return size_t(PySequence_Fast_GET_SIZE(list)) == table.groups()[g].size ? list : nullptr;
  }

  std::string optimizer_;
  py::str key_;
};

// Where parameters were when a plan was made.
class Places {
 public:
  // The position of a parameter, its group, and its place in that; none: it was in no group.
  using Place = std::tuple<int, int, int>;
  std::optional<Place> of(const PyObject* param, const std::vector<Entry>& entries) {
    if (positions_.empty())
      for (const Entry& e : entries) positions_.emplace(e.param, e.position);
    const auto found = positions_.find(param);
    if (found == positions_.end()) return std::nullopt;
    const Entry& e = entries[size_t(found->second)];
    return Place(e.position, e.group, e.in_group);
  }

 private:
  std::unordered_map<const PyObject*, int> positions_;
};

}  // namespace
}  // namespace fusedopt
