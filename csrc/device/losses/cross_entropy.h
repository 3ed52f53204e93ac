// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The bodies of the CUDA kernels of cross-entropy: what a lane does of a chunk, and of a row.
#pragma once

#include "../../core/losses/work.h"
#include "../update.h"

// A chunk is the work of a warp. Its exponentials are not kept, as those of a CPU are, but worked
// out again, from logits that lie in the L2 cache by then: to store and load them takes longer.
// Between two functions of a warp, its lanes exchange what they have; the host does so, too.
namespace fusedopt {

// What a launch does, of each chunk, of each row, and of each chunk again.
constexpr int kBegin = 1, kRow = 2, kFinish = 4;
enum class Team { warp, block };

// The kernel's whole argument.
struct CrossEntropyArgs {
  CrossEntropyWork work;
  void* terms;  // ChunkTerms of all chunks of all rows, and of each row a RowFactors behind them
  Team team;    // what takes a task: a row, or a chunk
  bool by_chunk;
  int phases;
};

FUSEDOPT_HD int64_t tasks_of(const CrossEntropyArgs& args) {
  return args.work.rows * (args.by_chunk ? loss_chunks(args.work.loss.classes) : 1);
}

// What the chunks of a row have to know of it.
struct RowFactors {
  double expected;
  double factor;
  bool ignored, wrong;
};

template <class Element>
struct CrossEntropyLane {
  using T = typename ElementTraits<Element>::Compute;
  using Terms = ChunkTerms<T>;
  static constexpr int kWidth = int(16 / sizeof(Element));  // elements of a 16-byte access
  static constexpr int kStep = kWarp * kWidth;
  static constexpr int kSteps = int(kLossChunk) / kStep;
  static constexpr int kSlots = int(kLossSlots) / kWarp;  // of a lane
  static constexpr int kGroups = kSlots / kWidth;         // steps until a slot comes again
  static_assert(kGroups * kStep == kLossSlots, "a lane has the same slots in each round");

  T sums[kSlots], distances[kSlots], shares[kSlots];

  // Where a lane's element is in its chunk.
  FUSEDOPT_HD static int place(int step, int i, uint32_t lane) {
    return step * kStep + int(lane) * kWidth + i;
  }

  FUSEDOPT_HD static int64_t width_of(const CrossEntropyWork& work, int64_t chunk) {
    const int64_t left = work.loss.classes - chunk * kLossChunk;
    return left < kLossChunk ? left : kLossChunk;
  }

  // A lane's logits of one step; behind the end of the row, what counts for nothing.
  FUSEDOPT_HD static void load(const Element* from, int at, int count, bool whole, T* logits) {
    if (whole && at + kWidth <= count) {
      Pack<Element, kWidth> pack;
      pack.load(from + at);
      FUSEDOPT_UNROLL
      for (int i = 0; i < kWidth; ++i) logits[i] = T(widen(pack.get(i)));
    } else {
      FUSEDOPT_UNROLL
      for (int i = 0; i < kWidth; ++i)
        logits[i] = at + i < count ? T(widen(from[at + i])) : lowest(T());
    }
  }
  FUSEDOPT_HD static const Element* logits_of(const CrossEntropyWork& work, int64_t row,
                                              int64_t chunk) {
    return static_cast<const Element*>(work.logits.at(row)) + chunk * kLossChunk;
  }
  FUSEDOPT_HD static bool is_aligned(const void* address) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0;
  }

