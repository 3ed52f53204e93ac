"""The instructions that the kernels are made of, executed on the host.

All threads of many blocks take each instruction together, as one wide warp would; they wait for
each other where those of a warp or of a block have to. Or one warp after the other runs until it
has to wait, in an order that is drawn at random. Each thread sees at once what others have written.

Two instructions are not known to the bit: the quick reciprocals and roots (MUFU) are those rounded
correctly, or moved by as many units in the last place as is asked for (but for those that are
hardest to round, see tests/core/quick.py), and the check before a quick
division (FCHK) sends more to the slow way than the hardware may. Indices of constant memory are
taken to wrap at 16 bits.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from core.quick import HARDEST_DIVISORS, HARDEST_ROOTS

from .machine_api import (
    CROSS_ENTROPY,
    LOSS,
    MEASURE,
    MSE,
    NORM,
    PREPARE,
    ROWS,
    SCALE,
    SHORT_ROWS,
    TARGETS,
    TOTAL,
    Launch,
    MachineApi,
    Placed,
)
from .sass import Instruction

THREADS = 256  # of a block
MOST_BLOCKS = 32  # that run at a time
MOST_KEPT = 8  # times blocks, for other launches
WARP = 32
U32, U64, I32, F32, F64 = np.uint32, np.uint64, np.int32, np.float32, np.float64
LOW = U64(0xFFFFFFFF)
FLOAT_NAN, DOUBLE_NAN = U32(0x7FFFFFFF), U64(0x7FFFFFFFFFFFFFFF)
ROUNDINGS = {"RM": 1, "RP": 2, "RZ": 3}
# Where the argument and the number of blocks lie in constant memory.
ARGUMENT = {"sm_90": 0x210, "sm_100": 0x380}
GRID_SIZE = {"sm_90": 0xC, "sm_100": 0x370}
MOST_INSTRUCTIONS = 4_000_000
WHOLE_WARP, WHOLE_BLOCK = 16, 17  # after the numbers of barriers
RESERVED = 0x400  # bytes of shared memory
SHARED_BYTES = {NORM: 2048 + 16, TOTAL: 2048, TARGETS: 4096, LOSS: 2048}  # behind them
Key = tuple[int, int]
"""Of a kernel: its number, and of one of codings that of the format of states, of a loss's that of
its dtype (and four more, where there is another one with accesses of 16 bytes)."""
KERNEL = re.compile(
    r"(?P<coded>coded_)?step_kernel<(?P<types>(?P<variant>.*?<.*?>|[^,]*), (?P<format>.*?)) *>"
    r"\(fusedopt::LaunchArgs\)"
)
PREPARE_KERNEL = re.compile(r"prepare_kernel<(?P<rule>.*?)>\(fusedopt::PrepareArgs\)")
LOSS_KERNEL = re.compile(
    r"(?P<name>short_rows|rows|cross_entropy|mse|scale|targets|loss)_kernel"
    r"(?:<(?P<element>[\w:]*)(?:, (?P<width>\d+))?>)?\(fusedopt::"
)
LOSS_KERNELS = {
    **{"cross_entropy": CROSS_ENTROPY, "mse": MSE, "scale": SCALE},
    **{"targets": TARGETS, "loss": LOSS, "short_rows": SHORT_ROWS, "rows": ROWS},
}
ELEMENTS = ("float", "double", "fusedopt::bfloat16", "fusedopt::float16")  # in DType's order
NORM_KERNEL = re.compile(r"norm_kernel\(fusedopt::NormArgs\)")
TOTAL_KERNEL = re.compile(r"total_kernel\(fusedopt::TotalArgs\)")
MEASURE_KERNEL = re.compile(r"measure_kernel<(?P<types>.*?>) *>\(fusedopt::LaunchArgs\)")
CODED = "fusedopt::Types<fusedopt::coded, fusedopt::coded, fusedopt::coded>"

Lanes = np.ndarray  # a value, or whether, for each lane
Read = Callable[[], np.ndarray]
Run = Callable[[Lanes], None]
Piece = tuple[Lanes, np.ndarray, np.ndarray]
Watch = Callable[[int, Lanes, Lanes], None]
"""Called with the place of an instruction, the lanes that it is issued to, and those of them for
which its predicate holds."""

COMPARISONS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}


class Memory:
    """What kernels may touch: arrays, at the addresses that they have or are said to have."""

    def __init__(self, arrays: Sequence[Placed]) -> None:
        placed = [(one.ctypes.data, one) if isinstance(one, np.ndarray) else one for one in arrays]
        every = [(begin, one.view(np.uint8).reshape(-1)) for begin, one in placed if one.size]
        every.sort(key=lambda each: each[0])
        self._arrays = [array for _, array in every]
        self._begins = np.array([begin for begin, _ in every], U64)

    def _pieces(self, addresses: np.ndarray, size: int) -> Iterator[Piece]:
        """Those that lie in one array: which they are, the array, and the places of their bytes."""
        assert not (addresses % U64(size)).any(), "an address is misaligned"
        numbers = np.searchsorted(self._begins, addresses, "right") - 1
        for number in np.unique(numbers):
            assert number >= 0, f"nothing lies at {int(addresses.min()):#x}"
            array, which = self._arrays[number], numbers == number
            places = (addresses[which] - self._begins[number]).astype(np.int64)
            assert places.max() + size <= len(array), "out of bounds"
            yield which, array, places[:, None] + np.arange(size)

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """So many bytes from each address on."""
        loaded = np.empty((len(addresses), size), np.uint8)
        for which, array, places in self._pieces(addresses, size):
            loaded[which] = array[places]
        return loaded

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        for which, array, places in self._pieces(addresses, values.shape[1]):
            array[places] = values[which]


def canonical(bits: np.ndarray) -> np.ndarray:
    """Of a float32, as arithmetic writes it."""
    return np.where((bits & U32(0x7FFFFFFF)) > U32(0x7F800000), FLOAT_NAN, bits)


def flushed(bits: np.ndarray) -> np.ndarray:
    return np.where(bits & U32(0x7F800000), bits, bits & U32(0x80000000))


class Blocks:
    """Blocks of a kernel's threads, which run together."""

    def __init__(
        self,
        code: Sequence[Instruction],
        arch: str,
        api: MachineApi,
        count: int,
        ulps: int = 0,
        shared: int = 0,
    ) -> None:
        """Ulps: how far off quick reciprocals and roots are. Shared: bytes of a block's shared
        memory."""
        self.code, self.arch, self.api, self.ulps = code, arch, api, ulps
        self.place_of = {instruction.address: i for i, instruction in enumerate(code)}
        self.constants = np.zeros(1 << 16, np.uint8)
        self.lanes = lanes = count * THREADS
        self.registers = np.zeros((256, lanes), U32)  # the last one is RZ
        self.uniform = np.zeros((256, lanes), U32)  # the same for all lanes of a warp
        self.predicates = np.zeros((8, lanes), bool)  # the last one is PT
        self.uniform_predicates = np.zeros((8, lanes), bool)
        self.next = np.zeros(lanes, np.int64)
        self.done = np.zeros(lanes, bool)
        self.issued = self.done  # what the current instruction is issued to
        self.waits_at = np.full(lanes, -1)
        self.barriers = np.zeros((16, lanes), bool)
        self.shared = np.zeros((count, RESERVED + shared), np.uint8)
        self.first = 0
        self.memory = Memory([])
        self.watch: Watch | None = None
        self.order: int | None = None
        self.executed: set[int] = set()
        self._random, self._warp = np.random.default_rng(0), 0
        self._decoded: dict[int, tuple[Read | None, Run]] = {}

    def run(
        self,
        argument: bytes,
        first: int,
        blocks: int,
        memory: Memory,
        watch: Watch | None = None,
        order: int | None = None,
    ) -> None:
        """Run all threads to their ends, of the blocks from the first one on, of so many in all.
        Order: a seed, of that in which warps run one by one; None: all run together."""
        self.memory, self.watch, self.order = memory, watch, order
        self._random, self._warp = np.random.default_rng(order or 0), 0
        self.executed = set()
        self.shared[:], self.shared[::2] = 0xFF, 0  # neither is what a kernel may take it for
        begin, size = ARGUMENT[self.arch], GRID_SIZE[self.arch]
        self.constants[begin : begin + len(argument)] = np.frombuffer(argument, np.uint8)
        self.constants[size : size + 4] = np.frombuffer(U32(blocks).tobytes(), np.uint8)
        self.first = first
        self.registers[:] = 0
        self.uniform[:] = 0
        self.predicates[:7], self.predicates[7] = False, True
        self.uniform_predicates[:7], self.uniform_predicates[7] = False, True
        self.next[:], self.done[:], self.waits_at[:] = 0, False, -1
        self.barriers[:] = False
        with np.errstate(all="ignore"):
            for _ in range(MOST_INSTRUCTIONS):
                ready = ~self.done & (self.waits_at < 0)
                if not ready.any():
                    if self.done.all():
                        return
                    ready = self._release_warps()
                if self.order is not None:
                    ready = self._one_warp(ready)
                # Those that are behind go first, so that lanes that have parted meet again.
                place = int(self.next[ready].min())
                active = ready & (self.next == place)
                self.next[active] = place + 1
                self._step(place, active)
        raise AssertionError("a kernel does not end")

    def forget(self) -> None:
        """What has been decoded refers to all of this, which is large."""
        self._decoded.clear()

    def _step(self, place: int, active: Lanes) -> None:
        if place not in self._decoded:
            instruction = self.code[place]
            predicate = instruction.predicate
            run = self._decoder(instruction.opcode[0].lower())(instruction)
            self._decoded[place] = (self._predicate(predicate) if predicate else None, run)
        predicate_of, run = self._decoded[place]
        self.issued = issued = active
        if predicate_of is not None:
            active = active & predicate_of()
        if self.watch is not None:
            self.watch(place, issued, active)
        if not active.any():
            return
        self.executed.add(place)
        run(active)

    def _decoder(self, name: str) -> Callable[[Instruction], Run]:
        """What works on uniform registers does the same as on others."""
        for known in (name, name.removeprefix("u")):
            if hasattr(self, f"_{known}"):
                found: Callable[[Instruction], Run] = getattr(self, f"_{known}")
                return found
        raise AssertionError(f"{name} is not known")

    # -- operands -----------------------------------------------------------------------------

    def _constant(self, text: str, size: int = 4) -> Read:
        match = re.fullmatch(r"c\[0x0\]\[(?:(U?R\w+)\+?)?(-?0x[0-9a-f]+)?\]", text)
        assert match is not None, text
        base, offset = match[1], int(match[2] or "0", 16)
        dtype = {1: np.uint8, 2: np.uint16, 4: U32}[min(size, 4)]
        word = np.dtype(dtype).itemsize

        def read() -> np.ndarray:
            begin = np.full(self.lanes, offset)
            if base is not None:
                begin = begin + self._raw(base)().astype(np.int64)
            places = begin[:, None] + np.arange(max(size, word))
            taken = np.ascontiguousarray(self.constants[places & 0xFFFF])
            found: np.ndarray = taken.view(dtype).astype(U32)
            return found.T if size > 4 else found[:, 0]

        return read

    def _raw(self, name: str) -> Read:
        """A register, whatever its bits mean."""
        if name in ("RZ", "URZ", "SRZ"):
            return lambda: np.zeros(self.lanes, U32)
        number = int(name.lstrip("UR"))
        if name[0] == "U":
            return lambda: self.uniform[number]
        return lambda: self.registers[number]

    def _integer(self, text: str, carries: bool = False) -> Read:
        """Its 32 bits, in 64; the negative of one that carries is 2^32 minus it, also of zero."""
        if re.fullmatch(r"-?0x[0-9a-f]+", text):
            value = U64(int(text, 16) & 0xFFFFFFFF)
            return lambda: np.full(self.lanes, value)
        sign, name = (text[0], text[1:]) if text[0] in "-~" else ("", text)
        raw = self._constant(name) if name.startswith("c[") else self._raw(name)
        if sign == "~":
            return lambda: (~raw()).astype(U64)
        if sign == "-":
            if carries:
                return lambda: (~raw()).astype(U64) + U64(1)
            return lambda: (U32(0) - raw()).astype(U64)
        return lambda: raw().astype(U64)

    def _float(self, text: str) -> Read:
        """The bits of a float32."""
        sign, name = (text[0] == "-", text[1:]) if text[0] in "-+" else (False, text)
        absolute, name = name.startswith("|"), name.strip("| ")
        if name.startswith("c["):
            raw = self._constant(name)
        elif name[0] in "RU":
            raw = self._raw(name)
        else:
            value = U32(int(name, 16)) if name[:2] == "0x" else F32(float(name)).view(U32)
            raw = lambda: np.full(self.lanes, value)  # noqa: E731
        if not (sign or absolute):
            return raw
        mask, flip = U32(0x7FFFFFFF if absolute else 0xFFFFFFFF), U32(0x80000000 if sign else 0)
        return lambda: (raw() & mask) ^ flip

    def _double(self, text: str) -> Read:
        sign, name = (text[0] == "-", text[1:]) if text[0] in "-+" else (False, text)
        absolute, name = name.startswith("|"), name.strip("| ")
        factor = F64(-1 if sign else 1)
        if name[0] not in "RU":
            value = factor * F64(float(name))
            return lambda: np.full(self.lanes, value)
        raw = self._pair(name)

        def read() -> np.ndarray:
            value = raw().view(F64)
            value = np.abs(value) if absolute else value
            return np.negative(value) if sign else value

        return read

    def _pair(self, name: str) -> Read:
        """64 bits of two registers."""
        if name in ("RZ", "URZ"):
            return lambda: np.zeros(self.lanes, U64)
        if name[0] == "-":
            positive = self._pair(name[1:])
            return lambda: ~positive() + U64(1)
        number = int(name.lstrip("UR").split(".")[0])
        if name[0] == "U":
            low, high = (self._raw(f"UR{number + i}") for i in (0, 1))
        else:
            low, high = (self._raw(f"R{number + i}") for i in (0, 1))
        return lambda: low().astype(U64) | high().astype(U64) << U64(32)

    def _predicate(self, text: str) -> Read:
        negated, name = text.startswith("!"), text.lstrip("!")
        number = 7 if name.endswith("T") else int(name.lstrip("UP"))
        if name[0] == "U":
            read: Read = lambda: self.uniform_predicates[number]  # noqa: E731
        else:
            read = lambda: self.predicates[number]  # noqa: E731
        return (lambda: ~read()) if negated else read

    def _write(self, name: str, values: np.ndarray, active: Lanes) -> None:
        if name in ("RZ", "URZ"):
            return
        bits = values if values.dtype == U32 else (values.astype(U64) & LOW).astype(U32)
        if name[0] == "U":
            self._write_uniform(self.uniform[int(name[2:])], bits, active)
        else:
            self.registers[int(name[1:])][active] = bits[active]

    def _write_pair(self, name: str, values: np.ndarray, active: Lanes) -> None:
        if name not in ("RZ", "URZ"):
            file, number = name.rstrip("0123456789"), int(name.lstrip("UR"))
            self._write(f"{file}{number}", values & LOW, active)
            self._write(f"{file}{number + 1}", values >> U64(32), active)

    def _write_float(self, name: str, values: np.ndarray, active: Lanes, flush: bool) -> None:
        bits = canonical(values.astype(F32, copy=False).view(U32))
        self._write(name, flushed(bits) if flush else bits, active)

    def _write_double(self, name: str, values: np.ndarray, active: Lanes) -> None:
        bits = np.where(np.isnan(values), DOUBLE_NAN, values.view(U64))
        self._write_pair(name, bits, active)

    def _write_predicate(self, name: str, values: np.ndarray, active: Lanes) -> None:
        if name in ("PT", "UPT"):
            return
        if name[0] == "U":
            self._write_uniform(self.uniform_predicates[int(name[2:])], values, active)
        else:
            self.predicates[int(name[1:])][active] = values[active]

    @staticmethod
    def _write_uniform(to: np.ndarray, values: np.ndarray, active: Lanes) -> None:
        """Of each warp that is active, the value that its active lanes agree on."""
        of_warps, chosen = active.reshape(-1, WARP), values.reshape(-1, WARP)
        warps = of_warps.any(1)
        common = chosen[np.arange(len(chosen)), of_warps.argmax(1)]
        agree = (chosen == common[:, None]) | ~of_warps
        assert agree.all(), "lanes do not agree on a uniform value"
        to.reshape(-1, WARP)[warps] = common[warps, None]

    def _split(self, operands: Sequence[str]) -> tuple[str, list[str], list[str]]:
        """The register that is written, the predicates that are, and what is read."""
        rest = [*operands[1:]]
        predicates = []
        while re.fullmatch(r"U?P(\d|T)", rest[0]):
            predicates.append(rest.pop(0))
        return operands[0], predicates, rest

    # -- control ------------------------------------------------------------------------------

    def _bra(self, i: Instruction) -> Run:
        if "DIV" in i.opcode:  # taken where lanes of a warp have parted before a shuffle
            mask = self._integer(i.operands[0])

            def run_never(active: Lanes) -> None:
                assert (mask()[active] == LOW).all(), "a shuffle is not of a whole warp"

            return run_never
        target = self.place_of[int(i.operands[-1], 16)]
        condition = self._predicate(i.operands[0]) if len(i.operands) == 2 else None
        if "U" in i.opcode and condition is None:

            def run_whole(active: Lanes) -> None:
                """By warps that it takes whole: behind it stands the branch for others."""
                left = (self.issued & ~active).reshape(-1, WARP).any(1)
                self.next[active & ~left.repeat(WARP)] = target

            return run_whole

        def run(active: Lanes) -> None:
            self.next[active if condition is None else active & condition()] = target

        return run

    def _exit(self, i: Instruction) -> Run:
        def run(active: Lanes) -> None:
            self.done |= active
            for barrier in np.unique(self.waits_at[self.waits_at >= 0]):
                if barrier < len(self.barriers):
                    self._release(int(barrier))

        return run

    def _bssy(self, i: Instruction) -> Run:
        barrier = int(i.operands[0][1:])

        def run(active: Lanes) -> None:
            self.barriers[barrier] |= active

        return run

    def _bsync(self, i: Instruction) -> Run:
        barrier = int(i.operands[0][1:])

        def run(active: Lanes) -> None:
            self.waits_at[active] = barrier
            self._release(barrier)

        return run

    def _break(self, i: Instruction) -> Run:
        """Lanes that leave a loop are no longer waited for behind it."""
        barrier = int(i.operands[-1][1:])

        def run(active: Lanes) -> None:
            self.barriers[barrier] &= ~active
            self._release(barrier)

        return run

    @staticmethod
    def _assert_whole(active: Lanes) -> None:
        """Lanes ask each other."""
        of_warps = active.reshape(-1, WARP)
        assert (of_warps.all(1) | ~of_warps.any(1)).all(), "lanes of a warp have parted"

    def _vote(self, i: Instruction) -> Run:
        *to, asked = i.operands
        condition = self._predicate(asked)

        def run(active: Lanes) -> None:
            self._assert_whole(active)
            of_warps = (condition() & active).reshape(-1, WARP)
            if i.opcode[1] == "ANY":
                found = of_warps.any(1)
            else:
                found = (of_warps | ~active.reshape(-1, WARP)).all(1)
            bits = (of_warps.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1)
            for name in to:
                if "P" in name:
                    self._write_predicate(name, found.repeat(WARP), active)
                else:
                    self._write(name, bits.astype(U32).repeat(WARP), active)

        return run

    _voteu = _vote

    def _warpsync(self, i: Instruction) -> Run:
        assert i.opcode[1] == "ALL", str(i)

        def run(active: Lanes) -> None:
            self.waits_at[active] = WHOLE_WARP
            waits = (self.waits_at == WHOLE_WARP) | self.done
            self.waits_at[waits.reshape(-1, WARP).all(1).repeat(WARP)] = -1

        return run

    def _bar(self, i: Instruction) -> Run:
        assert i.opcode[1] == "SYNC" and i.operands == ("0x0",), str(i)

        def run(active: Lanes) -> None:
            self.waits_at[active] = WHOLE_BLOCK
            waits = (self.waits_at == WHOLE_BLOCK) | self.done
            self.waits_at[waits.reshape(-1, THREADS).all(1).repeat(THREADS)] = -1

        return run

    def _nop(self, i: Instruction) -> Run:
        return lambda active: None

    # Nothing is held back from others here.
    _membar = _errbar = _cgaerrbar = _cctl = _nop

    def _release(self, barrier: int) -> None:
        """Let lanes go on that wait, where all do that have to come."""
        expected = self.barriers[barrier] & ~self.done
        if (self.waits_at[expected] == barrier).all():
            self.waits_at[expected] = -1
            self.barriers[barrier] = False

    def _one_warp(self, ready: Lanes) -> Lanes:
        """The one that ran before, until it cannot go on; then any other one."""
        of_warps = ready.reshape(-1, WARP).any(1)
        if not of_warps[self._warp]:
            self._warp = int(self._random.choice(np.flatnonzero(of_warps)))
        chosen = np.zeros_like(ready)
        chosen.reshape(-1, WARP)[self._warp] = True
        return ready & chosen

    def _release_warps(self) -> Lanes:
        """Those whose own warp has arrived. In hardware no warp waits for another one here; in the
        emulator they do while they can, so that more lanes take an instruction together."""
        for barrier in range(len(self.barriers)):
            expected = self.barriers[barrier] & ~self.done
            waits = (self.waits_at == barrier) | ~expected
            of_warp = waits.reshape(-1, WARP).all(1).repeat(WARP)
            self.waits_at[expected & of_warp] = -1
            self.barriers[barrier] &= ~of_warp
        ready: Lanes = ~self.done & (self.waits_at < 0)
        assert ready.any(), "lanes wait for each other"
        return ready

    def _call(self, i: Instruction) -> Run:
        target = self.place_of[int(i.operands[0], 16)]

        def run(active: Lanes) -> None:
            self.next[active] = target

        return run

    def _ret(self, i: Instruction) -> Run:
        back = self._raw(i.operands[0].split()[0])

        def run(active: Lanes) -> None:
            self.next[active] = [self.place_of[int(address)] for address in back()[active]]

        return run

    # -- moves --------------------------------------------------------------------------------

    def _mov(self, i: Instruction) -> Run:
        value = self._integer(i.operands[1])
        return lambda active: self._write(i.operands[0], value(), active)

    _r2ur = _mov

    def _s2r(self, i: Instruction) -> Run:
        lane = np.arange(self.lanes, dtype=U32)
        values = {
            "SR_TID.X": lambda: lane % U32(THREADS),
            "SR_LANEID": lambda: lane % U32(WARP),
            "SR_CTAID.X": lambda: U32(self.first) + lane // U32(THREADS),
            "SR_CgaCtaId": lambda: np.zeros(self.lanes, U32),
        }
        value = values[i.operands[1]]
        return lambda active: self._write(i.operands[0], value(), active)

    _s2ur = _s2r

    def _cs2r(self, i: Instruction) -> Run:
        assert i.operands[1] == "SRZ" and len(i.opcode) == 1, str(i)
        return lambda active: self._write_pair(i.operands[0], np.zeros(self.lanes, U64), active)

    def _ldc(self, i: Instruction) -> Run:
        size = {"64": 8, "128": 16, "U8": 1, "U16": 2}.get(i.opcode[-1], 4)
        value, to = self._constant(i.operands[1], size), i.operands[0]
        prefix, number = to.rstrip("0123456789"), int(re.sub(r"\D", "", to))

        def run(active: Lanes) -> None:
            found = value()
            for k, word in enumerate(found if size > 4 else [found]):
                self._write(f"{prefix}{number + k}", word, active)

        return run

    _ldcu = _ldc

    def _addresses(self, text: str) -> Read:
        match = re.fullmatch(r"desc\[UR\d+\]\[(R\d+)\.64\+?(-?0x[0-9a-f]+)?\]", text)
        assert match is not None, text
        base, offset = self._pair(match[1]), U64(int(match[2] or "0", 16) & (2**64 - 1))
        return lambda: base() + offset

    @staticmethod
    def _size(i: Instruction) -> int:
        return {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(i.opcode[-1], 4)

    def _ldg(self, i: Instruction) -> Run:
        addresses, size, number = self._addresses(i.operands[1]), self._size(i), i.operands[0][1:]
        signed = i.opcode[-1] in ("S8", "S16")
        dtype = np.dtype(f"{'i' if signed else 'u'}{min(size, 4)}")

        return self._load(number, dtype, lambda active: self.memory.load(addresses()[active], size))

    def _load(self, number: str, dtype: np.dtype, read: Callable[[Lanes], np.ndarray]) -> Run:
        """Into registers from this one on; read() gives the bytes of each lane."""

        def run(active: Lanes) -> None:
            words = read(active).view(dtype).astype(np.int64).astype(U64).astype(U32)
            for k in range(words.shape[1]):
                self.registers[int(number) + k][active] = words[:, k]

        return run

    def _stg(self, i: Instruction) -> Run:
        addresses, bytes_of = self._addresses(i.operands[0]), self._stored(i)
        return lambda active: self.memory.store(addresses()[active], bytes_of(active))

    def _stored(self, i: Instruction) -> Callable[[Lanes], np.ndarray]:
        """The bytes that each lane stores."""
        size, name = self._size(i), i.operands[1]
        count = max(1, size // 4)
        names = ["RZ"] * count if name == "RZ" else [f"R{int(name[1:]) + k}" for k in range(count)]
        words = [self._raw(each) for each in names]

        def read(active: Lanes) -> np.ndarray:
            values = np.stack([word()[active] for word in words], 1)
            found: np.ndarray = values.view(np.uint8)[:, :size]
            return found

        return read

    def _shared_places(self, text: str, size: int) -> Callable[[Lanes], np.ndarray]:
        """Of the bytes of each lane, in one array of all blocks' shared memory."""
        match = re.fullmatch(r"\[(U?R\w+)\+?(-?0x[0-9a-f]+)?\]", text)
        assert match is not None, text
        base, offset = self._raw(match[1]), int(match[2] or "0", 16)
        blocks, size_of_all = np.arange(self.lanes) // THREADS, self.shared.shape[1]

        def read(active: Lanes) -> np.ndarray:
            places = (base().astype(np.int64) + offset)[active]
            assert not (places % size).any(), "an address of shared memory is misaligned"
            inside = (places >= RESERVED) & (places + size <= size_of_all)
            assert inside.all(), "out of the bounds of shared memory"
            of_all: np.ndarray = (blocks[active] * size_of_all + places)[:, None] + np.arange(size)
            return of_all

        return read

    def _lds(self, i: Instruction) -> Run:
        assert i.opcode[-1] not in ("S8", "S16"), str(i)
        size, number = self._size(i), i.operands[0][1:]
        places, memory = self._shared_places(i.operands[1], size), self.shared.reshape(-1)
        return self._load(
            number, np.dtype(f"u{min(size, 4)}"), lambda active: memory[places(active)]
        )

    def _sts(self, i: Instruction) -> Run:
        places, memory = self._shared_places(i.operands[0], self._size(i)), self.shared.reshape(-1)
        bytes_of = self._stored(i)

        def run(active: Lanes) -> None:
            memory[places(active)] = bytes_of(active)

        return run

    def _atomg(self, i: Instruction) -> Run:
        assert i.opcode == ("ATOMG", "E", "ADD", "STRONG", "GPU"), str(i)
        addresses, added = self._addresses(i.operands[2]), self._raw(i.operands[3])
        to = int(i.operands[1][1:])

        def run(active: Lanes) -> None:
            where, by = addresses(), added()
            for lane in np.flatnonzero(active):
                one = where[lane : lane + 1]
                old = self.memory.load(one, 4).view(U32)[0, 0]
                self.memory.store(one, (old + by[lane : lane + 1]).view(np.uint8)[None])
                self.registers[to, lane] = old

        return run

    def _write_sum(
        self,
        to: str,
        carries: Sequence[str],
        total: np.ndarray,
        carried: Sequence[Read],
        active: Lanes,
    ) -> None:
        """A sum and what was carried into it; whether it carries at least one, two out."""
        for carry in carried:
            total = total + carry().astype(U64)
        self._write(to, total, active)
        for number, name in enumerate(carries):
            self._write_predicate(name, total >> U64(32) > U64(number), active)

    # -- integers -----------------------------------------------------------------------------

    def _iadd3(self, i: Instruction) -> Run:
        to, carries, rest = self._split(i.operands)
        extended = "X" in i.opcode
        values = [self._integer(text, not extended) for text in rest[:3]]
        carried = [self._predicate(text) for text in rest[3:]] if extended else []

        def run(active: Lanes) -> None:
            total = sum((value() for value in values), np.zeros(self.lanes, U64))
            self._write_sum(to, carries, total, carried, active)

        return run

    def _viadd(self, i: Instruction) -> Run:
        a, b = (self._integer(text) for text in i.operands[1:])
        return lambda active: self._write(i.operands[0], a() + b(), active)

    def _imad(self, i: Instruction) -> Run:
        to, carries, rest = self._split(i.operands)
        a, b = self._integer(rest[0]), self._integer(rest[1])
        wide = "WIDE" in i.opcode
        if wide or "HI" in i.opcode:
            signed = "U32" not in i.opcode
            assert "X" not in i.opcode and not (signed and (carries or not wide)), str(i)
            c = self._pair(rest[2])

            def extended(value: np.ndarray) -> np.ndarray:
                return value | (value >> U64(31)) * ~LOW if signed else value

            def run_wide(active: Lanes) -> None:
                product = extended(a()) * extended(b())
                total = product + c()
                for name in carries:
                    self._write_predicate(name, total < product, active)
                if wide:
                    self._write_pair(to, total, active)
                else:
                    self._write(to, total >> U64(32), active)

            return run_wide
        c = self._integer(rest[2])
        carry = self._predicate(rest[3]) if "X" in i.opcode else None

        def run(active: Lanes) -> None:
            self._write_sum(to, carries, a() * b() + c(), [carry] if carry else [], active)

        return run

    def _lea(self, i: Instruction) -> Run:
        to, carries, rest = self._split(i.operands)
        added = self._integer(rest[1], "HI" not in i.opcode)
        carry: Read | None = None
        if "HI" in i.opcode:
            low = self._integer(rest[0])
            signed = "SX32" in i.opcode
            shift = U64(32 - int(rest[2 if signed else 3], 16))
            high = None if signed else self._integer(rest[2])
            if "X" in i.opcode:
                carry = self._predicate(rest[3 if signed else 4])

            def shifted() -> np.ndarray:
                bits = low()
                above = high() if high is not None else np.where(bits >> U64(31), LOW, U64(0))
                return ((above << U64(32) | bits) >> shift) & LOW
        else:
            left, is_negative = U64(int(rest[2], 16)), rest[0][0] == "-"
            value = self._integer(rest[0].removeprefix("-"))

            def shifted() -> np.ndarray:
                bits = (value() << left) & LOW
                return U64(1 << 32) - bits if is_negative else bits  # also of zero: it carries

        def run(active: Lanes) -> None:
            self._write_sum(to, carries, shifted() + added(), [carry] if carry else [], active)

        return run

    def _shf(self, i: Instruction) -> Run:
        to, low, by, high = i.operands[0], *(self._integer(text) for text in i.operands[1:])
        _, direction, kind, *rest = i.opcode
        takes_high, is_wide = "HI" in rest, kind in ("U64", "S64")
        assert is_wide or kind in ("U32", "S32"), str(i)
        assert not (kind == "S64" and takes_high), str(i)

        def run(active: Lanes) -> None:
            shift, below, above = by(), low(), high()
            wide = above << U64(32) | below
            within = np.minimum(shift, U64(31))
            if direction == "L" and not takes_high:
                found = np.where(shift < U64(32), below << within, U64(0))
            elif direction == "L" or is_wide:
                # Within 32 bits, no sign is shifted in.
                assert (shift[active] < U64(64 if kind == "U64" else 32)).all()
                found = wide << within >> U64(32) if direction == "L" else wide >> shift
            elif kind == "S32":
                signed = above.astype(U32).view(I32) >> within.astype(I32)
                found = signed.view(U32).astype(U64)
            else:
                found = np.where(shift < U64(32), above >> within, U64(0))
            self._write(to, found, active)

        return run

    def _lop3(self, i: Instruction) -> Run:
        operands = [*i.operands]
        result = operands.pop(0) if operands[0].startswith(("P", "UP")) else None
        to, table = operands[0], int(operands[4], 16)
        inputs = [self._integer(text) for text in operands[1:4]]
        before = self._predicate(operands[5]) if len(operands) > 5 else None

        def run(active: Lanes) -> None:
            values = [value().astype(U32) for value in inputs]
            found = np.zeros(self.lanes, U32)
            for row in range(8):
                if table >> row & 1:
                    bits = [v if row >> 2 - k & 1 else ~v for k, v in enumerate(values)]
                    found |= bits[0] & bits[1] & bits[2]
            self._write(to, found, active)
            if result is not None:
                any_bit = found != 0 if before is None else (found != 0) | before()
                self._write_predicate(result, any_bit, active)

        return run

    def _plop3(self, i: Instruction) -> Run:
        inputs = [self._predicate(text) for text in i.operands[2:5]]
        outputs = list(zip(i.operands[:2], (int(t, 16) for t in i.operands[5:7]), strict=True))

        def run(active: Lanes) -> None:
            a, b, c = (value().astype(np.int64) for value in inputs)
            row = 4 * a + 2 * b + c
            for name, table in outputs:
                self._write_predicate(name, (table >> row & 1).astype(bool), active)

        return run

    def _prmt(self, i: Instruction) -> Run:
        assert len(i.opcode) == 1, str(i)
        low, selector, high = (self._integer(text) for text in i.operands[1:])

        def run(active: Lanes) -> None:
            wide, chosen, found = high() << U64(32) | low(), selector(), np.zeros(self.lanes, U64)
            for k in range(4):
                which = chosen >> U64(4 * k) & U64(15)
                byte = wide >> (which & U64(7)) * U64(8) & U64(255)
                sign = np.where(byte >> U64(7), U64(255), U64(0))
                found |= np.where(which & U64(8), sign, byte) << U64(8 * k)
            self._write(i.operands[0], found, active)

        return run

    def _select(self, i: Instruction, read: Callable[[str], Read]) -> Run:
        a, b, which = read(i.operands[1]), read(i.operands[2]), self._predicate(i.operands[3])
        return lambda active: self._write(i.operands[0], np.where(which(), a(), b()), active)

    def _sel(self, i: Instruction) -> Run:
        return self._select(i, self._integer)

    def _fsel(self, i: Instruction) -> Run:
        return self._select(i, self._float)

    def _set_predicate(self, i: Instruction, result: Read) -> Run:
        combined = self._predicate(i.operands[4])
        both = "AND" in i.opcode
        assert i.operands[1] in ("PT", "UPT"), str(i)

        def run(active: Lanes) -> None:
            found = result() & combined() if both else result() | combined()
            self._write_predicate(i.operands[0], found, active)

        return run

    def _isetp(self, i: Instruction) -> Run:
        a, b = (self._integer(text) for text in i.operands[2:4])
        name, signed = i.opcode[1], "U32" not in i.opcode
        compare = COMPARISONS[name]
        below = self._predicate(i.operands[5]) if "EX" in i.opcode else None

        def result() -> np.ndarray:
            x, y = a().astype(U32), b().astype(U32)
            if signed:
                x, y = x.view(I32), y.view(I32)
            if below is None:
                return compare(x, y)
            # Of numbers of 64 bits, of which the lower halves have been compared.
            if name in ("EQ", "NE"):
                return (x == y) & below() if name == "EQ" else (x != y) | below()
            strictly = COMPARISONS[name[0] + "T"](x, y)
            return strictly | (x == y) & below()

        return self._set_predicate(i, result)

    def _extreme(self, i: Instruction, added: int) -> Run:
        """The smaller or larger of some numbers; of the first ones, the sum."""
        to, _, rest = self._split(i.operands)
        *texts, which = rest
        values = [self._integer(text) for text in texts]
        choose = np.maximum if which == "!PT" else np.minimum
        signed = "U32" not in i.opcode

        def run(active: Lanes) -> None:
            found = [value() for value in values]
            total = sum(found[:added], np.zeros(self.lanes, U64))
            terms = [(each & LOW).astype(U32) for each in [total, *found[added:]]]
            if signed:
                terms = [each.view(I32) for each in terms]
            best = terms[0]
            for each in terms[1:]:
                best = choose(best, each)
            self._write(to, best.view(U32), active)

        return run

    def _vimnmx(self, i: Instruction) -> Run:
        return self._extreme(i, 1)

    _vimnmx3 = _vimnmx

    def _viaddmnmx(self, i: Instruction) -> Run:
        return self._extreme(i, 2)

    def _brev(self, i: Instruction) -> Run:
        value = self._integer(i.operands[1])

        def run(active: Lanes) -> None:
            bits = value().astype(U32)
            found = np.zeros(self.lanes, U32)
            for k in range(32):
                found |= (bits >> U32(k) & U32(1)) << U32(31 - k)
            self._write(i.operands[0], found, active)

        return run

    def _p2r(self, i: Instruction) -> Run:
        mask = self._integer(i.operands[3])
        of = i.operands[1].removesuffix("R")  # of the lane, or of the warp
        predicates = [self._predicate(f"{of}{k}") for k in range(7)]

        def run(active: Lanes) -> None:
            found = np.zeros(self.lanes, U64)
            for k, predicate in enumerate(predicates):
                found |= predicate().astype(U64) << U64(k)
            self._write(i.operands[0], found & mask(), active)

        return run

    _up2ur = _p2r

    def _shfl(self, i: Instruction) -> Run:
        """From the lane so far away, or the one of that number."""
        is_distance = i.opcode[1] == "BFLY"
        assert is_distance or i.opcode[1] == "IDX", str(i)
        _, to, value, given = (*i.operands[:2], *map(self._integer, i.operands[2:4]))
        lanes = np.arange(self.lanes)

        def run(active: Lanes) -> None:
            self._assert_whole(active)
            numbers = np.unique(given()[active])
            assert len(numbers) == 1 and i.operands[4] == "0x1f", str(i)
            number = int(numbers[0])
            other = lanes ^ number if is_distance else lanes // WARP * WARP + number % WARP
            self._write(to, value()[other], active)
            self._write_predicate(i.operands[0], np.ones(self.lanes, bool), active)

        return run

    # -- floating point -----------------------------------------------------------------------

    def _floats(self, i: Instruction, texts: Sequence[str]) -> list[Read]:
        reads = [self._float(text) for text in texts]
        if "FTZ" in i.opcode:
            return [lambda read=read: flushed(read()).view(F32) for read in reads]
        return [lambda read=read: read().view(F32) for read in reads]

    def _fadd(self, i: Instruction) -> Run:
        a, b = self._floats(i, i.operands[1:])
        flush, mode = "FTZ" in i.opcode, self._rounding(i)
        if mode != 0:
            one = np.ones(self.lanes, F32)
            return lambda active: self._write_float(
                i.operands[0], self.api.fma(a(), one, b(), mode), active, flush
            )
        return lambda active: self._write_float(i.operands[0], a() + b(), active, flush)

    def _fmul(self, i: Instruction) -> Run:
        a, b = self._floats(i, i.operands[1:])
        flush = "FTZ" in i.opcode
        return lambda active: self._write_float(i.operands[0], a() * b(), active, flush)

    def _rounding(self, i: Instruction) -> int:
        return next((ROUNDINGS[name] for name in i.opcode if name in ROUNDINGS), 0)

    def _ffma(self, i: Instruction) -> Run:
        inputs, mode = self._floats(i, i.operands[1:]), self._rounding(i)
        flush = "FTZ" in i.opcode

        def run(active: Lanes) -> None:
            found = self.api.fma(*(value() for value in inputs), mode)
            self._write_float(i.operands[0], found, active, flush)

        return run

    def _hfma2(self, i: Instruction) -> Run:
        """A way to load two halves."""
        assert i.operands[1:3] == ("-RZ", "RZ"), str(i)
        high, low = (int(np.float16(float(text)).view(np.uint16)) for text in i.operands[3:5])
        value = np.full(self.lanes, high << 16 | low, U32)
        return lambda active: self._write(i.operands[0], value, active)

    def _f2fp(self, i: Instruction) -> Run:
        """Two bfloat16 or float16, rounded to nearest; any NaN becomes one of them."""
        assert i.opcode[1] in ("BF16", "F16") and i.opcode[2:] == ("F32", "PACK_AB"), str(i)
        high, low = (self._float(text) for text in i.operands[1:])

        def rounded(bits: np.ndarray) -> np.ndarray:
            values = bits.view(F32)
            if i.opcode[1] == "F16":
                narrow = values.astype(np.float16).view(np.uint16).astype(U32)
            else:
                narrow = (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)
            return np.where(np.isnan(values), U32(0x7FFF), narrow)

        def run(active: Lanes) -> None:
            self._write(i.operands[0], rounded(high()) << U32(16) | rounded(low()), active)

        return run

    def _hadd2(self, i: Instruction) -> Run:
        """A way to widen a half."""
        assert i.opcode[1:] == ("F32",) and i.operands[1] == "-RZ", str(i)
        match = re.fullmatch(r"(R\d+)\.H([01])_H\2", i.operands[2])
        assert match is not None, str(i)
        raw, shift = self._raw(match[1]), U32(16 * int(match[2]))

        def run(active: Lanes) -> None:
            half = (raw() >> shift).astype(np.uint16).view(np.float16)
            self._write_float(i.operands[0], half.astype(F32), active, False)

        return run

    def _float_comparison(self, name: str, a: Read, b: Read) -> Read:
        def result() -> np.ndarray:
            x, y = a(), b()
            unordered = np.isnan(x) | np.isnan(y)
            if name in ("NAN", "NUM"):
                return unordered if name == "NAN" else ~unordered
            found: np.ndarray = COMPARISONS[name[:2]](x, y)
            return found | unordered if name.endswith("U") else found & ~unordered

        return result

    def _fsetp(self, i: Instruction) -> Run:
        a, b = self._floats(i, i.operands[2:4])
        return self._set_predicate(i, self._float_comparison(i.opcode[1], a, b))

    def _fset(self, i: Instruction) -> Run:
        """1 where the comparison holds, else 0."""
        assert i.opcode[1] == "BF" and "AND" in i.opcode, str(i)
        a, b = self._floats(i, i.operands[1:3])
        compare, combined = (
            self._float_comparison(i.opcode[2], a, b),
            self._predicate(i.operands[3]),
        )

        def run(active: Lanes) -> None:
            found = (compare() & combined()).astype(F32)
            self._write_float(i.operands[0], found, active, False)

        return run

    def _dsetp(self, i: Instruction) -> Run:
        a, b = (self._double(text) for text in i.operands[2:4])
        if i.opcode[1] == "MAX":
            return self._larger(i, a, b)
        return self._set_predicate(i, self._float_comparison(i.opcode[1], a, b))

    def _larger(self, i: Instruction, a: Read, b: Read) -> Run:
        """Whether the first one is the maximum, and whether that is to become a NaN. Known where
        the second one is none, which then is not."""
        assert i.opcode[2] == "AND" and i.operands[4] == "PT", str(i)

        def run(active: Lanes) -> None:
            x, y = a(), b()
            assert not np.isnan(y[active]).any(), "the maximum of anything and NaN is not known"
            self._write_predicate(i.operands[0], x > y, active)
            self._write_predicate(i.operands[1], np.zeros(self.lanes, bool), active)

        return run

    def _fmnmx(self, i: Instruction) -> Run:
        """A NaN wins only where that is asked for. A zero of either sign is none of theirs."""
        first, *others = self._floats(i, i.operands[1:-1])
        is_maximum = i.operands[-1] == "!PT"
        if "NAN" in i.opcode:
            choose = np.maximum if is_maximum else np.minimum
        else:
            choose = np.fmax if is_maximum else np.fmin

        def run(active: Lanes) -> None:
            found = first()
            for other in others:
                found = choose(found, other())
            self._write_float(i.operands[0], found, active, False)

        return run

    _fmnmx3 = _fmnmx

    def _moved(self, bits: np.ndarray, finite: np.ndarray) -> np.ndarray:
        by = self._random.integers(-self.ulps, self.ulps + 1, self.lanes)
        return np.where(finite, (bits.astype(np.int64) + by).astype(U32), bits)

    def _mufu(self, i: Instruction) -> Run:
        work = {"RCP": np.reciprocal, "RSQ": lambda x: 1 / np.sqrt(x)}[i.opcode[1][:3]]
        if i.opcode[1].endswith("64H"):
            high = self._raw(i.operands[1])

            def run_double(active: Lanes) -> None:
                found = work((high().astype(U64) << U64(32)).view(F64))
                bits = (found.view(U64) >> U64(32)).astype(U32)
                finite = np.isfinite(found) & (np.abs(found) > 1e-300) & (np.abs(found) < 1e300)
                self._write(i.operands[0], self._moved(bits, finite), active)

            return run_double
        value = self._float(i.operands[1])
        operands = HARDEST_ROOTS if i.opcode[1].startswith("RSQ") else HARDEST_DIVISORS
        # A mantissa and, of roots, the lowest bit of the exponent.
        mask = U32(0xFFFFFF if i.opcode[1].startswith("RSQ") else 0x7FFFFF)
        hardest = np.array([float.fromhex(text) for text in operands], F32).view(U32) & mask

        def run(active: Lanes) -> None:
            operand = flushed(value())
            found = work(operand.view(F32).astype(F64)).astype(F32)
            moves = np.isfinite(found) & (np.abs(found) > F32(2e-38)) & (np.abs(found) < F32(3e38))
            moves &= ~np.isin(operand & mask, hardest)
            bits = self._moved(found.view(U32), moves)
            self._write(i.operands[0], canonical(bits), active)

        return run

    def _fchk(self, i: Instruction) -> Run:
        a, b = (self._float(text) for text in i.operands[1:])

        def run(active: Lanes) -> None:
            of_a, of_b = ((each() >> U32(23) & U32(255)).astype(np.int64) for each in (a, b))
            apart = np.abs(of_a - of_b) >= 126
            slow = (of_b == 0) | (of_b >= 253) | (of_a == 255) | (of_a <= 24) | apart
            self._write_predicate(i.operands[0], slow, active)

        return run

    def _i2fp(self, i: Instruction) -> Run:
        value, signed = self._integer(i.operands[1]), "S32" in i.opcode

        def run(active: Lanes) -> None:
            bits = value().astype(U32)
            found = (bits.view(I32) if signed else bits).astype(F32)
            self._write_float(i.operands[0], found, active, False)

        return run

    def _i2f(self, i: Instruction) -> Run:
        if i.opcode[1] == "F64":
            wide, unsigned = i.opcode[2:] == ("S64",), i.opcode[2:] == ("U32",)
            assert wide or unsigned or i.opcode[2:] == (), str(i)
            raw = self._pair(i.operands[1]) if wide else self._integer(i.operands[1])

            def run_double(active: Lanes) -> None:
                found = raw().view(np.int64) if wide else raw().astype(U32)
                found = found if wide or unsigned else found.view(I32)
                self._write_double(i.operands[0], found.astype(F64), active)

            return run_double
        narrow, wide, upwards = ("U16" in i.opcode, "U64" in i.opcode, "RP" in i.opcode)
        value = (self._pair if wide else self._integer)(i.operands[1])
        assert narrow or wide or "U32" in i.opcode, str(i)

        def run(active: Lanes) -> None:
            exact = value() & U64(0xFFFF) if narrow else value()
            found = exact.astype(F32)
            if upwards:
                whole = np.minimum(found, F32(2.0**63)).astype(U64)
                less = np.where(found < F32(2.0**63), whole < exact, False)
                assert (exact[active] <= U64(2**63)).all(), str(i)
                found = np.where(less, np.nextafter(found, F32(np.inf)), found)
            self._write_float(i.operands[0], found, active, False)

        return run

    def _f2i(self, i: Instruction) -> Run:
        if i.opcode[1:3] == ("S64", "F64"):
            wide = self._double(i.operands[1])

            def run_double(active: Lanes) -> None:
                found = np.trunc(wide())
                assert (np.abs(found[active]) < 2.0**63).all(), "more than 64 bits have"
                self._write_pair(i.operands[0], found.astype(np.int64).view(U64), active)

            assert "TRUNC" in i.opcode, str(i)
            return run_double
        (value,) = self._floats(i, i.operands[1:])
        assert "TRUNC" in i.opcode, str(i)
        if "U64" in i.opcode:

            def run_wide(active: Lanes) -> None:
                found = value()
                assert ((found >= 0) & (found < F32(2.0**64)))[active].all(), "no 64 bits have that"
                self._write_pair(i.operands[0], found.astype(U64), active)

            return run_wide
        low, high = (0, 2**32 - 1) if "U32" in i.opcode else (-(2**31), 2**31 - 1)

        def run(active: Lanes) -> None:
            exact = value().astype(F64)
            whole = np.where(np.isnan(exact), 0, np.clip(np.trunc(exact), low, high))
            self._write(i.operands[0], whole.astype(np.int64).view(U64), active)

        return run

    def _f2f(self, i: Instruction) -> Run:
        if i.opcode[1:] == ("F32", "F64"):
            wide = self._double(i.operands[1])
            return lambda active: self._write_float(
                i.operands[0], wide().astype(F32), active, False
            )
        assert i.opcode[1:] == ("F64", "F32"), str(i)
        (value,) = self._floats(i, i.operands[1:])
        return lambda active: self._write_double(i.operands[0], value().astype(F64), active)

    def _dadd(self, i: Instruction) -> Run:
        a, b = (self._double(text) for text in i.operands[1:])
        return lambda active: self._write_double(i.operands[0], a() + b(), active)

    def _dmul(self, i: Instruction) -> Run:
        a, b = (self._double(text) for text in i.operands[1:])
        mode, zero = self._rounding(i), np.full(self.lanes, -0.0)

        def run(active: Lanes) -> None:
            found = self.api.fma(a(), b(), zero, mode) if mode else a() * b()
            self._write_double(i.operands[0], found, active)

        return run

    def _dfma(self, i: Instruction) -> Run:
        inputs, mode = [self._double(text) for text in i.operands[1:]], self._rounding(i)

        def run(active: Lanes) -> None:
            found = self.api.fma(*(value() for value in inputs), mode)
            self._write_double(i.operands[0], found, active)

        return run


class Machine:
    """The kernels of one architecture."""

    def __init__(
        self, kernels: Mapping[str, Sequence[Instruction]], arch: str, api: MachineApi
    ) -> None:
        self.arch, self.api = arch, api
        self._kept: dict[tuple[Key, int], Blocks] = {}  # the last one was used last
        self.code: dict[Key, Sequence[Instruction]] = {}
        self.symbols: dict[Key, str] = {}
        numbers = {name: number for number, name in enumerate(api.kernel_names())}
        formats = {name: number for number, name in enumerate(api.state_formats())}
        rules = {name: number for number, name in enumerate(api.rules())}
        for symbol, code in kernels.items():
            name = api.demangle(symbol)
            match = KERNEL.search(name)
            if NORM_KERNEL.search(name):
                key = NORM, 0
            elif TOTAL_KERNEL.search(name):
                key = TOTAL, 0
            elif measures := MEASURE_KERNEL.search(name):
                key = MEASURE + numbers[measures["types"]], 0
            elif prepares := PREPARE_KERNEL.search(name):
                key = PREPARE, rules[prepares["rule"]]
            elif of_loss := LOSS_KERNEL.search(name):
                element, is_wide = of_loss["element"], (of_loss["width"] or "1") != "1"
                member = ELEMENTS.index(element) if element else 0
                key = LOSS_KERNELS[of_loss["name"]], member + is_wide * len(ELEMENTS)
            elif match is None:
                continue
            elif match["coded"] is None:
                key = numbers[match["types"]], 0
            else:
                key = numbers[f"{match['variant']}, {CODED}"], formats[match["format"]]
            self.code[key], self.symbols[key] = code, symbol
        self.executed: dict[Key, set[int]] = {key: set() for key in self.code}

    def step(
        self,
        spans: np.ndarray,
        rows: np.ndarray,
        memory: Memory,
        *,
        blocks: int | None = None,
        rows_in_memory: bool = False,
        control: np.ndarray | None = None,
        watch: Watch | None = None,
    ) -> None:
        """A step over these spans, in place.

        Args:
            memory: all that it may touch.
            blocks: of each launch; None: as many as there are chunks.
            rows_in_memory: of the device, rather than in the argument.
            control: in the memory of the device, too.
            watch: told of each instruction.
        """
        for launch in self.api.launches(spans, rows, rows_in_memory, control):
            self.run(launch, memory, blocks, watch)

    def measured_step(
        self,
        spans: np.ndarray,
        rows: np.ndarray,
        memory: Memory,
        sums: np.ndarray,
        measured: np.ndarray,
        blocks: int | None = None,
    ) -> None:
        """A step that measures the parameters which spans name. Memory: with sums and measured."""
        for launch in self.api.measured(spans, rows, sums, measured):
            self.run(launch, memory, blocks)

    def run(
        self,
        launch: Launch,
        memory: Memory,
        blocks: int | None = None,
        watch: Watch | None = None,
        order: int | None = None,
    ) -> None:
        """A launch, of so many blocks or as many as it wants. Order: as Blocks take it."""
        for place in range(launch.members.bit_length()):
            if not launch.members >> place & 1:
                continue
            key = launch.kernel, place
            count = launch.blocks if blocks is None else blocks
            for done in range(0, count, MOST_BLOCKS):
                some = self._blocks(key, min(count - done, MOST_BLOCKS))
                where = launch.first + done, launch.first + count
                some.run(launch.argument, *where, memory, watch, order)
                self.executed[key] |= some.executed

    def _blocks(self, key: Key, count: int) -> Blocks:
        """So many, which may have run before: their instructions are decoded already."""
        code, shared = self.code[key], SHARED_BYTES.get(key[0], 0)
        found = self._kept.pop((key, count), None)
        if found is not None and found.code is not code:
            found.forget()
            found = None
        if found is None:
            found = Blocks(code, self.arch, self.api, count, 1, shared)
        self._kept[key, count] = found
        if len(self._kept) > MOST_KEPT:
            self._kept.pop(next(iter(self._kept))).forget()
        return found

    def executed_share(self, key: Key) -> float:
        """Of the instructions of a kernel, but for those behind its end, where what is rare is:
        slow ways through divisions and roots, and warps whose lanes have parted."""
        code = self.code[key]
        end = max(i for i, one in enumerate(code) if one.opcode[0] == "EXIT")
        places = {i for i in range(end) if code[i].opcode[0] not in ("NOP", "BRA")}
        return len(self.executed[key] & places) / len(places)
