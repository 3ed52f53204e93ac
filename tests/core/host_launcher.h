// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Launches a device's kernels on the host: every block and thread of them, one after the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "device/step.h"

namespace fusedopt {

// The order of the pieces of a step, or of the (block, thread) pairs of a launch. Any number above
// these is the seed of a shuffle.
constexpr int kForward = 0, kBackward = 1;

template <class T>
void arrange(std::vector<T>& items, int order) {
  if (order == kBackward) std::reverse(items.begin(), items.end());
  if (order <= kBackward) return;
  uint64_t random = order;
  for (size_t left = items.size(); left > 1; --left) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    std::swap(items[left - 1], items[(random >> 33) % left]);
  }
}

// One kernel of the CUDA build, on the host.
struct HostKernel {
  PackSpans pack;
  void (*run)(const LaunchArgs&, uint32_t block, uint32_t blocks, uint32_t thread);
  int chunk;
};

template <class Variant, class Types>
struct MakeHostKernel {
  using Body = Tile<Variant, Types>;
  static void run(const LaunchArgs& args, uint32_t block, uint32_t blocks, uint32_t thread) {
    Body::run(args, block, blocks, thread);
  }
  static constexpr HostKernel value = {Body::pack, run, Body::kChunk};
};

inline const std::vector<HostKernel>& host_kernels() {
  static const auto table = kernel_table<MakeHostKernel, HostKernel>();
  return table;
}

// Those of rules that measure; null for others.
struct HostMeasure {
  PackSpans pack = nullptr;
  // Sums of a chunk of a launch.
  void (*run)(const LaunchArgs& args, uint32_t chunk) = nullptr;
};

template <class Variant, class Types>
struct MakeHostMeasure {
  static void run(const LaunchArgs& args, uint32_t chunk) {
    using Body = MeasureTile<Variant, Types>;
    double lanes[Body::kSums][kMeasureLanes];
    uint32_t of_all = 0;
    for (uint32_t thread = 0; thread < kWarp; ++thread) {
      const auto sums = Body::share(args, chunk, thread, of_all);
      for (int k = 0; k < Body::kSums; ++k)
        for (int lane = 0; lane < Body::Sums::kLanes; ++lane)
          lanes[k][lane * kWarp + thread] = sums.of_lane[lane][k];
    }
    double* const place = Body::place_of(args.sums, of_all);
    for (int k = 0; k < Body::kSums; ++k) {
      tree_sum<kMeasureLanes>(lanes[k]);
      place[k] = lanes[k][0];
    }
  }
  static constexpr HostMeasure make() {
    if constexpr (sums_of<typename Variant::Rule> > 0) {
      return {MeasureTile<Variant, Types>::pack, run};
    } else {
      return {};
    }
  }
  static constexpr HostMeasure value = make();
};

inline const std::vector<HostMeasure>& host_measures() {
  static const auto table = kernel_table<MakeHostMeasure, HostMeasure>();
  return table;
}

template <class Rule>
void host_prepare(const PrepareArgs& args) {
  constexpr uint32_t threads = kWarp;  // which is less than a launch has sources
  for (uint32_t thread = 0; thread < threads; ++thread) prepare_rows<Rule>(args, thread, threads);
  for (uint32_t thread = 0; thread < threads; ++thread) advance_counts(args, thread, threads);
}

template <class... Members>
std::vector<void (*)(const PrepareArgs&)> host_prepares(TypeList<Members...>) {
  return {host_prepare<Members>...};
}

class HostLauncher {
 public:
  // blocks 0: as many as there are chunks.
  explicit HostLauncher(uint32_t blocks = 0, int order = kForward)
      : blocks_(blocks), order_(order) {}

  int norm(const NormArgs& args) {
    ++launches_;
    for (int64_t chunk = 0; chunk < args.chunks; ++chunk) {
      double lanes[kWarp];
      for (uint32_t thread = 0; thread < kWarp; ++thread)
        lanes[thread] = norm_share(args, chunk, thread);
      tree_sum<kWarp>(lanes);
      args.sums[args.first_chunk + chunk] = lanes[0];
    }
    if (args.last == 0) return 0;
    double lanes[kTotalLanes];
    for (uint32_t thread = 0; thread < kTotalLanes; ++thread)
      lanes[thread] = total_lane(args, thread);
    tree_sum<kTotalLanes>(lanes);
    set_control(args.factor, lanes[0], *args.control);
    return 0;
  }

  int prepare(int rule, const PrepareArgs& args) {
    ++launches_;
    static const auto prepares = host_prepares(Rules{});
    prepares[rule](args);
    return 0;
  }

  int find_unready_prepare(int) { return 0; }
  int find_unready(int) { return 0; }
  int find_unready_measure(int) { return 0; }
  PackSpans pack(int kernel) { return host_kernels()[kernel].pack; }

  int step(int kernel, const LaunchArgs& args) {
    ++launches_;
    const uint32_t blocks = blocks_ == 0 ? args.chunks : blocks_;
    std::vector<std::pair<uint32_t, uint32_t>> places;
    places.reserve(size_t(blocks) * kThreads);
    for (uint32_t block = 0; block < blocks; ++block)
      for (uint32_t thread = 0; thread < uint32_t(kThreads); ++thread)
        places.emplace_back(block, thread);
    arrange(places, order_);
    for (const auto& place : places)
      host_kernels()[kernel].run(args, place.first, blocks, place.second);
    return 0;
  }

  PackSpans pack_chunks(int kernel) { return host_measures()[kernel].pack; }
  int measure(int kernel, const LaunchArgs& args) {
    ++launches_;
    if (args.control != nullptr && args.control->skip != 0) return 0;
    std::vector<uint32_t> chunks(args.chunks);
    for (uint32_t chunk = 0; chunk < args.chunks; ++chunk) chunks[chunk] = chunk;
    arrange(chunks, order_);
    for (const uint32_t chunk : chunks) host_measures()[kernel].run(args, chunk);
    return 0;
  }
  int total(const TotalArgs& args) {
    ++launches_;
    for (uint32_t i = 0; i < args.count; ++i) {
      for (int k = 0; k < kMaxSums; ++k) {
        double lanes[kTotalLanes];
        for (uint32_t thread = 0; thread < uint32_t(kTotalLanes); ++thread)
          lanes[thread] = measured_lane(args, i, k, thread);
        tree_sum<kTotalLanes>(lanes);
        args.measured[i].sums[k] = lanes[0];
      }
      args.measured[i].numel = double(args.chunks[i].numel);
      finish(args.measured[i]);
    }
    return 0;
  }

  int launches() const { return launches_; }

 private:
  uint32_t blocks_;
  int order_;
  int launches_ = 0;
};

}  // namespace fusedopt
