// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The maths of cross-entropy, forward and backward, and the order of its additions.
#pragma once

#include "../arithmetic.h"
#include "../dtype.h"
#include "../norm.h"

// Of one row of logits x with the expected shares t, and lse = log(sum(exp(x))):
//
//   loss     = sum(t_i (lse - x_i)) + z_loss lse^2
//   gradient = exp(x_i - lse) (sum(t) + 2 z_loss lse) - t_i
//
// A row is cut into chunks. Each has a maximum of its own, so that an exponential is worked out
// once and never again: exp(x_i - maximum), kept where the gradient will be. When all chunks are
// done, what a chunk's exponentials have to be multiplied by is known. The order of additions
// depends on the number of classes only:
//
//   chunk   slot i of 256 adds up the elements i, i + 256, i + 512, i + 768; the slots are then
//           added as a tree
//   row     lane i of 32 adds up the chunks i, i + 32 ... in float64; the lanes as a tree
namespace fusedopt {

constexpr int64_t kLossChunk = 1024;
constexpr int64_t kLossSlots = 256;

FUSEDOPT_HD int64_t loss_chunks(int64_t classes) { return (classes + kLossChunk - 1) / kLossChunk; }

FUSEDOPT_HD double highest(double) { return 0x1.fffffffffffffp1023; }
// Where a maximum begins. Not at -Inf, from which -Inf cannot be subtracted: in a chunk of nothing
// but -Inf all exponentials are zero.
FUSEDOPT_HD float lowest(float) { return -0x1.fffffep127f; }
FUSEDOPT_HD double lowest(double) { return -0x1.fffffffffffffp1023; }

// The second one, if the first is NaN.
template <class T>
FUSEDOPT_HD T larger_of(T a, T b) {
#if defined(__CUDA_ARCH__)
  if (sizeof(T) == sizeof(float)) return fmaxf(float(a), float(b));  // one instruction
#endif
  return a > b ? a : b;
}

// The places of the smallest tree that holds so many slots; further ones would add zeros.
FUSEDOPT_HD int64_t tree_places(int64_t count) {
  int64_t places = 1;
  while (places < count) places *= 2;
  return places;
}

// What is known of a chunk when its exponentials are.
template <class T>
struct ChunkTerms {
  T maximum;
  T sum;       // of the exponentials
  T distance;  // the sum of t_i (maximum - x_i), without the target's own share
  T share;     // the sum of t_i, likewise
};

// What is known of a row when all chunks are, relative to its maximum.
struct RowTerms {
  double maximum, sum, distance, share;
};

template <class T>
FUSEDOPT_HD double weight_of(const ChunkTerms<T>& chunk, double maximum) {
  return exponential(double(chunk.maximum) - maximum);
}

// chunk(i) gives the terms of the chunk i.
template <class T, class Chunk>
FUSEDOPT_HD RowTerms row_terms(Chunk chunk, int64_t chunks) {
  T maximum = chunk(0).maximum;
  for (int64_t i = 1; i < chunks; ++i) maximum = larger_of(chunk(i).maximum, maximum);
  RowTerms row{double(maximum), 0, 0, 0};
  if (chunks == 1) {
    const ChunkTerms<T>& only = chunk(0);
    row.sum = double(only.sum);
    row.distance = double(only.distance);
    row.share = double(only.share);
    return row;
  }
  double sums[kWarp] = {}, distances[kWarp] = {}, shares[kWarp] = {};
  for (int64_t i = 0; i < chunks; ++i) {
    const ChunkTerms<T>& each = chunk(i);
    const double share = double(each.share);
    sums[i % kWarp] += double(each.sum) * weight_of(each, row.maximum);
    distances[i % kWarp] += double(each.distance) + (row.maximum - double(each.maximum)) * share;
    shares[i % kWarp] += share;
  }
  tree_sum<kWarp>(sums);
  tree_sum<kWarp>(distances);
  tree_sum<kWarp>(shares);
  row.sum = sums[0];
  row.distance = distances[0];
  row.share = shares[0];
  return row;
}

// What all rows have in common.
struct CrossEntropy {
  double smoothing = 0;
  double z_loss = 0;
  double factor = 1;    // by which losses of rows are multiplied where they are averaged
  double z_factor = 1;  // likewise, what z_loss adds to them
  int64_t classes = 0;

  // Of the target's class, and of every class. Multiplied by weights, where there are any.
  FUSEDOPT_HD double target_share() const { return 1 - smoothing; }
  FUSEDOPT_HD double common_share() const { return smoothing / double(classes); }
};

// The share t_i of a class that does not hang on a target. Without weights, weight is one.
template <class T>
FUSEDOPT_HD T share_of(T probability, T own, T common, T weight) {
  return multiply_add(probability, own, common) * weight;
}

// What the logit's gradient is, from exp(x_i - maximum of the chunk).
template <class T>
FUSEDOPT_HD T logit_gradient(T kept, T scale) {
  return kept * scale;
}
template <class T>
FUSEDOPT_HD T logit_gradient(T kept, T scale, T share, T factor) {
  return multiply_add(kept, scale, -(share * factor));
}
// Likewise, that of the target, which expects so much more.
template <class T>
FUSEDOPT_HD T target_gradient(T kept, T scale, T share, T factor, T expected) {
  return multiply_add(kept, scale, -multiply_add(share, factor, expected));
}

struct RowLoss {
  double loss;  // multiplied by the factors
  double lse;
  double scale;     // what exp(x_i - maximum of the row) is multiplied by in the gradient
  double expected;  // what the target's gradient has less than that
};

// The loss of a row, from log(row.sum). A target's own share is not in the terms.
FUSEDOPT_HD RowLoss row_loss(const CrossEntropy& loss, const RowTerms& row, double log_sum,
                             bool has_target, double target_logit, double target_share) {
  RowLoss result;
  // Inf - Inf has made the sum NaN.
  result.lse = row.maximum > highest(double()) ? row.maximum : row.maximum + log_sum;
  double value = 0;
  // An absent term is a branch: a distance may be Inf.
  if (has_target) value = target_share * (log_sum + (row.maximum - target_logit));
  if (row.share != 0 || row.distance != 0) value += row.distance + row.share * log_sum;
  result.loss = value * loss.factor;
  double of_exponentials = (target_share + row.share) * loss.factor;
  if (loss.z_loss != 0) {
    const double z = loss.z_loss * loss.z_factor * result.lse;
    result.loss += z * result.lse;
    of_exponentials += 2 * z;
  }
  result.scale = of_exponentials / row.sum;
  result.expected = target_share * loss.factor;
  return result;
}

}  // namespace fusedopt