  // The loads of this pass are those that wait for memory, and many are under way at a time. Later
  // ones find the chunk in a cache.
  FUSEDOPT_HD static T maximum(const CrossEntropyWork& work, int64_t row, int64_t chunk,
                               uint32_t lane) {
    const Element* from = logits_of(work, row, chunk);
    const int count = int(width_of(work, chunk));
    const bool whole = is_aligned(from);
    T largest = lowest(T());
    FUSEDOPT_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      T logits[kWidth];
      load(from, place(step, 0, lane), count, whole, logits);
      FUSEDOPT_UNROLL
      for (int i = 0; i < kWidth; ++i) largest = larger_of(logits[i], largest);
    }
    return largest;
  }

  FUSEDOPT_HD static T share(const CrossEntropyWork& work, int64_t row, int64_t at) {
    const T weight = work.weights == nullptr ? T(1) : static_cast<const T*>(work.weights)[at];
    const T probability =
        work.targets != nullptr
            ? T(0)
            : T(widen(static_cast<const Element*>(work.probabilities.at(row))[at]));
    return share_of(probability, T(work.loss.target_share()), T(work.loss.common_share()), weight);
  }

  // The lane's slots of a chunk with this maximum.
  FUSEDOPT_HD void add_up(const CrossEntropyWork& work, int64_t row, int64_t chunk, uint32_t lane,
                          T maximum) {
    const Element* from = logits_of(work, row, chunk);
    const int count = int(width_of(work, chunk));
    const bool whole = is_aligned(from), has_shares = work.has_shares();
    FUSEDOPT_UNROLL
    for (int i = 0; i < kSlots; ++i) sums[i] = distances[i] = shares[i] = 0;
    FUSEDOPT_NO_UNROLL
    for (int first = 0; first < kSteps; first += kGroups) {
      FUSEDOPT_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        T logits[kWidth];
        const int at = place(first + group, 0, lane);
        load(from, at, count, whole, logits);
        FUSEDOPT_UNROLL
        for (int i = 0; i < kWidth; ++i) {
          const T below = logits[i] - maximum;
          const int slot = group * kWidth + i;
          if (at + i >= count) continue;
          sums[slot] += exponential(below);
          if (has_shares) {
            const T part = share(work, row, chunk * kLossChunk + at + i);
            distances[slot] -= part * below;
            shares[slot] += part;
          }
        }
      }
    }
  }

  // The tree over the slots of a chunk: levels within a lane, others between two lanes, others
  // within a lane again. exchange gives what another lane has.
  template <class Value, class Exchange>
  FUSEDOPT_HD static Value tree(Value* values, Exchange exchange) {
    FUSEDOPT_UNROLL
    for (int half = kGroups / 2; half > 0; half /= 2) {
      FUSEDOPT_UNROLL
      for (int i = 0; i < half * kWidth; ++i) values[i] += values[i + half * kWidth];
    }
    FUSEDOPT_UNROLL
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      FUSEDOPT_UNROLL
      for (int i = 0; i < kWidth; ++i) values[i] += exchange(values[i], distance);
    }
    tree_sum<kWidth>(values);
    return values[0];
  }

  // The lane's elements of the gradient.
  FUSEDOPT_HD static void finish(const CrossEntropyWork& work, int64_t row, int64_t chunk,
                                 uint32_t lane, const Terms& terms, const RowFactors& of_row) {
    const Element* from = logits_of(work, row, chunk);
    auto* to = static_cast<Element*>(work.gradient.at(row)) + chunk * kLossChunk;
    const int count = int(width_of(work, chunk));
    const bool whole = is_aligned(from), whole_to = is_aligned(to);
    const bool has_shares = work.has_shares();
    const T scale = terms.sum, factor = T(of_row.factor), expected = T(of_row.expected);
    const bool has_target = work.targets != nullptr && !of_row.wrong;
    const int64_t target = has_target ? work.targets[row] - chunk * kLossChunk : -1;
    FUSEDOPT_NO_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      Pack<Element, kWidth> pack;
      T logits[kWidth];
      const int at = place(step, 0, lane);
      load(from, at, count, whole, logits);
      FUSEDOPT_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        const T kept = exponential(logits[i] - terms.maximum);
        T part = 0;
        T value = logit_gradient(kept, scale);
        if (has_shares && at + i < count) {
          part = share(work, row, chunk * kLossChunk + at + i);
          value = logit_gradient(kept, scale, part, factor);
        }
        if (at + i == target) value = target_gradient(kept, scale, part, factor, expected);
        Element element;
        narrow(of_row.ignored ? T(0) : value, element);
        pack.set(i, element);
      }
      if (whole_to && at + kWidth <= count) {
        pack.store(to + at);
      } else {
        FUSEDOPT_UNROLL
        for (int i = 0; i < kWidth; ++i)
          if (at + i < count) to[at + i] = pack.get(i);
      }
    }
  }
};

