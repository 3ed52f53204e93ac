// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The bodies of the CUDA kernels of cross-entropy: what a lane does of a chunk, and of a row.
#pragma once

#include "../../core/losses/work.h"
#include "../update.h"

// A chunk is the work of a warp, whose lanes have all of it in registers. Of a row of one chunk its
// exponentials stay there. Those of others are not kept, as those of a CPU are, but worked out
// again, from logits that lie in the L2 cache by then: to store and load them takes longer. Between
// two functions of a warp, its lanes exchange what they have; the host does so, too.
namespace fusedopt {

// How rows are shared out: to a lane a short row, to a warp a row of one chunk, to a block a row,
// or to a warp a chunk.
enum class Form { short_rows, rows, blocks, chunks };
// What a launch does of chunks, of each, of each row, and of each again.
constexpr int kBegin = 1, kRow = 2, kFinish = 4;

// The kernel's whole argument.
struct CrossEntropyArgs {
  CrossEntropyWork work;
  // Of rows of more than one chunk: ChunkTerms of all chunks of all rows, and behind them of each
  // row a RowFactors.
  void* terms;
  Form form;
  bool wide;  // accesses are of 16 bytes; if not, of an element, neighbouring lanes' side by side
  int phases;
};

FUSEDOPT_HD bool is_by_chunk(const CrossEntropyArgs& args) {
  return args.form == Form::chunks && args.phases != kRow;
}
FUSEDOPT_HD int64_t tasks_of(const CrossEntropyArgs& args) {
  return args.work.rows * (is_by_chunk(args) ? loss_chunks(args.work.loss.classes) : 1);
}

// What the chunks of a row have to know of it.
struct RowFactors {
  double expected;
  double factor;
  bool ignored, wrong;
};

// As many elements as a lane loads at a time: 16 bytes, or one.
template <class Element, int width>
struct Piece : Pack<Element, width> {
  template <class T>
  FUSEDOPT_HD void set_all(const T* values) {
    QuickMath math;
    FUSEDOPT_UNROLL
    for (int i = 0; i < width; i += 2) this->set_two(i, values[i], values[i + 1], math);
    if (!math.is_rare()) return;
    FUSEDOPT_UNROLL
    for (int i = 0; i < width; ++i) {
      Element element;
      narrow(values[i], element);
      this->set(i, element);
    }
  }
};
template <class Element>
struct Piece<Element, 1> {
  Element only;

  FUSEDOPT_HD void load(const Element* from) { only = *from; }
  FUSEDOPT_HD void store(Element* to) const { *to = only; }
  FUSEDOPT_HD Element get(int) const { return only; }
  template <class T>
  FUSEDOPT_HD void set_all(const T* values) {
    narrow(values[0], only);
  }
};

// The shares t_i of the classes of a row, without what hangs on its target.
template <class Element>
struct Shares {
  using T = typename ElementTraits<Element>::Compute;
  const Element* probabilities;  // or null
  const T* weights;              // or null
  T own, common;

  // From this class of the row on.
  FUSEDOPT_HD Shares(const CrossEntropyWork& work, int64_t row, int64_t begin)
      : probabilities(nullptr),
        weights(static_cast<const T*>(work.weights)),
        own(T(work.loss.target_share())),
        common(T(work.loss.common_share())) {
    if (work.targets == nullptr)
      probabilities = static_cast<const Element*>(work.probabilities.at(row)) + begin;
    if (weights != nullptr) weights += begin;
  }
  FUSEDOPT_HD T at(int i) const {
    return share_of(probabilities == nullptr ? T(0) : T(widen(probabilities[i])), own, common,
                    weights == nullptr ? T(1) : weights[i]);
  }
};

// Which gradient a chunk's logits get, from their exponentials.
template <class Element>
struct LogitGradient {
  using T = typename ElementTraits<Element>::Compute;
  T scale, factor, expected;

