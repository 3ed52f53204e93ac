// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The loops over the elements of a span. Included once by each instruction set's
// file, inside that set's target region, with FUSEDOPT_ISA naming the set's namespace: no symbol
// made here is shared between instruction sets.

namespace fusedopt {
namespace cpu {
namespace FUSEDOPT_ISA {
namespace {

// The states of a variant, by number: loops have a parameter for each state's stream, as a loop
// over an array of pointers would not vectorise.
template <class Variant>
using States = std::make_index_sequence<size_t(Variant::state_count)>;
template <class Element, size_t>
struct Stream {
  using type = Element;
};

// Two neighbouring bfloat16, wherever they lie. Taken apart and put together as the halves of a
// word, they need no instruction that moves elements between the lanes of a register.
typedef uint32_t __attribute__((may_alias, aligned(2))) Pair;
template <size_t>
struct PairStream {  // a Stream of pairs, whose attributes a template argument would lose
  using type = Pair;
};

inline __attribute__((always_inline)) float first_of(uint32_t pair) {
  return bits_to_float(pair << 16);
}
inline __attribute__((always_inline)) float second_of(uint32_t pair) {
  return bits_to_float(pair & 0xffff0000u);
}
// The bits of a float32 of which the upper half is rounded to nearest, ties to even, as narrow()
// does. A NaN needs no care here: one of bfloat16 has no bits in its lower half, nor has one that
// arithmetic makes of it, so that nothing is carried out of there.
inline __attribute__((always_inline)) uint32_t rounded(float value) {
  const uint32_t bits = float_to_bits(value);
  return bits + (0x7fffu + ((bits >> 16) & 1u));
}
inline __attribute__((always_inline)) uint32_t make_pair(float first, float second) {
  return (rounded(first) >> 16) | (rounded(second) & 0xffff0000u);
}

inline __attribute__((always_inline)) Pair* pairs_from(void* stream, int64_t begin) {
  return reinterpret_cast<Pair*>(static_cast<bfloat16*>(stream) + begin);
}

// Updates as many pairs, from the beginning of the streams on.
template <bool usual, class Variant, class Row, size_t... k>
inline __attribute__((always_inline)) void update_pairs(
    std::index_sequence<k...>, const Row& row, int64_t pairs, Pair* FUSEDOPT_RESTRICT param,
    const Pair* FUSEDOPT_RESTRICT grad, typename PairStream<k>::type* FUSEDOPT_RESTRICT... states) {
#pragma GCC ivdep
  for (int64_t i = 0; i < pairs; ++i) {
    float p = first_of(param[i]), next_p = second_of(param[i]);
    float state[] = {first_of(states[i])..., 0}, next_state[] = {second_of(states[i])..., 0};
    PlainMath math;
    Variant::template update<usual>(row, p, first_of(grad[i]), state, math);
    Variant::template update<usual>(row, next_p, second_of(grad[i]), next_state, math);
    param[i] = make_pair(p, next_p);
    ((states[i] = make_pair(state[k], next_state[k])), ...);
  }
}

// Updates the pairs in [begin, end) of a span whose streams are all bfloat16; returns their end.
template <bool usual, class Variant, class Row, size_t... k>
inline __attribute__((always_inline)) int64_t run_pairs(std::index_sequence<k...> states,
                                                        const Span& span, const Row& row,
                                                        int64_t begin, int64_t end) {
  const int64_t pairs = (end - begin) / 2;
  update_pairs<usual, Variant>(states, row, pairs, pairs_from(span.param, begin),
                               pairs_from(const_cast<void*>(span.grad), begin),
                               pairs_from(span.states[k], begin)...);
  return begin + 2 * pairs;
}

// The largest bits of a float32 without its sign, of those seen.
inline __attribute__((always_inline)) void raise(int32_t& largest, float value) {
  const int32_t magnitude = int32_t(magnitude_bits(value));
  largest = magnitude > largest ? magnitude : largest;
}
inline __attribute__((always_inline)) void raise(int32_t&, double) {}

template <bool usual, class Variant, class Types, bool tells_largest, class Row, size_t... k>
inline __attribute__((always_inline)) void update_elements(
    std::index_sequence<k...>, const Row& row, int64_t begin, int64_t end, int32_t* largest,
    typename Types::Param* FUSEDOPT_RESTRICT param,
    const typename Types::Grad* FUSEDOPT_RESTRICT grad,
    typename Stream<typename Types::State, k>::type* FUSEDOPT_RESTRICT... states) {
  using T = typename Types::Compute;
  [[maybe_unused]] int32_t largest_of[kMaxStates] = {};
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    T p = widen(param[i]);
    T state[] = {widen(states[i])..., T(0)};
    PlainMath math;
    Variant::template update<usual>(row, p, T(widen(grad[i])), state, math);
    narrow(p, param[i]);
    (narrow(state[k], states[i]), ...);
    if (tells_largest) (raise(largest_of[k], state[k]), ...);
  }
  if (tells_largest) ((largest[k] = largest_of[k]), ...);
}

// Updates the elements [begin, end). With largest it tells, of each state, the largest magnitude.
template <bool usual, class Variant, class Types, bool tells_largest = false, class Row,
          size_t... k>
inline __attribute__((always_inline)) void run(std::index_sequence<k...> states, const Span& span,
                                               const Row& row, int64_t begin, int64_t end,
                                               int32_t* largest = nullptr) {
  update_elements<usual, Variant, Types, tells_largest>(
      states, row, begin, end, largest, static_cast<typename Types::Param*>(span.param),
      static_cast<const typename Types::Grad*>(span.grad),
      static_cast<typename Types::State*>(span.states[k])...);
}

// float16 is converted a piece at a time, beside the streams, in the L1 cache: one loop over
// float32 does for all combinations of dtypes, and the processor's own instructions can convert,
// which no compiler takes in a loop over scalars. They give the bits of widen() and narrow().
// Without wider registers that goes for bfloat16 as well, whose loops would be long there.
constexpr int kPiece = 256;
#if defined(FUSEDOPT_F16C)
constexpr bool kBfloat16InPieces = false;
#else
constexpr bool kBfloat16InPieces = true;
#endif
template <class Element>
constexpr bool kInPieces = std::is_same<Element, float16>::value ||
                           (kBfloat16InPieces && std::is_same<Element, bfloat16>::value);

template <class Element>
__attribute__((noinline, noclone)) void widen_piece(const Element* FUSEDOPT_RESTRICT from,
                                                    float* FUSEDOPT_RESTRICT piece, int64_t count) {
  int64_t i = 0;
#if defined(FUSEDOPT_F16C)
  if constexpr (std::is_same<Element, float16>::value)
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(piece + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < count; ++i) piece[i] = widen(from[i]);
}
template <class Element>
__attribute__((noinline, noclone)) void narrow_piece(const float* FUSEDOPT_RESTRICT piece,
                                                     Element* FUSEDOPT_RESTRICT to, int64_t count) {
  int64_t i = 0;
#if defined(FUSEDOPT_F16C)
  for (; std::is_same<Element, float16>::value && i + 8 <= count; i += 8) {
    const __m256 values = _mm256_loadu_ps(piece + i);
    const __m256 is_nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    const __m256 canonical = _mm256_blendv_ps(values, _mm256_set1_ps(__builtin_nanf("")), is_nan);
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(canonical, _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < count; ++i) narrow(piece[i], to[i]);
}

// Where the elements of a piece are in float32: in place if they are stored so.
template <class Element>
inline __attribute__((always_inline)) float* fetch(Element* from, float* piece, int64_t count) {
  if constexpr (std::is_same<Element, float>::value) {
    return from;
  } else {
    widen_piece(from, piece, count);
    return piece;
  }
}
template <class Element>
inline __attribute__((always_inline)) void put_back(const float* piece, Element* to,
                                                    int64_t count) {
  if constexpr (!std::is_same<Element, float>::value) narrow_piece(piece, to, count);
}

template <class Variant, class Row>
bool is_usual_but_cautious(const Row& row) {
  if constexpr (has_cautious<Variant>) {
    return row.against != 1 && Variant::Rule::usual_but_cautious(row);
  } else {
    return false;
  }
}

template <bool usual, class Variant, class Row>
__attribute__((noinline)) void update_piece(const Span& piece, const Row& row) {
  const Row own = row;  // which no store can change
  run<usual, Variant, fusedopt::Types<float, float, float>>(States<Variant>{}, piece, own, 0,
                                                            piece.numel);
}

template <class Variant, class Types, class Row>
inline __attribute__((always_inline)) void run_pieces(const Span& span, const Row& row,
                                                      int64_t begin, int64_t end) {
  using State = typename Types::State;
  auto update = Variant::Rule::usual(row) ? update_piece<true, Variant, Row>
                                          : update_piece<false, Variant, Row>;
  if constexpr (has_cautious<Variant>)
    if (is_usual_but_cautious<Variant>(row))
      update = update_piece<true, typename Variant::Cautious, Row>;
  alignas(64) float params[kPiece], grads[kPiece], states[kMaxStates][kPiece];
  for (int64_t i = begin; i < end; i += kPiece) {
    const int64_t count = end - i < kPiece ? end - i : kPiece;
    auto* param = static_cast<typename Types::Param*>(span.param) + i;
    auto* grad = static_cast<typename Types::Grad*>(const_cast<void*>(span.grad)) + i;
    Span piece{fetch(param, params, count), fetch(grad, grads, count), {}, count, 0, 0, 0, nullptr};
    for (int k = 0; k < Variant::state_count; ++k)
      piece.states[k] = fetch(static_cast<State*>(span.states[k]) + i, states[k], count);
    update(piece, row);
    put_back(params, param, count);
    for (int k = 0; k < Variant::state_count; ++k)
      put_back(states[k], static_cast<State*>(span.states[k]) + i, count);
  }
}

#include "update_coded.h"

// Updates the elements [begin, end) in the way that suits their types best.
template <bool usual, class Variant, class Types, class Row>
inline __attribute__((always_inline)) void run_best(const Span& span, const Row& row, int64_t begin,
                                                    int64_t end) {
  using Param = typename Types::Param;
  constexpr bool all_bfloat16 = std::is_same<Param, bfloat16>::value &&
                                std::is_same<typename Types::Grad, bfloat16>::value &&
                                std::is_same<typename Types::State, bfloat16>::value;
  if constexpr (std::is_same<Types, Coded>::value) {
    run_blocks<usual, Variant>(span, row, begin, end);
  } else {
    constexpr States<Variant> states;
    if constexpr (all_bfloat16) begin = run_pairs<usual, Variant>(states, span, row, begin, end);
    if (begin < end) run<usual, Variant, Types>(states, span, row, begin, end);
  }
}

template <class Variant, class Types>
__attribute__((noinline)) void span_loop(const Span& span, const HyperRow& packed_row,
                                         int64_t begin, int64_t end) {
  using Rule = typename Variant::Rule;
  using Row = typename Rule::template Row<typename Types::Compute>;
  Row packed;
  memcpy(&packed, packed_row.bytes, sizeof packed);
  // A copy of its own for each loop, which g++ takes apart into registers: not what memcpy has
  // written as a whole.
  if constexpr (kInPieces<typename Types::Param>) {
    run_pieces<Variant, Types>(span, packed, begin, end);
  } else if (Rule::usual(packed)) {
    const Row row = packed;
    run_best<true, Variant, Types>(span, row, begin, end);
  } else if (is_usual_but_cautious<Variant>(packed)) {
    if constexpr (has_cautious<Variant>) {
      const Row row = packed;
      run_best<true, typename Variant::Cautious, Types>(span, row, begin, end);
    }
  } else {
    const Row row = packed;
    run_best<false, Variant, Types>(span, row, begin, end);
  }
}

template <class Variant, class Types>
struct Loop {
  static constexpr SpanLoop value = span_loop<Variant, Types>;
};

#include "measure.h"

}  // namespace
}  // namespace FUSEDOPT_ISA
}  // namespace cpu
}  // namespace fusedopt
