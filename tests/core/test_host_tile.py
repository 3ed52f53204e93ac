"""The core by itself: every kernel on every instruction set and as CUDA would run it."""

import mmap
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from . import checks, coded, codes, coding, core_checks, measured
from .coded_streams import CodedStreams
from .library import DTYPES, THREADED, Core, Kernel
from .memory import Streams, extreme
from .options import RULES

pytestmark = pytest.mark.slow  # the core takes minutes to compile


def test_every_rule_and_variant_has_a_reference(core: Core) -> None:
    assert set(core.rules) == set(RULES)
    for kernel in core.kernels:
        assert checks.options_of(core, kernel), f"no options lead to {kernel}"


def test_a_third_has_all_variants_and_dtypes(core: Core) -> None:
    some = checks.taken(core.kernels, checks.check_division)
    assert len(some) <= len(core.kernels) / 3 + 1
    assert {kernel.variant for kernel in some} == {kernel.variant for kernel in core.kernels}
    dtypes, of_some = (
        {kernel.dtypes[:3] for kernel in kernels if kernel.states}
        for kernels in (core.kernels, some)
    )
    assert of_some == dtypes


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("check", checks.CHECKS.values(), ids=checks.CHECKS)
def test_every_kernel(core: Core, check: Callable[[Core, Kernel], None], rule: str) -> None:
    for kernel in checks.taken(core.kernels, check):
        if kernel.rule == rule:
            check(core, kernel)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("check", coded.CODED_CHECKS.values(), ids=coded.CODED_CHECKS)
def test_every_coded_kernel(core: Core, check: Callable[[Core, Kernel], None], rule: str) -> None:
    for kernel in core.coded_kernels:
        if kernel.rule == rule:
            check(core, kernel)


@pytest.mark.parametrize("rule", RULES)
def test_measured_parameters(core: Core, rule: str) -> None:
    for kernel in core.kernels[::3]:  # with all variants and dtypes, see above
        if kernel.rule == rule:
            measured.check_measured(core, kernel)
    for kernel in core.coded_kernels:
        if kernel.rule == rule:
            measured.check_measured_coded(core, kernel)


@pytest.mark.parametrize("check", core_checks.CORE_CHECKS.values(), ids=core_checks.CORE_CHECKS)
def test_core(core: Core, check: Callable[[Core], None]) -> None:
    check(core)


@pytest.mark.parametrize("check", codes.CODE_CHECKS.values(), ids=codes.CODE_CHECKS)
def test_codes(core: Core, check: Callable[[Core], None]) -> None:
    check(core)


def test_every_float32_is_split_and_joined(core: Core) -> None:
    piece = 1 << 18  # which stays in the cache
    for begin in range(0, 1 << 32, piece):
        codes.check_split(core, np.arange(begin, begin + piece, dtype=np.uint32))


def test_step_over_mixed_kernels(core: Core) -> None:
    """Spans of many kernels in one step, in any order, as an optimizer with many groups has."""
    random = np.random.default_rng(0)
    kernels, rows, memories = core.kernels[::5], [], []
    for kernel in kernels:
        sizes = random.integers(1, 300, 60)
        shifts = random.integers(0, 16, (len(sizes), len(kernel.streams)))
        which = len(rows) + random.integers(0, 3, len(sizes))
        rows += [*checks.make_rows(core, kernel, 3)]
        memories.append(Streams(kernel, sizes, shifts, which, extreme))
    table = np.stack(rows)
    want = [m.after(partial(core.cpu_step, rows=table, isa="baseline")) for m in memories]

    spans = random.permutation(np.concatenate([memory.spans for memory in memories]))
    spans["offset"] = np.cumsum(spans["numel"]) - spans["numel"]
    cuts = np.linspace(0, spans["numel"].sum(), 4).astype(int)
    ways = [partial(core.tile_step, rows=table, order=2)]
    ways += [
        partial(core.cpu_step, rows=table, isa=isa, cuts=cuts, order=THREADED) for isa in core.isas
    ]
    for step in ways:
        for memory in memories:
            memory.reset()
        step(spans)
        for memory, expected in zip(memories, want, strict=True):
            memory.assert_same(memory.result(), expected, str(step))


