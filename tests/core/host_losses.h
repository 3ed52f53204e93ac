// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Launches the kernels of losses on the host: every warp of them, all lanes of which take each step
// together.
#pragma once

#include <vector>

#include "device/losses/launches.h"

namespace fusedopt {

// What a value is in each lane of a warp.
template <class T>
struct WarpValue {
  T lanes[kWarp];

  WarpValue& operator+=(const WarpValue& other) {
    for (int i = 0; i < kWarp; ++i) lanes[i] += other.lanes[i];
    return *this;
  }
  WarpValue exchanged(int distance) const {
    WarpValue result;
    for (int i = 0; i < kWarp; ++i) result.lanes[i] = lanes[i ^ distance];
    return result;
  }
};

// All lanes of a warp that has a chunk.
template <class Lane>
struct HostWarp {
  using T = typename Lane::T;
  std::vector<Lane> lanes = std::vector<Lane>(kWarp);

  void load(const CrossEntropyWork& work, int64_t row, int64_t chunk) {
    for (uint32_t lane = 0; lane < uint32_t(kWarp); ++lane)
      lanes[lane].load(work, row, chunk, lane);
  }
  T total(T (Lane::*slots)[Lane::kSlots]) const {
    WarpValue<T> values[Lane::kSlots];
    for (int i = 0; i < Lane::kSlots; ++i)
      for (int lane = 0; lane < kWarp; ++lane) values[i].lanes[lane] = (lanes[lane].*slots)[i];
    const auto exchange = [](const WarpValue<T>& value, int distance) {
      return value.exchanged(distance);
    };
    return Lane::tree(values, exchange).lanes[0];
  }
  template <bool of_logits>
  void store_gradient(const CrossEntropyWork& work, const ChunkTerms<T>& terms,
                      const RowFactors& factors) {
    for (Lane& lane : lanes) {
      if (work.has_shares())
        lane.store_gradient_with_shares(work, terms, factors);
      else
        lane.template store_gradient<of_logits>(work, terms, factors);
    }
  }
  ChunkTerms<T> begin(const CrossEntropyWork& work, int64_t row, int64_t chunk) {
    load(work, row, chunk);
    T maximum = lowest(T());
    for (const Lane& lane : lanes) maximum = larger_of(lane.maximum(), maximum);
    for (Lane& lane : lanes) lane.add_up(work, maximum);
    ChunkTerms<T> terms{maximum, total(&Lane::sums), 0, 0};
    if (work.has_shares()) {
      terms.distance = total(&Lane::distances);
      terms.share = total(&Lane::shares);
    }
    return terms;
  }
};

template <class Element, int width>
struct HostCrossEntropy {
  using Warp = HostWarp<CrossEntropyLane<Element, width>>;
  using T = typename Warp::T;

  static void whole_row(const CrossEntropyWork& work, int64_t row) {
    Warp warp;
    ChunkTerms<T> terms = warp.begin(work, row, 0);
    const RowTerms of_row{double(terms.maximum), double(terms.sum), double(terms.distance),
                          double(terms.share)};
    double scale;
    const RowFactors factors = finish_row<Element>(work, row, of_row, true, &scale);
    if (work.gradient.first == nullptr) return;
    terms.sum = T(scale);
    warp.template store_gradient<false>(work, terms, factors);
  }

  static void begin_chunk(const CrossEntropyArgs& args, int64_t row, int64_t chunk,
                          int64_t chunks) {
    terms_of<T>(args, row, chunks)[chunk] = Warp().begin(args.work, row, chunk);
  }

  static void end_row(const CrossEntropyArgs& args, int64_t row, int64_t chunks) {
    ChunkTerms<T>* terms = terms_of<T>(args, row, chunks);
    T largest = lowest(T());
    for (int64_t i = 0; i < chunks; ++i) largest = larger_of(terms[i].maximum, largest);
    const double maximum = double(largest);
    double sums[kWarp], distances[kWarp], shares[kWarp];
    for (uint32_t lane = 0; lane < uint32_t(kWarp); ++lane) {
      const RowParts parts = row_parts(terms, chunks, lane, maximum);
      sums[lane] = parts.sum;
      distances[lane] = parts.distance;
      shares[lane] = parts.share;
    }
    tree_sum<kWarp>(sums);
    tree_sum<kWarp>(distances);
    tree_sum<kWarp>(shares);
    double scale;
    const RowTerms of_row{maximum, sums[0], distances[0], shares[0]};
    *factors_of(args, row, chunks) = finish_row<Element>(args.work, row, of_row, true, &scale);
    for (uint32_t lane = 0; lane < uint32_t(kWarp); ++lane)
      set_scales(terms, chunks, lane, maximum, scale);
  }

