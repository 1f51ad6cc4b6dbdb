"""What was compiled before: where it lies, and XDP programs that are loaded from there.

Compiling a program takes clang a second, loading what it made a quarter of one. A program that was compiled is kept as
the kernel takes it, with the names of the maps in place of their descriptors: it can be loaded over any tables with the
same numbers of rows. Its file is named by a digest of all that clang and bcc were given.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from xdp import kernel
from xdp.errors import Error
from xdp.writing import write

_HERE = Path(__file__).resolve().parent
_KEEP = 64  # programs, of 100 KB each
_PATIENCE_S, _LOOK_AGAIN_S = 120.0, 0.05  # for another process that compiles
_INSTRUCTION = struct.Struct("=BBhi")  # struct bpf_insn: operation, two registers, offset, immediate
_LOAD_64 = 0x18  # BPF_LD | BPF_DW | BPF_IMM
_MAP_FD = 1  # BPF_PSEUDO_MAP_FD in the upper register: the immediate is the descriptor of a map


def base() -> Path:
    """Return the folder of all that turnout compiles, which need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turnout"


@dataclass(frozen=True)
class Program:
    """A compiled program: its instructions, and which of them (byte offset) want the descriptor of which map."""

    instructions: bytes
    maps: dict[int, str]

    @classmethod
    def of(cls, instructions: bytes, names: Mapping[int, str]) -> Self:
        """Take the descriptors out of a program that could be loaded now; `names` has the maps by their ids."""
        code, maps = bytearray(instructions), {}
        for offset in range(0, len(code), _INSTRUCTION.size):
            operation, registers, displacement, immediate = _INSTRUCTION.unpack_from(code, offset)
            if operation == _LOAD_64 and registers >> 4 == _MAP_FD:
                maps[offset] = names[kernel.map_info(immediate).id]
                _INSTRUCTION.pack_into(code, offset, operation, registers, displacement, 0)
        return cls(bytes(code), maps)

    @contextlib.contextmanager
    def over(self, folder: Path) -> Iterator[bytes]:
        """Yield the instructions over the maps pinned in `folder`, whose descriptors are open as long as this lasts."""
        code = bytearray(self.instructions)
        with contextlib.ExitStack() as stack:
            descriptors: dict[str, int] = {}
            for name in set(self.maps.values()):
                descriptors[name] = kernel.open_pinned(folder / name)
                stack.callback(os.close, descriptors[name])
            for offset, name in self.maps.items():
                *head, _ = _INSTRUCTION.unpack_from(code, offset)
                _INSTRUCTION.pack_into(code, offset, *head, descriptors[name])
            yield bytes(code)


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold a file's lock: whoever else wants what is being compiled waits for it.

    Where none can be written, go on; and where somebody has held it for longer than anything takes to compile.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            _acquire(stack.enter_context(lock.open("w")).fileno())
        yield


def _acquire(fd: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_AGAIN_S)


def place_of(text: bytes, headers: Iterable[Path], options: Iterable[str]) -> Path:
    """Return the file of the program that `text` becomes with these folders of headers and compiler's `options`."""
    digest = hashlib.blake2b(text, digest_size=16)
    bcc = importlib.util.find_spec("bcc")
    compiler = Path(bcc.origin).with_name("version.py") if bcc and bcc.origin else None
    found = sorted(path for folder in headers for path in folder.rglob("*.h"))
    for path in [*found, *([compiler] if compiler and compiler.is_file() else [])]:
        digest.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    digest.update("\0".join(options).encode())
    return base() / "programs" / f"{digest.hexdigest()}.json"


def read(place: Path) -> Program | None:
    """Return the program that is kept in a file; None if there is none that can be read."""
    try:
        kept = json.loads(place.read_bytes())
        program = Program(
            bytes.fromhex(kept["instructions"]), {int(offset): str(name) for offset, name in kept["maps"].items()}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    with contextlib.suppress(OSError):
        os.utime(place)
    return program


def keep(program: Program, place: Path) -> None:
    """Keep a program in a file, and drop those not used for longest. Where nothing can be written, nothing is kept."""
    with contextlib.suppress(OSError, Error):
        place.parent.mkdir(parents=True, exist_ok=True)
        write(place, json.dumps({"instructions": program.instructions.hex(), "maps": program.maps}))
        others = sorted(place.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for old in others[:-_KEEP]:
            old.unlink(missing_ok=True)
