// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Where the states of a plan's members are, which others may exchange at any time.
#pragma once

#include <unordered_set>
#include <vector>

#include "changes.h"
#include "member.h"

namespace fusedopt {
namespace {

// Plans hold no memory: what is found here is borrowed from the dictionaries. Those that are of the
// watched types tell of changes; others, which somebody has put there, are looked into in each
// step.
class StateFinder {
 public:
  // The types of optimizer.state and of the state of one parameter.
  StateFinder(py::handle state, py::handle values)
      : watched_state_(state.ptr()), watched_values_(values.ptr()) {}

  // Whether all dictionaries are those that were found, and those that tell of changes unchanged.
  bool are_found(const py::object& state) const {
    return is_watched(state) && state.ptr() == state_ && changes == seen_;
  }

  // Finds the dictionaries and what is in those that tell of changes; false where the plan has to
  // be made anew. The parameters have to be alive. Other threads may run meanwhile.
  bool find(const py::object& state, std::vector<Member>& members, std::vector<Entry>& entries) {
    const bool watched = is_watched(state);
    state_ = nullptr;
    for (const Member& m : members) held_.push_back(py::reinterpret_borrow<py::object>(m.param));
    // While another thread changes them again and again, somebody has to give up.
    for (int attempt = 0; attempt < 10; ++attempt) {
      const uint64_t before = changes;
      looked_into_.clear();
      for (size_t at = 0; at < members.size(); ++at)
        if (!find_one(state.ptr(), watched, at, members[at], entries[at])) return false;
      if (changes != before) continue;
      if (watched) state_ = state.ptr();
      seen_ = before;
      return true;
    }
    return false;
  }

  // Looks into the other dictionaries; false where the plan has to be made anew.
  bool look_into_others(std::vector<Member>& members, std::vector<Entry>& entries) {
    for (const size_t at : looked_into_)
      if (!take(members[at], entries[at])) return false;
    return true;
  }

  // Takes the tensors in the dictionary of a member; false where there are not those that there
  // have to be.
  bool take(Member& m, Entry& e) {
    StateTensors found{}, tensors{};
    if (!find_tensors(m.values, m.keys, found)) return false;
    const size_t size = m.keys.size();
    for (size_t i = 0; i < size; ++i) {
      tensors[i] = e.sharded ? dtensors.local(found[i]) : found[i];
      if (tensors[i] == nullptr) return false;
    }
    if (m.kinds.empty()) {
      for (size_t i = 0; i < size; ++i)
        if (!is_wanted(m, e, i, THPVariable_Unpack(tensors[i]))) return false;
      for (size_t i = 0; i < size; ++i) m.kinds.push_back(TensorKind::of(tensors[i]));
    } else {
      for (size_t i = 0; i < size; ++i)
        if (!m.kinds[i].is_that_of(tensors[i])) return false;
      // Nobody knows how many steps other counts on a device have seen.
      const bool same = found == m.tensors && tensors == m.locals;
      if (!same && e.device_counts) return false;
      if (same && has_same_state(e)) return true;
    }
    set_tensors(found, tensors, m, e);
    set_padding(m, e);
    e.checked = false;
    if (e.count != nullptr && !e.device_counts && !(*e.count >= 0)) return false;
    if (e.count != nullptr)
      counts_are_shared_ = !counts_.insert(e.count).second || counts_are_shared_;
    return true;
  }

  // Between steps nothing is held.
  void release() { held_.clear(); }

  // Whether several parameters may have the same count.
  bool counts_are_shared() const { return counts_are_shared_; }

 private:
  bool is_watched(const py::object& state) const {
    return reinterpret_cast<PyObject*>(Py_TYPE(state.ptr())) == watched_state_;
  }

  bool find_one(PyObject* state, bool watched, size_t at, Member& m, Entry& e) {
    if (m.idle || e.duplicate || m.keys.empty()) return true;
    m.values = value_of(state, m.param);
    if (m.values == nullptr) return false;
    if (!watched) held_.push_back(py::reinterpret_borrow<py::object>(m.values));
    if (e.sharded) {  // which may have another local tensor by now
      e.local = dtensors.local(m.param);
      if (e.local == nullptr || dtensors.spec(m.param) != m.spec.ptr()) return false;
    }
    if (watched && reinterpret_cast<PyObject*>(Py_TYPE(m.values)) == watched_values_)
      return take(m, e);
    looked_into_.push_back(at);
    return true;
  }

  PyObject *watched_state_, *watched_values_;
  PyObject* state_ = nullptr;        // the one that was found, if it tells of changes
  uint64_t seen_ = 0;                // the changes known of
  std::vector<size_t> looked_into_;  // positions of those that do not tell of changes
  std::vector<py::object> held_;
  std::unordered_set<const float*> counts_;
  bool counts_are_shared_ = false;
};

}  // namespace
}  // namespace fusedopt