// A lane's part of what row_terms() adds up, of the chunks lane, lane + 32 ...
struct RowParts {
  double sum = 0, distance = 0, share = 0;
};

template <class T>
FUSEDOPT_HD RowParts row_parts(const ChunkTerms<T>* terms, int64_t chunks, uint32_t lane,
                               double maximum) {
  RowParts parts;
  FUSEDOPT_NO_UNROLL
  for (int64_t i = lane; i < chunks; i += kWarp) {
    const double share = double(terms[i].share);
    parts.sum += double(terms[i].sum) * weight_of(terms[i], maximum);
    parts.distance += double(terms[i].distance) + (maximum - double(terms[i].maximum)) * share;
    parts.share += share;
  }
  return parts;
}

// The loss of a row on a device; says what its chunks have to know. A target that is no class gives
// NaN, as the device cannot raise.
template <class Element>
FUSEDOPT_HD RowFactors finish_row(const CrossEntropyWork& given, int64_t row, const RowTerms& terms,
                                  double* scale) {
  using T = typename ElementTraits<Element>::Compute;
  CrossEntropy loss = given.loss;
  if (given.divisors != nullptr) {
    loss.factor = 1 / given.divisors->weight;
    loss.z_factor = 1 / given.divisors->valid;
  }
  const int64_t target = given.targets == nullptr ? -1 : given.targets[row];
  RowFactors factors;
  factors.ignored = given.ignores(row);
  factors.wrong =
      given.targets != nullptr && !factors.ignored && uint64_t(target) >= uint64_t(loss.classes);
  const bool has_target = given.targets != nullptr && !factors.ignored && !factors.wrong;
  double share = loss.target_share(), logit = 0;
  if (has_target) {
    logit = double(widen(static_cast<const Element*>(given.logits.at(row))[target]));
    if (given.weights != nullptr) share *= double(static_cast<const T*>(given.weights)[target]);
  }
  RowLoss result =
      row_loss(loss, terms, logarithm(terms.sum), has_target, logit, has_target ? share : 0);
  if (factors.wrong) result.loss = result.scale = not_a_number();
  given.losses[row] = factors.ignored ? 0 : result.loss;
  if (given.lse != nullptr) static_cast<T*>(given.lse)[row] = T(result.lse);
  factors.expected = result.expected;
  factors.factor = loss.factor;
  *scale = result.scale;
  return factors;
}

// The scale of a chunk takes the place of its sum, which nobody needs any more.
template <class T>
FUSEDOPT_HD void set_scales(ChunkTerms<T>* terms, int64_t chunks, uint32_t lane, double maximum,
                            double scale) {
  FUSEDOPT_NO_UNROLL
  for (int64_t i = lane; i < chunks; i += kWarp)
    terms[i].sum = T(scale * weight_of(terms[i], maximum));
}

// --- what a mean divides by, and the loss of all rows ------------------------------------------

struct TargetArgs {
  const int64_t* targets;
  const void* weights;  // in the compute type, or null
  int64_t rows, classes, ignore_index;
  bool float64;
  Divisors* divisors;
};

// A lane's part, of kTotalLanes.
FUSEDOPT_HD Divisors target_lane(const TargetArgs& args, uint32_t lane) {
  Divisors part{0, 0};
  for (int64_t i = lane; i < args.rows; i += kTotalLanes) {
    const int64_t target = args.targets[i];
    if (target == args.ignore_index) continue;
    part.valid += 1;
    if (args.weights == nullptr) {
      part.weight += 1;
    } else if (uint64_t(target) < uint64_t(args.classes)) {
      part.weight += args.float64 ? static_cast<const double*>(args.weights)[target]
                                  : double(static_cast<const float*>(args.weights)[target]);
    }
  }
  return part;
}

FUSEDOPT_HD double loss_lane(const LossArgs& args, uint32_t lane) {
  double sum = 0;
  for (int64_t i = lane; i < args.count; i += kTotalLanes) sum += args.losses[i];
  return sum;
}

}  // namespace fusedopt
