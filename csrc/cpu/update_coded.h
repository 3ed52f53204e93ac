// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The loop over a span with a Coding: a block at a time is decoded to float32 in the L1 cache,
// updated there, and encoded again. Included by update.h. What does not depend on the rule is a
// function of its own, so that all kernels of an instruction set share it. There is room for a
// whole block in all streams, however many elements it has.

#define FUSEDOPT_SHARED __attribute__((noinline))
#define FUSEDOPT_INLINED __attribute__((always_inline))
#define FUSEDOPT_INLINE inline FUSEDOPT_INLINED

// One block of a span: where its streams are, and its number in the parameter.
struct Block {
  void* param;
  void* master;
  const void* grad;
  void* states[kMaxStates];
  float* scales[kMaxStates];
  int64_t number;
};

// with_format() of codes.h with this instruction set, without which visit() could not be inlined.
template <class... Formats, class Visit>
FUSEDOPT_INLINE void with_format_here(TypeList<Formats...>, int place, Visit visit) {
  int at = 0;
  ((at++ == place ? visit(Formats{}) : void()), ...);
}

// -- bfloat16 and float16 ------------------------------------------------------------------------

template <class Element>
FUSEDOPT_INLINE void decode(const Element* from, float* to) {
  widen_piece(from, to, kBlock);
}
template <class Element>
FUSEDOPT_INLINE void encode(const float* from, Element* to) {
  narrow_piece(from, to, kBlock);
}

// -- parameters ----------------------------------------------------------------------------------

// A block of a format whose master is apart from the parameter.
template <class Format>
FUSEDOPT_SHARED void decode(const typename Format::Param* FUSEDOPT_RESTRICT param,
                            const typename Format::Master* FUSEDOPT_RESTRICT master,
                            float* FUSEDOPT_RESTRICT to) {
  for (int i = 0; i < kBlock; ++i) to[i] = Format::decode(param[i], master[i]);
}
template <class Format>
FUSEDOPT_SHARED void encode(const float* FUSEDOPT_RESTRICT from,
                            typename Format::Param* FUSEDOPT_RESTRICT param,
                            typename Format::Master* FUSEDOPT_RESTRICT master) {
  for (int i = 0; i < kBlock; ++i) Format::encode(from[i], param[i], master[i]);
}

// With the processor's own conversions.
template <>
FUSEDOPT_SHARED void decode<Float16And32>(const float16* FUSEDOPT_RESTRICT param,
                                          const float* FUSEDOPT_RESTRICT master,
                                          float* FUSEDOPT_RESTRICT to) {
  alignas(64) float rounded[kBlock];
  alignas(64) float16 narrowed[kBlock];
  encode(master, narrowed);
  decode(narrowed, rounded);
  decode(param, to);
  for (int i = 0; i < kBlock; ++i) to[i] = Float16And32::of(to[i], rounded[i], master[i]);
}
template <>
FUSEDOPT_INLINE void encode<Float16And32>(const float* FUSEDOPT_RESTRICT from,
                                          float16* FUSEDOPT_RESTRICT param,
                                          float* FUSEDOPT_RESTRICT master) {
  memcpy(master, from, kBlock * sizeof(float));
  encode(from, param);
}

FUSEDOPT_SHARED void encode_at_random(const float* FUSEDOPT_RESTRICT from, RandomBlock random,
                                      bfloat16* FUSEDOPT_RESTRICT to) {
  for (int i = 0; i < kRandomPairs; ++i)
    Bfloat16Stochastic::encode(from[i], random.bits(uint32_t(i)) & 0xffffu, to[i]);
  from += kRandomPairs;
  to += kRandomPairs;
  for (int i = 0; i < kRandomPairs; ++i)
    Bfloat16Stochastic::encode(from[i], random.bits(uint32_t(i)) >> 16, to[i]);
}

// Where the elements are in float32: in place if they are stored so.
FUSEDOPT_INLINE float* decode_param(const Block& block, int format, float* to) {
  with_format_here(ParamFormats{}, format, [&](auto of_place) FUSEDOPT_INLINED {
    using Format = decltype(of_place);
    auto* const param = static_cast<typename Format::Param*>(block.param);
    if constexpr (std::is_same<Format, Float32>::value) {
      to = param;
    } else if constexpr (std::is_same<typename Format::Master, NoMaster>::value) {
      decode(param, to);
    } else {
      decode<Format>(param, static_cast<const typename Format::Master*>(block.master), to);
    }
  });
  return to;
}

