"""Faults to plant in machine code: an immediate or a register of an instruction is another one."""

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from . import emulator
from .emulator import Machine, Watch
from .sass import Instruction

IMMEDIATE = re.compile(r"-?0x[0-9a-f]+")
REGISTER = re.compile(r"([-+~|!]?)R(\d+)((?:\.64)?)(\|?)")


def other_immediate(text: str) -> str:
    """With another lowest bit, or, of a number of four bytes, the lowest one of its second byte."""
    value = int(text, 16)
    return hex(value ^ (1 if abs(value) < 1 << 16 else 1 << 8))


def changed(instruction: Instruction) -> Iterator[Instruction]:
    """The instruction with an immediate that it reads changed, and with a register that it reads
    exchanged for another one that it names, or for RZ."""
    first = 1 if instruction.opcode[0] not in ("STG", "BRA") else 0
    for i in range(first, len(instruction.operands)):
        operand = instruction.operands[i]
        if IMMEDIATE.fullmatch(operand):
            new = other_immediate(operand)
        elif match := REGISTER.fullmatch(operand):
            others = [text for text in instruction.operands if REGISTER.fullmatch(text)]
            other = next((text for text in others if text.strip("-+~|") != f"R{match[2]}"), "RZ")
            new = f"{match[1]}{other.strip('-+~|')}{match[4]}"
        else:
            continue
        operands = (*instruction.operands[:i], new, *instruction.operands[i + 1 :])
        yield replace(instruction, operands=operands)


def faults(
    code: Sequence[Instruction], executed: set[int], every: int
) -> Iterator[tuple[int, Instruction]]:
    """One in so many of the instructions that have been executed, each with one operand changed."""
    apart = ("BRA", "BSSY", "BSYNC", "CALL", "RET", "EXIT", "NOP", "WARPSYNC", "MUFU", "FCHK")
    places = [place for place in sorted(executed) if code[place].opcode[0] not in apart]
    for turn, place in enumerate(places[::every]):
        found = list(changed(code[place]))
        if found:
            yield place, found[turn % len(found)]


class Found(NamedTuple):
    """Of the faults that were planted."""

    wrong: int  # by what was written
    stopped: int  # by the emulator: an address or an instruction that cannot be, or no end
    rare: list[str]  # not by what was written, but as a slow way was taken, which got it right
    missed: list[str]

    @property
    def total(self) -> int:
        return self.wrong + self.stopped + len(self.rare) + len(self.missed)

    def __str__(self) -> str:
        what = f"of {self.total}, {self.wrong} wrote something else, {self.stopped} were stopped"
        missed = "\n".join(self.missed)
        return f"{what}, {len(self.rare)} took another way; missed:\n{missed}"

    def assert_share(self, found: float, rare: float = 0) -> None:
        """At least these shares of them were found, and took a slow way."""
        share = (self.wrong + self.stopped) / self.total
        assert self.total > 20 and share >= found, str(self)
        assert share + len(self.rare) / self.total >= found + rare, str(self)


def find_faults(
    machine: Machine, every: int, check: Callable[[Machine, Watch], None], steps: int
) -> Found:
    """Plant them in all code that a check executes, one after the other, for so many instructions
    at most: a fault may be a loop without end."""
    machine = copy(machine)
    machine.code, machine.executed = dict(machine.code), {key: set() for key in machine.code}
    found, issued = Found(0, 0, [], []), 0

    def count(place: int, lanes: np.ndarray, active: np.ndarray) -> None:
        nonlocal issued
        issued += int(active.sum())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator, "MOST_INSTRUCTIONS", steps)
        check(machine, count)
        usually = issued
        for key in [key for key, executed in machine.executed.items() if executed]:
            code = machine.code[key]
            for place, fault in faults(code, machine.executed[key], every):
                machine.code[key] = [*code[:place], fault, *code[place + 1 :]]
                issued = 0
                try:
                    check(machine, count)
                except Exception as error:
                    last = traceback.extract_tb(error.__traceback__)[-1].filename
                    if last == emulator.__file__:
                        found = found._replace(stopped=found.stopped + 1)
                    else:
                        found = found._replace(wrong=found.wrong + 1)
                else:
                    where = found.missed if issued == usually else found.rare
                    where.append(f"{code[place]} as {fault}")
            machine.code[key] = code
    return found
