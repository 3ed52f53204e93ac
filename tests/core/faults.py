"""Faults to plant in the core, for the checks to catch.

The text that a fault replaces has to stand in the sources exactly once, so none of these can rot
silently. A build with a fault has the baseline loops and two combinations of dtypes only.
"""

from concurrent.futures import Future
from pathlib import Path

from .build import Fault, build

Builds = dict[tuple[str, str], Future[Path]]
"""By check and name of the fault."""

FLAGS = ["-O0"]  # what the compiler makes of a fault is not the point

ADAM, SGD, RMSPROP, AVERAGE = (
    f"core/rules/{name}.h" for name in ("adam", "sgd", "rmsprop", "average")
)
TILE, NORM, NORM_TILE, CONTROL, PREPARE, DEVICE_STEP, DTYPE = (
    f"core/{name}.h"
    for name in ("tile", "norm", "norm_tile", "control", "prepare", "device_step", "dtype")
)
LOOP, DISPATCH = "cpu/loop.h", "cpu/dispatch.cpp"

BIAS = "correction1 = one_minus_power(o.beta1, (long long)(step"
DECAY = "row.coupled_decay = o.decoupled_weight_decay != 0 ? 0 : o.weight_decay;"
COUPLED = "row.coupled_decay = o.weight_decay; if (true) row.decoupled_decay = 0; else"
ROW = "to.row = args.rows == nullptr ? packed_rows - 1 : uint32_t(from.row);"
FACTOR = "if (args.control != nullptr) {\n      T factor;"
GUARD = "work = *static_cast<const Work*>(context);"
NORM_GUARD = "work = *static_cast<const NormWork*>(context);"
GUARDED = "\n  const DefaultFloatingPoint guard;"
LOOP_TAIL = "lane = 0; i + lane < count; ++lane) add_square"
NEXT = "(args.last ? args.total_chunks : step.gradients[next]"
RANGE = "i = thread; i < range.size; i += threads)"
SOURCE = "i = thread; i < args.sources; i += threads)"

