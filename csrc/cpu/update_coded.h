// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
// The loop over a span with a Coding: a block at a time is decoded to float32 in the L1 cache,
// updated there, and encoded again. Included by update.h. What does not depend on the rule is a
// function of its own, so that all kernels of an instruction set share it.

#define FUSEDOPT_SHARED static __attribute__((noinline))
#define FUSEDOPT_INLINE inline __attribute__((always_inline))

// One block of a span, of kBlock elements: where its streams are, and its place in the parameter.
struct Block {
  void* param;
  void* master;
  const void* grad;
  void* states[kMaxStates];
  float* scales[kMaxStates];
  int64_t position;
};

// -- bfloat16 and float16 ------------------------------------------------------------------------

FUSEDOPT_SHARED void decode(const bfloat16* FUSEDOPT_RESTRICT from, float* FUSEDOPT_RESTRICT to) {
  for (int i = 0; i < kBlock; ++i) to[i] = widen(from[i]);
}
FUSEDOPT_SHARED void encode(const float* FUSEDOPT_RESTRICT from, bfloat16* FUSEDOPT_RESTRICT to) {
  for (int i = 0; i < kBlock; ++i) narrow(from[i], to[i]);
}
FUSEDOPT_SHARED void decode(const float16* FUSEDOPT_RESTRICT from, float* FUSEDOPT_RESTRICT to) {
#if defined(FUSEDOPT_F16C)
  fetch(from, to, kBlock);
#else
  for (int i = 0; i < kBlock; ++i) to[i] = widen(from[i]);
#endif
}
FUSEDOPT_SHARED void encode(const float* FUSEDOPT_RESTRICT from, float16* FUSEDOPT_RESTRICT to) {
#if defined(FUSEDOPT_F16C)
  put_back(from, to, kBlock);
#else
  for (int i = 0; i < kBlock; ++i) narrow(from[i], to[i]);
#endif
}

// -- parameters ----------------------------------------------------------------------------------

FUSEDOPT_SHARED void decode(const bfloat16* FUSEDOPT_RESTRICT high,
                            const int16_t* FUSEDOPT_RESTRICT remainder,
                            float* FUSEDOPT_RESTRICT to) {
  for (int i = 0; i < kBlock; ++i) to[i] = bits_to_float(join(high[i].bits, remainder[i]));
}
FUSEDOPT_SHARED void encode(const float* FUSEDOPT_RESTRICT from, bfloat16* FUSEDOPT_RESTRICT high,
                            int16_t* FUSEDOPT_RESTRICT remainder) {
  for (int i = 0; i < kBlock; ++i) {
    const Split parts = split(canonical_bits(from[i]));
    high[i].bits = parts.high;
    remainder[i] = parts.remainder;
  }
}
FUSEDOPT_SHARED void decode(const bfloat16* FUSEDOPT_RESTRICT high,
                            const int8_t* FUSEDOPT_RESTRICT remainder,
                            float* FUSEDOPT_RESTRICT to) {
  for (int i = 0; i < kBlock; ++i)
    to[i] = bits_to_float(join(high[i].bits, int16_t(remainder[i] * 256)));
}
FUSEDOPT_SHARED void encode(const float* FUSEDOPT_RESTRICT from, bfloat16* FUSEDOPT_RESTRICT high,
                            int8_t* FUSEDOPT_RESTRICT remainder) {
  for (int i = 0; i < kBlock; ++i) {
    const Split parts = split(round_to_24(canonical_bits(from[i])));
    high[i].bits = parts.high;
    remainder[i] = int8_t(parts.remainder >> 8);
  }
}
FUSEDOPT_SHARED void decode(const float16* param, const float* FUSEDOPT_RESTRICT master,
                            float* FUSEDOPT_RESTRICT to) {
  alignas(64) float rounded[kBlock];
  alignas(64) float16 narrowed[kBlock];
  encode(master, narrowed);
  decode(narrowed, rounded);
  decode(param, to);
  for (int i = 0; i < kBlock; ++i) to[i] = master_of(to[i], rounded[i], master[i]);
}
FUSEDOPT_SHARED void encode_at_random(const float* FUSEDOPT_RESTRICT from, RandomBlock random,
                                      bfloat16* FUSEDOPT_RESTRICT to) {
  constexpr int half = kBlock / 2;
  for (int i = 0; i < half; ++i)
    to[i] = cut_to_bfloat16(from[i], random.bits(uint32_t(i)) & 0xffffu);
  for (int i = 0; i < half; ++i)
    to[half + i] = cut_to_bfloat16(from[half + i], random.bits(uint32_t(i)) >> 16);
}

