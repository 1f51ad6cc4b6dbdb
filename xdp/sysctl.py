"""Parameters of the kernel, of this network namespace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from xdp.errors import KernelError


def read(name: str) -> str:
    """Return a kernel parameter of this network namespace, e.g. `net/ipv4/ip_forward`. KernelError: it cannot be."""
    return str(_at(name, Path.read_text)).strip()


def write(name: str, value: str) -> None:
    """Set a kernel parameter of this network namespace. KernelError: it cannot be."""
    _at(name, lambda path: path.write_text(value + "\n"))  # an empty write would be none at all


def _at(name: str, access: Callable[[Path], Any]) -> Any:
    try:
        return access(Path("/proc/sys", name))
    except OSError as error:
        message = f"{name.replace('/', '.')}: {error.strerror}; set it by hand, or run as root"
        raise KernelError(message, error.errno or 0) from error
