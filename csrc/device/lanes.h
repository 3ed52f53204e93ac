// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What a lane of a warp has of a block: its elements of each stream, loaded, decoded and encoded.
#pragma once

#include "../core/codes.h"
#include "../core/norm.h"

// A block is the work of half a warp: a lane has four neighbours in each of the block's quarters,
// so that the codes of these are four words, and all accesses are as wide as they can be.
namespace fusedopt {

constexpr int kQuarters = 4;
constexpr int kNeighbours = 4;
constexpr int kLaneElements = kQuarters * kNeighbours;
constexpr int kLanes = kBlock / kLaneElements;
static_assert(2 * kLanes == kWarp, "a warp has two blocks");
static_assert(kWords == kLanes * kNeighbours, "the words of codes are a lane's neighbours");

// Where in its block an element of a lane is.
FUSEDOPT_HD int place_of(int lane, int i) {
  return i / kNeighbours * kWords + kNeighbours * lane + i % kNeighbours;
}

// The value, at this place of the code: what is worked out of it would otherwise be so ahead of a
// loop, and take a register all the time.
FUSEDOPT_HD uint32_t here(uint32_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// Neighbours of one stream, of so many bytes each, moved in one access.
template <int bytes>
struct alignas(kNeighbours* bytes) Neighbours {
  uint32_t words[bytes];
};
inline bool are_aligned(const void* first, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(first) % uintptr_t(kNeighbours * bytes) == 0;
}
template <int bytes>
FUSEDOPT_HD void load_neighbours(const void* from, uint32_t* words) {
  Neighbours<bytes> all;
#if defined(__CUDA_ARCH__)
  all = *static_cast<const Neighbours<bytes>*>(from);
#else
  memcpy(&all, from, sizeof all);
#endif
  FUSEDOPT_UNROLL
  for (int i = 0; i < bytes; ++i) words[i] = all.words[i];
}
template <int bytes>
FUSEDOPT_HD void store_neighbours(void* to, const uint32_t* words) {
#if defined(__CUDA_ARCH__)
  if constexpr (bytes == 4) {
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  } else if constexpr (bytes == 2) {
    *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  } else {
    *static_cast<uint32_t*>(to) = words[0];
  }
#else
  memcpy(to, words, kNeighbours * bytes);
#endif
}

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

// A lane's elements of one stream as they are stored, those of a quarter from a word of its own on.
// They are loaded before any is decoded, so that the loads of all streams overlap.
struct LaneWords {
  uint32_t words[kLaneElements];

  template <int bytes>
  FUSEDOPT_HD static constexpr int word_of(int i) {
    return i / kNeighbours * kNeighbours + i % kNeighbours * bytes / 4;
  }
  template <class Element>
  FUSEDOPT_HD Element get(int i) const {
    constexpr int bytes = sizeof(Element);
    const auto bits =
        typename BitsOf<bytes>::type(words[word_of<bytes>(i)] >> (8 * bytes * i % 32));
    Element element;
    memcpy(&element, &bits, sizeof element);
    return element;
  }
  // In the order of elements, and all of them.
  template <class Element>
  FUSEDOPT_HD void set(int i, Element element) {
    constexpr int bytes = sizeof(Element);
    typename BitsOf<bytes>::type bits;
    memcpy(&bits, &element, sizeof bits);
    uint32_t& word = words[word_of<bytes>(i)];
    const int shift = 8 * bytes * i % 32;
    word = shift == 0 ? uint32_t(bits) : word | uint32_t(bits) << shift;
  }

  // Block: where a whole one begins, whose neighbours are_aligned().
  template <int bytes>
  FUSEDOPT_HD void load_of(const char* block, int lane) {
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; i += kNeighbours)
      load_neighbours<bytes>(block + place_of(lane, i) * bytes, words + i);
  }
  template <int bytes>
  FUSEDOPT_HD void store_of(char* block, int lane) const {
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; i += kNeighbours)
      store_neighbours<bytes>(block + place_of(lane, i) * bytes, words + i);
  }
};

// A lane's codes: a word for each of its neighbours, a byte for each quarter. Not of careful
// blocks.
struct LaneCodes {
  uint32_t words[kNeighbours];

  FUSEDOPT_HD void load(const char* block, int lane) {
    load_neighbours<4>(block + 4 * kNeighbours * lane, words);
  }
  FUSEDOPT_HD void store(char* block, int lane) const {
    store_neighbours<4>(block + 4 * kNeighbours * lane, words);
  }