def test_step_over_mixed_coded_kernels(core: Core) -> None:
    """Likewise with codings, and some spans without."""
    random = np.random.default_rng(0)
    rows = np.concatenate([checks.make_rows(core, kernel, 3) for kernel in core.coded_kernels])
    memories = []
    for i, kernel in enumerate(core.coded_kernels):
        codes_of = [coded.CODINGS[int(k)] for k in random.integers(0, len(coded.CODINGS), 40)]
        spans = [(code, int(random.integers(1, 700))) for code in codes_of]
        memory = CodedStreams(core, kernel, spans, rows, seed=i)
        memory.spans["row"] = 3 * i + random.integers(0, 3, len(spans))
        memories.append(memory)
    want = [memory.expected() for memory in memories]
    kernel = core.kernels[0]
    plain = Streams(kernel, random.integers(1, 300, 60), rows=random.integers(0, 3, 60))
    want_plain = plain.after(partial(core.cpu_step, rows=rows, isa="baseline"))

    spans = np.concatenate([plain.spans, *(memory.spans for memory in memories)])
    spans = random.permutation(spans)
    spans["offset"] = np.cumsum(spans["numel"]) - spans["numel"]
    cuts = np.linspace(0, spans["numel"].sum(), 4).astype(int)
    ways = [partial(core.tile_step, rows=rows, order=2)]
    ways += [
        partial(core.cpu_step, rows=rows, isa=isa, cuts=cuts, order=THREADED) for isa in core.isas
    ]
    for step in ways:
        plain.reset()
        for memory in memories:
            memory.memory[:] = memory.before
        step(spans)
        plain.assert_same(plain.result(), want_plain, str(step))
        for memory, expected in zip(memories, want, strict=True):
            memory.assert_same(memory.memory, expected, str(step))


class HugeSpan:
    """A span of more than 2^32 bfloat16 elements, behind a small one. Only the pages that are
    touched take memory: no test may walk along all of it."""

    NUMEL = 2**32 + 5
    BEGIN = 1003  # not at a 16-byte boundary
    FIRST = 1000  # elements of the span before

    def __init__(self, core: Core) -> None:
        self.kernel = checks.find(core, "sgd", (), "bfloat16", "bfloat16")[0]
        self.rows = checks.make_rows(core, self.kernel, 1)
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        size = 2 * (self.BEGIN + self.NUMEL + 8192)
        try:
            maps = [mmap.mmap(-1, size, flags) for _ in range(2)]
        except OSError as error:
            pytest.skip(f"no {size} bytes of address space: {error}")
        self.param, self.grad = (np.frombuffer(m, np.uint16) for m in maps)
        self.spans = np.zeros(2, core.layout.span)
        self.spans["param"] = self.param.ctypes.data + np.array([0, 2 * self.BEGIN])
        self.spans["grad"] = self.grad.ctypes.data + np.array([0, 2 * self.BEGIN])
        self.spans["numel"] = self.FIRST, self.NUMEL
        self.spans["offset"] = 0, self.FIRST
        self.spans["kernel"] = self.kernel.index

    def check(self, core: Core, begin: int, end: int, step: Callable[[], object]) -> None:
        """Checks that a step updates the elements [begin, end) of the span and none near them."""
        begin, end = max(begin, 0), min(end, self.NUMEL)
        window = slice(max(0, self.BEGIN + begin - 5000), self.BEGIN + end + 5000)
        memory = Streams(self.kernel, [window.stop - window.start])
        before = [array[live] for array, live in zip(memory.before, memory.live, strict=True)]
        inside = slice(self.BEGIN + begin - window.start, self.BEGIN + end - window.start)
        after, _ = memory.after(partial(core.cpu_step, rows=self.rows, isa="baseline"))
        want = before[0].copy()
        want[inside] = after[inside]
        self.param[window], self.grad[window] = before
        step()
        assert np.array_equal(self.param[window], want), f"[{begin}, {end})"


