// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Tensors that lie one behind the other in one buffer.
#pragma once

#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "torch.h"

namespace fusedopt {
namespace {

// In flat buffers a parameter starts at a multiple of this many elements: 64 bytes or more.
constexpr int64_t kSlot = 64;

int64_t padded(int64_t numel) { return (numel + kSlot - 1) / kSlot * kSlot; }

// The tensors that flat_tensors made and that are alive, by address: behind each of them lies
// padding up to the next multiple of kSlot elements. Tensors die on any thread, with or without the
// GIL.
class Slots {
 public:
  void add(const void* address, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes_[address] = bytes;
  }
  void remove(const void* address) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes_.erase(address);
  }
  bool holds(const at::Tensor& tensor) {
    if (tensor.numel() == 0) return true;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = bytes_.find(tensor.const_data_ptr());
    return found != bytes_.end() && found->second == tensor.nbytes();
  }

 private:
  std::mutex mutex_;
  std::unordered_map<const void*, size_t> bytes_;
};

Slots& slots() {
  // Never destroyed: tensors may outlive the destructors of static objects.
  static Slots* instance = new Slots;
  return *instance;
}

// Tensors with the shapes and dense strides of `like`, one behind the other in one zeroed buffer,
// each at a multiple of kSlot elements. Each has a Storage of its own, exactly its size, whose
// deleter holds the buffer: views of one Storage would each be pickled with all of it.
std::pair<at::Tensor, std::vector<at::Tensor>> flat_tensors(const std::vector<at::Tensor>& like,
                                                            at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  int64_t total = 0;
  for (const auto& tensor : like) total += padded(tensor.numel());
  const auto options = like.at(0).options().dtype(dtype).requires_grad(false);
  at::Tensor buffer = at::zeros({total}, options);
  char* next = static_cast<char*>(buffer.mutable_data_ptr());
  std::vector<at::Tensor> views;
  for (const auto& tensor : like) {
    const auto strides = tensor.is_non_overlapping_and_dense()
                             ? tensor.strides().vec()
                             : at::empty_like(tensor, at::TensorOptions(at::kMeta)).strides().vec();
    const auto release = [buffer](void* address) { slots().remove(address); };
    views.push_back(
        at::from_blob(next, tensor.sizes(), strides, release, options, buffer.device()));
    if (tensor.numel() > 0) slots().add(next, views.back().nbytes());
    next += padded(tensor.numel()) * int64_t(c10::elementSize(dtype));
  }
  return {buffer, views};
}

// Step counts: 0-dim float32 tensors, one behind the other in one buffer.
std::vector<at::Tensor> flat_steps(const std::vector<double>& values, c10::Device device) {
  at::Tensor buffer = at::tensor(values, at::kFloat).to(device);
  float* next = buffer.mutable_data_ptr<float>();
  std::vector<at::Tensor> views;
  for (size_t i = 0; i < values.size(); ++i)
    views.push_back(
        at::from_blob(next++, {}, {}, [buffer](void*) {}, buffer.options(), buffer.device()));
  return views;
}

// Gives the parameters that are at their addresses their flat gradients back, where they have
// others; frozen ones have none. Returns whether all parameters are where they were put.
bool attach_gradients(const py::list& params, const py::list& grads,
                      const std::vector<uintptr_t>& addresses,
                      const std::vector<uintptr_t>& grad_addresses) {
  const auto at = [](const at::Tensor& tensor, const at::Tensor& like, uintptr_t address) {
    return reinterpret_cast<uintptr_t>(tensor.unsafeGetTensorImpl()->data()) == address &&
           tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device() &&
           tensor.sizes() == like.sizes();
  };
  bool all = true;
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& param = THPVariable_Unpack(PyList_GET_ITEM(params.ptr(), i));
    const at::Tensor& flat = THPVariable_Unpack(PyList_GET_ITEM(grads.ptr(), i));
    const at::Tensor& current = param.unsafeGetTensorImpl()->grad();
    if (!at(param, flat, addresses[i]) || !at(flat, flat, grad_addresses[i])) {
      all = false;
    } else if (!param.requires_grad()) {
      if (current.defined()) param.mutable_grad().reset();
    } else if (!current.defined() || !at(current, flat, grad_addresses[i])) {
      // An alias, as .grad.data = ... would move the flat gradient itself.
      param.mutable_grad() = flat.detach();
    }
  }
  return all;
}

}  // namespace
}  // namespace fusedopt