  template <bool never_negative>
  FUSEDOPT_HD float decode(int i, float scale) const {
    return Code<never_negative>::decode(words[i % kNeighbours], i / kNeighbours, scale, false);
  }
  template <bool never_negative>
  FUSEDOPT_HD void encode(const float* from, float inverse, uint32_t of_block, int lane) {
    // A place is one of its lane's and one of its lane's first element, without a common bit.
    const uint32_t of_lane = dither(of_block, uint32_t(place_of(lane, 0)));
    FUSEDOPT_UNROLL
    for (int j = 0; j < kNeighbours; ++j) {
      uint32_t codes[kQuarters], values[kQuarters];
      FUSEDOPT_UNROLL
      for (int q = 0; q < kQuarters; ++q) {
        const int i = q * kNeighbours + j;
        values[q] = float_to_bits(from[i]);
        if constexpr (never_negative) {
          const uint32_t threshold = dither(of_lane, uint32_t(place_of(0, i)));
          codes[q] = SquareCode::encode(from[i], inverse, threshold, false);
        } else {
          codes[q] = SignedCode::encode_magnitude(absolute(from[i]), inverse);
        }
      }
      words[j] = bytes_of<0>(codes);
      if constexpr (!never_negative)  // the signs of all four at once
        words[j] = (words[j] & 0x7f7f7f7fu) | (bytes_of<3>(values) & 0x80808080u);
    }
  }
};

// All elements of a lane, so that their format is looked at once. They are loaded here, after those
// of all other streams, whose registers then are not also kept for what other formats have.
FUSEDOPT_HD void load_params(int format, const char* param, const char* master, int lane,
                             float* to) {
  with_format(ParamFormats{}, format, [&](auto of_place) {
    using Format = decltype(of_place);
    using Master = typename Format::Master;
    constexpr bool has_master = !std::is_same<Master, NoMaster>::value;
    LaneWords params, masters;
    params.load_of<sizeof(typename Format::Param)>(param, lane);
    if constexpr (has_master) masters.load_of<sizeof(Master)>(master, lane);
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      const auto stored = params.get<typename Format::Param>(i);
      if constexpr (has_master) {
        to[i] = Format::decode(stored, masters.get<Master>(i));
      } else {
        to[i] = Format::decode(stored, NoMaster{});
      }
    }
  });
}

// The random bits of a lane's elements.
FUSEDOPT_HD void random_bits(const RandomBlock& random, int lane, uint32_t* to) {
  constexpr int half = kLaneElements / 2;
  static_assert(half / kNeighbours * kWords == kRandomPairs, "a lane has both elements of a hash");
  FUSEDOPT_UNROLL
  for (int i = 0; i < half; ++i) {
    const uint32_t both = random.bits(uint32_t(place_of(lane, i)));
    to[i] = both & 0xffffu;
    to[i + half] = both >> 16;
  }
}

// Random() is a RandomBlock, which only one format asks for.
template <class Random>
FUSEDOPT_HD void store_params(int format, const float* from, Random random, int lane, char* param,
                              char* master) {
  with_format(ParamFormats{}, format, [&](auto of_place) {
    using Format = decltype(of_place);
    using Master = typename Format::Master;
    constexpr bool has_master = !std::is_same<Master, NoMaster>::value;
    [[maybe_unused]] uint32_t bits[kLaneElements];
    if constexpr (Format::stochastic) random_bits(random(), lane, bits);
    LaneWords params, masters;
    FUSEDOPT_UNROLL
    for (int i = 0; i < kLaneElements; ++i) {
      typename Format::Param stored;
      Master rest;
      if constexpr (Format::stochastic) {
        Format::encode(from[i], bits[i], stored);
      } else {
        Format::encode(from[i], stored, rest);
      }
      params.set(i, stored);
      if constexpr (has_master) masters.set(i, rest);
    }
    params.store_of<sizeof(typename Format::Param)>(param, lane);
    if constexpr (has_master) masters.store_of<sizeof(Master)>(master, lane);
  });
}

template <class Element>
FUSEDOPT_HD void decode_elements(const LaneWords& from, float* to) {
  FUSEDOPT_UNROLL
  for (int i = 0; i < kLaneElements; ++i) to[i] = widen(from.get<Element>(i));
}

FUSEDOPT_HD void load_grads(DType dtype, const char* grad, int lane, LaneWords& to) {
  if (dtype == DType::float32) {
    to.load_of<4>(grad, lane);
  } else {
    to.load_of<2>(grad, lane);
  }
}
FUSEDOPT_HD void decode_grads(DType dtype, const LaneWords& grad, float* to) {
  if (dtype == DType::bfloat16) {
    decode_elements<bfloat16>(grad, to);
  } else if (dtype == DType::float16) {
    decode_elements<float16>(grad, to);
  } else {
    decode_elements<float>(grad, to);
  }
}

