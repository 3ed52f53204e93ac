// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// How many blocks a launch gets, and what is said where one fails.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>

namespace fusedopt {
namespace cuda {

// So many times the blocks that a device holds at a time. Another kernel may hold some of its
// multiprocessors, as those of NCCL do; with one block for each, what these leave undone would
// begin when all others are done, and take as long again.
constexpr int kWaves = 8;
// Older drivers (before 530) refuse launches with more than 4 KB of arguments.
constexpr int kLeastDriver = 12010;

// Runtime has what is needed of CUDA's, with errors as numbers, 0: none. All functions return null,
// or what went wrong; an error that has been told of is not left for others to find.
template <class Runtime>
class Launches {
 public:
  // As many blocks as the current device holds at a time. Where it cannot run the kernel, that is
  // found here.
  template <auto kernel>
  static const char* resident_blocks(int& blocks) {
    constexpr int kDevices = 64;
    static std::atomic<int> known[kDevices];
    int device = 0, processors = 0, driver = 0;
    if (int error = Runtime::current_device(device)) return failure(error);
    if (device < kDevices && (blocks = known[device]) != 0) return nullptr;
    if (int error = Runtime::driver_version(driver)) return failure(error);
    if (driver < kLeastDriver) return too_old(driver);
    if (int error = Runtime::processors(device, processors)) return failure(error);
    if (int error = Runtime::template resident_blocks<kernel>(blocks)) return failure(error);
    blocks = std::max(1, blocks) * processors;
    if (device < kDevices) known[device] = blocks;
    return nullptr;
  }

  template <auto kernel, class Args, class Stream>
  static const char* launch(const Args& args, int64_t wanted_blocks, Stream stream) {
    int blocks = 0;
    if (const char* error = resident_blocks<kernel>(blocks)) return error;
    const int64_t most = int64_t(blocks) * kWaves;
    blocks = int(std::clamp<int64_t>(wanted_blocks, 1, most));
    if (int error = Runtime::template launch<kernel>(args, blocks, stream)) return failure(error);
    return nullptr;
  }

 private:
  static const char* failure(int error) {
    Runtime::forget_error();
    said() = Runtime::text(error);
    if (Runtime::lacks_code(error))
      said() += "; fusedopt has no code for this GPU: build it with FUSEDOPT_CUDA_ARCHS=native";
    return said().c_str();
  }
  static const char* too_old(int driver) {
    said() = "the driver is one for CUDA " + std::to_string(driver / 1000) + "." +
             std::to_string(driver % 1000 / 10) +
             "; expected 530 or newer, which takes launches with more than 4 KB of arguments";
    return said().c_str();
  }
  static std::string& said() {
    thread_local std::string text;
    return text;
  }
};

}  // namespace cuda
}  // namespace fusedopt