# What is planted in which file, under the check that has to catch it.
FAULTS: dict[str, dict[str, tuple[str, str, str]]] = {
    "reference": {
        "no-op": (ADAM, "p -= change;", ""),
        "no-op of the loop": (LOOP, "narrow(p, param[i]);", ""),
        "no-op of the tile": (TILE, "narrow(value, s.param[i]);", ""),
        "no eps": (ADAM, "o.eps * correction2", "0"),
        "ten times eps": (ADAM, "o.eps * correction2", "10 * o.eps * correction2"),
        "eps not corrected": (ADAM, "o.eps * correction2", "o.eps"),
        "no eps in the root": (RMSPROP, "variance + row.eps_inside", "variance"),
        "decay coupled": (ADAM, DECAY, COUPLED),
        "step off by one": (ADAM, BIAS, f"{BIAS} - 1"),
        "first ignored": (SGD, "row.first != 0 ? g : ", ""),
        "maximize ignored": (SGD, "o.maximize != 0 ? -1 : 1", "1"),
        "no maximum in amsgrad": (ADAM, "second_moment = max_exp_avg_sq;", ""),
        "tail skipped by the loop": (LOOP, "i < end; ++i", "i < end - end % 8; ++i"),
        "tail skipped by the tile": (TILE, "i < s.numel)", "i < s.numel - s.numel % 8)"),
    },
    "same bits": {
        "tile starts too early": (TILE, "if (i >= 0 && i < s.numel)", "if (i < s.numel)"),
        "misaligned are skipped": (TILE, "if (i >= 0 &&", "if (aligned(s) && i >= 0 &&"),
        "grid skips a chunk": (TILE, "chunk += blocks)", "chunk += blocks + 1)"),
        "denormals flushed": (DISPATCH, GUARD + GUARDED, GUARD),
    },
    "division": {
        "end of a piece skipped": (DISPATCH, "cut(*span, end)", "cut(*span, end - 64)"),
        "begin of a piece skipped": (DISPATCH, "cut(*span, begin)", "cut(*span, begin + 63)"),
        "span at a cut skipped": (DISPATCH, "s.offset + s.numel;", "s.offset + 1;"),
    },
    "many spans": {
        "first row for all": (TILE, ROW, ROW.replace("packed_rows - 1", "0")),
        "one launch only": (TILE, "  return next;", "  return count;"),
    },
    "memory": {
        "factor ignored": (TILE, "row.grad_factor *= factor;", ""),
        "sign of the row dropped": (TILE, "grad_factor *= factor;", "grad_factor = factor;"),
        "factor only with rows": (TILE, FACTOR, FACTOR.replace(")", " && args.rows != nullptr)")),
        "no factor in float": (
            CONTROL,
            "narrow_grad_factor = float(control.grad_factor)",
            "skip = 0",
        ),
        "skip ignored": (TILE, "&& args.control->skip != 0", "&& false"),
        "skip not set": (CONTROL, "control.skip = skipped(source);", "control.skip = 0;"),
        "first row in memory for all": (TILE, ROW, ROW.replace("uint32_t(from.row)", "0")),
    },
    "sum of squares": {
        "tail of the loop's sum": (LOOP, LOOP_TAIL, LOOP_TAIL.replace("< count", "< 0")),
        "tail of the tile's sum": (NORM_TILE, "if (at + j < count)", "if (at + width <= count)"),
        "packs skipped": (NORM_TILE, "at += kUnroll * lanes)", "at += (kUnroll + 1) * lanes)"),
        "end of a chunk": (DISPATCH, "min(kNormChunk,", "min(kNormChunk - 1,"),
        "chunk of a piece": (
            DISPATCH,
            "chunk = begin; chunk",
            "chunk = begin + (begin > 0); chunk",
        ),
        "chunk of a launch": (DEVICE_STEP, NEXT, NEXT.replace("next]", "next - 1]")),
        "empty gradient of the loop": (DISPATCH, "while (gradient + 1", "if (gradient + 1"),
        "empty gradient of the tile": (
            NORM_TILE,
            "].first_chunk <= chunk",
            "].first_chunk < chunk",
        ),
        "lanes of 16 bits": (LOOP, "slots = kSlots<Grad>", "slots = sizeof(Grad) == 8 ? 2 : 4"),
        "lanes added otherwise": (NORM, "(i + half) * stride", "(2 * half - 1 - i) * stride"),
        "total in another order": (NORM, "[i % kTotalLanes]", "[i * kTotalLanes / count]"),
        "total of the tile": (NORM_TILE, "i = thread; i", "i = thread / 2 + thread % 2 * 128; i"),
        "squares in float": (NORM, "value * value", "double(float(value) * float(value))"),
        "sums flush denormals": (DISPATCH, NORM_GUARD + GUARDED, NORM_GUARD),
        "total flushes denormals": (DISPATCH, f"{GUARDED}\n  return total_of", "return total_of"),
    },
    "prepare": {
        "counts before rows": (DEVICE_STEP, "if (source == step.source_count)", "if (true)"),
        "counts of a skipped step": (PREPARE, "if (skipped(args.factor)) return;", ""),
        "counts not advanced": (PREPARE, "counts[i] += 1;", "counts[i] += 0;"),
        "counts of one turn": (PREPARE, RANGE, RANGE.replace("+= threads", "+= range.size")),
        "ranges of one launch": (DEVICE_STEP, "|| range < step.count_ranges) {", ") {"),
        "sources of one turn": (PREPARE, SOURCE, SOURCE.replace("+= threads", "+= args.sources")),
        "first at any count": (PREPARE, "source.first && taken == 0", "source.first"),
        "taken not counted": (PREPARE, "double(taken) + 1", "1"),
        "count in memory ignored": (PREPARE, "source.count == nullptr ?", "true ?"),
        "float32 options ignored": (PREPARE, "kind == OptionKind::float32", "false"),
        "float64 options ignored": (PREPARE, "kind == OptionKind::float64", "false"),
        "rows in float": (PREPARE, "taken == 0, source.float64", "taken == 0, false"),
    },
    "conversions": {
        "pairs round ties up": (LOOP, "(0x7fffu + ((bits >> 16) & 1u))", "0x8000u"),
        "bfloat16 cut off": (DTYPE, "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16"),
        "bfloat16 ties away": (DTYPE, "0x7fffu + ((bits >> 16) & 1u)", "0x8000u"),
    },
    "multiply-add": {
        "rounded twice": (AVERAGE, "halfway & to_other ? other : nearest", "nearest"),
    },
}


def make_faultless() -> Path:
    return build("faultless-core", extra_flags=FLAGS, small=True)


def make(check: str, name: str) -> Path:
    fault = Fault(*FAULTS[check][name])
    folder = f"fault-{name.replace(' ', '-')}"
    return build(folder, extra_flags=FLAGS, faults=[fault], small=True)
