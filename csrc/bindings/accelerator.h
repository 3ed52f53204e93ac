// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The device whose kernels csrc/cuda has, and its streams.
#pragma once

#include "../cuda/cuda.h"
#include "torch.h"

namespace fusedopt {
namespace {

// What csrc/cuda runs on. A test builds this file with the CPU here and that code on the host.
#if !defined(FUSEDOPT_ACCELERATOR)
#define FUSEDOPT_ACCELERATOR c10::kCUDA
#endif
constexpr c10::DeviceType kAccelerator = FUSEDOPT_ACCELERATOR;

// Whether kernels can read a value where it is: a float32 or float64 tensor of one element.
inline bool is_on_accelerator(PyObject* value) {
  if (!THPVariable_Check(value)) return false;
  const at::Tensor& tensor = THPVariable_Unpack(value);
  return tensor.device().type() == kAccelerator && tensor.numel() == 1 &&
         (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
}

inline void* stream_of(c10::Device device) {
  if (!device.is_cuda()) return nullptr;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

inline bool is_capturing(c10::Device device) {
  if (device.type() != kAccelerator) return false;
  const c10::DeviceGuard guard(device);
  return cuda::is_capturing(stream_of(device));
}

// Memory that the current stream of its device uses, which may be another one than it was allocated
// on: given back, it is used again only when that stream has done what it was told until then.
inline void note_use(const at::Tensor& memory) {
  const c10::Device device = memory.device();
  if (!device.is_cuda()) return;
  memory.record_stream(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
}

}  // namespace
}  // namespace fusedopt
