"""Checks of the kernels of spans with a Coding."""

from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np

from . import coding
from .checks import ROUNDING, all_ways, flushing_denormals, gap_of_signs, make_rows, options_of
from .coded_streams import CodedStreams
from .coding import BLOCK, PARAM_CODES, STATE_CODES, Coding
from .library import BACKWARD, FORWARD, THREADED, Core, Kernel
from .memory import usual
from .options import RULES

GRADS = ["float32", "bfloat16", "float16"]
CODINGS = [Coding(*names) for names in product(PARAM_CODES, GRADS, STATE_CODES)]
SOME_CODINGS = [
    Coding("bfloat16_and_16", "bfloat16", "int8"),
    Coding("bfloat16_stochastic", "float32", "bfloat16"),
    Coding("float16_and_float32", "float16", "int8"),
    Coding("float32", "float32", "int8"),
    Coding("bfloat16_and_8", "bfloat16", "bfloat16"),
]
SIZES = [0, 1, 3, 255, 256, 257, 2049, 4095, 4096, 4097, 9000]
"""Around the borders of blocks, and of the sixteen blocks that are a chunk of the CUDA kernel."""
ROWS = [(9, 63), (9, 64), (9, 65), (9, 255), (9, 256), (9, 257), (9, 300), (5, 511), (5, 512)]
ROWS += [(5, 513), (1, 300), (3, 2049)]
"""How many, and how many elements each has."""


def check_bits(core: Core, kernel: Kernel) -> None:
    """Every coding by every instruction set and by the tile, to the last bit: all sizes, aligned
    and misaligned, with special values, in threads that flush denormals."""
    rows = make_rows(core, kernel, 7)
    in_rows = [
        (code, count * row, row)
        for code, (count, row) in product(CODINGS, ROWS)
        if code.state == "int8"
    ]
    memory = CodedStreams(core, kernel, [*product(CODINGS, SIZES), *in_rows], rows)
    want = memory.expected()
    for way, step in all_ways(core, rows):
        memory.assert_same(memory.after(step), want, way)
    for isa in core.isas:
        step = flushing_denormals(partial(core.cpu_step, rows=rows, isa=isa))
        memory.assert_same(memory.after(step), want, f"{isa} where denormals are flushed")


def check_division(core: Core, kernel: Kernel) -> None:
    """The same bits however a step is cut into pieces, in whatever order or thread they run."""
    sizes = [1000, 30011, 17, 256, 3, 512, 5001]
    rows = make_rows(core, kernel, 3)
    spans = [(code, 7 * row, row) for code, row in product(SOME_CODINGS, [64, 300, 513, 1024])]
    memory = CodedStreams(core, kernel, [*product(SOME_CODINGS, sizes), *spans], rows)
    want = memory.expected()
    total = int(memory.spans["numel"].sum())
    borders = np.append(memory.spans["offset"], total)
    near = np.concatenate([borders + i for i in (-257, -256, -255, -1, 0, 1, 255, 256, 257)])
    random = np.random.default_rng(0).integers(0, total, 50)
    cuts = np.unique(np.concatenate([near, random, [0, 1, total]]).clip(0, total))
    even = [(np.linspace(0, total, n + 1).astype(int), THREADED) for n in (1, 2, 3)]
    for isa in core.isas:
        for places, order in [*even, (cuts, BACKWARD), (cuts, 2)]:
            step = partial(core.cpu_step, rows=rows, isa=isa, cuts=places, order=order)
            what = f"{isa} in {len(places) - 1} pieces, order {order}"
            memory.assert_same(memory.after(step), want, what)


def check_memory(core: Core, kernel: Kernel) -> None:
    """Rows, a gradient factor and counts of steps in the device's memory. A step to be skipped
    changes nothing."""
    random = np.random.default_rng(0)
    sizes = [*random.integers(1, 600, 200), 2047, 2048, 2049, 4100]
    spans = [(SOME_CODINGS[i % len(SOME_CODINGS)], int(size)) for i, size in enumerate(sizes)]
    factor = 1 / 3  # which float32 does not hold
    plain = make_rows(core, kernel, 7, grad_factor=1)
    scaled = make_rows(core, kernel, 7, grad_factor=factor)
    memory = CodedStreams(core, kernel, spans * 2, scaled)
    want = memory.expected()
    counts = memory.codings["step"].astype(np.float32)
    places = np.arange(len(counts))
    in_memory = places % 3 > 0
    memory.codings["count"] = np.where(in_memory, counts.ctypes.data + 4 * places, 0)
    memory.codings["step"][in_memory] = 77  # which is not to be looked at
    ways = [(plain, factor, True), (plain, factor, False), (scaled, None, True)]
    for (rows, own_factor, rows_in_memory), (blocks, order) in product(
        ways, [(0, FORWARD), (3, 3), (0, BACKWARD)]
    ):
        memory.memory[:] = memory.before
        launches = core.tile_step_from_memory(
            memory.spans, rows, own_factor, False, rows_in_memory, blocks, order
        )
        what = f"the tile with factor {own_factor}, rows in memory: {rows_in_memory}"
        assert launches >= 2 + (own_factor is not None), f"{what}: {launches} launches"
        memory.assert_same(memory.memory, want, f"{what}, {blocks} blocks in order {order}")
        if own_factor is not None:
            memory.memory[:] = memory.before
            core.tile_step_from_memory(memory.spans, rows, own_factor, True, rows_in_memory)
            memory.assert_same(memory.memory, memory.before, "a step that is skipped")


