// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The loop of the mean squared error. Included once by each instruction set's file, as update.h is.

namespace fusedopt {
namespace cpu {
namespace FUSEDOPT_ISA {
namespace {

template <class Element, bool has_gradient>
inline __attribute__((always_inline)) double mse_chunk(const MseWork& work, int64_t begin,
                                                       int64_t end) {
  using T = typename ElementTraits<Element>::Compute;
  constexpr int quad = kQuadElements<Element>;
  constexpr int64_t width = kWarp * quad;
  const auto* FUSEDOPT_RESTRICT input = static_cast<const Element*>(work.input) + begin;
  const auto* FUSEDOPT_RESTRICT target = static_cast<const Element*>(work.target) + begin;
  auto* FUSEDOPT_RESTRICT gradient = static_cast<Element*>(work.gradient) + begin;
  const T twice_factor = T(2 * work.factor);
  const int64_t count = end - begin;
  double lanes[width] = {};
  const auto add_up = [&](int64_t first, int64_t size, Element* to) __attribute__((always_inline)) {
#pragma GCC ivdep
    for (int64_t lane = 0; lane < size; ++lane) {
      const T difference =
          squared_error(T(widen(input[first + lane])), T(widen(target[first + lane])), lanes[lane]);
      if (has_gradient) narrow(squared_error_gradient(difference, twice_factor), to[lane]);
    }
  };
  int64_t i = 0;
  for (; i + width <= count; i += width) add_up(i, width, gradient + i);
  add_up(i, count - i, gradient + i);
  for (int warp_lane = 0; warp_lane < kWarp; ++warp_lane) tree_sum<quad>(lanes + warp_lane * quad);
  tree_sum<kWarp>(lanes, quad);
  return lanes[0];
}

template <class Element>
__attribute__((noinline)) double mse_loop(const MseWork& work, int64_t begin, int64_t end) {
  return work.gradient != nullptr ? mse_chunk<Element, true>(work, begin, end)
                                  : mse_chunk<Element, false>(work, begin, end);
}

const LossLoops* loss_loops() {
  static const LossLoops loops = {
      {CrossEntropyRows<float>::loops, CrossEntropyRows<double>::loops,
       CrossEntropyRows<bfloat16>::loops, CrossEntropyRows<float16>::loops},
      {mse_loop<float>, mse_loop<double>, mse_loop<bfloat16>, mse_loop<float16>}};
  return &loops;
}

}  // namespace
}  // namespace FUSEDOPT_ISA
}  // namespace cpu
}  // namespace fusedopt