FUSEDOPT_INLINE void encode_param(const Block& block, const Coding& coding, const float* from) {
  with_format_here(ParamFormats{}, coding.param, [&](auto of_place) FUSEDOPT_INLINED {
    using Format = decltype(of_place);
    auto* const param = static_cast<typename Format::Param*>(block.param);
    if constexpr (std::is_same<Format, Float32>::value) {
      return;
    } else if constexpr (Format::stochastic) {
      const RandomBlock random(coding.key, coding.step, coding.first_block + block.number);
      if (coding.first_place == 0) {
        encode_at_random(from, random, param);
      } else {
        for (int i = 0; i < kBlock - coding.first_place; ++i)
          Bfloat16Stochastic::encode(from[i], random.of_place(coding.first_place + i), param[i]);
      }
    } else if constexpr (std::is_same<typename Format::Master, NoMaster>::value) {
      encode(from, param);
    } else {
      encode<Format>(from, param, static_cast<typename Format::Master*>(block.master));
    }
  });
}

// -- gradients -----------------------------------------------------------------------------------

FUSEDOPT_INLINE const float* decode_grad(const Block& block, DType dtype, float* to) {
  switch (dtype) {
    case DType::bfloat16:
      decode(static_cast<const bfloat16*>(block.grad), to);
      return to;
    case DType::float16:
      decode(static_cast<const float16*>(block.grad), to);
      return to;
    default:
      return static_cast<const float*>(block.grad);
  }
}

// -- states --------------------------------------------------------------------------------------

// Codes, a word at a time, wherever they lie.
typedef uint32_t __attribute__((may_alias, aligned(1))) Word;

template <bool never_negative, bool careful>
FUSEDOPT_INLINE void decode_codes_by(const uint8_t* FUSEDOPT_RESTRICT from, float scale, int count,
                                     float* FUSEDOPT_RESTRICT to) {
  if (count < kBlock) {
    for (; count > 0; count -= kWords, from += kWords, to += kWords)
      for (int i = 0; i < kWords; ++i)
        to[i] = Code<never_negative>::decode(from[i], 0, scale, careful);
    return;
  }
  const Word* FUSEDOPT_RESTRICT words = reinterpret_cast<const Word*>(from);
#pragma GCC unroll 4
  for (int byte = 0; byte < 4; ++byte)
    for (int i = 0; i < kWords; ++i)
      to[byte * kWords + i] = Code<never_negative>::decode(words[i], byte, scale, careful);
}

template <bool never_negative>
FUSEDOPT_SHARED void decode_codes(const uint8_t* from, float scale, int count, float* to) {
  if (is_careful(scale)) {
    decode_codes_by<never_negative, true>(from, absolute(scale), count, to);
  } else {
    decode_codes_by<never_negative, false>(from, scale, count, to);
  }
}

struct DitherOfPlaces {
  alignas(64) uint32_t values[kBlock] = {};
  constexpr DitherOfPlaces() {
    for (uint32_t i = 0; i < uint32_t(kBlock); ++i) values[i] = dither(0, i);
  }
};
constexpr DitherOfPlaces kDither;

template <bool never_negative, bool careful>
FUSEDOPT_INLINE void encode_codes(const float* FUSEDOPT_RESTRICT from, float inverse,
                                  uint32_t dither, int count, uint8_t* FUSEDOPT_RESTRICT to) {
  if (count < kBlock) {
    const uint32_t* of_place = kDither.values;
    for (; count > 0; count -= kWords, from += kWords, to += kWords, of_place += kWords)
      for (int i = 0; i < kWords; ++i)
        to[i] =
            uint8_t(Code<never_negative>::encode(from[i], inverse, dither ^ of_place[i], careful));
    return;
  }
  Word* FUSEDOPT_RESTRICT words = reinterpret_cast<Word*>(to);
  for (int i = 0; i < kWords; ++i) {
    uint32_t word = 0;
    for (int byte = 0; byte < 4; ++byte) {
      const uint32_t place = uint32_t(byte * kWords + i);
      const uint32_t code = Code<never_negative>::encode(from[place], inverse,
                                                         dither ^ kDither.values[place], careful);
      word |= code << (8 * byte);
    }
    words[i] = word;
  }
}

FUSEDOPT_INLINE int32_t largest_finite(const float* values, int count) {
  int32_t largest = 0;
  for (int i = 0; i < count; ++i)
    raise(largest, is_finite(magnitude_bits(values[i])) ? values[i] : 0);
  return largest;
}

template <bool never_negative>
FUSEDOPT_SHARED void encode_codes(const float* from, int32_t largest, uint32_t dither, int count,
                                  uint8_t* to, float* scale_to) {
  const bool careful = !is_finite(uint32_t(largest));
  if (careful) largest = largest_finite(from, count);
  const Scale scale = Code<never_negative>::scale_of(uint32_t(largest), careful);
  *scale_to = scale.scale;
  if (careful) {
    encode_codes<never_negative, true>(from, scale.inverse, dither, count, to);
  } else {
    encode_codes<never_negative, false>(from, scale.inverse, dither, count, to);
  }
}