  static void end_chunk(const CrossEntropyArgs& args, int64_t row, int64_t chunk, int64_t chunks) {
    Warp warp;
    warp.load(args.work, row, chunk);
    const ChunkTerms<T>& terms = terms_of<T>(args, row, chunks)[chunk];
    const RowFactors& factors = *factors_of(args, row, chunks);
    warp.template store_gradient<true>(args.work, terms, factors);
  }

  // Tasks in any order: here backwards.
  static void run(const CrossEntropyArgs& args) {
    const int64_t chunks = loss_chunks(args.work.loss.classes);
    const bool by_chunk = is_by_chunk(args);
    for (int64_t task = tasks_of(args) - 1; task >= 0; --task) {
      if (args.form == Form::short_rows) {
        short_row<Element>(args.work, task);
        continue;
      }
      if (args.form == Form::rows) {
        whole_row(args.work, task);
        continue;
      }
      const int64_t row = by_chunk ? task / chunks : task;
      const int64_t first = by_chunk ? task % chunks : 0;
      const int64_t last = by_chunk ? first + 1 : chunks;
      if (args.phases & kBegin)
        for (int64_t chunk = first; chunk < last; ++chunk) begin_chunk(args, row, chunk, chunks);
      if (args.phases & kRow) end_row(args, row, chunks);
      if (args.phases & kFinish)
        for (int64_t chunk = first; chunk < last; ++chunk) end_chunk(args, row, chunk, chunks);
    }
  }
};

// Calls run(Element()) for the element of a dtype.
template <class Run>
void host_for_dtype(DType dtype, Run run) {
  switch (dtype) {
    case DType::float32:
      return run(float());
    case DType::float64:
      return run(double());
    case DType::bfloat16:
      return run(bfloat16());
    default:
      return run(float16());
  }
}

inline void host_cross_entropy(const CrossEntropyArgs& args, DType dtype) {
  host_for_dtype(dtype, [&](auto element) {
    if (args.wide)
      HostCrossEntropy<decltype(element), int(16 / sizeof element)>::run(args);
    else
      HostCrossEntropy<decltype(element), 1>::run(args);
  });
}

inline void host_mse(const MseWork& work, DType dtype) {
  host_for_dtype(dtype, [&](auto element) {
    for (int64_t chunk = 0; chunk < norm_chunks(work.numel); ++chunk) {
      double lanes[kWarp];
      for (uint32_t lane = 0; lane < uint32_t(kWarp); ++lane)
        lanes[lane] = mse_lane<decltype(element)>(work, chunk, lane);
      tree_sum<kWarp>(lanes);
      work.sums[chunk] = lanes[0];
    }
  });
}

inline void host_scale(const ScaleArgs& args, DType dtype) {
  constexpr int64_t kManyThreads = 2 * kThreads;
  host_for_dtype(dtype, [&](auto element) {
    for (int64_t thread = 0; thread < kManyThreads; ++thread)
      scale_values<decltype(element)>(args, thread, kManyThreads);
  });
}

inline void host_check_targets(const TargetArgs& args) {
  double weights[kTotalLanes], counts[kTotalLanes];
  for (uint32_t lane = 0; lane < uint32_t(kTotalLanes); ++lane) {
    const Divisors part = target_lane(args, lane);
    weights[lane] = part.weight;
    counts[lane] = part.valid;
  }
  tree_sum<kTotalLanes>(weights);
  tree_sum<kTotalLanes>(counts);
  *args.divisors = {weights[0], counts[0]};
}

inline void host_finish_loss(const LossArgs& args) {
  double lanes[kTotalLanes];
  for (uint32_t lane = 0; lane < uint32_t(kTotalLanes); ++lane) lanes[lane] = loss_lane(args, lane);
  tree_sum<kTotalLanes>(lanes);
  finish_loss(args, lanes[0]);
}

}  // namespace fusedopt
