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
  static constexpr int kChunkBlocks = kThreads / kLanes;
  static constexpr int kChunk = kChunkBlocks * kBlock;
  // With three states, half a multiprocessor has too few registers for a block.
  static constexpr int kMinBlocks = states < 3 ? 2 : 1;

  struct TileSpan : MeasuredSpan<typename Variant::Rule> {
    void* param;
    void* grad;
    void* state[states > 0 ? states : 1];
    int64_t numel;
    uint32_t first_chunk;
    uint32_t row : 31;
    uint32_t is_aligned : 1;  // all streams can be moved in wide accesses from their beginnings on
    Coding coding;

    static bool wants(const Span&) { return true; }
    static TileSpan from(const Span& span) {
      TileSpan to{MeasuredSpan<typename Variant::Rule>(span),
                  span.param,
                  const_cast<void*>(span.grad),
                  {},
                  span.numel,
                  0,
                  0,
                  1,
                  *span.coding};
      const StreamBytes bytes(to.coding);
      const auto look_at = [&](const void* stream, int64_t size) {
        if (!are_aligned(stream, size)) to.is_aligned = 0;
      };
      look_at(span.param, bytes.param);
      look_at(span.grad, bytes.grad);
      if (bytes.master != 0) look_at(to.coding.master, bytes.master);
      for (int k = 0; k < states; ++k) {
        to.state[k] = span.states[k];
        look_at(span.states[k], to.coding.state == state_format<CodedState> ? 4 : bytes.state);
      }
      to.coding.row = to.blocks().joined().row;
      return to;
    }
    uint32_t format() const { return 1u << coding.state; }
    FUSEDOPT_HD Blocks blocks() const { return {numel, coding.row}; }
    FUSEDOPT_HD uint32_t chunks() const {
      return uint32_t((blocks().count() + kChunkBlocks - 1) / kChunkBlocks);
    }
  };

  // What a lane keeps of its elements until nothing can be rare any more, and scales are known:
  // states that need no scale as they are stored.
  template <class StateFormat>
  struct Lane {
    float params[kLaneElements];
    typename std::conditional<StateFormat::in_codes, float[kLaneElements], LaneWords>::type
        state[states > 0 ? states : 1];
    bool rare;

    FUSEDOPT_HD uint32_t largest(int k) const {
      float result = 0;
      FUSEDOPT_UNROLL
      for (int i = 0; i < kLaneElements; ++i) result = larger_magnitude(result, state[k][i]);
      return float_to_bits(result);
    }
  };

  struct Place : BlockPlace {
    int first;         // the place in the whole block of the one that begins here
    int64_t of_whole;  // the number of the block in the whole parameter
    uint32_t step;

    // Worked out when it is needed: registers are scarce until then.
    FUSEDOPT_HD uint32_t dither() const { return dither_of_block(of_whole, step); }
  };

  FUSEDOPT_HD static char* at(void* stream, int64_t size, const BlockPlace& place) {
    return static_cast<char*>(stream) + place.begin * size;
  }

  template <class StateFormat>
  FUSEDOPT_HD static void update(const TileSpan& s, const Row& row, const BlockPlace& place,
                                 uint32_t of_block, int lane, Lane<StateFormat>& to) {
    const Coding& coding = s.coding;
    const StreamBytes bytes(coding);
    using Element = typename StateFormat::Element;
    LaneWords grad;
    typename std::conditional<StateFormat::in_codes, LaneCodes, LaneWords>::type
        stored[states > 0 ? states : 1];
    [[maybe_unused]] float scales[states > 0 ? states : 1];
    FUSEDOPT_UNROLL
    for (int k = 0; k < states; ++k) {
      const char* const from = at(s.state[k], sizeof(Element), place);
      if constexpr (StateFormat::in_codes) {
        stored[k].load(from, lane);
        scales[k] = coding.scales[k][place.number];
      } else {
        stored[k].template load_of<sizeof(Element)>(from, lane);
      }
    }
    load_grads(coding.grad, at(s.grad, bytes.grad, place), lane, grad);
    load_params(coding.param, at(s.param, bytes.param, place),
                at(coding.master, bytes.master, place), lane, to.params);
    float grads[kLaneElements];
    decode_grads(coding.grad, grad, grads);
    // A place is one of its lane's and one of its lane's first element, without a common bit.
    [[maybe_unused]] const uint32_t of_lane = dither(of_block, here(uint32_t(place_of(lane, 0))));
    QuickMath math;
    // Elsewhere usual rows save little, and two ways take registers that some have not.
    const bool usual = has_cautious<Variant> && Variant::Rule::usual(row);
    if constexpr (StateFormat::in_codes) {
      FUSEDOPT_UNROLL
      for (int k = 0; k < states; ++k) math.note_if(is_careful(scales[k]));
    }
    FUSEDOPT_UNROLL
    for (int first = 0; first < kLaneElements; first += kNeighbours) {
      float states_of[kNeighbours][kMaxStates] = {};
      FUSEDOPT_UNROLL
      for (int j = 0; j < kNeighbours; ++j) {
        for_each_state<Variant>([&](auto number, auto of_squares) {
          constexpr int k = decltype(number)::value;
          if constexpr (StateFormat::in_codes) {
            states_of[j][k] =
                stored[k].template decode<decltype(of_squares)::value>(first + j, scales[k]);
          } else {
            states_of[j][k] = widen(stored[k].template get<Element>(first + j));
          }
        });
      }
      const auto update_neighbours = [&](auto is_usual) {
        FUSEDOPT_UNROLL
        for (int j = 0; j < kNeighbours; ++j)
          Variant::template update<decltype(is_usual)::value>(row, to.params[first + j],
                                                              grads[first + j], states_of[j], math);
      };
      if (usual) {
        update_neighbours(std::true_type());
      } else {
        update_neighbours(std::false_type());
      }
      FUSEDOPT_UNROLL
      for (int j = 0; j < kNeighbours; ++j) {
        const int i = first + j;
        for_each_state<Variant>([&](auto number, auto of_squares) {
          constexpr int k = decltype(number)::value;
          if constexpr (StateFormat::in_codes) {
            to.state[k][i] = states_of[j][k];
          } else {
            Element stored;
            const uint32_t threshold = dither(of_lane, uint32_t(place_of(0, i)));
            StateFormat::template encode<decltype(of_squares)::value>(states_of[j][k], threshold,
                                                                      stored);
            to.state[k].set(i, stored);
          }
        });
      }
      to.rare = math.is_rare();
      // Not only at the end: ptxas then mixes fewer elements, and does not run out of registers.
      if (to.rare) return;
    }
  }

  template <class StateFormat, bool never_negative>
  FUSEDOPT_HD static void store_state(const TileSpan& s, const Place& place, int k, int lane,
                                      const Lane<StateFormat>& from, float inverse,
                                      uint32_t of_block) {
    using Element = typename StateFormat::Element;
    char* const to = at(s.state[k], sizeof(Element), place);
    if constexpr (StateFormat::in_codes) {
      LaneCodes codes;
      codes.encode<never_negative>(from.state[k], inverse, of_block, lane);
      codes.store(to, lane);
    } else {
      from.state[k].template store_of<sizeof(Element)>(to, lane);
    }
  }

  // Updates a whole block; false where something is rare or it is none, and nothing has been stored
  // then. The lanes of one that is not whole come along with those of the warp's other block.
  template <class StateFormat>
  FUSEDOPT_HD static bool run_whole(const TileSpan& s, const Row& row, const Place& place,
                                    bool is_whole, uint32_t thread) {
    const Coding& coding = s.coding;
    using Lane = Tile::Lane<StateFormat>;
    Lanes<Lane> lanes(thread);
    if (!Lanes<Lane>::for_either(is_whole)) return false;
    const BlockPlace from = Lanes<Lane>::this_or_other(is_whole, place);
    lanes.each([&](Lane& lane, int number) {
      update<StateFormat>(s, row, from, StateFormat::in_codes ? 0 : place.dither(), number, lane);
    });
    bool rare = lanes.any([](const Lane& lane) { return lane.rare; });
    [[maybe_unused]] uint32_t largest[states > 0 ? states : 1] = {};
    if constexpr (StateFormat::in_codes) {
      FUSEDOPT_UNROLL
      for (int k = 0; k < states; ++k) {
        largest[k] =
            lanes.largest([&](const Lane& lane) { return lane.rare ? 0 : lane.largest(k); });
        rare = rare || !is_finite(largest[k]);
      }
    }
    if (rare || !is_whole) return false;
    lanes.each([&](Lane& lane, int number) {
      const StreamBytes bytes(coding);
      const auto random = [&] { return RandomBlock(coding.key, place.step, place.of_whole); };
      store_params(coding.param, lane.params, random, number, at(s.param, bytes.param, place),
                   at(coding.master, bytes.master, place));
      const uint32_t of_block = StateFormat::in_codes ? place.dither() : 0;
      for_each_state<Variant>([&](auto state, auto of_squares) {
        constexpr int k = decltype(state)::value;
        constexpr bool never_negative = decltype(of_squares)::value;
        const Scale scale = Code<never_negative>::scale_of(largest[k], false);
        store_state<StateFormat, never_negative>(s, place, k, number, lane, scale.inverse,
                                                 of_block);
        if (StateFormat::in_codes && number == 0) coding.scales[k][place.number] = scale.scale;
      });
    });
    return true;
  }

  // -- blocks that are not whole, or lie askew: an element after the other
  // -------------------------

  // An element of a lane, updated.
  struct Updated {
    float value, state[kMaxStates];
  };
  // The largest magnitudes of a lane's elements.
  struct PartLane {
    uint32_t all[states > 0 ? states : 1] = {}, finite[states > 0 ? states : 1] = {};
    float scales[states > 0 ? states : 1] = {};

    FUSEDOPT_HD void note(const Updated& element) {
      FUSEDOPT_UNROLL
      for (int k = 0; k < states; ++k) {
        const uint32_t magnitude = magnitude_bits(element.state[k]);
        all[k] = magnitude > all[k] ? magnitude : all[k];
        const bool counts = magnitude > finite[k] && is_finite(magnitude);
        finite[k] = counts ? magnitude : finite[k];
      }
    }
  };

  template <class StateFormat>
  FUSEDOPT_HD static Updated updated(const TileSpan& s, const Row& row, const Place& place,
                                     const float* scales, int i) {
    const Coding& coding = s.coding;
    const int64_t element = place.begin + i;
    Updated result = {};
    result.value = decode_param(coding.param, s.param, coding.master, element);
    for_each_state<Variant>([&](auto state, auto of_squares) {
      constexpr int k = decltype(state)::value;
      using Element = typename StateFormat::Element;
      if constexpr (StateFormat::in_codes) {
        const uint32_t code =
            element_at<Element>(s.state[k], place.begin + byte_of(i, place.count));
        result.state[k] = Code<decltype(of_squares)::value>::decode(code, 0, absolute(scales[k]),
                                                                    is_careful(scales[k]));
      } else {
        result.state[k] = widen(element_at<Element>(s.state[k], element));
      }
    });
    PlainMath math;
    Variant::template update<false>(row, result.value, decode_grad(coding.grad, s.grad, element),
                                    result.state, math);
    return result;
  }

  template <class StateFormat>
  FUSEDOPT_HD static void store(const TileSpan& s, const Place& place, const Updated& from, int i,
                                const Scale* scales, const bool* careful, uint32_t of_block) {
    const Coding& coding = s.coding;
    const int64_t at = place.begin + i;
    const auto random = [&] {
      return RandomBlock(coding.key, place.step, place.of_whole).of_place(place.first + i);
    };
    encode_param(coding.param, from.value, random, s.param, coding.master, at);
    const uint32_t threshold = dither(of_block, uint32_t(place.first + i));
    for_each_state<Variant>([&](auto state, auto of_squares) {
      constexpr int k = decltype(state)::value;
      constexpr bool never_negative = decltype(of_squares)::value;
      using Element = typename StateFormat::Element;
      if constexpr (StateFormat::in_codes) {
        auto* const codes = static_cast<Element*>(s.state[k]) + place.begin;
        codes[byte_of(i, place.count)] = Element(
            Code<never_negative>::encode(from.state[k], scales[k].inverse, threshold, careful[k]));
      } else {
        StateFormat::template encode<never_negative>(from.state[k], threshold,
                                                     static_cast<Element*>(s.state[k])[at]);
      }
    });
  }

  template <class StateFormat>
  FUSEDOPT_HD static void run_part(const TileSpan& s, const Row& row, const Place& place,
                                   uint32_t thread) {
    const Coding& coding = s.coding;
    Scale scales[states > 0 ? states : 1] = {};
    bool careful[states > 0 ? states : 1] = {};
    Lanes<PartLane> lanes(thread);
    if constexpr (StateFormat::in_codes) {
      lanes.each([&](PartLane& lane, int) {
        FUSEDOPT_UNROLL
        for (int k = 0; k < states; ++k)
          if (place.count > 0) lane.scales[k] = coding.scales[k][place.number];
      });
    }
    const uint32_t of_block = place.dither();
    // Where there are codes, elements are updated twice, as there is nowhere to keep all of them
    // until their scale is known.
    FUSEDOPT_NO_UNROLL
    for (int pass = StateFormat::in_codes ? 0 : 1; pass < 2; ++pass) {
      lanes.each([&](PartLane& lane, int number) {
        FUSEDOPT_NO_UNROLL
        for (int i = number; i < place.count; i += kLanes) {
          const Updated element = updated<StateFormat>(s, row, place, lane.scales, i);
          if (pass == 0) {
            lane.note(element);
          } else {
            store<StateFormat>(s, place, element, i, scales, careful, of_block);
          }
        }
      });
      if (!StateFormat::in_codes || pass == 1) continue;
      for_each_state<Variant>([&](auto state, auto of_squares) {
        constexpr int k = decltype(state)::value;
        careful[k] = !is_finite(lanes.largest([&](const PartLane& lane) { return lane.all[k]; }));
        scales[k] = Code<decltype(of_squares)::value>::scale_of(
            lanes.largest([&](const PartLane& lane) { return lane.finite[k]; }), careful[k]);
      });
    }
    if constexpr (StateFormat::in_codes) {
      lanes.each([&](PartLane&, int number) {
        FUSEDOPT_UNROLL
        for (int k = 0; k < states; ++k)
          if (number == 0 && place.count > 0) coding.scales[k][place.number] = scales[k].scale;
      });
    }
  }

  template <class StateFormat>
  FUSEDOPT_HD static void run_block(const TileSpan& s, const Row& row, const BlockPlace& block,
                                    uint32_t thread) {
    const Coding& coding = s.coding;
    const uint32_t step = coding.count == nullptr ? coding.step : uint32_t(*coding.count);
    const int64_t number = coding.first_block + block.number;
    const Place place{block, coding.first_place, number, step};
    // A first block that is cut off in front counts places from there. A block has to begin where
    // its lanes' neighbours would, and the words of their codes.
    constexpr int64_t together = StateFormat::in_codes ? 4 * kNeighbours : kNeighbours;
    const bool is_whole = block.count == kBlock && place.first == 0 && s.is_aligned != 0 &&
                          block.begin % together == 0;
    const bool done = run_whole<StateFormat>(s, row, place, is_whole, thread);
    if (!Lanes<PartLane>::for_either(!done && block.count > 0)) return;
    Place part = place;
    part.count = done ? 0 : block.count;
    run_part<StateFormat>(s, row, part, thread);
  }

  // The spans whose states are in one format, each of which has a kernel: for all in one, a device
  // has too few registers.
  template <class StateFormat>
  FUSEDOPT_HD static void run(const LaunchArgs& args, uint32_t block, uint32_t blocks,
                              uint32_t thread) {
    if (args.control != nullptr && args.control->skip != 0) return;
    if (!Lanes<PartLane>::runs_in(thread)) return;
    const auto* spans = reinterpret_cast<const TileSpan*>(args.data);
    uint32_t known = 0;
    uint32_t span_of_row = ~uint32_t(0);  // none yet
    Row row = {};
    for (uint32_t chunk = block; chunk < args.chunks; chunk += blocks) {
      known = span_of_chunk(spans, known, args.spans, chunk);
      const TileSpan& s = spans[known];
      if (s.coding.state != state_format<StateFormat>) continue;  // a whole block of threads
      // No memory holds more than 2^32 blocks.
      const uint32_t number = (chunk - s.first_chunk) * kChunkBlocks + thread / kLanes;
      BlockPlace place = s.blocks().at(number);
      if (place.begin >= s.numel) place = {0, 0, 0};  // none
      if (span_of_row != known) {
        row = row_of<Row>(args, s.row);
        s.complete(args, row);
      }
      span_of_row = known;
      run_block<StateFormat>(s, row, place, thread);
    }
  }

  // On the host, all of them in turn.
  static void run(const LaunchArgs& args, uint32_t block, uint32_t blocks, uint32_t thread) {
    for_each_type(StateFormats{},
                  [&](auto format) { run<decltype(format)>(args, block, blocks, thread); });
  }

  static size_t pack(const Span* spans, size_t count, size_t next, int kernel, const HyperRow* rows,
                     LaunchArgs& args) {
    return pack_spans<TileSpan, Row>(spans, count, next, kernel, rows, args);
  }
};

}  // namespace fusedopt
