// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The body of the CUDA kernel that updates spans with a Coding.
#pragma once

#include "../core/codes.h"
#include "../core/norm.h"
#include "update.h"

// A block is the work of a warp: a lane has a pair of neighbours in each of the block's quarters,
// so that the codes of these are two words.
namespace fusedopt {

constexpr int kPairs = 4;
constexpr int kLaneElements = 2 * kPairs;
static_assert(kLaneElements * kWarp == kBlock, "a warp has a block");

// Where in its block an element of a lane is.
FUSEDOPT_HD int place_of(int lane, int i) { return i / 2 * kWords + 2 * lane + i % 2; }

template <class Word>
FUSEDOPT_HD Word load_aligned(const void* from) {
#if defined(__CUDA_ARCH__)
  return *static_cast<const Word*>(from);
#else
  Word word;
  memcpy(&word, from, sizeof word);
  return word;
#endif
}
template <class Word>
FUSEDOPT_HD void store_aligned(void* to, Word word) {
#if defined(__CUDA_ARCH__)
  *static_cast<Word*>(to) = word;
#else
  memcpy(to, &word, sizeof word);
#endif
}

// A lane's elements of one stream as they are stored, a pair in the lower bits of a word. They are
// loaded before any is decoded, so that the loads of all streams overlap.
struct LanePairs {
  uint64_t pairs[kPairs] = {};

  template <class Element>
  FUSEDOPT_HD Element get(int i) const {
    return Element(pairs[i / 2] >> (8 * sizeof(Element) * (i % 2)));
  }
  template <class Element>
  FUSEDOPT_HD void set(int i, Element value) {
    constexpr int bits = 8 * sizeof(Element);
    const uint64_t mask = (uint64_t(1) << bits) - 1;
    // The other one may still have to be decoded.
    pairs[i / 2] &= ~(mask << (bits * (i % 2)));
    pairs[i / 2] |= uint64_t(value) << (bits * (i % 2));
  }

  // Block: where it begins; count: the elements it has.
  template <class Element, class Pair>
  FUSEDOPT_HD void load(const void* block, int lane, int count) {
    const auto* from = static_cast<const Element*>(block);
    const bool whole = count == kBlock && reinterpret_cast<uintptr_t>(block) % sizeof(Pair) == 0;
    FUSEDOPT_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      const int place = place_of(lane, 2 * pair);
      if (whole) {
        pairs[pair] = load_aligned<Pair>(from + place);
      } else {
        set<Element>(2 * pair, place < count ? from[place] : Element(0));
        set<Element>(2 * pair + 1, place + 1 < count ? from[place + 1] : Element(0));
      }
    }
  }
  template <class Element, class Pair>
  FUSEDOPT_HD void store(void* block, int lane, int count) const {
    auto* to = static_cast<Element*>(block);
    const bool whole = count == kBlock && reinterpret_cast<uintptr_t>(block) % sizeof(Pair) == 0;
    FUSEDOPT_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      const int place = place_of(lane, 2 * pair);
      if (whole) {
        store_aligned(to + place, Pair(pairs[pair]));
      } else {
        if (place < count) to[place] = get<Element>(2 * pair);
        if (place + 1 < count) to[place + 1] = get<Element>(2 * pair + 1);
      }
    }
  }

  FUSEDOPT_HD void load(const void* block, int64_t size, int lane, int count) {
    if (size == 4) load<uint32_t, uint64_t>(block, lane, count);
    if (size == 2) load<uint16_t, uint32_t>(block, lane, count);
    if (size == 1) load<uint8_t, uint16_t>(block, lane, count);
  }
  FUSEDOPT_HD void store(void* block, int64_t size, int lane, int count) const {
    if (size == 4) store<uint32_t, uint64_t>(block, lane, count);
    if (size == 2) store<uint16_t, uint32_t>(block, lane, count);
    if (size == 1) store<uint8_t, uint16_t>(block, lane, count);
  }
};