FUSEDOPT_INLINE float* decode_param(const Block& block, ParamCode code, float* to) {
  auto* bfloats = static_cast<const bfloat16*>(block.param);
  auto* halves = static_cast<const float16*>(block.param);
  switch (code) {
    case ParamCode::float32:
      return static_cast<float*>(block.param);
    case ParamCode::bfloat16:
    case ParamCode::bfloat16_stochastic:
      decode(bfloats, to);
      break;
    case ParamCode::float16:
      decode(halves, to);
      break;
    case ParamCode::bfloat16_and_16:
      decode(bfloats, static_cast<const int16_t*>(block.master), to);
      break;
    case ParamCode::bfloat16_and_8:
      decode(bfloats, static_cast<const int8_t*>(block.master), to);
      break;
    case ParamCode::float16_and_float32:
      decode(halves, static_cast<const float*>(block.master), to);
      break;
  }
  return to;
}

FUSEDOPT_INLINE void encode_param(const Block& block, const Coding& coding, const float* from) {
  auto* bfloats = static_cast<bfloat16*>(block.param);
  auto* halves = static_cast<float16*>(block.param);
  switch (coding.param) {
    case ParamCode::float32:
      break;
    case ParamCode::bfloat16:
      encode(from, bfloats);
      break;
    case ParamCode::float16:
      encode(from, halves);
      break;
    case ParamCode::bfloat16_and_16:
      encode(from, bfloats, static_cast<int16_t*>(block.master));
      break;
    case ParamCode::bfloat16_and_8:
      encode(from, bfloats, static_cast<int8_t*>(block.master));
      break;
    case ParamCode::bfloat16_stochastic:
      encode_at_random(from, RandomBlock(coding.key, coding.step, block.position / kBlock),
                       bfloats);
      break;
    case ParamCode::float16_and_float32:
      memcpy(block.master, from, kBlock * sizeof(float));
      encode(from, halves);
      break;
  }
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

template <bool never_negative, bool careful>
FUSEDOPT_INLINE void decode_codes_by(const uint32_t* FUSEDOPT_RESTRICT from, float scale,
                                     float* FUSEDOPT_RESTRICT to) {
#pragma GCC unroll 4
  for (int byte = 0; byte < 4; ++byte)
    for (int i = 0; i < kWords; ++i)
      to[byte * kWords + i] =
          decode_code(never_negative, from[i] >> (8 * byte) & 0xffu, scale, careful);
}

template <bool never_negative>
FUSEDOPT_SHARED void decode_codes(const uint32_t* from, float scale, float* to) {
  if (is_careful(scale)) {
    decode_codes_by<never_negative, true>(from, absolute(scale), to);
  } else {
    decode_codes_by<never_negative, false>(from, scale, to);
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
                                  uint32_t dither, uint32_t* FUSEDOPT_RESTRICT to) {
  for (int i = 0; i < kWords; ++i) {
    uint32_t word = 0;
    for (int byte = 0; byte < 4; ++byte) {
      const uint32_t place = uint32_t(byte * kWords + i);
      const uint32_t code = encode_code(never_negative, from[place], inverse,
                                        dither ^ kDither.values[place], careful);
      word |= code << (8 * byte);
    }
    to[i] = word;
  }
}

FUSEDOPT_INLINE int32_t largest_finite(const float* values) {
  int32_t largest = 0;
  for (int i = 0; i < kBlock; ++i)
    raise(largest, is_finite(magnitude_bits(values[i])) ? values[i] : 0);
  return largest;
}

template <bool never_negative>
FUSEDOPT_SHARED void encode_codes(const float* from, int32_t largest, uint32_t dither, uint32_t* to,
                                  float* scale_to) {
  const bool careful = !is_finite(uint32_t(largest));
  if (careful) largest = largest_finite(from);
  const Scale scale = scale_of<never_negative>(uint32_t(largest), careful);
  *scale_to = scale.scale;
  if (careful) {
    encode_codes<never_negative, true>(from, scale.inverse, dither, to);
  } else {
    encode_codes<never_negative, false>(from, scale.inverse, dither, to);
  }
}

FUSEDOPT_SHARED void encode_dithered(const float* FUSEDOPT_RESTRICT from, uint32_t dither,
                                     bfloat16* FUSEDOPT_RESTRICT to) {
  for (int i = 0; i < kBlock; ++i)
    to[i] = cut_to_bfloat16(from[i], (dither ^ kDither.values[i]) >> 7);
}

template <bool never_negative>
FUSEDOPT_INLINE float* decode_state(const Block& block, int k, StateCode code, float* to) {
  if (code == StateCode::float32) return static_cast<float*>(block.states[k]);
  if (code == StateCode::bfloat16) {
    decode(static_cast<const bfloat16*>(block.states[k]), to);
  } else {
    decode_codes<never_negative>(static_cast<const uint32_t*>(block.states[k]), *block.scales[k],
                                 to);
  }
  return to;
}

template <bool never_negative>
FUSEDOPT_INLINE void encode_state(const Block& block, int k, const Coding& coding,
                                  const float* from, int32_t largest) {
  if (coding.state == StateCode::float32) return;
  const uint32_t dither = dither_of_block(block.position / kBlock, coding.step);
  if (coding.state == StateCode::int8) {
    encode_codes<never_negative>(from, largest, dither, static_cast<uint32_t*>(block.states[k]),
                                 block.scales[k]);
  } else if (never_negative) {
    encode_dithered(from, dither, static_cast<bfloat16*>(block.states[k]));
  } else {
    encode(from, static_cast<bfloat16*>(block.states[k]));
  }
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
FUSEDOPT_INLINE void prefetch_quarter(const Block& block, const Coding& coding, int quarter) {
  prefetch_quarter(block.param, size_of(coding.param), quarter);
  prefetch_quarter(block.master, size_of_master(coding.param), quarter);
  prefetch_quarter(const_cast<void*>(block.grad), size_of(coding.grad), quarter);
  for (int k = 0; k < states; ++k)
    prefetch_quarter(block.states[k], size_of(coding.state), quarter);
}

// Calls visit(k, never_negative) for each state, both known to the compiler.
template <class Variant, int k = 0, class Visit>
FUSEDOPT_INLINE void for_each_state(Visit visit) {
  if constexpr (k < Variant::states) {
    visit(k, std::integral_constant<bool, Variant::never_negative(k)>{});
    for_each_state<Variant, k + 1>(visit);
  }
}

// A block in float32, between its update and its encoding.
struct Updated {
  alignas(64) float params[kBlock], states[kMaxStates][kBlock];
  int32_t largest[kMaxStates];
  Block block;
};

template <bool usual, class Variant, class Row>
FUSEDOPT_INLINE void update_block(const Block& block, const Coding& coding, const Row& row,
                                  Updated& to) {
  alignas(64) float grads[kBlock];
  to.block = block;
  prefetch_quarter<Variant::states>(block, coding, 0);
  float* const param = decode_param(block, coding.param, to.params);
  const float* const grad = decode_grad(block, coding.grad, grads);
  prefetch_quarter<Variant::states>(block, coding, 1);
  Span decoded{param, grad, {}, kBlock, 0, 0, 0, nullptr};
  for_each_state<Variant>([&](int k, auto never_negative) {
    decoded.states[k] = decode_state<never_negative.value>(block, k, coding.state, to.states[k]);
  });
  run<usual, Variant, Types<float, float, float>, true>(decoded, row, 0, kBlock, to.largest);
  prefetch_quarter<Variant::states>(block, coding, 2);
}

template <class Variant>
FUSEDOPT_INLINE void encode_block(const Updated& from, const Coding& coding) {
  encode_param(from.block, coding, from.params);
  for_each_state<Variant>([&](int k, auto never_negative) {
    encode_state<never_negative.value>(from.block, k, coding, from.states[k], from.largest[k]);
  });
}

// The end of a parameter that is no whole block, as one that is.
struct LastBlock {
  alignas(64) unsigned char param[4 * kBlock], master[4 * kBlock], grad[4 * kBlock];
  alignas(64) unsigned char states[kMaxStates][4 * kBlock];
};

// Updates the elements [begin, end), from the beginning of a block on.
template <bool usual, class Variant, class Row>
FUSEDOPT_INLINE void run_blocks(const Span& span, const Row& row, int64_t begin, int64_t end) {
  const Coding& coding = *span.coding;
  const int64_t param_size = size_of(coding.param), master_size = size_of_master(coding.param);
  const int64_t grad_size = size_of(coding.grad), state_size = size_of(coding.state);
  // A block is encoded after the next one was updated: nothing waits for the last of its roots and
  // quotients, then.
  Updated updated[2];
  int now = 0;
  for (int64_t i = begin; i < end; i += kBlock, now = 1 - now) {
    Block block{static_cast<char*>(span.param) + i * param_size,
                static_cast<char*>(coding.master) + i * master_size,
                static_cast<const char*>(span.grad) + i * grad_size,
                {},
                {},
                i};
    for (int k = 0; k < Variant::states; ++k) {
      block.states[k] = static_cast<char*>(span.states[k]) + i * state_size;
      if (coding.state == StateCode::int8) block.scales[k] = coding.scales[k] + i / kBlock;
    }
    if (end - i >= kBlock) {
      update_block<usual, Variant>(block, coding, row, updated[now]);
      prefetch_quarter<Variant::states>(block, coding, 3);
      if (i > begin) encode_block<Variant>(updated[1 - now], coding);
      continue;
    }
    if (i > begin) encode_block<Variant>(updated[1 - now], coding);
    const size_t count = size_t(end - i);
    LastBlock last = {};
    Block whole = block;
    whole.param = memcpy(last.param, block.param, count * size_t(param_size));
    whole.master = last.master;
    if (master_size > 0) memcpy(last.master, block.master, count * size_t(master_size));
    whole.grad = memcpy(last.grad, block.grad, count * size_t(grad_size));
    // Codes come in whole blocks.
    const bool codes = coding.state == StateCode::int8;
    for (int k = 0; k < Variant::states && !codes; ++k)
      whole.states[k] = memcpy(last.states[k], block.states[k], count * size_t(state_size));
    update_block<usual, Variant>(whole, coding, row, updated[now]);
    encode_block<Variant>(updated[now], coding);
    memcpy(block.param, last.param, count * size_t(param_size));
    if (master_size > 0) memcpy(block.master, last.master, count * size_t(master_size));
    for (int k = 0; k < Variant::states && !codes; ++k)
      memcpy(block.states[k], last.states[k], count * size_t(state_size));
    return;
  }
  if (begin < end) encode_block<Variant>(updated[1 - now], coding);
}

#undef FUSEDOPT_SHARED
#undef FUSEDOPT_INLINE
