// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Memory on devices that an optimizer's steps use.
#pragma once

#include <algorithm>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "accelerator.h"
#include "weights.h"

namespace fusedopt {
namespace {

// Memory on devices that an optimizer's steps use. It is never given back while the optimizer
// lives, as a captured graph may use it.
class Workspace {
 public:
  struct Memory {
    Control* control;
    HyperRow* rows;
    double* sums;
  };

  Memory get(c10::Device device, size_t rows, int64_t chunks) {
    Room* room = this->room(device);
    if (room == nullptr || room->rows < rows || room->chunks < chunks) {
      // What a graph allocates is set to zero by its replays only, and each time.
      if (is_capturing(device))
        throw std::runtime_error(
            "this step needs memory that the steps before it did not need; take one like it before "
            "capture begins");
      const auto options = at::TensorOptions(at::kByte).device(device);
      if (room == nullptr) {
        room = &rooms_.emplace_back();
        room->control = at::zeros({sizeof(Control)}, options);
      } else {
        outgrown_.push_back(room->memory);
      }
      room->rows = std::max<size_t>(rows, 2 * room->rows);
      room->chunks = std::max<int64_t>(chunks, 2 * room->chunks);
      const size_t size = room->rows * sizeof(HyperRow) + room->chunks * sizeof(double);
      room->memory = at::empty({int64_t(size)}, options);
    }
    // What is captured is replayed on any stream, while the optimizer lives.
    if (!is_capturing(device)) {
      note_use(room->control);
      note_use(room->memory);
    }
    char* const memory = static_cast<char*>(room->memory.mutable_data_ptr());
    return {static_cast<Control*>(room->control.mutable_data_ptr()),
            reinterpret_cast<HyperRow*>(memory),
            reinterpret_cast<double*>(memory + room->rows * sizeof(HyperRow))};
  }

  // Whether a graph has been captured, which may be replayed at any time.
  bool captured = false;

  Weights& weights_of(PyObject* param) { return weights_[param]; }
  // Whether it is known which weights a master belongs to, which it can be for some only.
  bool knows_weights_of(const py::object& param, const py::object& master) const {
    const auto found = weights_.find(param.ptr());
    return found != weights_.end() && found->second.are_known(master.ptr());
  }
  // Whether these are others now.
  bool are_outdated(const py::object& param, const py::object& master) const {
    return knows_weights_of(param, master) &&
           !weights_.find(param.ptr())->second.are_those_of(param.ptr());
  }
  void note_weights_of(const py::object& param, const py::object& master) {
    weights_[param.ptr()] = Weights::of(param.ptr(), master.ptr());
  }
  // What is stored with them now belongs to the weights that the next step finds.
  void forget_weights_of(const py::object& param) { weights_[param.ptr()] = Weights{}; }
  // Of states that were loaded nothing is known.
  void forget_states() {
    for (auto& [param, weights] : weights_) weights = Weights{};
    begun_.clear();
  }

  // A parameter whose state was made for a step that is still to come, and one tensor of it:
  // another one in its place, or one that somebody has written, is no state that was just made.
  void begin(const py::object& param, const py::object& made) {
    begun_[param.ptr()] = Content::of(made.ptr());
  }
  void has_stepped(PyObject* param) { begun_.erase(param); }
  void forget_begun(const py::object& param) { begun_.erase(param.ptr()); }
  bool may_be_begun(PyObject* param) const { return begun_.count(param) > 0; }
  bool is_begun(py::handle param, py::handle made) const {
    const auto found = begun_.find(param.ptr());
    return found != begun_.end() && found->second == Content::of(made.ptr());
  }

  // Held while a step is on its way: one at a time, should several threads want one.
  std::mutex turn;

  // Numbers in the memory of a device, from an address on.
  at::Tensor doubles(c10::Device device, void* address, size_t count) {
    const at::Tensor& memory = room(device)->memory;
    const auto before = static_cast<char*>(address) - static_cast<char*>(memory.mutable_data_ptr());
    return memory.narrow(0, before, int64_t(count * sizeof(double))).view(at::kDouble);
  }

  // The sum of squares that the last norm on the device has left; waits for it.
  double sum_of_squares(c10::Device device) {
    return room(device)
        ->control.narrow(0, offsetof(Control, sum_of_squares), sizeof(double))
        .view(at::kDouble)
        .item<double>();
  }

  // Where the norm of the last step that clipped is: with the device, or this one.
  void note_norm(c10::Device device, std::optional<double> norm = std::nullopt) {
    norm_device_ = device;
    norm_ = norm;
  }

  std::optional<at::Tensor> grad_norm() {
    if (!norm_device_) return std::nullopt;
    const auto options = at::TensorOptions(at::kFloat).device(*norm_device_);
    if (norm_) return at::full({}, *norm_, options);
    const at::Tensor& control = room(*norm_device_)->control;
    if (!is_capturing(*norm_device_)) note_use(control);
    return control.narrow(0, offsetof(Control, grad_norm), sizeof(float))
        .view(at::kFloat)
        .reshape({})
        .clone();
  }

 private:
  struct Room {
    at::Tensor control;
    at::Tensor memory;  // rows, then sums of chunks
    size_t rows = 0;
    int64_t chunks = 0;
  };

  Room* room(c10::Device device) {
    for (Room& room : rooms_)
      if (room.control.device() == device) return &room;
    return nullptr;
  }

  std::vector<Room> rooms_;
  std::vector<at::Tensor> outgrown_;
  std::unordered_map<PyObject*, Content> begun_;
  std::unordered_map<PyObject*, Weights> weights_;  // whose members stay where they are
  std::optional<c10::Device> norm_device_;
  std::optional<double> norm_;
};

}  // namespace
}  // namespace fusedopt
