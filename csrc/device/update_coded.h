// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The body of the CUDA kernel that updates spans with a Coding.
#pragma once

#include "lanes.h"
#include "update.h"

namespace fusedopt {

// Calls visit(k, never_negative) for each state, both known to the compiler.
template <class Variant, int k = 0, class Visit>
FUSEDOPT_HD void for_each_state(Visit visit) {
  if constexpr (k < Variant::state_count) {
    visit(std::integral_constant<int, k>{},
          std::integral_constant<bool, is_never_negative(Variant::states[k].kind)>{});
    for_each_state<Variant, k + 1>(visit);
  }
}

template <class Variant>
struct Tile<Variant, Coded> {
  using Row = typename Variant::Rule::template Row<float>;
  static constexpr int states = Variant::state_count;
  static constexpr int kChunkBlocks = kThreads / kWarp;
  static constexpr int kChunk = kChunkBlocks * kBlock;
  // With three states, half a multiprocessor has too few registers for a block.
  static constexpr int kMinBlocks = states < 3 ? 2 : 1;

  struct TileSpan {
    void* param;
    void* grad;
    void* state[states > 0 ? states : 1];
    int64_t numel;
    uint32_t first_chunk;
    uint32_t row;
    Coding coding;

    static TileSpan from(const Span& span) {
      TileSpan to{span.param, const_cast<void*>(span.grad), {}, span.numel, 0, 0, *span.coding};
      for (int k = 0; k < states; ++k) to.state[k] = span.states[k];
      to.coding.row = to.blocks().joined().row;
      return to;
    }
    FUSEDOPT_HD Blocks blocks() const { return {numel, coding.row}; }
    FUSEDOPT_HD uint32_t chunks() const {
      return uint32_t((blocks().count() + kChunkBlocks - 1) / kChunkBlocks);
    }
  };

  // What a lane keeps of its elements until their block's scales are known.
  struct Lane {
    float state[states > 0 ? states : 1][kLaneElements];

    FUSEDOPT_HD uint32_t largest(int k, bool finite_only) const {
      uint32_t result = 0;
      FUSEDOPT_UNROLL
      for (int i = 0; i < kLaneElements; ++i) {
        const uint32_t magnitude = magnitude_bits(state[k][i]);
        const bool counts = magnitude > result && (!finite_only || is_finite(magnitude));
        result = counts ? magnitude : result;
      }
      return result;
    }
  };

  struct Place : BlockPlace {
    int first;  // the place in the whole block of the one that begins here
    uint32_t dither;
    RandomBlock random;
  };

  FUSEDOPT_HD static char* at(void* stream, int64_t size, const Place& place) {
    return static_cast<char*>(stream) + place.begin * size;
  }

  FUSEDOPT_HD static void update(const TileSpan& s, const Row& row, const Place& place, int lane,
                                 Lane& to) {
    const Coding& coding = s.coding;
    const StreamBytes bytes(coding);
    const bool in_codes = coding.state == state_format<CodedState>;
    LanePairs param, master, grad, state[states > 0 ? states : 1];
    uint64_t words[states > 0 ? states : 1];
    float scales[states > 0 ? states : 1];
    param.load(at(s.param, bytes.param, place), bytes.param, lane, place.count);
    master.load(at(coding.master, bytes.master, place), bytes.master, lane, place.count);
    grad.load(at(s.grad, bytes.grad, place), bytes.grad, lane, place.count);
    FUSEDOPT_UNROLL
    for (int k = 0; k < states; ++k) {
      if (in_codes) {
        words[k] = load_codes(at(s.state[k], 1, place), lane, place.count);
        scales[k] = coding.scales[k][place.number];
      } else {
        state[k].load(at(s.state[k], bytes.state, place), bytes.state, lane, place.count);
      }
    }
    float params[kLaneElements], grads[kLaneElements];
    decode_params(coding.param, param, master, params);
    decode_grads(coding.grad, grad, grads);
    for_each_state<Variant>([&](auto k, auto never_negative) {
      if (in_codes) {
        FUSEDOPT_UNROLL
        for (int i = 0; i < kLaneElements; ++i)
          to.state[k][i] = decode<never_negative.value>(words[k], scales[k], i);
      } else if (coding.state == state_format<Bfloat16State>) {
        decode_elements<bfloat16>(state[k], to.state[k]);
      } else {
        decode_elements<float>(state[k], to.state[k]);
      }
    });
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      float states_of_i[kMaxStates] = {};
      FUSEDOPT_UNROLL
      for (int k = 0; k < states; ++k) states_of_i[k] = to.state[k][i];
      Variant::template update<false>(row, params[i], grads[i], states_of_i);
      FUSEDOPT_UNROLL
      for (int k = 0; k < states; ++k) to.state[k][i] = states_of_i[k];
    }
    if (place.count < kBlock) {
      // Elements that there are not have no say in a scale.
      FUSEDOPT_UNROLL
      for (int i = 0; i < kLaneElements; ++i) {
        FUSEDOPT_UNROLL
        for (int k = 0; k < states; ++k)
          to.state[k][i] = place_of(lane, i) < place.count ? to.state[k][i] : 0;
      }
    }
    // Of their own, so that no register holds the loaded ones until here.
    LanePairs new_param, new_master;
    encode_params(coding.param, params, place.random, place.first, lane, new_param, new_master);
    new_param.store(at(s.param, bytes.param, place), bytes.param, lane, place.count);
    new_master.store(at(coding.master, bytes.master, place), bytes.master, lane, place.count);
  }

