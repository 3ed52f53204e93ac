// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The loops that measure a span: what its rule adds up over all elements, in the order of
// core/measure.h. Included by update.h.

// Adds the elements [i, i + count) to as many lanes, from first_lane on.
template <class Variant, class T, class Row, size_t... k>
FUSEDOPT_INLINE void measure_lanes(std::index_sequence<k...>, const Row& row, int64_t i,
                                   int64_t first_lane, int64_t count,
                                   double* FUSEDOPT_RESTRICT lanes,
                                   const T* FUSEDOPT_RESTRICT param,
                                   const T* FUSEDOPT_RESTRICT grad,
                                   const typename Stream<T, k>::type* FUSEDOPT_RESTRICT... states) {
  constexpr int sums = sums_of<typename Variant::Rule>;
#pragma GCC ivdep
  for (int64_t lane = 0; lane < count; ++lane) {
    const T state[] = {states[i + lane]..., T(0)};
    double of_lane[sums];
    for (int s = 0; s < sums; ++s) of_lane[s] = lanes[s * kMeasureLanes + first_lane + lane];
    PlainMath math;
    Variant::measure(row, param[i + lane], grad[i + lane], state, math, of_lane);
    for (int s = 0; s < sums; ++s) lanes[s * kMeasureLanes + first_lane + lane] = of_lane[s];
  }
}

template <class Variant, class T, class Row, size_t... k>
FUSEDOPT_INLINE void measure_elements(std::index_sequence<k...> states, const Span& piece,
                                      const Row& row, int64_t lane, double* lanes) {
  for (int64_t i = 0; i < piece.numel;) {
    const int64_t left = piece.numel - i;
    const auto measure = [&](int64_t count) FUSEDOPT_INLINED {
      measure_lanes<Variant, T>(
          states, row, i, lane, count, lanes, static_cast<const T*>(piece.param),
          static_cast<const T*>(piece.grad), static_cast<const T*>(piece.states[k])...);
      i += count;
    };
    if (lane == 0 && left >= kMeasureLanes) {
      measure(kMeasureLanes);
    } else {
      measure(left < kMeasureLanes - lane ? left : kMeasureLanes - lane);
      lane = 0;
    }
  }
}

// The elements of a piece, whose streams are in what the rule computes in, from a lane on.
template <class Variant, class T, class Row>
__attribute__((noinline)) void measure_piece(const Span& piece, const Row& row, int64_t lane,
                                             double* lanes) {
  const Row own = row;  // which no store can change
  measure_elements<Variant, T>(States<Variant>{}, piece, own, lane, lanes);
}

// Where the elements of a piece are as numbers of type T: in place if they are stored so.
template <class Element, class T>
FUSEDOPT_INLINE void* fetch_as(const Element* from, T* piece, int64_t count) {
  if constexpr (std::is_same<Element, T>::value) {
    return const_cast<Element*>(from);
  } else if constexpr (std::is_same<T, double>::value) {
    for (int64_t i = 0; i < count; ++i) piece[i] = double(widen(from[i]));
  } else {
    widen_piece(from, piece, count);
  }
  return piece;
}

template <class Variant, class Types, class Row>
FUSEDOPT_INLINE void measure_plain(const Span& span, const Row& row, int64_t begin, int64_t end,
                                   double* lanes) {
  using T = typename Types::Compute;
  using Param = typename Types::Param;
  using Grad = typename Types::Grad;
  using State = typename Types::State;
  constexpr bool in_place = std::is_same<Param, T>::value && std::is_same<Grad, T>::value &&
                            (Variant::state_count == 0 || std::is_same<State, T>::value);
  static_assert(kPiece % kMeasureLanes == 0, "each piece begins with the first lane");
  constexpr int64_t most = in_place ? kNormChunk : kPiece;
  alignas(64) [[maybe_unused]] T params[kPiece], grads[kPiece], states[kMaxStates][kPiece];
  for (int64_t i = begin; i < end; i += most) {
    const int64_t count = end - i < most ? end - i : most;
    Span piece{fetch_as(static_cast<const Param*>(span.param) + i, params, count),
               fetch_as(static_cast<const Grad*>(span.grad) + i, grads, count),
               {},
               count,
               0,
               0,
               0,
               nullptr};
    for (int k = 0; k < Variant::state_count; ++k)
      piece.states[k] = fetch_as(static_cast<const State*>(span.states[k]) + i, states[k], count);
    measure_piece<Variant, T>(piece, row, 0, lanes);
  }
}

// A chunk may begin and end within a block, of which another chunk has the rest.
template <class Variant, class Row>
FUSEDOPT_INLINE void measure_blocks(const Span& span, const Row& row, int64_t begin, int64_t end,
                                    double* lanes) {
  const Coding& coding = *span.coding;
  const StreamBytes bytes(coding);
  const Blocks blocks = Blocks{span.numel, coding.row}.joined();
  alignas(64) float params[kBlock], grads[kBlock], states[kMaxStates][kBlock];
  WholeBlock room;
  memset(&room, 0, sizeof room);
  for (int64_t i = begin, number = blocks.number_of(begin); i < end; ++number) {
    const BlockPlace place = blocks.at(number);
    Block block = block_at<Variant>(span, bytes, place.begin, number);
    if (place.count < kBlock) block = as_whole<Variant>(block, bytes, place.count, room);
    const int64_t first = i - place.begin, stop = place.begin + place.count;
    Span piece{decode_param(block, coding.param, params) + first,
               decode_grad(block, coding.grad, grads) + first,
               {},
               (stop < end ? stop : end) - i,
               0,
               0,
               0,
               nullptr};
    for_each_state<Variant>([&](int k, auto never_negative) {
      piece.states[k] =
          decode_state<never_negative.value>(block, k, coding.state, place.count, states[k]) +
          first;
    });
    measure_piece<Variant, float>(piece, row, (i - begin) % kMeasureLanes, lanes);
    i += piece.numel;
  }
}

// The sums of the elements [begin, end), of which there are at most kNormChunk.
template <class Variant, class Types>
__attribute__((noinline)) void measure_chunk(const Span& span, const HyperRow& packed_row,
                                             int64_t begin, int64_t end, double* sums) {
  using Rule = typename Variant::Rule;
  using Row = typename Rule::template Row<typename Types::Compute>;
  Row row;
  memcpy(&row, packed_row.bytes, sizeof row);
  alignas(64) double lanes[sums_of<Rule> * kMeasureLanes] = {};
  if constexpr (std::is_same<Types, Coded>::value) {
    measure_blocks<Variant>(span, row, begin, end, lanes);
  } else {
    measure_plain<Variant, Types>(span, row, begin, end, lanes);
  }
  for (int s = 0; s < kMaxSums; ++s) sums[s] = 0;
  for (int s = 0; s < sums_of<Rule>; ++s) {
    tree_sum<kMeasureLanes>(lanes + s * kMeasureLanes);
    sums[s] = lanes[s * kMeasureLanes];
  }
}

template <class Variant, class Types>
constexpr MeasureLoop measure_loop() {
  if constexpr (sums_of<typename Variant::Rule> > 0) {
    return measure_chunk<Variant, Types>;
  } else {
    return nullptr;
  }
}

template <class Variant, class Types>
struct Measure {
  static constexpr MeasureLoop value = measure_loop<Variant, Types>();
};

#undef FUSEDOPT_SHARED
#undef FUSEDOPT_INLINE
#undef FUSEDOPT_INLINED
