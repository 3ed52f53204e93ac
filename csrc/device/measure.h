// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The bodies of the CUDA kernels that measure parameters: sums of their chunks, and of all of
// these.
#pragma once

#include "../core/measure.h"
#include "norm.h"
#include "update_coded.h"

namespace fusedopt {

// What a thread of a warp adds up: the sums of two lanes.
template <class Rule>
struct ThreadSums {
  static constexpr int kLanes = kMeasureLanes / kWarp;
  double of_lane[kLanes][sums_of<Rule>];
};

// An element, decoded. Of spans with a Coding: where its block is, too.
template <class Variant, class Types>
struct MeasuredElement {
  using T = typename Types::Compute;
  T param, grad, state[kMaxStates];

  template <class TileSpan>
  FUSEDOPT_HD void load(const TileSpan& s, int64_t i) {
    param = widen(s.param[i]);
    grad = T(widen(s.grad[i]));
    FUSEDOPT_UNROLL
    for (int k = 0; k < Variant::state_count; ++k) state[k] = widen(s.state[k][i]);
  }
};
template <class Variant>
struct MeasuredElement<Variant, Coded> {
  float param, grad, state[kMaxStates];

  template <class TileSpan>
  FUSEDOPT_HD void load(const TileSpan& s, int64_t i) {
    const Coding& coding = s.coding;
    param = decode_param(coding.param, s.param, coding.master, i);
    grad = decode_grad(coding.grad, s.grad, i);
    if (coding.state == state_format<CodedState>) {
      const Blocks blocks = s.blocks();
      const bool is_one_row = blocks.row == blocks.numel;
      const int64_t number = is_one_row ? i / kBlock : blocks.number_of(i);
      const BlockPlace place = blocks.at(number);
      const int64_t at = place.begin + byte_of(int(i - place.begin), place.count);
      for_each_state<Variant>([&](auto number_of_state, auto of_squares) {
        constexpr int k = decltype(number_of_state)::value;
        const float scale = coding.scales[k][number];
        state[k] = Code<decltype(of_squares)::value>::decode(element_at<uint8_t>(s.state[k], at), 0,
                                                             absolute(scale), is_careful(scale));
      });
      return;
    }
    FUSEDOPT_UNROLL
    for (int k = 0; k < Variant::state_count; ++k)
      state[k] = coding.state == state_format<Bfloat16State>
                     ? widen(element_at<bfloat16>(s.state[k], i))
                     : element_at<float>(s.state[k], i);
  }
};

template <class Variant, class Types>
struct MeasureTile {
  using Rule = typename Variant::Rule;
  using Body = Tile<Variant, Types>;
  using Row = typename Body::Row;
  using Sums = ThreadSums<Rule>;
  static constexpr int kSums = sums_of<Rule>;
  // See Tile.
  static constexpr int kMinBlocks = 2;
  // Elements in flight.
  static constexpr int kUnroll = sizeof(typename Types::Compute) == 8 ? 2 : 4;

  struct ChunkSpan : Body::TileSpan {
    static bool wants(const Span& span) { return span.measured >= 0; }
    static ChunkSpan from(const Span& span) { return {Body::TileSpan::from(span)}; }
    FUSEDOPT_HD uint32_t chunks() const { return uint32_t(norm_chunks(this->numel)); }
  };

  // The quick way, or where an operand was rare the other one.
  FUSEDOPT_HD static void add(const Row& row, const MeasuredElement<Variant, Types>& e,
                              double* sums) {
    PlainMath plain;
    if constexpr (std::is_same<typename Types::Compute, double>::value) {
      Variant::measure(row, e.param, e.grad, e.state, plain, sums);
    } else {
      double before[kSums];
      FUSEDOPT_UNROLL
      for (int k = 0; k < kSums; ++k) before[k] = sums[k];
      QuickMath quick;
      Variant::measure(row, e.param, e.grad, e.state, quick, sums);
      if (!quick.is_rare()) return;
      FUSEDOPT_UNROLL
      for (int k = 0; k < kSums; ++k) sums[k] = before[k];
      Variant::measure(row, e.param, e.grad, e.state, plain, sums);
    }
  }

  // A thread's share in the sums of a chunk, given by its number in this launch.
  FUSEDOPT_HD static Sums share(const LaunchArgs& args, uint32_t chunk, uint32_t thread,
                                uint32_t& chunk_of_all) {
    const auto* spans = reinterpret_cast<const ChunkSpan*>(args.data);
    const ChunkSpan& s = spans[span_of_chunk(spans, 0, args.spans, chunk)];
    const Row row = row_of<Row>(args, s.row);
    chunk -= s.first_chunk;
    chunk_of_all = s.first_chunk_of_all + chunk;
    const int64_t begin = int64_t(chunk) * kNormChunk;
    const int64_t end = begin + kNormChunk < s.numel ? begin + kNormChunk : s.numel;
    Sums sums = {};
    FUSEDOPT_NO_UNROLL
    for (int64_t i = begin + thread; i < end; i += kUnroll * kWarp) {
      MeasuredElement<Variant, Types> elements[kUnroll];
      FUSEDOPT_UNROLL
      for (int u = 0; u < kUnroll; ++u)
        if (i + u * kWarp < end) elements[u].load(s, i + u * kWarp);
      FUSEDOPT_UNROLL
      for (int u = 0; u < kUnroll; ++u)
        if (i + u * kWarp < end) add(row, elements[u], sums.of_lane[u % Sums::kLanes]);
    }
    return sums;
  }

  // Where a chunk's sums go; those that the rule has none of become zero.
  FUSEDOPT_HD static double* place_of(double* sums, uint32_t chunk_of_all) {
    double* const place = sums_of_chunk(sums, chunk_of_all);
    for (int k = kSums; k < kMaxSums; ++k) place[k] = 0;
    return place;
  }

  static size_t pack(const Span* spans, size_t count, size_t next, int kernel, const HyperRow* rows,
                     LaunchArgs& args) {
    return pack_spans<ChunkSpan, Row>(spans, count, next, kernel, rows, args);
  }
};

// The argument of the kernel that adds up the chunks of each parameter.
struct TotalArgs {
  static constexpr int kCapacity = 1024;  // parameters of a launch
  const double* sums;                     // of all chunks
  Measured* measured;                     // of the parameters of this launch
  uint32_t count;
  MeasuredChunks chunks[kCapacity];
};
static_assert(sizeof(TotalArgs) <= kMaxArgumentBytes, "more than a launch takes");

// A lane of one sum of a parameter.
FUSEDOPT_HD double measured_lane(const TotalArgs& args, uint32_t parameter, int sum,
                                 uint32_t thread) {
  const MeasuredChunks& chunks = args.chunks[parameter];
  double total = 0;
  for (int64_t i = thread; i < chunks.count; i += kTotalLanes)
    total += args.sums[(chunks.first + i) * kMaxSums + sum];
  return total;
}

}  // namespace fusedopt
