// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The body of the CUDA kernel that updates spans: a function of (block, blocks, thread).
#pragma once

#include "../core/control.h"
#include "../core/registry.h"
#include "quick_math.h"

// No CUDA header, no shared memory, no barrier, so that the host can run it too.
namespace fusedopt {

#if defined(__CUDACC__)
using Quad = uint4;
#else
struct alignas(16) [[gnu::may_alias]] Quad {
  uint32_t x, y, z, w;
};
#endif

// One 16-byte store. A plain assignment is at times split into words by nvcc.
FUSEDOPT_HD void store_quad(Quad* to, const Quad& from) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(from.x), "r"(from.y), "r"(from.z), "r"(from.w)
               : "memory");
#else
  *to = from;
#endif
}

// As many elements of one stream as a thread handles at a time, moved in 16-byte accesses.
template <class Element, int count>
struct alignas(16) Pack {
  static_assert(sizeof(Element) * count % 16 == 0, "a pack is a multiple of 16 bytes");
  static constexpr int quads = int(sizeof(Element) * count / 16);
  Quad data[quads];

  FUSEDOPT_HD void load(const Element* from) {
    FUSEDOPT_UNROLL
    for (int i = 0; i < quads; ++i) data[i] = reinterpret_cast<const Quad*>(from)[i];
  }
  FUSEDOPT_HD void store(Element* to) const {
    FUSEDOPT_UNROLL
    for (int i = 0; i < quads; ++i) store_quad(reinterpret_cast<Quad*>(to) + i, data[i]);
  }
  FUSEDOPT_HD Element get(int i) const {
    Element value;
    memcpy(&value, reinterpret_cast<const unsigned char*>(data) + i * sizeof value, sizeof value);
    return value;
  }
  FUSEDOPT_HD void set(int i, Element value) {
    memcpy(reinterpret_cast<unsigned char*>(data) + i * sizeof value, &value, sizeof value);
  }

  // Stores values as elements i and i + 1, or notes that these are not what narrow() makes of them.
  template <class T>
  FUSEDOPT_HD void set_two(int i, T first, T second, QuickMath& math) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (std::is_same<Element, bfloat16>::value) {
      uint32_t word;
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
      memcpy(reinterpret_cast<unsigned char*>(data) + i * sizeof(Element), &word, sizeof word);
      math.note(first);  // a NaN has other bits
      math.note(second);
      return;
    }
#endif
    Element element;
    narrow(first, element);
    set(i, element);
    narrow(second, element);
    set(i + 1, element);
  }
};

constexpr int kThreads = 256;

// The most bytes of arguments that a launch gets. It takes more, but arguments begin in constant
// memory at 0x1a90, or before it: thus all of them, and their end, lie below 0x8000. From there on,
// ptxas mixes two forms of an address that are the same only if addresses wrap at 16 bits, which
// nothing documents.
constexpr size_t kMaxArgumentBytes = 0x6500;
static_assert(0x1a90 + kMaxArgumentBytes < 0x8000, "an address that has two forms");

// The kernel's whole argument: spans from the front of data, rows of hyper-parameters from its
// back.
struct LaunchArgs {
  static constexpr int kBytes = 25808;
  const Control* control = nullptr;    // null: gradients are taken as the rows say
  const HyperRow* rows = nullptr;      // on the device; null: the rows are in data
  const Measured* measured = nullptr;  // of all parameters that are measured
  double* sums = nullptr;              // of their chunks, where it is these that are wanted
  uint32_t spans;
  uint32_t chunks;
  uint32_t formats;  // of the spans' states: a bit for each of StateFormats; see update_coded.h
  alignas(16) unsigned char data[kBytes];
};
static_assert(sizeof(LaunchArgs) <= kMaxArgumentBytes, "more than a launch takes");

