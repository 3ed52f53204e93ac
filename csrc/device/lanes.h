// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What a lane of a warp has of a block: its elements of each stream, loaded, decoded and encoded.
#pragma once

#include "../core/codes.h"
#include "../core/norm.h"

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
    // In place of whatever was there, and beside the other one.
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

FUSEDOPT_HD void encode_params(int format, const float* from, const RandomBlock& random, int first,
                               int lane, LanePairs& param, LanePairs& master) {
  with_format(ParamFormats{}, format, [&](auto of_place) {
    using Format = decltype(of_place);
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      typename Format::Param stored;
      typename Format::Master rest;
      if constexpr (Format::stochastic) {
        Format::encode(from[i], random.of_place(first + place_of(lane, i)), stored);
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

}  // namespace fusedopt
