// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The loops of cross-entropy over rows of logits. Included once by each instruction set's file, as
// update.h is.

namespace fusedopt {
namespace cpu {
namespace FUSEDOPT_ISA {
namespace {

// Rows of at most so many classes are worked out many at a time, as one alone has not enough to do
// for a vector.
constexpr int64_t kShortRow = 64;
constexpr int64_t kTileRows = 64;

// Lanes of a maximum, of which any order gives the same.
constexpr int kMaximumLanes = 64;

template <int64_t count, class T>
inline __attribute__((always_inline)) void tree_maximum(T* lanes) {
  if constexpr (count > 1) {
    constexpr int64_t half = count / 2;
    for (int64_t i = 0; i < half; ++i) lanes[i] = larger_of(lanes[i + half], lanes[i]);
    tree_maximum<half>(lanes);
  }
}

template <class T>
inline __attribute__((always_inline)) T maximum_of(const T* logits, int64_t count) {
  T lanes[kMaximumLanes];
  for (int64_t i = 0; i < kMaximumLanes; ++i) lanes[i] = lowest(T());
  int64_t i = 0;
  for (; i + kMaximumLanes <= count; i += kMaximumLanes)
    for (int64_t lane = 0; lane < kMaximumLanes; ++lane)
      lanes[lane] = larger_of(logits[i + lane], lanes[lane]);
  for (int64_t lane = 0; i + lane < count; ++lane)
    lanes[lane] = larger_of(logits[i + lane], lanes[lane]);
  tree_maximum<kMaximumLanes>(lanes);
  return lanes[0];
}

// The shares t_i that do not hang on a target, of the classes [begin, begin + count) of a row.
template <class Element, class T>
__attribute__((noinline)) void fill_shares(const CrossEntropyWork& work, int64_t row, int64_t begin,
                                           int64_t count, T* shares) {
  const T common = T(work.loss.common_share()), own = T(work.loss.target_share());
  const T* weights = static_cast<const T*>(work.weights);
  const auto fill = [&](auto probability, auto weight) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; ++i)
      shares[i] = share_of(T(probability(i)), own, common, T(weight(begin + i)));
  };
  const auto one = [](int64_t) { return T(1); };
  const auto of_class = [&](int64_t i) { return weights[i]; };
  if (work.targets != nullptr) {
    const auto none = [](int64_t) { return T(0); };
    weights == nullptr ? fill(none, one) : fill(none, of_class);
  } else {
    const auto* row_begin = static_cast<const Element*>(work.probabilities.at(row)) + begin;
    const auto given = [&](int64_t i) { return T(widen(row_begin[i])); };
    weights == nullptr ? fill(given, one) : fill(given, of_class);
  }
}

template <class T>
__attribute__((noinline)) T sum_of_slots(T* slots) {
  tree_sum<kLossSlots>(slots);
  return slots[0];
}

// Works out the exponentials of a chunk. Where they are kept may be where the logits are.
template <bool has_shares, class T>
__attribute__((noinline)) void begin_chunk(const T* logits, T* kept, int64_t count, const T* shares,
                                           ChunkTerms<T>& terms) {
  const T maximum = maximum_of(logits, count);
  T sums[kLossSlots], distances[kLossSlots], all_shares[kLossSlots];
  for (int64_t i = 0; i < kLossSlots; ++i) sums[i] = 0;
  if (has_shares)
    for (int64_t i = 0; i < kLossSlots; ++i) distances[i] = all_shares[i] = 0;
  for (int64_t first = 0; first < count; first += kLossSlots) {
    const int64_t left = count - first, slots = left < kLossSlots ? left : kLossSlots;
#pragma GCC ivdep
    for (int64_t i = 0; i < slots; ++i) {
      const T below = logits[first + i] - maximum;
      const T kept_value = exponential(below);
      kept[first + i] = kept_value;
      sums[i] += kept_value;
      if (has_shares) {
        distances[i] -= shares[first + i] * below;
        all_shares[i] += shares[first + i];
      }
    }
  }
  terms = {maximum, sum_of_slots(sums), 0, 0};
  if (has_shares) {
    terms.distance = sum_of_slots(distances);
    terms.share = sum_of_slots(all_shares);
  }
}

template <bool has_shares, class Element, class T>
inline __attribute__((always_inline)) void end_chunk(const T* kept, Element* gradient,
                                                     int64_t count, const T* shares, T factor,
                                                     T scale) {
  if (has_shares) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i)
      narrow(logit_gradient(kept[i], scale, shares[i], factor), gradient[i]);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) narrow(logit_gradient(kept[i], scale), gradient[i]);
  }
}

