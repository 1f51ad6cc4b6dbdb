"""Machine code as Python calls it: object code that was kept or has just been made, put into memory, with an entry.

An entry takes the address of the words of its arguments (xdp/words.py) and the address of room for those of its result,
and returns a status, zero if all went well. So numba is needed to make one, and not to call it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from llvmlite import binding

from xdp import kept
from xdp.words import words_of

_DIGEST_BYTES = 16
_loading = threading.Lock()  # of threads that come at once each would make an engine, and all code but one's would go
_ENTRY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)  # a call of it lets other threads run


@dataclass(frozen=True)
class Code:
    """Object code whose `entry` takes so many `words`.

    The result is a tuple of parts, or the only one of them, a word each: of `formats` as in `struct`. Of `enums`, by
    position, they are members: of the class of that module and name.
    """

    entry: str
    words: int
    formats: list[str]
    is_tuple: bool
    enums: dict[int, tuple[str, str]]
    machine_code: bytes

    def to_bytes(self) -> bytes:
        """Return it as it is kept in a file."""
        about = asdict(self)
        machine_code = about.pop("machine_code")
        content: bytes = json.dumps(about).encode() + b"\n" + machine_code
        return _digest(content) + content

    @classmethod
    def from_bytes(cls, found: bytes) -> Self:
        """Return what was kept. ValueError: it is not whole."""
        digest, content = found[:_DIGEST_BYTES], found[_DIGEST_BYTES:]
        if digest != _digest(content):
            raise ValueError("damaged")
        about, _, machine_code = content.partition(b"\n")
        fields = json.loads(about)
        enums = {int(at): (module, name) for at, (module, name) in fields.pop("enums").items()}
        return cls(**fields, enums=enums, machine_code=machine_code)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def read(place: Path | None) -> Code | None:
    """Return the code that is kept in a file; None if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return Code.from_bytes(place.read_bytes()) if place else None
    return None


def keep(code: Code, place: Path | None) -> None:
    """Keep code in a file. Where nothing can be written, nothing is kept."""
    with contextlib.suppress(OSError):
        if place:
            kept.write(place, code.to_bytes())


@cache
def processor() -> str:
    """Return what machine code is made for: the CPU, with what it can."""
    return f"{binding.get_host_cpu_name()} {binding.get_host_cpu_features().flatten()}"


@cache
def _engine() -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    return binding.create_mcjit_compiler(binding.parse_assembly(""), machine)


def entry(code: Code) -> Callable[[Sequence[Any]], Any]:
    """Put object code into memory; return what calls it with a sequence of arguments."""
    with _loading:
        engine = _engine()
        engine.add_object_file(binding.ObjectFileRef.from_data(code.machine_code))
        engine.finalize_object()
        function = _ENTRY(engine.get_function_address(code.entry))
    pack, unpack = struct.Struct(f"={code.words}Q").pack, struct.Struct(f"={''.join(code.formats)}").unpack
    room = ctypes.c_uint64 * len(code.formats)
    enums = {at: getattr(importlib.import_module(module), name) for at, (module, name) in code.enums.items()}

    def call(arguments: Sequence[Any]) -> Any:
        result = room()
        status = function(pack(*[word for argument in arguments for word in words_of(argument)]), result)
        if status:
            raise RuntimeError(f"{code.entry} ended with status {status}")
        values = unpack(result)
        if enums:
            values = tuple(enums[at](value) if at in enums else value for at, value in enumerate(values))
        return values if code.is_tuple else values[0] if values else None

    return call
