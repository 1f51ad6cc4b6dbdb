"""The one door to numba: `compiled`, and where its cache lives.

numba notices a change only in the file that a function is in: constants from schema.h or a callee in another module
stay frozen in the cache. The cache folder is therefore named by a digest of all our .py and .h files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from xdp.cache import base

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


def cache_folder() -> Path:
    """Return the folder of compiled code for these very sources, making it and dropping the oldest others."""
    folder = base() / f"compiled-{source_digest()}"
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(base().glob("compiled-*"), key=lambda path: path.stat().st_mtime)
        for old in others[: -_KEEP - 1]:
            shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.utime(folder)
    return folder


def _has_cache() -> bool:
    """Name the cache folder, unless the user has; return False if none can be written: every start compiles anew."""
    if "NUMBA_CACHE_DIR" not in os.environ:
        try:
            folder = cache_folder()
        except OSError:
            return False
        if not os.access(folder, os.W_OK | os.X_OK):
            return False
        os.environ["NUMBA_CACHE_DIR"] = str(folder)
    return True


_HAS_CACHE = _has_cache()

import numba  # noqa: E402  after its cache folder is named ...

# ... and told again: whoever imported numba first (xdp/atomic.py does) made it read its configuration too early.
numba.config.CACHE_DIR = os.environ.get("NUMBA_CACHE_DIR", "")  # type: ignore[attr-defined]


from xdp.roots import Root  # noqa: E402

_OPTIONS: dict[str, Any] = {
    "nopython": True,
    "nogil": True,
    "error_model": "numpy",
    # Without numba's runtime nothing can be allocated, and arrays are not reference-counted: two atomic additions for
    # each array that a function is given.
    "_nrt": False,
    # Nobody hands our functions to C: without the wrapper for it, compiling takes an eighth less memory.
    "no_cfunc_wrapper": True,
}


def compiled(function: _F) -> _F:
    """Compile `function` at its first call: no GIL, no allocation, arrays and numbers only; cached if possible."""
    return Root(function, _OPTIONS, is_cached=_HAS_CACHE, is_inlined=False)  # type: ignore[return-value]


def inlined(function: _F) -> _F:
    """Compile a small `function` into each of its callers."""
    return Root(function, _OPTIONS, is_cached=_HAS_CACHE, is_inlined=True)  # type: ignore[return-value]