template <class Element>
struct CrossEntropyRows {
  using T = typename ElementTraits<Element>::Compute;

  // Where the exponentials of a row are kept.
  static T* kept_of(const CrossEntropyWork& work, int64_t row, void* scratch) {
    return static_cast<T*>(scratch != nullptr ? scratch : work.gradient.at(row));
  }
  static int64_t width(const CrossEntropyWork& work, int64_t chunk) {
    const int64_t left = work.loss.classes - chunk * kLossChunk;
    return left < kLossChunk ? left : kLossChunk;
  }

  static __attribute__((noinline)) void begin_chunks(const CrossEntropyWork& work, int64_t row,
                                                     int64_t begin, int64_t end, void* terms,
                                                     void* scratch) {
    const auto* logits = static_cast<const Element*>(work.logits.at(row));
    auto* of_chunks = static_cast<ChunkTerms<T>*>(terms);
    alignas(64) T shares[kLossChunk];
    const bool keeps = work.gradient.first != nullptr, has_shares = work.has_shares();
    T* const kept = keeps ? kept_of(work, row, scratch) : nullptr;
    alignas(64) T forgotten[kLossChunk];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * kLossChunk;
      const int64_t count = width(work, i);
      T* const to = keeps ? kept + at : forgotten;
      const T* from = nullptr;
      if constexpr (std::is_same<Element, T>::value) {
        from = logits + at;
      } else {
#pragma GCC ivdep
        for (int64_t k = 0; k < count; ++k) to[k] = widen(logits[at + k]);
        from = to;
      }
      if (has_shares) {
        fill_shares<Element>(work, row, at, count, shares);
        begin_chunk<true>(from, to, count, shares, of_chunks[i]);
      } else {
        begin_chunk<false>(from, to, count, shares, of_chunks[i]);
      }
    }
  }

  static double target_share(const CrossEntropyWork& work, int64_t target) {
    const double share = work.loss.target_share();
    return work.weights == nullptr ? share
                                   : share * double(static_cast<const T*>(work.weights)[target]);
  }

  static void note(const CrossEntropyWork& work, int64_t row, const RowLoss& result) {
    work.losses[row] = result.loss;
    if (work.lse != nullptr) static_cast<T*>(work.lse)[row] = T(result.lse);
  }

  // target_logit as it was: in place, it is overwritten by now.
  static RowLoss loss_of(const CrossEntropyWork& work, int64_t row, const RowTerms& terms,
                         double log_sum, double target_logit) {
    if (work.targets == nullptr || work.ignores(row))
      return row_loss(work.loss, terms, log_sum, false, 0, 0);
    return row_loss(work.loss, terms, log_sum, true, target_logit,
                    target_share(work, work.targets[row]));
  }

  static void no_loss(const CrossEntropyWork& work, int64_t row) {
    work.losses[row] = 0;
    if (work.gradient.first != nullptr)
      memset(work.gradient.at(row), 0, size_t(work.loss.classes) * sizeof(Element));
  }

  static double target_logit(const CrossEntropyWork& work, int64_t row) {
    if (work.targets == nullptr || work.ignores(row)) return 0;
    return double(widen(static_cast<const Element*>(work.logits.at(row))[work.targets[row]]));
  }

  static void finish_row(const CrossEntropyWork& work, int64_t row, const void* terms,
                         double target_logit, RowLoss& result, double& maximum) {
    const auto* of_chunks = static_cast<const ChunkTerms<T>*>(terms);
    const RowTerms of_row =
        row_terms<T>([=](int64_t i) -> const ChunkTerms<T>& { return of_chunks[i]; },
                     loss_chunks(work.loss.classes));
    maximum = of_row.maximum;
    result = loss_of(work, row, of_row, logarithm(of_row.sum), target_logit);
    note(work, row, result);
  }

  static T at_target(const CrossEntropyWork& work, const RowLoss& result, T kept, T scale,
                     T share) {
    return target_gradient(kept, scale, share, T(work.loss.factor), T(result.expected));
  }

  static __attribute__((noinline)) void end_chunks(const CrossEntropyWork& work, int64_t row,
                                                   int64_t begin, int64_t end, const void* terms,
                                                   const void* scratch, const RowLoss& result,
                                                   double maximum) {
    const auto* of_chunks = static_cast<const ChunkTerms<T>*>(terms);
    const T* const kept = kept_of(work, row, const_cast<void*>(scratch));
    auto* gradient = static_cast<Element*>(work.gradient.at(row));
    alignas(64) T shares[kLossChunk];
    const bool has_shares = work.has_shares();
    const int64_t target = work.targets == nullptr ? -1 : work.targets[row];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * kLossChunk;
      const int64_t count = width(work, i);
      const T scale = T(result.scale * weight_of(of_chunks[i], maximum));
      const bool has_target = target >= at && target < at + count;
      const T target_kept = has_target ? kept[target] : T(0);
      Element* const to = gradient + at;
      if (has_shares) {
        fill_shares<Element>(work, row, at, count, shares);
        end_chunk<true>(kept + at, to, count, shares, T(work.loss.factor), scale);
      } else {
        end_chunk<false>(kept + at, to, count, shares, T(0), scale);
      }
      if (has_target)
        narrow(at_target(work, result, target_kept, scale, has_shares ? shares[target - at] : T(0)),
               to[target - at]);
    }
  }

  // One row, from its logits in the cache to its gradient.
  static void long_row(const CrossEntropyWork& work, int64_t row, void* terms, void* scratch) {
    const int64_t chunks = loss_chunks(work.loss.classes);
    const double logit = target_logit(work, row);
    RowLoss result;
    double maximum;
    if (work.skips(row)) return no_loss(work, row);
    begin_chunks(work, row, 0, chunks, terms, scratch);
    finish_row(work, row, terms, logit, result, maximum);
    if (work.ignores(row)) return no_loss(work, row);
    if (work.gradient.first != nullptr)
      end_chunks(work, row, 0, chunks, terms, scratch, result, maximum);
  }

  // Rows of few classes: side by side in the lanes of vectors, class by class.
  static __attribute__((noinline)) void short_rows(const CrossEntropyWork& work, int64_t begin,
                                                   int64_t end) {
    const int64_t classes = work.loss.classes;
    const bool has_shares = work.has_shares(), keeps = work.gradient.first != nullptr;
    alignas(64) T tile[kShortRow * kTileRows], slots[kShortRow * kTileRows];
    alignas(64) T shares[kShortRow * kTileRows], maxima[kTileRows], scales[kTileRows];
    alignas(64) double logs[kTileRows];
    T one_row[kShortRow], of_targets[kTileRows];
    RowTerms terms[kTileRows];
    double target_logits[kTileRows];
    for (int64_t first = begin; first < end; first += kTileRows) {
      const int64_t rows = end - first < kTileRows ? end - first : kTileRows;
      for (int64_t r = 0; r < rows; ++r) {
        const auto* logits = static_cast<const Element*>(work.logits.at(first + r));
        for (int64_t i = 0; i < classes; ++i) tile[i * kTileRows + r] = T(widen(logits[i]));
        target_logits[r] = target_logit(work, first + r);
        if (!has_shares) continue;
        fill_shares<Element>(work, first + r, 0, classes, one_row);
        for (int64_t i = 0; i < classes; ++i) shares[i * kTileRows + r] = one_row[i];
      }
      for (int64_t r = rows; r < kTileRows; ++r)
        for (int64_t i = 0; i < classes; ++i)
          tile[i * kTileRows + r] = shares[i * kTileRows + r] = 0;
      for (int64_t r = 0; r < kTileRows; ++r) maxima[r] = lowest(T());
      for (int64_t i = 0; i < classes; ++i)
        for (int64_t r = 0; r < kTileRows; ++r)
          maxima[r] = larger_of(tile[i * kTileRows + r], maxima[r]);
      for (int64_t i = 0; i < classes; ++i)
        for (int64_t r = 0; r < kTileRows; ++r) tile[i * kTileRows + r] -= maxima[r];
      const int64_t size = classes * kTileRows;
      for (int64_t r = 0; r < rows; ++r) terms[r] = {double(maxima[r]), 0, 0, 0};
      if (has_shares) {
        for (int64_t i = 0; i < size; ++i) slots[i] = T(0) - shares[i] * tile[i];
        add_up_classes(slots, classes);
        for (int64_t r = 0; r < rows; ++r) terms[r].distance = double(slots[r]);
        for (int64_t i = 0; i < size; ++i) slots[i] = T(0) + shares[i];
        add_up_classes(slots, classes);
        for (int64_t r = 0; r < rows; ++r) terms[r].share = double(slots[r]);
      }
      for (int64_t i = 0; i < size; ++i) slots[i] = tile[i] = exponential(tile[i]);
      add_up_classes(slots, classes);
      for (int64_t r = 0; r < kTileRows; ++r) logs[r] = logarithm(double(slots[r]));
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = first + r;
        if (work.skips(row)) {
          work.losses[row] = 0;
          continue;
        }
        terms[r].sum = double(slots[r]);
        const RowLoss result = loss_of(work, row, terms[r], logs[r], target_logits[r]);
        note(work, row, result);
        scales[r] = T(result.scale);
        if (work.targets == nullptr || work.ignores(row)) continue;
        const int64_t at = work.targets[row] * kTileRows + r;
        of_targets[r] =
            at_target(work, result, tile[at], scales[r], has_shares ? shares[at] : T(0));
      }
      if (keeps) {
        const T factor = T(work.loss.factor);
        for (int64_t i = 0; i < classes; ++i)
          for (int64_t r = 0; r < kTileRows; ++r) {
            const int64_t at = i * kTileRows + r;
            tile[at] = has_shares ? logit_gradient(tile[at], scales[r], shares[at], factor)
                                  : logit_gradient(tile[at], scales[r]);
          }
      }
      for (int64_t r = 0; r < rows; ++r) {
        if (work.ignores(first + r)) {
          no_loss(work, first + r);
        } else if (keeps) {
          auto* gradient = static_cast<Element*>(work.gradient.at(first + r));
          for (int64_t i = 0; i < classes; ++i) narrow(tile[i * kTileRows + r], gradient[i]);
          if (work.targets != nullptr) narrow(of_targets[r], gradient[work.targets[first + r]]);
        }
      }
    }
  }

  // Of each row, as the slots of a chunk are added: those that there are not would add zeros.
  static inline __attribute__((always_inline)) void add_up_classes(T* slots, int64_t classes) {
    for (int64_t half = tree_places(classes) / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i + half < classes; ++i) {
#pragma GCC ivdep
        for (int64_t r = 0; r < kTileRows; ++r)
          slots[i * kTileRows + r] += slots[(i + half) * kTileRows + r];
      }
      classes = half;
    }
  }

  static void rows(const CrossEntropyWork& work, int64_t begin, int64_t end) {
    if (work.loss.classes <= kShortRow) return short_rows(work, begin, end);
    const int64_t chunks = loss_chunks(work.loss.classes);
    const std::unique_ptr<ChunkTerms<T>[]> terms(new ChunkTerms<T>[chunks]);
    std::unique_ptr<T[]> scratch;
    if (work.gradient.first != nullptr && !std::is_same<Element, T>::value)
      scratch.reset(new T[work.loss.classes]);
    for (int64_t row = begin; row < end; ++row) long_row(work, row, terms.get(), scratch.get());
  }

  static constexpr CrossEntropyLoops loops = {rows,       begin_chunks, finish_row,
                                              end_chunks, target_logit, no_loss};
};

}  // namespace
}  // namespace FUSEDOPT_ISA
}  // namespace cpu
}  // namespace fusedopt