  FUSEDOPT_HD T usual(T kept) const { return logit_gradient(kept, scale); }
  FUSEDOPT_HD T with_share(T kept, T share) const {
    return logit_gradient(kept, scale, share, factor);
  }
  FUSEDOPT_HD T of_target(T kept, T share) const {
    return target_gradient(kept, scale, share, factor, expected);
  }
};

// The elements of a chunk that one lane of a warp has, so many of them side by side.
template <class Element, int width>
struct CrossEntropyLane {
  using T = typename ElementTraits<Element>::Compute;
  using Terms = ChunkTerms<T>;
  static constexpr int kStep = kWarp * width;
  static constexpr int kSteps = int(kLossChunk) / kStep;
  static constexpr int kElements = kSteps * width;
  static constexpr int kSlots = int(kLossSlots) / kWarp;  // of a lane
  static constexpr int kGroups = kSlots / width;          // steps until a slot comes again
  // So many exponentials are worked out together: more would not fit into registers.
  static constexpr int kTogether = width < 4 ? 4 : width;
  static_assert(kGroups * kStep == kLossSlots, "a lane has the same slots in each round");

  int64_t row, begin;   // where the chunk is
  int count, first;     // its elements, and which of them the lane's first one is
  int steps;            // that the lane has elements in
  T values[kElements];  // logits, or their exponentials
  T sums[kSlots], distances[kSlots], shares[kSlots];

  FUSEDOPT_HD static int width_of(const CrossEntropyWork& work, int64_t chunk) {
    const int64_t left = work.loss.classes - chunk * kLossChunk;
    return int(left < kLossChunk ? left : kLossChunk);
  }

  // Behind the end of the row is what counts for nothing. All loads are under way at a time.
  FUSEDOPT_HD void load(const CrossEntropyWork& work, int64_t row, int64_t chunk, uint32_t lane) {
    this->row = row;
    begin = chunk * kLossChunk;
    count = width_of(work, chunk);
    first = int(lane) * width;
    steps = (count - first + kStep - 1) / kStep;
    const Element* from = logits_of(work) + first;
    if (count == int(kLossChunk)) {
      Piece<Element, width> pieces[kSteps];
      FUSEDOPT_UNROLL
      for (int step = 0; step < kSteps; ++step) pieces[step].load(from + step * kStep);
      FUSEDOPT_UNROLL
      for (int i = 0; i < kElements; ++i) values[i] = T(widen(pieces[i / width].get(i % width)));
    } else {
      Piece<Element, width> pieces[kSteps];
      FUSEDOPT_UNROLL
      for (int step = 0; step < kSteps; ++step)
        if (step < steps) pieces[step].load(from + step * kStep);
      FUSEDOPT_UNROLL
      for (int i = 0; i < kElements; ++i)
        values[i] = i / width < steps ? T(widen(pieces[i / width].get(i % width))) : -T(INFINITY);
    }
  }

  FUSEDOPT_HD T maximum() const {
    T largest = lowest(T());
    FUSEDOPT_UNROLL
    for (int i = 0; i < kElements; ++i) largest = larger_of(values[i], largest);
    return largest;
  }

  // The lane's slots of a chunk. Without shares, exponentials are made of its logits.
  FUSEDOPT_HD void add_up(const CrossEntropyWork& work, T maximum) {
    FUSEDOPT_UNROLL
    for (int i = 0; i < kSlots; ++i) sums[i] = distances[i] = shares[i] = 0;
    if (work.has_shares()) {
      add_up_shares(work, maximum);
      return;
    }
    FUSEDOPT_UNROLL
    for (int i = 0; i < kElements; i += kTogether) {
      if (i * kWarp >= count) break;
      exponentiate(i, maximum);
      FUSEDOPT_UNROLL
      for (int j = i; j < i + kTogether; ++j) sums[j % kSlots] += values[j];
    }
  }
  // With shares there is more to do, for which its code is short: logits come from a cache again.
  FUSEDOPT_HD void add_up_shares(const CrossEntropyWork& work, T maximum) {
    const Element* logits = logits_of(work);
    const Shares<Element> of_row(work, row, begin);
    FUSEDOPT_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      FUSEDOPT_NO_UNROLL
      for (int at = place(group); at < count; at += kGroups * kStep) {
        Piece<Element, width> piece;
        piece.load(logits + at);
        FUSEDOPT_UNROLL
        for (int i = 0; i < width; ++i) {
          const T below = T(widen(piece.get(i))) - maximum;
          const T part = of_row.at(at + i);
          const int slot = group * width + i;
          sums[slot] += exponential(below);
          distances[slot] -= part * below;
          shares[slot] += part;
        }
      }
    }
  }

