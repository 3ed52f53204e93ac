// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What keeps the memory that a step reads and writes alive while other threads run.
#pragma once

#include <algorithm>
#include <chrono>
#include <mutex>
#include <vector>

#include "member.h"

namespace fusedopt {
namespace {

// A step that is expected to take less than Python's switch interval keeps the GIL, so that nobody
// can change anything; a longer one, beside which holding costs little, gives it up and holds the
// Storages. Holding tensors would not do: `.data =` exchanges the Storage in a tensor.
class Hold {
 public:
  void add(const Entry& e) {
    objects_.push_back(py::reinterpret_borrow<py::object>(e.param));
    if (e.sharded) objects_.push_back(py::reinterpret_borrow<py::object>(e.local));
    add(THPVariable_Unpack(e.local));
    const at::Tensor* const grad = Gradient::of(e.param).local;
    if (grad != nullptr) add(*grad);
    const int tensors = e.tensor_count + (e.count != nullptr ? 1 : 0);
    for (int k = 0; k < tensors; ++k) add(THPVariable_Unpack(e.tensors[k]));
    for (int i = 0; e.numbers != nullptr && i < e.numbers->count(); ++i) add(e.numbers->tensor(i));
    for (int k = 0; k < e.part_count; ++k) add(THPVariable_Unpack(e.parts[k]));
    // Its version is asked for after the step.
    if (e.weights != nullptr) objects_.push_back(py::reinterpret_borrow<py::object>(e.master));
  }

 private:
  void add(const at::Tensor& tensor) {
    storages_.push_back(tensor.unsafeGetTensorImpl()->storage());
  }

  std::vector<py::object> objects_;
  std::vector<c10::Storage> storages_;
};

// Lets one step of an optimizer run at a time, should several threads want one. Who waits gives up
// the GIL.
class Turn {
 public:
  explicit Turn(std::mutex& mutex) : mutex_(mutex) {
    if (mutex_.try_lock()) return;
    const py::gil_scoped_release release;
    mutex_.lock();
  }
  ~Turn() { mutex_.unlock(); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  std::mutex& mutex_;
};

// Whether a step is expected to be short, from the one before.
class Duration {
 public:
  bool is_short(size_t members) const {
    using std::chrono::microseconds;
    // What holding takes, some 65 ns a member, is to stay below 3% of the step.
    const auto longest =
        std::max<std::chrono::nanoseconds>(microseconds(5000), members * microseconds(2));
    return last_ < longest;
  }
  template <class Body>
  void measure(Body body) {
    const auto begin = std::chrono::steady_clock::now();
    body();
    last_ = std::chrono::steady_clock::now() - begin;
  }

 private:
  std::chrono::nanoseconds last_ = std::chrono::nanoseconds::max();
};

}  // namespace
}  // namespace fusedopt