// The larger of two magnitudes, the second one's of a number of either sign; no number wins.
FUSEDOPT_HD float larger_magnitude(float magnitude, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(magnitude), "f"(fabsf(value)));
  return larger;
#else
  const float other = absolute(value);
  return float_to_bits(other) > float_to_bits(magnitude) ? other : magnitude;
#endif
}

// One element, wherever it is, of a block that is not whole or lies askew.
template <class Element>
FUSEDOPT_HD Element element_at(const void* stream, int64_t i) {
  return static_cast<const Element*>(stream)[i];
}
FUSEDOPT_HD float decode_param(int format, const void* param, const void* master, int64_t i) {
  float value = 0;
  with_format(ParamFormats{}, format, [&](auto of_place) {
    using Format = decltype(of_place);
    using Master = typename Format::Master;
    const auto stored = element_at<typename Format::Param>(param, i);
    if constexpr (std::is_same<Master, NoMaster>::value) {
      value = Format::decode(stored, NoMaster{});
    } else {
      value = Format::decode(stored, element_at<Master>(master, i));
    }
  });
  return value;
}
template <class Random>
FUSEDOPT_HD void encode_param(int format, float value, Random random, void* param, void* master,
                              int64_t i) {
  with_format(ParamFormats{}, format, [&](auto of_place) {
    using Format = decltype(of_place);
    using Master = typename Format::Master;
    auto& stored = static_cast<typename Format::Param*>(param)[i];
    Master rest;
    if constexpr (Format::stochastic) {
      Format::encode(value, random(), stored);
    } else {
      Format::encode(value, stored, rest);
    }
    if constexpr (!std::is_same<Master, NoMaster>::value) static_cast<Master*>(master)[i] = rest;
  });
}
FUSEDOPT_HD float decode_grad(DType dtype, const void* grad, int64_t i) {
  return dtype == DType::bfloat16  ? widen(element_at<bfloat16>(grad, i))
         : dtype == DType::float16 ? widen(element_at<float16>(grad, i))
                                   : element_at<float>(grad, i);
}

#if defined(__CUDA_ARCH__)
// The lanes that work on a block. On the device a lane is a thread.
template <class Lane>
struct Lanes {
  Lane lane_of_thread;
  int number;

  FUSEDOPT_HD explicit Lanes(uint32_t thread) : number(int(thread % kLanes)) {}
  FUSEDOPT_HD static bool runs_in(uint32_t) { return true; }
  template <class Visit>
  FUSEDOPT_HD void each(Visit visit) {
    visit(lane_of_thread, number);
  }
  // All lanes of a warp ask together, those of its other block for that one.
  template <class Value>
  FUSEDOPT_HD bool any(Value value) {
    const uint32_t ours = ((1u << kLanes) - 1) << (threadIdx.x & uint32_t(kLanes));
    return (__ballot_sync(0xffffffffu, value(lane_of_thread)) & ours) != 0;
  }
  template <class Value>
  FUSEDOPT_HD uint32_t largest(Value value) {
    uint32_t result = value(lane_of_thread);
    FUSEDOPT_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, result, distance);
      result = other > result ? other : result;
    }
    return result;
  }
  // For either of a warp's blocks.
  FUSEDOPT_HD static bool for_either(bool value) { return __any_sync(0xffffffffu, value) != 0; }
  // The other block in place of one that is not to be looked at, so that lanes do not part.
  FUSEDOPT_HD static BlockPlace this_or_other(bool this_one, BlockPlace place) {
    const int64_t begin = __shfl_xor_sync(0xffffffffu, place.begin, kLanes);
    const int64_t number = __shfl_xor_sync(0xffffffffu, place.number, kLanes);
    return this_one ? place : BlockPlace{number, begin, kBlock};
  }
};
#else
// On the host, the thread of lane 0 runs them one after the other.
template <class Lane>
struct Lanes {
  Lane lanes[kLanes];

  explicit Lanes(uint32_t) {}
  static bool runs_in(uint32_t thread) { return thread % kLanes == 0; }
  template <class Visit>
  void each(Visit visit) {
    for (int lane = 0; lane < kLanes; ++lane) visit(lanes[lane], lane);
  }
  template <class Value>
  bool any(Value value) {
    bool result = false;
    for (const Lane& lane : lanes) result = result || value(lane);
    return result;
  }
  template <class Value>
  uint32_t largest(Value value) {
    uint32_t result = 0;
    for (const Lane& lane : lanes) result = value(lane) > result ? value(lane) : result;
    return result;
  }
  static bool for_either(bool value) { return value; }
  static BlockPlace this_or_other(bool, BlockPlace place) { return place; }
};
#endif

}  // namespace fusedopt
