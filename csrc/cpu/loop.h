// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
// The loops over the elements of a span and of a gradient. Included once by each instruction set's
// file, inside that set's target region, with FUSEDOPT_ISA naming the set's namespace: no symbol
// made here is shared between instruction sets.

namespace fusedopt {
namespace cpu {
namespace FUSEDOPT_ISA {
namespace {

template <bool usual, class Variant, class Types, class Row>
inline __attribute__((always_inline)) void run(const Span& span, const Row& row, int64_t begin,
                                               int64_t end) {
  using T = typename Types::Compute;
  using State = typename Types::State;
  constexpr int states = Variant::states;

  auto* FUSEDOPT_RESTRICT param = static_cast<typename Types::Param*>(span.param);
  const auto* FUSEDOPT_RESTRICT grad = static_cast<const typename Types::Grad*>(span.grad);
  State* FUSEDOPT_RESTRICT state0 = static_cast<State*>(span.states[0]);
  State* FUSEDOPT_RESTRICT state1 = static_cast<State*>(span.states[1]);
  State* FUSEDOPT_RESTRICT state2 = static_cast<State*>(span.states[2]);
  static_assert(kMaxStates == 3, "one pointer per state: an array of them would not vectorise");

#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    T p = widen(param[i]);
    T state[kMaxStates] = {};
    if (states > 0) state[0] = widen(state0[i]);
    if (states > 1) state[1] = widen(state1[i]);
    if (states > 2) state[2] = widen(state2[i]);
    Variant::template update<usual>(row, p, T(widen(grad[i])), state);
    narrow(p, param[i]);
    if (states > 0) narrow(state[0], state0[i]);
    if (states > 1) narrow(state[1], state1[i]);
    if (states > 2) narrow(state[2], state2[i]);
  }
}

template <class Variant, class Types>
__attribute__((noinline)) void span_loop(const Span& span, const HyperRow& packed_row,
                                         int64_t begin, int64_t end) {
  using Rule = typename Variant::Rule;
  typename Rule::template Row<typename Types::Compute> row;
  memcpy(&row, packed_row.bytes, sizeof row);
  if (Rule::usual(row)) {
    run<true, Variant, Types>(span, row, begin, end);
  } else {
    run<false, Variant, Types>(span, row, begin, end);
  }
}

template <class Variant, class Types>
struct Loop {
  static constexpr SpanLoop value = span_loop<Variant, Types>;
};

// The sum of the squares of a chunk of a gradient, see norm.h.
template <class Grad>
__attribute__((noinline)) double square_sum(const void* grad, int64_t count) {
  constexpr int slots = kSlots<Grad>;
  constexpr int64_t width = kWarp * slots;
  const auto* FUSEDOPT_RESTRICT elements = static_cast<const Grad*>(grad);
  double lanes[width] = {};
  int64_t i = 0;
  for (; i + width <= count; i += width)
    for (int64_t lane = 0; lane < width; ++lane) add_square(lanes[lane], elements[i + lane]);
  for (int64_t lane = 0; i + lane < count; ++lane) add_square(lanes[lane], elements[i + lane]);
  for (int warp_lane = 0; warp_lane < kWarp; ++warp_lane)
    tree_sum<slots>(lanes + warp_lane * slots);
  tree_sum<kWarp>(lanes, slots);
  return lanes[0];
}

template <class Grad>
struct Sum {
  static constexpr SquareSum value = square_sum<Grad>;
};

}  // namespace
}  // namespace FUSEDOPT_ISA
}  // namespace cpu
}  // namespace fusedopt
