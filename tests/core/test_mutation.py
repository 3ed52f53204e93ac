"""Plants faults in the core and shows that the checks catch each of them.

The text that a fault replaces has to stand in the sources exactly once, so none of these can rot
silently. A build with a fault has the baseline loops and two combinations of dtypes only.
"""

import pytest

from . import checks
from .build import Fault, build
from .library import Core

FLAGS = ["-O1"]  # what the compiler makes of a fault is not the point

ADAM, SGD, RMSPROP, AVERAGE = (
    f"core/rules/{name}.h" for name in ("adam", "sgd", "rmsprop", "average")
)
TILE, LOOP, DISPATCH, DTYPE = "core/tile.h", "cpu/loop.h", "cpu/dispatch.cpp", "core/dtype.h"

BIAS = "correction1 = one_minus_power(o.beta1, (long long)(step"
DECAY = "row.coupled_decay = o.decoupled_weight_decay != 0 ? 0 : o.weight_decay;"
COUPLED = "row.coupled_decay = o.weight_decay; if (true) row.decoupled_decay = 0; else"

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
        "maximize ignored": (SGD, "o.maximize != 0 ? -grad_factor : ", ""),
        "no maximum in amsgrad": (ADAM, "second_moment = max_exp_avg_sq;", ""),
        "tail skipped by the loop": (LOOP, "i < end;", "i < end - end % 8;"),
        "tail skipped by the tile": (TILE, "i < s.numel)", "i < s.numel - s.numel % 8)"),
    },
    "same bits": {
        "tile starts too early": (TILE, "if (i >= 0 && i < s.numel)", "if (i < s.numel)"),
        "misaligned are skipped": (TILE, "if (i >= 0 &&", "if (aligned(s) && i >= 0 &&"),
        "grid skips a chunk": (TILE, "chunk += blocks)", "chunk += blocks + 1)"),
        "denormals flushed": (DISPATCH, "const DefaultFloatingPoint guard;", ""),
    },
    "division": {
        "end of a piece skipped": (DISPATCH, "cut(*span, end)", "cut(*span, end - 64)"),
        "begin of a piece skipped": (DISPATCH, "cut(*span, begin)", "cut(*span, begin + 63)"),
        "span at a cut skipped": (DISPATCH, "s.offset + s.numel;", "s.offset + 1;"),
    },
    "many spans": {
        "first row for all": (TILE, "to.row = packed_rows - 1;", "to.row = 0;"),
        "one launch only": (TILE, "  return next;", "  return count;"),
    },
    "conversions": {
        "bfloat16 cut off": (DTYPE, "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16"),
        "bfloat16 ties away": (DTYPE, "0x7fffu + ((bits >> 16) & 1u)", "0x8000u"),
    },
    "multiply-add": {
        "rounded twice": (AVERAGE, "halfway & to_other ? other : nearest", "nearest"),
    },
}


def run(check: str, core: Core) -> None:
    if check == "conversions":
        checks.check_conversions(core)
    elif check == "multiply-add":
        checks.check_multiply_add(core)
    else:
        for kernel in core.kernels:
            checks.CHECKS[check](core, kernel)


@pytest.mark.parametrize("check", FAULTS)
def test_no_fault_passes(check: str) -> None:
    run(check, Core(build("faultless", extra_flags=FLAGS, small=True)))


@pytest.mark.parametrize(
    ("check", "name"), [(c, n) for c, faults in FAULTS.items() for n in faults]
)
def test_fault_is_caught(check: str, name: str) -> None:
    fault = Fault(*FAULTS[check][name])
    folder = f"fault-{name.replace(' ', '-')}"
    library = Core(build(folder, extra_flags=FLAGS, faults=[fault], small=True))
    with pytest.raises(AssertionError):
        run(check, library)