// Bits of an element, as LanePairs has them.
template <int bytes>
struct BitsOf;
template <>
struct BitsOf<1> {
  using type = uint8_t;
};
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<4> {
  using type = uint32_t;
};

template <class Element>
FUSEDOPT_HD Element element_of(const LanePairs& from, int i) {
  const auto bits = from.get<typename BitsOf<sizeof(Element)>::type>(i);
  Element element;
  memcpy(&element, &bits, sizeof element);
  return element;
}
template <class Element>
FUSEDOPT_HD void set_element(LanePairs& to, int i, Element element) {
  typename BitsOf<sizeof(Element)>::type bits;
  memcpy(&bits, &element, sizeof bits);
  to.set(i, bits);
}

// All elements of a lane, so that their format is looked at once.
FUSEDOPT_HD void decode_params(int format, const LanePairs& param, const LanePairs& master,
                               float* to) {
  with_format(ParamFormats{}, format, [&](auto of_place) {
    using Format = decltype(of_place);
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      const auto stored = element_of<typename Format::Param>(param, i);
      if constexpr (std::is_same<typename Format::Master, NoMaster>::value) {
        to[i] = Format::decode(stored, NoMaster{});
      } else {
        to[i] = Format::decode(stored, element_of<typename Format::Master>(master, i));
      }
    }
  });
}

FUSEDOPT_HD void encode_params(int format, const float* from, const RandomBlock& random, int lane,
                               LanePairs& param, LanePairs& master) {
  with_format(ParamFormats{}, format, [&](auto of_place) {
    using Format = decltype(of_place);
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      typename Format::Param stored;
      typename Format::Master rest;
      if constexpr (Format::stochastic) {
        Format::encode(from[i], random.of_place(place_of(lane, i)), stored);
      } else {
        Format::encode(from[i], stored, rest);
      }
      set_element(param, i, stored);
      if constexpr (!std::is_same<typename Format::Master, NoMaster>::value)
        set_element(master, i, rest);
    }
  });
}

template <class Element>
FUSEDOPT_HD void decode_elements(const LanePairs& from, float* to) {
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) to[i] = widen(element_of<Element>(from, i));
}

FUSEDOPT_HD void decode_grads(DType dtype, const LanePairs& grad, float* to) {
  if (dtype == DType::bfloat16) {
    decode_elements<bfloat16>(grad, to);
  } else if (dtype == DType::float16) {
    decode_elements<float16>(grad, to);
  } else {
    decode_elements<float>(grad, to);
  }
}

#if defined(__CUDA_ARCH__)
// What the lanes of a warp work on. On the device a lane is a thread.
template <class Lane>
struct Warp {
  Lane lane_of_thread;
  int number;

  FUSEDOPT_HD explicit Warp(uint32_t thread) : number(int(thread % kWarp)) {}
  FUSEDOPT_HD static bool runs_in(uint32_t) { return true; }
  template <class Visit>
  FUSEDOPT_HD void each(Visit visit) {
    visit(lane_of_thread, number);
  }
  template <class Value>
  FUSEDOPT_HD uint32_t largest(Value value) {
    uint32_t result = value(lane_of_thread);
    FUSEDOPT_UNROLL
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, result, distance);
      result = other > result ? other : result;
    }
    return result;
  }
};
#else
// On the host, the thread of lane 0 runs them one after the other.
template <class Lane>
struct Warp {
  Lane lanes[kWarp];

