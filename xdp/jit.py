"""Compiled functions: `compiled`, `inlined`, and where their machine code is kept.

A function has two sides. Compiled code links it into its callers, as numba lowers it. What Python calls is a root: it
and all that it calls are optimized, made machine code, and kept; who finds that needs no numba (xdp/calls.py).

numba notices a change only in the file that a function is in: constants from schema.h or a callee in another module
would stay frozen in what is kept. The folder is therefore named by a digest of all our .py and .h files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Hashable, Sequence
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from xdp.kept import alone, base
from xdp.words import kind_of

_F = TypeVar("_F", bound=Callable[..., Any])
_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("xdp", "conntrack", "lb", "dataplane", "perf")
_KEEP = 4  # folders of earlier versions that stay, for work that goes back and forth between two


def source_digest() -> str:
    """Return a digest of all our .py and .h files: the version that compiled code belongs to."""
    digest = hashlib.blake2b(digest_size=10)
    for package in _PACKAGES:
        for path in sorted((_ROOT / package).rglob("*.[ph]*")):
            if path.suffix in (".py", ".h"):
                digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def cache_folder() -> Path | None:
    """Return the folder of machine code for these very sources, making it and dropping the oldest others.

    None: none can be written, and every start compiles anew.
    """
    folder = base() / f"compiled-{source_digest()}"
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            others = sorted(base().glob("compiled-*"), key=lambda path: path.stat().st_mtime)
            for old in others[: -_KEEP - 1]:
                shutil.rmtree(old, ignore_errors=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            return None
        os.utime(folder)
    except OSError:
        return None
    return folder


@cache
def _versions() -> tuple[str, ...]:
    """Return the versions of what makes machine code, which need not be imported."""
    return tuple(map(version, ("numba", "llvmlite")))


class Root:
    """A function as Python calls it. `is_inlined`: whether it is put into each of its compiled callers."""

    def __init__(self, function: Callable[..., Any], *, is_inlined: bool) -> None:
        self.py_func = function
        self.is_inlined = is_inlined
        self.entries: dict[tuple[Hashable, ...], Callable[[Sequence[Any]], Any]] = {}  # by kinds of arguments
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        """Call its machine code, which is made at the first call with arguments of such kinds."""
        if len(arguments) < self.py_func.__code__.co_argcount:
            arguments = self._with_defaults(arguments)
        kinds = tuple(map(kind_of, arguments))
        entry = self.entries.get(kinds)
        if entry is None:
            entry = self.entries[kinds] = self._entry(kinds, arguments)
        return entry(arguments)

    def _with_defaults(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        missing = self.py_func.__code__.co_argcount - len(arguments)
        defaults = self.py_func.__defaults__ or ()
        if missing > len(defaults):
            raise TypeError(f"{self.py_func.__qualname__}: {missing} arguments are missing")
        return (*arguments, *defaults[len(defaults) - missing :])

    def _entry(self, kinds: tuple[Hashable, ...], arguments: tuple[Any, ...]) -> Callable[[Sequence[Any]], Any]:
        from xdp import calls  # llvmlite

        place = self.place(".code", kinds, calls.processor())
        code = calls.read(place)
        if code is None:
            with alone(place.with_suffix(".lock")) if place else contextlib.nullcontext():
                code = calls.read(place)  # whom it has waited for has made it
                if code is None:
                    from xdp import roots  # numba

                    code = roots.code_of(self, arguments)
                    calls.keep(code, place)
        return calls.entry(code)

    def place(self, suffix: str, *about: object) -> Path | None:
        """Return the file of what is made of it, all that this depends on being `about`; None: it is not to be kept.

        What a closure holds is in no digest.
        """
        folder, code = cache_folder(), self.py_func.__code__
        if folder is None or self.py_func.__closure__:
            return None
        name = f"{self.py_func.__module__}.{self.py_func.__qualname__}"
        digest = hashlib.blake2b(Path(code.co_filename).read_bytes(), digest_size=10)
        digest.update(repr((code.co_firstlineno, about, _versions())).encode())
        return folder / f"{name}-{digest.hexdigest()}{suffix}"

    @cached_property
    def callee(self) -> Any:
        """The other side, made when something is compiled."""
        from xdp import roots

        return roots.Callee(self)

    @property
    def _numba_type_(self) -> Any:
        """Return what compiled code takes this for."""
        return self.callee._numba_type_


def compiled(function: _F) -> _F:
    """Compile `function` at its first call: no GIL, no allocation, arrays and numbers only; kept if possible."""
    return Root(function, is_inlined=False)  # type: ignore[return-value]


def inlined(function: _F) -> _F:
    """Compile a small `function` into each of its callers."""
    return Root(function, is_inlined=True)  # type: ignore[return-value]
