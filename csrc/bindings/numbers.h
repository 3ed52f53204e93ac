// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The numbers of a parameter's state, besides its count of steps, that rows are made from.
#pragma once

#include <array>

#include "weights.h"
#include "work.h"

namespace fusedopt {
namespace {

using NumberValues = std::array<float, kMaxNumbers>;

// Those of one parameter, in the order of its rule's options. They are where its count is: with the
// host, or the device.
class Numbers {
 public:
  explicit Numbers(int count) : count_(count) {}

  int count() const { return count_; }
  const float* address(int i) const { return values_[i]; }
  const at::Tensor& tensor(int i) const { return THPVariable_Unpack(tensors_[i]); }

  void set(int i, PyObject* tensor) {
    tensors_[i] = tensor;
    values_[i] = static_cast<float*>(address_of(tensor));
    versions_[i] = version_of(tensor);
  }

  // Kernels do not change versions, so that these tell of others who wrote.
  bool are_same(bool on_device) const {
    for (int i = 0; i < count_; ++i)
      if (address_of(tensors_[i]) != values_[i] ||
          (on_device && version_of(tensors_[i]) != versions_[i]))
        return false;
    return true;
  }

  // With the host.
  NumberValues values() const {
    NumberValues result{};
    for (int i = 0; i < count_; ++i) result[i] = *values_[i];
    return result;
  }

  // The step at hand is by this row; the device, where they are there, is to take them from it.
  void take(int row, bool on_device, DeviceWork& work) {
    row_ = row;
    work_ = &work;
    const RowNote& note = work.notes[row];
    for (int i = 0; i < count_ && on_device; ++i)
      work.set_from_row(i, values_[i], row, note.rule->place_of_next(i), note.float64);
  }

  // After the step, with the host.
  void advance() {
    for (int i = 0; i < count_; ++i) *values_[i] = work_->notes[row_].next_numbers[i];
  }

 private:
  int count_;
  std::array<PyObject*, kMaxNumbers> tensors_{};  // borrowed from the dictionary
  std::array<float*, kMaxNumbers> values_{};
  std::array<uint32_t, kMaxNumbers> versions_{};
  int row_ = 0;
  DeviceWork* work_ = nullptr;
};

}  // namespace
}  // namespace fusedopt