def spacing(points: np.ndarray, scale: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How far apart what is stored is around these values; in blocks, one scale each."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(scale[:, None] == 0, 0, np.abs(values) / scale[:, None])
    upper = np.searchsorted(points, ratios).clip(1, len(points) - 1)
    gaps: np.ndarray = (points[upper] - points[upper - 1]) * scale[:, None]
    return gaps


def check_reference(core: Core, kernel: Kernel) -> None:
    """A step amidst training against the formulas in float64, as exactly as the codes allow."""
    update = RULES[kernel.rule].update
    codes = CODINGS[::2]
    for options in options_of(core, kernel):
        rows = core.row(kernel, options, 7, False, grad_factor=0.5).reshape(1, -1)
        spans = [(code, 700) for code in codes]
        memory = CodedStreams(core, kernel, spans, rows, [usual], arbitrary=False)
        old = [memory.decoded(memory.before, i) for i in range(len(spans))]
        ways = [(isa, partial(core.cpu_step, rows=rows, isa=isa)) for isa in core.isas]
        for way, step in [*ways, ("the tile", partial(core.tile_step, rows=rows))]:
            after = memory.after(step)
            for i, code in enumerate(codes):
                inputs = [array.astype(np.float64).ravel()[:700] for array in old[i]]
                states = dict(zip(kernel.states, inputs[2:], strict=True))
                factor = -0.5 if options["maximize"] else 0.5
                param, states = update(options, 7, False, inputs[0], factor * inputs[1], states)
                step_of = partial(update, options, 7, False)
                apart = gap_of_signs(step_of, factor, inputs, kernel.states)
                got = memory.decoded(after, i)
                for k, name in enumerate(["param", "grad", *kernel.states]):
                    want = {"param": param, "grad": inputs[1]} | states
                    expected = np.zeros_like(got[k], np.float64)
                    expected.ravel()[:700] = want[name]
                    magnitude = np.abs(expected)
                    bound = 16 * ROUNDING["float32"] * magnitude.max()
                    if k == 0:
                        lost = {"bfloat16": 2.0**-8, "bfloat16_stochastic": 2.0**-7}
                        lost |= {"float16": 2.0**-11, "bfloat16_and_8": 2.0**-16}
                        bound = bound + lost.get(code.param, 0) * magnitude + 2.0**-25
                        bound.ravel()[:700] += apart
                    elif k > 1 and code.state == "bfloat16":
                        square = kernel.never_negative[k - 2]
                        bound = bound + 2.0 ** (-7 if square else -8) * magnitude
                    elif k > 1 and code.state == "int8":
                        square = kernel.never_negative[k - 2]
                        largest = magnitude.max(axis=1) * (1 + 1e-5)
                        if square:
                            bound = bound + spacing(coding.SQUARE_POINTS, largest, expected)
                        else:
                            largest = largest * (32 / 31)
                            bound = bound + spacing(coding.SIGNED_POINTS, largest, expected) / 2
                    error = np.where(np.arange(expected.size).reshape(expected.shape) < 700, 1, 0)
                    error = error * np.abs(got[k] - expected)
                    assert (error <= bound * (1 + 1e-3)).all(), (
                        f"{kernel}, {code} by {way}, {options}: "
                        f"{name} is off by {(error / bound).max():.3g} bounds"
                    )


def check_isolation(core: Core, kernel: Kernel) -> None:
    """A gradient that is no finite number leaves other elements of its block as they would be."""
    rows = make_rows(core, kernel, 1, seed=1)
    codes = [Coding(param, "float32", "int8") for param in PARAM_CODES]
    spans = [(code, 2 * BLOCK) for code in codes]
    memory = CodedStreams(core, kernel, spans, rows, [usual], arbitrary=False)
    sick = 77  # of either block; its states are no block's largest
    others = np.arange(BLOCK) != sick
    for i in range(len(spans)):
        for state in ("grad", *kernel.states):
            blocks = memory._get(memory.before, i, state)
            assert blocks is not None
            if state == "grad":
                blocks[:, sick] = 0
            else:
                blocks.reshape(2, 64, 4)[:, sick % 64, sick // 64] = 0
            memory._put(memory.before, i, state, blocks)
    healthy = memory.after(partial(core.cpu_step, rows=rows, isa="baseline"))
    for value in (np.inf, -np.inf, np.nan, 3e38):
        for i in range(len(spans)):
            grad = memory._get(memory.before, i, "grad")
            assert grad is not None
            grad[:, sick] = np.float32(value).view(np.uint32)
            memory._put(memory.before, i, "grad", grad)
        for way, step in all_ways(core, rows):
            after = memory.after(step)
            for i, code in enumerate(codes):
                want, got = memory.decoded(healthy, i), memory.decoded(after, i)
                for k, name in enumerate(["param", "grad", *kernel.states]):
                    if name == "grad":
                        continue
                    known = np.isfinite(got[k][:, sick]) & (np.abs(got[k][:, sick]) > 1e30)
                    if name != "param" and known.any():
                        continue  # a finite number this large is a scale of its own
                    same = got[k][:, others] == want[k][:, others]
                    if k > 1 and kernel.never_negative[k - 2]:
                        # The code above the largest is taken in a block of finite numbers only.
                        largest = want[k].max(axis=1, keepdims=True)
                        same |= want[k][:, others] >= largest * (1 - 2.0**-6)
                    assert same.all(), (
                        f"{kernel}, {code} by {way}: {name} differs beside a gradient of {value}"
                    )


CODED_CHECKS: dict[str, Callable[[Core, Kernel], None]] = {
    "coded bits": check_bits,
    "coded division": check_division,
    "coded memory": check_memory,
    "coded reference": check_reference,
    "isolation": check_isolation,
}
"""Those that are run for the kernel of each variant that takes a Coding."""
