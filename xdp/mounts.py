"""File systems of the kernel's own, bpffs and cgroups: whether a folder lies in one, and a bpffs made where none is."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from pathlib import Path

from xdp.errors import MissingFeatureError
from xdp.syscalls import failure, ffi, libc

_BPFFS_MAGIC, _CGROUP2_MAGIC = 0xCAFE4A11, 0x63677270


def is_bpffs(folder: Path) -> bool:
    """Return whether `folder` lies in a mounted bpffs."""
    return _file_system(folder) == _BPFFS_MAGIC


def is_cgroup(folder: Path) -> bool:
    """Return whether `folder` is a cgroup, of the hierarchy of cgroups v2."""
    return folder.is_dir() and _file_system(folder) == _CGROUP2_MAGIC


def _file_system(folder: Path) -> int:
    """Return the magic number of the file system that `folder` lies in; 0: there is no such folder."""
    buffer = ffi.new("long[]", 64)  # struct statfs is 120 bytes and starts with the type
    return int(buffer[0]) if libc.statfs(os.fsencode(folder), buffer) == 0 else 0


def mount_bpffs(folder: Path, init_namespace: Path = Path("/proc/1/ns/mnt")) -> None:
    """Make `folder` a bpffs, unless it lies in one already.

    In a mount namespace of our own (`ip netns exec` makes one) a mount would end with this process and take the pins
    with it. So it is made in the namespace of process 1, from where it comes to us; only where it does not (mounts that
    are private) the pins last no longer than this process.
    """
    if is_bpffs(folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise failure(f"folder {folder}", error.errno or errno.EIO) from None
    if not _is_our_namespace(init_namespace):
        mount = ["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(folder)]
        with contextlib.suppress(OSError):
            subprocess.run(["nsenter", f"--mount={init_namespace}", "--", *mount], capture_output=True, check=False)
        if is_bpffs(folder):
            return
    if libc.mount(b"bpf", os.fsencode(folder), b"bpf", 0, ffi.new("char[]", b"mode=0700")) < 0:
        number = ffi.errno
        if number == errno.ENODEV:
            raise MissingFeatureError(f"{folder}: this kernel has no bpffs; it needs CONFIG_BPF_SYSCALL")
        raise failure(f"mount of a bpffs at {folder}", number)


def _is_our_namespace(namespace: Path) -> bool:
    try:
        return namespace.stat().st_ino == Path("/proc/self/ns/mnt").stat().st_ino
    except OSError:  # not ours to look into: then not ours to mount into
        return True
