"""BPF instructions, for programs so short that a compiler would only be in the way.

A program is a sequence of instructions and labels; `assemble` turns it into what kernel.prog_load wants. The operand
that changes comes first. Names follow the kernel's own assembler (Documentation/bpf/standardization/instruction-set).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

# r0: results; r1 to r5: arguments, lost in a call; r6 to r9: kept; r10: the stack, 512 bytes below it.
R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = range(11)

MAP_LOOKUP, MAP_UPDATE, REDIRECT = 1, 2, 23  # enum bpf_func_id


class Instruction(NamedTuple):
    """One instruction of 8 bytes. `target` is the label that a jump leads to."""

    opcode: int
    destination: int = 0
    source: int = 0
    offset: int = 0
    immediate: int = 0
    target: str = ""


Program = list[Instruction | str]  # a string is a label


def move_register(destination: int, source: int) -> Instruction:
    """Copy a register."""
    return Instruction(0xBF, destination, source)


def move_constant(destination: int, value: int) -> Instruction:
    """Set a register to `value`, of 32 bits, with its sign."""
    return Instruction(0xB7, destination, immediate=value)


def add_constant(destination: int, value: int) -> Instruction:
    """Add `value`, of 32 bits with its sign."""
    return Instruction(0x07, destination, immediate=value)


def negate32(destination: int) -> Instruction:
    """Negate the lower 32 bits of a register; the upper ones become 0."""
    return Instruction(0x84, destination)


def truncate32(destination: int) -> Instruction:
    """Set the upper 32 bits of a register to 0."""
    return Instruction(0xBC, destination, destination)


def load64(destination: int, address: int, offset: int) -> Instruction:
    """Read 8 bytes at register `address` + `offset`."""
    return Instruction(0x79, destination, address, offset)


def load32(destination: int, address: int, offset: int) -> Instruction:
    """Read 4 bytes at register `address` + `offset`."""
    return Instruction(0x61, destination, address, offset)


def store64(address: int, offset: int, source: int) -> Instruction:
    """Write 8 bytes of register `source` at register `address` + `offset`."""
    return Instruction(0x7B, address, source, offset)


def store32(address: int, offset: int, source: int) -> Instruction:
    """Write the lower 4 bytes of register `source` at register `address` + `offset`."""
    return Instruction(0x63, address, source, offset)


def atomic_add64(address: int, offset: int, source: int) -> Instruction:
    """Add register `source` to the 8 bytes at register `address` + `offset`."""
    return Instruction(0xDB, address, source, offset)


def jump_if_equal32(register: int, value: int, target: str) -> Instruction:
    """Go to label `target` if the lower 32 bits are `value`."""
    return Instruction(0x16, register, immediate=value, target=target)


def jump_if_not_equal32(register: int, value: int, target: str) -> Instruction:
    """Go to label `target` unless the lower 32 bits are `value`."""
    return Instruction(0x56, register, immediate=value, target=target)


def jump_if_null(register: int, target: str) -> Instruction:
    """Go to label `target` if all 64 bits are 0."""
    return Instruction(0x15, register, target=target)


def jump_unless_null(register: int, target: str) -> Instruction:
    """Go to label `target` unless all 64 bits are 0."""
    return Instruction(0x55, register, target=target)


def load_map(destination: int, fd: int) -> list[Instruction]:
    """Set a register to the map behind descriptor `fd`."""
    return [Instruction(0x18, destination, 1, immediate=fd), Instruction(0)]


def call(helper: int) -> Instruction:
    """Call a helper with r1 to r5; the result is in r0."""
    return Instruction(0x85, immediate=helper)


def leave() -> Instruction:
    """Return r0."""
    return Instruction(0x95)


def assemble(program: Program) -> bytes:
    """Return the machine code, 8 bytes per instruction, in the byte order of this machine."""
    places: dict[str, int] = {}
    code: list[Instruction] = []
    for part in program:
        if isinstance(part, str):
            places[part] = len(code)
        else:
            code.append(part)
    return b"".join(_encode(one, at, places) for at, one in enumerate(code))


def _encode(one: Instruction, at: int, places: dict[str, int]) -> bytes:
    offset = places[one.target] - at - 1 if one.target else one.offset
    # x86-64 and arm64: little endian, the destination in the lower half of its byte.
    registers = one.source << 4 | one.destination
    return struct.pack("=BBhI", one.opcode, registers, offset, one.immediate & 0xFFFFFFFF)