def test_tile_of_a_span_beyond_32_bits(core: Core) -> None:
    huge = HugeSpan(core)
    chunk, shift = huge.kernel.chunk, huge.BEGIN % 8
    chunks = 1 + -(-(huge.NUMEL + shift) // chunk)
    for element in (0, 2**31, 2**32 - chunk, 2**32, huge.NUMEL - 1):
        near = (element + shift) // chunk
        for place in (near - 1, near):
            if place >= 0:
                run = partial(core.tile_chunks, huge.spans, huge.rows, [1 + place])
                begin = place * chunk - shift
                huge.check(core, begin, begin + chunk, run)
    assert core.tile_chunks(huge.spans, huge.rows, []) == chunks


def test_loop_over_a_span_beyond_32_bits(core: Core) -> None:
    huge = HugeSpan(core)
    for isa in core.isas:
        for element in (2**31, 2**32, huge.NUMEL):
            # Cuts are moved down to a multiple of 256, except at the very end.
            cuts = [huge.FIRST + element - 1000, huge.FIRST + element]
            begin, end = (element - 1000) // 256 * 256, element
            step = partial(core.cpu_step, huge.spans, huge.rows, isa, cuts)
            huge.check(core, begin, end, step)


def test_coded_span_beyond_32_bits(core: Core) -> None:
    """Far from its beginning, a span's blocks have random numbers of their own all the same."""
    huge = HugeSpan(core)
    kernel = next(k for k in core.coded_kernels if k.variant == huge.kernel.variant)
    own = np.zeros(2, core.layout.coding)
    own["key"], own["step"] = core.random_key(5, 6), 7
    own["row"] = huge.spans["numel"]
    own["param"] = list(coding.PARAM_CODES).index("bfloat16_stochastic")
    own["grad"] = DTYPES.index("bfloat16")
    huge.spans["coding"] = own.ctypes.data + own.itemsize * np.arange(2, dtype=np.uint64)
    huge.spans["kernel"] = kernel.index
    plain = checks.find(core, "sgd", (), "float32", "float32")[0]
    random = np.random.default_rng(0)
    for element in (0, 2**31, 2**32 - kernel.chunk, 2**32, huge.NUMEL - 1):
        # The blocks of one chunk of the tile.
        begin = element // kernel.chunk * kernel.chunk
        end = min(begin + kernel.chunk, huge.NUMEL)
        window = slice(huge.BEGIN + begin, huge.BEGIN + end)
        before = coding.to_bfloat16(random.standard_normal((2, end - begin)).astype(np.float32))
        memory = Streams(plain, [end - begin])
        for k in range(2):
            memory.before[k][memory.live[k]] = coding.from_bfloat16(before[k]).view(np.uint32)
        new = memory.after(partial(core.cpu_step, rows=huge.rows, isa="baseline"))[0]
        blocks = range(begin // coding.BLOCK, -(-end // coding.BLOCK))
        key, step = int(own["key"][0]), int(own["step"][0])
        bits = np.concatenate([coding.random_bits(key, step, block) for block in blocks])
        want = coding.cut_to_bfloat16(new.view(np.float32), bits[: end - begin])

        place = 1 + begin // kernel.chunk  # behind the chunk of the first span
        cuts = [huge.FIRST + begin, huge.FIRST + end]
        ways = [partial(core.tile_chunks, huge.spans, huge.rows, [place])]
        ways += [partial(core.cpu_step, huge.spans, huge.rows, isa, cuts) for isa in core.isas]
        for run in ways:
            huge.param[window], huge.grad[window] = before
            run()
            assert np.array_equal(huge.param[window], want), f"[{begin}, {end}) by {run}"
