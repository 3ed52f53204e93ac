// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Copies, for one step, of tensors that lie in another order than kernels walk in, or with gaps.
#pragma once

#include <vector>

#include "torch.h"

namespace fusedopt {
namespace {

class Gathered {
 public:
  // The address of a copy with these strides.
  void* copy(const at::Tensor& from, at::IntArrayRef strides) {
    const auto options = from.options().requires_grad(false);
    copies_.push_back(at::empty_strided(from.sizes(), strides, options).copy_(from.detach()));
    return copies_.back().mutable_data_ptr();
  }

  // Likewise, of what the step changes.
  void* borrow(const at::Tensor& from, at::IntArrayRef strides) {
    void* const address = copy(from, strides);
    borrowed_.push_back({from, copies_.back()});
    return address;
  }

  void put_back() {
    for (auto& each : borrowed_) each.from.detach().copy_(each.copy);
  }

  void clear() {
    copies_.clear();
    borrowed_.clear();
  }

 private:
  struct Borrowed {
    at::Tensor from, copy;
  };

  std::vector<at::Tensor> copies_;
  std::vector<Borrowed> borrowed_;
};

}  // namespace
}  // namespace fusedopt