  // The code of element i is in the byte of its quarter, of the word of its place in the pair.
  FUSEDOPT_HD static int shift_of(int i) { return 32 * (i % 2) + 8 * (i / 2); }

  // The codes of a lane, as the words that they are in memory if that can be.
  FUSEDOPT_HD static bool are_words(const void* block, int count) {
    return count == kBlock && reinterpret_cast<uintptr_t>(block) % sizeof(uint64_t) == 0;
  }
  FUSEDOPT_HD static uint64_t load_codes(const void* block, int lane, int count) {
    const auto* from = static_cast<const uint8_t*>(block);
    if (are_words(block, count)) return load_aligned<uint64_t>(from + 8 * lane);
    uint64_t words = 0;
    for (int i = 0; i < kLaneElements; ++i) {
      const int place = place_of(lane, i);
      if (place < count) words |= uint64_t(from[byte_of(place, count)]) << shift_of(i);
    }
    return words;
  }
  FUSEDOPT_HD static void store_codes(void* block, int lane, int count, uint64_t words) {
    auto* to = static_cast<uint8_t*>(block);
    if (are_words(block, count)) {
      store_aligned(to + 8 * lane, words);
      return;
    }
    for (int i = 0; i < kLaneElements; ++i) {
      const int place = place_of(lane, i);
      if (place < count) to[byte_of(place, count)] = uint8_t(words >> shift_of(i));
    }
  }

  template <bool never_negative>
  FUSEDOPT_HD static float decode(uint64_t words, float scale, int i) {
    const uint32_t code = uint32_t(words >> shift_of(i)) & 0xffu;
    return Code<never_negative>::decode(code, absolute(scale), is_careful(scale));
  }

  template <bool never_negative>
  FUSEDOPT_HD static void encode_codes(const TileSpan& s, const Place& place, int k, int lane,
                                       const Lane& from, const Scale& scale, bool careful) {
    uint64_t words = 0;
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      const uint32_t threshold = dither(place.dither, uint32_t(place_of(lane, i)));
      const uint32_t code =
          Code<never_negative>::encode(from.state[k][i], scale.inverse, threshold, careful);
      words |= uint64_t(code) << shift_of(i);
    }
    store_codes(at(s.state[k], 1, place), lane, place.count, words);
    if (lane == 0) s.coding.scales[k][place.number] = scale.scale;
  }

  template <bool never_negative>
  FUSEDOPT_HD static void store_state(const TileSpan& s, const Place& place, int k, int lane,
                                      const Lane& from) {
    const int64_t size = StreamBytes(s.coding).state;
    LanePairs to;
    with_format(StateFormats{}, s.coding.state, [&](auto of_place) {
      using Format = decltype(of_place);
      if constexpr (!Format::in_codes) {
        FUSEDOPT_UNROLL
        for (int i = 0; i < kLaneElements; ++i) {
          const uint32_t threshold =
              dither(place.dither, uint32_t(place.first + place_of(lane, i)));
          typename Format::Element stored;
          Format::template encode<never_negative>(from.state[k][i], threshold, stored);
          set_element(to, i, stored);
        }
      }
    });
    to.store(at(s.state[k], size, place), size, lane, place.count);
  }

  FUSEDOPT_HD static void run_block(const TileSpan& s, const Row& row, const BlockPlace& block,
                                    uint32_t thread) {
    const Coding& coding = s.coding;
    const uint32_t step = coding.count == nullptr ? coding.step : uint32_t(*coding.count);
    const int64_t number = coding.first_block + block.number;
    const Place place{block, coding.first_place, dither_of_block(number, step),
                      RandomBlock(coding.key, step, number)};
    Warp<Lane> warp(thread);
    warp.each([&](Lane& lane, int number) { update(s, row, place, number, lane); });
    for_each_state<Variant>([&](auto k, auto of_squares) {
      constexpr bool never_negative = decltype(of_squares)::value;
      if (coding.state != state_format<CodedState>) {
        warp.each([&](Lane& lane, int number) {
          store_state<never_negative>(s, place, k, number, lane);
        });
        return;
      }
      uint32_t largest = warp.largest([&](const Lane& lane) { return lane.largest(k, false); });
      const bool careful = !is_finite(largest);
      if (careful) largest = warp.largest([&](const Lane& lane) { return lane.largest(k, true); });
      const Scale scale = Code<never_negative>::scale_of(largest, careful);
      warp.each([&](Lane& lane, int number) {
        encode_codes<never_negative>(s, place, k, number, lane, scale, careful);
      });
    });
  }

  FUSEDOPT_HD static void run(const LaunchArgs& args, uint32_t block, uint32_t blocks,
                              uint32_t thread) {
    if (args.control != nullptr && args.control->skip != 0) return;
    if (!Warp<Lane>::runs_in(thread)) return;
    const auto* spans = reinterpret_cast<const TileSpan*>(args.data);
    uint32_t known = 0;
    for (uint32_t chunk = block; chunk < args.chunks; chunk += blocks) {
      known = span_of_chunk(spans, known, args.spans, chunk);
      const TileSpan& s = spans[known];
      // No memory holds more than 2^32 blocks.
      const uint32_t number = (chunk - s.first_chunk) * kChunkBlocks + thread / kWarp;
      const BlockPlace block = s.blocks().at(number);
      // All lanes of a warp leave together.
      if (block.begin < s.numel) run_block(s, row_of<Row>(args, s.row), block, thread);
    }
  }

  static size_t pack(const Span* spans, size_t count, size_t next, int kernel, const HyperRow* rows,
                     LaunchArgs& args) {
    return pack_spans<TileSpan, Row>(spans, count, next, kernel, rows, args);
  }
};

}  // namespace fusedopt
