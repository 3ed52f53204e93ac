"""Faults to plant in machine code: an immediate or a register of an instruction is another one."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

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
