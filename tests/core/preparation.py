"""Sources of rows of hyper-parameters, and counts of steps, as a device has them in its memory."""

from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np

from .library import COUNT_RANGE, Core
from .options import RULES

STEPS = [*range(1, 6), 7, 10, 17, 64, 100, 255, 256, 999, 1000, 4096, 9999, 65536, 123457]
STEPS += [999999, 1000000]
NUMBER, FLOAT32, FLOAT64, MIXED = range(4)
"""What the options of a row are made from."""


Prepare = Callable[[np.ndarray, np.ndarray, bool, np.ndarray], None]
"""prepare(sources, ranges, skip, rows)"""


class Preparation:
    """Sources of a rule's rows, of more than one launch, and counts of steps to be advanced.

    All option sets with all kinds of sources and all steps; half of the rows have their count of
    steps in memory. The counts of the last rows lie in the ranges that are advanced first.
    """

    def __init__(self, core: Core, rule: str, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        sets = [core.values(rule, options) for options in RULES[rule].all_options]
        cases = list(product(sets, (False, True), (NUMBER, FLOAT32, FLOAT64, MIXED), STEPS))
        cases *= -(-1000 // len(cases))
        random.shuffle(cases)
        count, self.core, self.rule = len(cases), core, rule

        # Ranges with gaps in between, which nothing may change.
        sizes = random.choice([0, 1, 2, 3], 3000)
        sizes[0] = 1000  # more than a block has threads
        starts = np.cumsum(sizes) - sizes + np.cumsum(random.integers(0, 3, len(sizes)))
        self.counts = random.integers(0, 1000, starts[-1] + sizes[-1] + 5).astype(np.float32)
        self.ranges = np.zeros(len(sizes), COUNT_RANGE)
        self.ranges["counts"] = self.counts.ctypes.data + 4 * starts
        self.ranges["size"] = sizes
        self.places = [np.arange(a, a + b) for a, b in zip(starts, sizes, strict=True)]
        # Some become what stands in a row, others one more; of these, rows are made.
        self.from_rows = random.random(len(sizes)) < 0.3
        counted = [p for p, taken in zip(self.places, self.from_rows, strict=True) if not taken]

        # The values that count, those of the options and where they are in memory.
        self.values = np.zeros((count, core.layout.options))
        self.values[:, : len(sets[0])] = [values for values, *_ in cases]
        kinds = np.array([kind for _, _, kind, _ in cases])[:, None]
        kinds = np.where(kinds == MIXED, random.integers(0, 3, self.values.shape), kinds)
        self._float32, self._float64 = self.values.astype(np.float32), self.values.copy()
        self.values = np.where(kinds == FLOAT32, self._float32, self.values)

        element = np.arange(self.values.size).reshape(self.values.shape)
        self.sources = np.zeros(count, core.layout.row_source)
        self.sources["options"] = np.choose(
            kinds,
            [
                self._float64.view(np.uint64),
                (self._float32.ctypes.data + 4 * element).astype(np.uint64),
                (self._float64.ctypes.data + 8 * element).astype(np.uint64),
            ],
        )
        self.sources["kinds"] = (kinds << (2 * np.arange(core.layout.options))).sum(axis=1)
        self.sources["float64"] = [float64 for _, float64, _, _ in cases]
        self.sources["first"] = random.random(count) < 0.5
        self.sources["row"] = random.permutation(count)

        taken = np.array([step - 1 for *_, step in cases], np.float32)
        self.place = np.concatenate(counted)[:count][::-1]
        self.place = np.where(random.random(count) < 0.5, self.place, -1)
        in_memory = self.place >= 0
        self.counts[self.place[in_memory]] = taken[in_memory]
        self.sources["count"] = np.where(in_memory, self.counts.ctypes.data + 4 * self.place, 0)
        self.sources["taken"] = np.where(in_memory, 0, taken)

        # Which source's row, and which value of it.
        self.made_by = random.integers(0, count, len(sizes))
        self.value = random.integers(0, core.layout.row.itemsize // 8, len(sizes))
        wide = self.sources["float64"][self.made_by]
        words = core.layout.row.itemsize // 4 * self.sources["row"][self.made_by]
        place = words + np.where(wide, 2, 1) * self.value
        self.ranges["source"] = np.where(self.from_rows, 2 * place + np.where(wide, 3, 2), 0)

    @property
    def arrays(self) -> list[np.ndarray]:
        """What sources and ranges point to."""
        return [self.counts, self._float32, self._float64]

    def rows(self, count: int) -> np.ndarray:
        """What the first sources have to make of the counts as they are now; others' places and
        those around all rows stay as they were."""
        shape = (len(self.sources) + 2, *self.core.layout.row.shape)
        rows = np.full(shape, 0xAA, np.uint8)
        for i, source in enumerate(self.sources[:count]):
            taken = source["taken"] if self.place[i] < 0 else self.counts[self.place[i]]
            first = bool(source["first"] and taken == 0)
            rows[1 + source["row"]] = self.core.make_row(
                self.rule, self.values[i], bool(source["float64"]), float(taken) + 1, first
            )
        return rows

    def _value_of(self, number: int, rows: np.ndarray) -> np.float32:
        """What the numbers of a range become."""
        source = self.sources[self.made_by[number]]
        dtype = np.float64 if source["float64"] else np.float32
        values = rows[1 + source["row"]].view(dtype)
        return np.float32(values[self.value[number]])

    def check(
        self, sources: int, ranges: int, skip: bool = False, prepare: Prepare | None = None
    ) -> None:
        """Prepare: instead of the core's prepare_rows."""
        what = f"{self.rule}: {sources} sources, {ranges} ranges, skip {skip}"
        want_rows, want_counts = self.rows(sources), self.counts.copy()
        if not skip:
            for number, places in enumerate(self.places[:ranges]):
                if self.from_rows[number]:
                    want_counts[places] = self._value_of(number, want_rows)
                else:
                    want_counts[places] += 1
        rows = np.full_like(want_rows, 0xAA)
        prepare = prepare or partial(self.core.prepare_rows, self.rule)
        prepare(self.sources[:sources], self.ranges[:ranges], skip, rows[1:])
        wrong = np.flatnonzero(self.counts.view(np.uint32) != want_counts.view(np.uint32))
        assert not len(wrong), (
            f"{what}: {len(wrong)} counts are wrong, first {wrong[0]}: "
            f"{self.counts[wrong[0]]}, not {want_counts[wrong[0]]}"
        )
        different = np.flatnonzero((rows != want_rows).any(axis=1))
        assert not len(different), (
            f"{what}: {len(different)} rows are wrong, first {different[0] - 1} from "
            f"{self.sources[self.sources['row'] == different[0] - 1]}"
        )