  // The tree over the slots of a chunk: levels within a lane, others between two lanes, others
  // within a lane again. exchange gives what another lane has. All lanes get the sum.
  template <class Value, class Exchange>
  FUSEDOPT_HD static Value tree(Value* values, Exchange exchange) {
    FUSEDOPT_UNROLL
    for (int half = kGroups / 2; half > 0; half /= 2) {
      FUSEDOPT_UNROLL
      for (int i = 0; i < half * width; ++i) values[i] += values[i + half * width];
    }
    FUSEDOPT_UNROLL
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      FUSEDOPT_UNROLL
      for (int i = 0; i < width; ++i) values[i] += exchange(values[i], distance);
    }
    tree_sum<width>(values);
    return values[0];
  }

  // The lane's elements of the gradient, without shares, from their exponentials, or from logits,
  // of which these are made before.
  template <bool of_logits>
  FUSEDOPT_HD void store_gradient(const CrossEntropyWork& work, const Terms& terms,
                                  const RowFactors& of_row) {
    Element* to = gradient_of(work);
    const LogitGradient<Element> gradient{terms.sum, T(of_row.factor), T(of_row.expected)};
    const int target = target_of(work, of_row);
    if (of_row.ignored) {
      store_zeros(to);
      return;
    }
    const int target_step = target < 0 ? -1 : target / kStep, target_in_step = target % kStep;
    FUSEDOPT_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      if (step * width % kTogether == 0) {
        if (step * kStep >= count) break;
        if (of_logits) exponentiate(step * width, terms.maximum);
      }
      T results[width];
      FUSEDOPT_UNROLL
      for (int i = 0; i < width; ++i) results[i] = gradient.usual(values[step * width + i]);
      if (step == target_step) {
        FUSEDOPT_UNROLL
        for (int i = 0; i < width; ++i)
          if (first + i == target_in_step)
            results[i] = gradient.of_target(values[step * width + i], T(0));
      }
      if (step < steps) store(to + place(step), results);
    }
  }
  // Likewise, with shares.
  FUSEDOPT_HD void store_gradient_with_shares(const CrossEntropyWork& work, const Terms& terms,
                                              const RowFactors& of_row) const {
    const Element* logits = logits_of(work);
    Element* to = gradient_of(work);
    const Shares<Element> shares_of_row(work, row, begin);
    const LogitGradient<Element> gradient{terms.sum, T(of_row.factor), T(of_row.expected)};
    const int target = target_of(work, of_row);
    if (of_row.ignored) {
      store_zeros(to);
      return;
    }
    FUSEDOPT_NO_UNROLL
    for (int at = first; at < count; at += kStep) {
      Piece<Element, width> piece;
      piece.load(logits + at);
      T results[width];
      FUSEDOPT_UNROLL
      for (int i = 0; i < width; ++i) {
        const T kept = exponential(T(widen(piece.get(i))) - terms.maximum);
        const T part = shares_of_row.at(at + i);
        results[i] =
            at + i == target ? gradient.of_target(kept, part) : gradient.with_share(kept, part);
      }
      store(to + at, results);
    }
  }

 private:
  // Makes exponentials of some of the logits of a chunk with this maximum.
  FUSEDOPT_HD void exponentiate(int from, T maximum) {
    FUSEDOPT_UNROLL
    for (int i = from; i < from + kTogether; ++i) values[i] = exponential(values[i] - maximum);
  }
  FUSEDOPT_HD int place(int step) const { return step * kStep + first; }
  FUSEDOPT_HD const Element* logits_of(const CrossEntropyWork& work) const {
    return static_cast<const Element*>(work.logits.at(row)) + begin;
  }
  FUSEDOPT_HD Element* gradient_of(const CrossEntropyWork& work) const {
    return static_cast<Element*>(work.gradient.at(row)) + begin;
  }
  // The target's place in the chunk, if it is there.
  FUSEDOPT_HD int target_of(const CrossEntropyWork& work, const RowFactors& of_row) const {
    if (work.targets == nullptr || of_row.wrong) return -1;
    const int64_t target = work.targets[row] - begin;
    return target >= 0 && target < count ? int(target) : -1;
  }
  FUSEDOPT_HD static void store(Element* to, const T* results) {
    Piece<Element, width> piece;
    piece.set_all(results);
    piece.store(to);
  }
  FUSEDOPT_HD void store_zeros(Element* to) const {
    const T zeros[width] = {};
    FUSEDOPT_NO_UNROLL
    for (int at = first; at < count; at += kStep) store(to + at, zeros);
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

// The loss of a row on a device, which one lane stores; says what its chunks have to know. A target
// that is no class gives NaN, as the device cannot raise.
template <class Element>
FUSEDOPT_HD RowFactors finish_row(const CrossEntropyWork& given, int64_t row, const RowTerms& terms,
                                  bool stores, double* scale) {
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
  if (stores) given.losses[row] = factors.ignored ? 0 : result.loss;
  if (stores && given.lse != nullptr) static_cast<T*>(given.lse)[row] = T(result.lse);
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

// A row of so few classes is the work of a single lane.
constexpr int kShortRow = 16;

template <class Element>
FUSEDOPT_HD void short_row(const CrossEntropyWork& work, int64_t row) {
  using T = typename ElementTraits<Element>::Compute;
  const int classes = int(work.loss.classes);
  const auto* from = static_cast<const Element*>(work.logits.at(row));
  const bool has_shares = work.has_shares();
  const Shares<Element> shares_of_row(work, row, 0);
  T values[kShortRow], sums[kShortRow], distances[kShortRow], shares[kShortRow];
  FUSEDOPT_UNROLL
  for (int i = 0; i < kShortRow; ++i) values[i] = i < classes ? T(widen(from[i])) : -T(INFINITY);
  T maximum = lowest(T());
  FUSEDOPT_UNROLL
  for (int i = 0; i < kShortRow; ++i) maximum = larger_of(values[i], maximum);
  FUSEDOPT_UNROLL
  for (int i = 0; i < kShortRow; ++i) {
    const T below = values[i] - maximum;
    sums[i] = distances[i] = shares[i] = 0;
    values[i] = 0;
    if (i >= classes) continue;
    if (has_shares) {
      shares[i] = shares_of_row.at(i);
      distances[i] -= shares[i] * below;
    }
    sums[i] = values[i] = exponential(below);
  }
  tree_sum<kShortRow>(sums);
  tree_sum<kShortRow>(distances);
  double scale;
  const RowFactors of_row = [&] {
    T all[kShortRow];
    FUSEDOPT_UNROLL
    for (int i = 0; i < kShortRow; ++i) all[i] = shares[i];
    tree_sum<kShortRow>(all);
    const RowTerms terms{double(maximum), double(sums[0]), double(distances[0]), double(all[0])};
    return finish_row<Element>(work, row, terms, true, &scale);
  }();
  if (work.gradient.first == nullptr) return;
  auto* to = static_cast<Element*>(work.gradient.at(row));
  const LogitGradient<Element> gradient{T(scale), T(of_row.factor), T(of_row.expected)};
  const int64_t target = work.targets != nullptr && !of_row.wrong ? work.targets[row] : -1;
  FUSEDOPT_UNROLL
  for (int i = 0; i < kShortRow; ++i) {
    if (i >= classes) continue;
    T value = has_shares ? gradient.with_share(values[i], shares[i]) : gradient.usual(values[i]);
    if (i == target) value = gradient.of_target(values[i], shares[i]);
    narrow(of_row.ignored ? T(0) : value, to[i]);
  }
}

}  // namespace fusedopt