template <bool never_negative>
FUSEDOPT_SHARED void encode_dithered(const float* FUSEDOPT_RESTRICT from, uint32_t dither,
                                     int first_place, bfloat16* FUSEDOPT_RESTRICT to) {
  if (first_place > 0) {
    for (int i = 0; i < kBlock - first_place; ++i)
      Bfloat16State::encode<never_negative>(from[i], dither ^ kDither.values[first_place + i],
                                            to[i]);
    return;
  }
  for (int i = 0; i < kBlock; ++i)
    Bfloat16State::encode<never_negative>(from[i], dither ^ kDither.values[i], to[i]);
}

// Where the elements are in float32: in place if they are stored so.
template <bool never_negative>
FUSEDOPT_INLINE float* decode_state(const Block& block, int k, int format, int count, float* to) {
  with_format_here(StateFormats{}, format, [&](auto of_place) FUSEDOPT_INLINED {
    using Format = decltype(of_place);
    if constexpr (Format::in_codes) {
      decode_codes<never_negative>(static_cast<const uint8_t*>(block.states[k]), *block.scales[k],
                                   count, to);
    } else if constexpr (std::is_same<Format, Float32State>::value) {
      to = static_cast<float*>(block.states[k]);
    } else {
      decode(static_cast<const typename Format::Element*>(block.states[k]), to);
    }
  });
  return to;
}

template <bool never_negative>
FUSEDOPT_INLINE void encode_state(const Block& block, int k, const Coding& coding, int count,
                                  const float* from, int32_t largest) {
  with_format_here(StateFormats{}, coding.state, [&](auto of_place) FUSEDOPT_INLINED {
    using Format = decltype(of_place);
    if constexpr (std::is_same<Format, Float32State>::value) return;
    const uint32_t dither = dither_of_block(coding.first_block + block.number, coding.step);
    if constexpr (Format::in_codes) {
      encode_codes<never_negative>(from, largest, dither, count,
                                   static_cast<uint8_t*>(block.states[k]), block.scales[k]);
    } else if constexpr (!std::is_same<Format, Float32State>::value) {
      encode_dithered<never_negative>(from, dither, coding.first_place,
                                      static_cast<typename Format::Element*>(block.states[k]));
    }
  });
}

// -- blocks --------------------------------------------------------------------------------------

// A quarter of the next block. While a block is decoded and encoded in the cache, the processor's
// own prefetching pauses.
template <int64_t size>
FUSEDOPT_INLINE void prefetch_quarter(void* stream, int quarter) {
  char* const from = static_cast<char*>(stream) + (kBlock + quarter * kBlock / 4) * size;
  for (int64_t i = 0; i < size; ++i) __builtin_prefetch(from + 64 * i, 1);
}
FUSEDOPT_INLINE void prefetch_quarter(void* stream, int64_t size, int quarter) {
  if (size == 4) prefetch_quarter<4>(stream, quarter);
  if (size == 2) prefetch_quarter<2>(stream, quarter);
  if (size == 1) prefetch_quarter<1>(stream, quarter);
}
template <int states>
FUSEDOPT_INLINE void prefetch_quarter(const Block& block, const StreamBytes& bytes, int quarter) {
  prefetch_quarter(block.param, bytes.param, quarter);
  prefetch_quarter(block.master, bytes.master, quarter);
  prefetch_quarter(const_cast<void*>(block.grad), bytes.grad, quarter);
  for (int k = 0; k < states; ++k) prefetch_quarter(block.states[k], bytes.state, quarter);
}

// Calls visit(k, never_negative) for each state, both known to the compiler.
template <class Variant, int k = 0, class Visit>
FUSEDOPT_INLINE void for_each_state(Visit visit) {
  if constexpr (k < Variant::state_count) {
    visit(k, std::integral_constant<bool, is_never_negative(Variant::states[k].kind)>{});
    for_each_state<Variant, k + 1>(visit);
  }
}

// A block in float32, between its update and its encoding.
struct Updated {
  alignas(64) float params[kBlock], states[kMaxStates][kBlock];
  int32_t largest[kMaxStates];
  Block block;
};