// The last span that begins at or before a chunk, none before the known one.
template <class ChunkSpan, class Chunk>
FUSEDOPT_HD uint32_t span_of_chunk(const ChunkSpan* spans, uint32_t known, uint32_t count,
                                   Chunk chunk) {
  uint32_t low = known, high = count - 1;
  while (low < high) {
    const uint32_t middle = (low + high + 1) / 2;
    if (spans[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// What a span has besides if its rule measures parameters.
template <class Rule, bool measures = (sums_of<Rule> > 0)>
struct MeasuredSpan {
  explicit MeasuredSpan(const Span&) {}
  template <class Row>
  FUSEDOPT_HD void complete(const LaunchArgs&, Row&) const {}
};
template <class Rule>
struct MeasuredSpan<Rule, true> {
  int32_t parameter;            // -1: this one is not measured
  uint32_t first_chunk_of_all;  // that are measured

  explicit MeasuredSpan(const Span& span)
      : parameter(span.measured), first_chunk_of_all(span.first_chunk) {}
  template <class Row>
  FUSEDOPT_HD void complete(const LaunchArgs& args, Row& row) const {
    if (parameter < 0) return;
    const auto& as = measured_as(args.measured[parameter], row.grad_factor);
    Rule::use(as.means, as.norms, row);
  }
};

template <class Row>
FUSEDOPT_HD Row row_of(const LaunchArgs& args, uint32_t i) {
  Row row = args.rows == nullptr
                ? *(reinterpret_cast<const Row*>(args.data + LaunchArgs::kBytes) - (i + 1))
                : *reinterpret_cast<const Row*>(args.rows[i].bytes);
  if (args.control != nullptr) {
    decltype(row.grad_factor) factor;
    get_grad_factor(*args.control, factor);
    row.grad_factor *= factor;
  }
  return row;
}

// Packs spans into the argument of one launch, from spans[next] on; returns the next one that did
// not fit. Spans of other kernels, and those that are not wanted, are passed over. Rows are shared
// by the spans that name them, and left out where they are on the device, as args.rows says.
template <class TileSpan, class Row>
size_t pack_spans(const Span* spans, size_t count, size_t next, int kernel, const HyperRow* rows,
                  LaunchArgs& args) {
  constexpr size_t capacity = LaunchArgs::kBytes;
  args.spans = 0;
  args.chunks = 0;
  args.formats = 0;
  uint32_t packed_rows = 0;
  int32_t last_row = -1;
  for (; next < count; ++next) {
    const Span& from = spans[next];
    if (from.kernel != kernel || from.numel == 0 || !TileSpan::wants(from)) continue;
    const bool new_row = args.rows == nullptr && from.row != last_row;
    if ((args.spans + 1) * sizeof(TileSpan) + (packed_rows + new_row) * sizeof(Row) > capacity)
      break;
    TileSpan to = TileSpan::from(from);
    to.first_chunk = args.chunks;
    // A launch counts its chunks in 31 bits; the spans that would overflow go into the next.
    if (uint64_t(args.chunks) + to.chunks() > INT32_MAX) break;
    if (new_row) {
      memcpy(args.data + capacity - (++packed_rows) * sizeof(Row), rows[from.row].bytes,
             sizeof(Row));
      last_row = from.row;
    }
    to.row = args.rows == nullptr ? packed_rows - 1 : uint32_t(from.row);
    memcpy(args.data + args.spans * sizeof(TileSpan), &to, sizeof to);
    ++args.spans;
    args.chunks += to.chunks();
    args.formats |= to.format();
  }
  return next;
}

template <class Variant, class Types>
struct Tile {
  using T = typename Types::Compute;
  using Param = typename Types::Param;
  using Grad = typename Types::Grad;
  using State = typename Types::State;
  using Row = typename Variant::Rule::template Row<T>;
  static constexpr int states = Variant::state_count;

  // Elements in a pack: 16 bytes of the narrowest stream.
  static constexpr int narrowest(int a, int b) { return a < b ? a : b; }
  static constexpr int kNarrowest =
      narrowest(narrowest(sizeof(Param), sizeof(Grad)), states > 0 ? int(sizeof(State)) : 16);
  static constexpr int kPack = 16 / kNarrowest;
  // Packs in flight: at least 64 bytes a thread.
  static constexpr int kPackBytes =
      kPack * int(sizeof(Param) + sizeof(Grad) + states * sizeof(State));
  static constexpr int kUnroll = kPackBytes >= 64 ? 1 : 2;
  static constexpr int kRound = kThreads * kPack * kUnroll;
  // So many rounds, one after the other, that it does not count what a chunk takes by itself.
  static constexpr int kChunk = 4 * kRound;
  // Blocks that a multiprocessor must hold at least. Without it, ptxas aims at four and spills.
  static constexpr int kMinBlocks = 2;

  struct TileSpan : MeasuredSpan<typename Variant::Rule> {
    Param* param;
    const Grad* grad;
    State* state[states > 0 ? states : 1];
    int64_t numel;
    uint32_t first_chunk;
    uint32_t row;

    static bool wants(const Span&) { return true; }
    static TileSpan from(const Span& span) {
      TileSpan to{MeasuredSpan<typename Variant::Rule>(span),
                  static_cast<Param*>(span.param),
                  static_cast<const Grad*>(span.grad),
                  {},
                  span.numel,
                  0,
                  0};
      for (int k = 0; k < states; ++k) to.state[k] = static_cast<State*>(span.states[k]);
      return to;
    }
    // Chunks are laid out from the 16-byte boundary at or before the parameter's first element: the
    // elements in between do not exist and are masked like those behind the end.
    FUSEDOPT_HD uint32_t shift() const {
      return uint32_t(reinterpret_cast<uintptr_t>(param) % 16 / sizeof(Param)) % kPack;
    }
    static constexpr uint32_t format() { return 1; }
    FUSEDOPT_HD uint32_t chunks() const {
      return uint32_t((numel + shift() + kChunk - 1) / kChunk);
    }
  };

  // Whether all streams reach a 16-byte boundary at the same element.
  FUSEDOPT_HD static bool aligned(const TileSpan& s) {
    const uint32_t before = s.shift();
    bool result = (reinterpret_cast<uintptr_t>(s.param) - before * sizeof(Param)) % 16 == 0 &&
                  (reinterpret_cast<uintptr_t>(s.grad) - before * sizeof(Grad)) % 16 == 0;
    FUSEDOPT_UNROLL
    for (int k = 0; k < states; ++k)
      result =
          result && (reinterpret_cast<uintptr_t>(s.state[k]) - before * sizeof(State)) % 16 == 0;
    return result;
  }

  // Updates a pack; false where an operand was rare, so that nothing of it may be stored.
  template <bool usual>
  FUSEDOPT_HD static bool update(const Row& row, Pack<Param, kPack>& p, const Pack<Grad, kPack>& g,
                                 Pack<State, kPack>* state) {
    QuickMath math;
    FUSEDOPT_UNROLL
    for (int i = 0; i < kPack; i += 2) {
      T values[2], states_of[2][kMaxStates];
      FUSEDOPT_UNROLL
      for (int j = 0; j < 2; ++j) {
        values[j] = widen(p.get(i + j));
        FUSEDOPT_UNROLL
        for (int k = 0; k < states; ++k) states_of[j][k] = widen(state[k].get(i + j));
        Variant::template update<usual>(row, values[j], T(widen(g.get(i + j))), states_of[j], math);
      }
      p.set_two(i, values[0], values[1], math);
      FUSEDOPT_UNROLL
      for (int k = 0; k < states; ++k) state[k].set_two(i, states_of[0][k], states_of[1][k], math);
    }
    return !math.is_rare();
  }

  FUSEDOPT_HD static void update_one(const TileSpan& s, const Row& row, int64_t i) {
    T value = widen(s.param[i]);
    T states_of_i[kMaxStates];
    FUSEDOPT_UNROLL
    for (int k = 0; k < states; ++k) states_of_i[k] = widen(s.state[k][i]);
    PlainMath math;
    Variant::template update<false>(row, value, T(widen(s.grad[i])), states_of_i, math);
    narrow(value, s.param[i]);
    FUSEDOPT_UNROLL
    for (int k = 0; k < states; ++k) narrow(states_of_i[k], s.state[k][i]);
  }

  // Those of the elements [i, end) that the span has.
  FUSEDOPT_HD static void run_elements(const TileSpan& s, const Row& row, int64_t i, int64_t end) {
    FUSEDOPT_NO_UNROLL
    for (; i < end; ++i)
      if (i >= 0 && i < s.numel) update_one(s, row, i);
  }

  // A thread's packs of one round.
  template <bool usual>
  FUSEDOPT_HD static void run_packs(const TileSpan& s, const Row& row, int64_t first) {
    Pack<Param, kPack> p[kUnroll];
    Pack<Grad, kPack> g[kUnroll];
    Pack<State, kPack> state[kUnroll][states > 0 ? states : 1];
    // Packs that the span has as a whole, as it has nearly all of them.
    bool whole[kUnroll];
    FUSEDOPT_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * kThreads * kPack;
      whole[u] = i >= 0 && i + kPack <= s.numel;
      if (!whole[u]) continue;
      p[u].load(s.param + i);
      g[u].load(s.grad + i);
      FUSEDOPT_UNROLL
      for (int k = 0; k < states; ++k) state[u][k].load(s.state[k] + i);
    }
    FUSEDOPT_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * kThreads * kPack;
      if (whole[u] && update<usual>(row, p[u], g[u], state[u])) {
        p[u].store(s.param + i);
        FUSEDOPT_UNROLL
        for (int k = 0; k < states; ++k) state[u][k].store(s.state[k] + i);
      } else {
        run_elements(s, row, i, i + kPack);
      }
    }
  }

  template <bool usual>
  FUSEDOPT_HD static void run_rounds(const TileSpan& s, const Row& row, int64_t base,
                                     uint32_t thread) {
    FUSEDOPT_NO_UNROLL
    for (int64_t at = base; at < base + kChunk && at < s.numel; at += kRound)
      run_packs<usual>(s, row, at + thread * kPack);
  }

  FUSEDOPT_HD static void run_chunk(const TileSpan& s, const Row& row, uint32_t chunk,
                                    uint32_t thread) {
    const int64_t base = int64_t(chunk) * kChunk - s.shift();
    if (!aligned(s)) {
      // Neighbouring threads take neighbouring elements.
      for (uint32_t at = thread; at < uint32_t(kChunk); at += kThreads)
        run_elements(s, row, base + at, base + at + 1);
    } else if (Variant::Rule::usual(row)) {
      run_rounds<true>(s, row, base, thread);
    } else {
      run_rounds<false>(s, row, base, thread);
    }
  }

  FUSEDOPT_HD static void run(const LaunchArgs& args, uint32_t block, uint32_t blocks,
                              uint32_t thread) {
    if (args.control != nullptr && args.control->skip != 0) return;
    const auto* spans = reinterpret_cast<const TileSpan*>(args.data);
    uint32_t known = 0;
    for (uint32_t chunk = block; chunk < args.chunks; chunk += blocks) {
      known = span_of_chunk(spans, known, args.spans, chunk);
      const TileSpan& s = spans[known];
      Row row = row_of<Row>(args, s.row);
      s.complete(args, row);
      run_chunk(s, row, chunk - s.first_chunk, thread);
    }
  }

  static size_t pack(const Span* spans, size_t count, size_t next, int kernel, const HyperRow* rows,
                     LaunchArgs& args) {
    return pack_spans<TileSpan, Row>(spans, count, next, kernel, rows, args);
  }
};

}  // namespace fusedopt