  explicit Warp(uint32_t) {}
  static bool runs_in(uint32_t thread) { return thread % kWarp == 0; }
  template <class Visit>
  void each(Visit visit) {
    for (int lane = 0; lane < kWarp; ++lane) visit(lanes[lane], lane);
  }
  template <class Value>
  uint32_t largest(Value value) {
    uint32_t result = 0;
    for (const Lane& lane : lanes) result = value(lane) > result ? value(lane) : result;
    return result;
  }
};
#endif

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
  static constexpr int kChunk = kThreads * kLaneElements;
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
      return to;
    }
    FUSEDOPT_HD uint32_t chunks() const { return uint32_t((numel + kChunk - 1) / kChunk); }
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

  // A block, and how many elements of it there are.
  struct Place {
    int64_t block;
    int count;
    uint32_t step;
    RandomBlock random;
  };

  FUSEDOPT_HD static char* at(void* stream, int64_t size, const Place& place) {
    return static_cast<char*>(stream) + place.block * kBlock * size;
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
        words[k] = load_aligned<uint64_t>(at(s.state[k], 1, place) + 8 * lane);
        scales[k] = coding.scales[k][place.block];
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
    encode_params(coding.param, params, place.random, lane, param, master);
    param.store(at(s.param, bytes.param, place), bytes.param, lane, place.count);
    master.store(at(coding.master, bytes.master, place), bytes.master, lane, place.count);
  }

  // The code of element i is in the byte of its quarter, of the word of its place in the pair.
  FUSEDOPT_HD static int shift_of(int i) { return 32 * (i % 2) + 8 * (i / 2); }

  template <bool never_negative>
  FUSEDOPT_HD static float decode(uint64_t words, float scale, int i) {
    const uint32_t code = uint32_t(words >> shift_of(i)) & 0xffu;
    return Code<never_negative>::decode(code, absolute(scale), is_careful(scale));
  }

  template <bool never_negative>
  FUSEDOPT_HD static void store_codes(const TileSpan& s, const Place& place, int k, int lane,
                                      const Lane& from, const Scale& scale, bool careful) {
    const uint32_t dither = dither_of_block(place.block, place.step);
    uint64_t words = 0;
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      const uint32_t threshold = fusedopt::dither(dither, uint32_t(place_of(lane, i)));
      const uint32_t code =
          Code<never_negative>::encode(from.state[k][i], scale.inverse, threshold, careful);
      words |= uint64_t(code) << shift_of(i);
    }
    store_aligned(at(s.state[k], 1, place) + 8 * lane, words);
    if (lane == 0) s.coding.scales[k][place.block] = scale.scale;
  }

  template <bool never_negative>
  FUSEDOPT_HD static void store_state(const TileSpan& s, const Place& place, int k, int lane,
                                      const Lane& from) {
    const uint32_t dither = dither_of_block(place.block, place.step);
    const int64_t size = StreamBytes(s.coding).state;
    LanePairs to;
    with_format(StateFormats{}, s.coding.state, [&](auto of_place) {
      using Format = decltype(of_place);
      if constexpr (!Format::in_codes) {
        FUSEDOPT_UNROLL
        for (int i = 0; i < kLaneElements; ++i) {
          const uint32_t threshold = fusedopt::dither(dither, uint32_t(place_of(lane, i)));
          typename Format::Element stored;
          Format::template encode<never_negative>(from.state[k][i], threshold, stored);
          set_element(to, i, stored);
        }
      }
    });
    to.store(at(s.state[k], size, place), size, lane, place.count);
  }

  FUSEDOPT_HD static void run_block(const TileSpan& s, const Row& row, int64_t block,
                                    uint32_t thread) {
    const int64_t left = s.numel - block * kBlock;
    const Coding& coding = s.coding;
    const uint32_t step = coding.count == nullptr ? coding.step : uint32_t(*coding.count);
    const Place place{block, int(left < kBlock ? left : kBlock), step,
                      RandomBlock(coding.key, step, block)};
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
        store_codes<never_negative>(s, place, k, number, lane, scale, careful);
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
      const int64_t in_span = int64_t(chunk - s.first_chunk) * (kThreads / kWarp) + thread / kWarp;
      // All lanes of a warp leave together.
      if (in_span * kBlock < s.numel) run_block(s, row_of<Row>(args, s.row), in_span, thread);
    }
  }

  static size_t pack(const Span* spans, size_t count, size_t next, int kernel, const HyperRow* rows,
                     LaunchArgs& args) {
    return pack_spans<TileSpan, Row, kChunk>(spans, count, next, kernel, rows, args);
  }
};

}  // namespace fusedopt