// Updates count elements of a block.
template <bool usual, class Variant, class Row>
FUSEDOPT_INLINE void update_block(const Block& block, const Coding& coding,
                                  const StreamBytes& bytes, const Row& row, int count,
                                  Updated& to) {
  alignas(64) float grads[kBlock];
  const auto prefetch = [&](int quarter) FUSEDOPT_INLINED {
    if (count == kBlock) prefetch_quarter<Variant::state_count>(block, bytes, quarter);
  };
  to.block = block;
  prefetch(0);
  float* const param = decode_param(block, coding.param, to.params);
  const float* const grad = decode_grad(block, coding.grad, grads);
  prefetch(1);
  Span decoded{param, grad, {}, count, 0, 0, 0, nullptr};
  for_each_state<Variant>([&](int k, auto never_negative) {
    decoded.states[k] =
        decode_state<never_negative.value>(block, k, coding.state, count, to.states[k]);
  });
  run<usual, Variant, Types<float, float, float>, true>(States<Variant>{}, decoded, row, 0, count,
                                                        to.largest);
  prefetch(2);
}

template <class Variant>
FUSEDOPT_INLINE void encode_block(const Updated& from, const Coding& coding, int count) {
  encode_param(from.block, coding, from.params);
  for_each_state<Variant>([&](int k, auto never_negative) {
    encode_state<never_negative.value>(from.block, k, coding, count, from.states[k],
                                       from.largest[k]);
  });
}

// Room for the streams of a block that is not whole, as if it were.
struct WholeBlock {
  alignas(64) unsigned char param[4 * kBlock], master[4 * kBlock], grad[4 * kBlock];
  alignas(64) unsigned char states[kMaxStates][4 * kBlock];
};

// The block that begins with an element of a span.
template <class Variant>
FUSEDOPT_INLINE Block block_at(const Span& span, const StreamBytes& bytes, int64_t begin,
                               int64_t number) {
  const Coding& coding = *span.coding;
  Block block{static_cast<char*>(span.param) + begin * bytes.param,
              static_cast<char*>(coding.master) + begin * bytes.master,
              static_cast<const char*>(span.grad) + begin * bytes.grad,
              {},
              {},
              number};
  for (int k = 0; k < Variant::state_count; ++k) {
    block.states[k] = static_cast<char*>(span.states[k]) + begin * bytes.state;
    if (coding.state == state_format<CodedState>) block.scales[k] = coding.scales[k] + number;
  }
  return block;
}

// A block of count elements, copied to where there is room for a whole one.
template <class Variant>
FUSEDOPT_INLINE Block as_whole(const Block& block, const StreamBytes& bytes, int count,
                               WholeBlock& room) {
  Block whole = block;
  whole.param = memcpy(room.param, block.param, size_t(count * bytes.param));
  whole.master = room.master;
  if (bytes.master > 0) memcpy(room.master, block.master, size_t(count * bytes.master));
  whole.grad = memcpy(room.grad, block.grad, size_t(count * bytes.grad));
  for (int k = 0; k < Variant::state_count; ++k)
    whole.states[k] = memcpy(room.states[k], block.states[k], size_t(count * bytes.state));
  return whole;
}

// Updates the elements [begin, end), from the beginning of a block to one.
template <bool usual, class Variant, class Row>
FUSEDOPT_INLINE void run_blocks(const Span& span, const Row& row, int64_t begin, int64_t end) {
  const Coding& coding = *span.coding;
  const StreamBytes bytes(coding);
  const Blocks blocks = Blocks{span.numel, coding.row}.joined();
  int64_t number = blocks.number_of(begin);
  // A block is encoded after the next one was updated: nothing waits for the last of its roots and
  // quotients, then.
  Updated updated[2];
  WholeBlock room;
  bool cleared = false;  // room, which few spans need
  for (int64_t i = begin; i < end;) {
    const int64_t row_end = i / blocks.row * blocks.row + blocks.row;
    const int64_t stop = row_end < end ? row_end : end, first = i;
    int now = 0;
    for (; stop - i >= kBlock; i += kBlock, now = 1 - now) {
      const Block block = block_at<Variant>(span, bytes, i, number++);
      update_block<usual, Variant>(block, coding, bytes, row, kBlock, updated[now]);
      prefetch_quarter<Variant::state_count>(block, bytes, 3);
      if (i > first) encode_block<Variant>(updated[1 - now], coding, kBlock);
    }
    if (i > first) encode_block<Variant>(updated[1 - now], coding, kBlock);
    const int count = int(stop - i);
    if (count == 0) continue;
    if (!cleared) memset(&room, 0, sizeof room);
    cleared = true;
    const Block block = block_at<Variant>(span, bytes, i, number++);
    const Block whole = as_whole<Variant>(block, bytes, count, room);
    update_block<usual, Variant>(whole, coding, bytes, row, count, updated[now]);
    encode_block<Variant>(updated[now], coding, count);
    memcpy(block.param, room.param, size_t(count * bytes.param));
    if (bytes.master > 0) memcpy(block.master, room.master, size_t(count * bytes.master));
    for (int k = 0; k < Variant::state_count; ++k)
      memcpy(block.states[k], room.states[k], size_t(count * bytes.state));
    i = stop;
  }
}
