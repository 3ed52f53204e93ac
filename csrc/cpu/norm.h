// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The loop that sums up the squares of a gradient. Included once by each instruction set's file,
// as update.h is.

namespace fusedopt {
namespace cpu {
namespace FUSEDOPT_ISA {
namespace {

// The sum of the squares of a chunk of a gradient, see norm.h.
template <class Grad>
__attribute__((noinline)) double square_sum(const void* grad, int64_t count) {
  constexpr int quad = kQuadElements<Grad>;
  constexpr int64_t width = kWarp * quad;
  const auto* FUSEDOPT_RESTRICT elements = static_cast<const Grad*>(grad);
  double lanes[width] = {};
  int64_t i = 0;
  for (; i + width <= count; i += width)
    for (int64_t lane = 0; lane < width; ++lane) add_square(lanes[lane], elements[i + lane]);
  for (int64_t lane = 0; i + lane < count; ++lane) add_square(lanes[lane], elements[i + lane]);
  for (int warp_lane = 0; warp_lane < kWarp; ++warp_lane) tree_sum<quad>(lanes + warp_lane * quad);
  tree_sum<kWarp>(lanes, quad);
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
