"""System calls that Python has no words for, and what becomes of their errors.

Through libc by cffi's ABI mode (no compiler at run time). Errors are MissingFeatureError (no privilege, no BPF) or
KernelError, which keeps the errno.
"""

from __future__ import annotations

import errno
import os
import platform

from xdp.declared import declared
from xdp.errors import Error, KernelError, MissingFeatureError

ffi = declared("""
long syscall(long number, ...);
int statfs(const char *path, void *buffer);
int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data);
""")
libc = ffi.dlopen(None)

_NUMBERS = {"x86_64": (321, 324), "aarch64": (280, 283)}
BPF, MEMBARRIER = _NUMBERS.get(platform.machine(), (-1, -1))


def errno_name(number: int) -> str:
    """Return what manuals call an errno."""
    # Linux gives ENOTSUP and EOPNOTSUPP one number; its manuals speak of the latter.
    return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, str(number))


def failure(what: str, number: int) -> Error:
    """Return the exception for errno `number` of doing `what`."""
    if number == errno.ENOSYS:
        return MissingFeatureError(f"{what}: this kernel has no bpf(2) (ENOSYS); it needs CONFIG_BPF_SYSCALL")
    if number in (errno.EPERM, errno.EACCES):
        why = f"not permitted ({errno_name(number)})"
        return MissingFeatureError(f"{what}: {why}; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN")
    return KernelError(f"{what}: {os.strerror(number)} ({errno_name(number)})", number)
