"""C declarations by way of cffi, which parses them once.

cffi's parser is pycparser: 0.06 s of CPU in every process. cffi can write down what it has read as a Python module
(out of line, in ABI mode), which is kept, named by a digest of the declarations and the version of cffi that is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import runpy
from pathlib import Path
from typing import Any

import _cffi_backend  # what such a module imports; cffi itself brings the parser

from xdp import kept


def declared(declarations: str) -> Any:
    """Return the ffi object of C declarations."""
    digest = hashlib.blake2b(declarations.encode(), digest_size=10)
    digest.update(_cffi_backend.__version__.encode())
    place = kept.base() / "declarations" / f"{digest.hexdigest()}.py"
    with contextlib.suppress(OSError, SyntaxError, ValueError, KeyError):  # it is not there, or damaged
        return runpy.run_path(str(place))["ffi"]
    return _parsed(declarations, place)


def _parsed(declarations: str, place: Path) -> Any:
    """Return the ffi object as it is before it is written down, and keep it at `place` if possible."""
    import cffi
    from cffi.recompiler import make_py_source  # ffi.emit_python_code, which would say so on stdout

    ffi, module = cffi.FFI(), io.StringIO()
    ffi.cdef(declarations)
    make_py_source(ffi, f"declared_{place.stem}", module)
    with contextlib.suppress(OSError):
        kept.write(place, module.getvalue().encode())
    return ffi
