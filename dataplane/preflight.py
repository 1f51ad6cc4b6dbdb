"""What is looked at before anything is changed: whether this process may, and whether the interfaces are there."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path

from xdp.errors import MissingFeatureError, UsageError

_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13}


def need_privileges(command: str) -> None:
    """Raise MissingFeatureError unless this process may change the network, as `turnout COMMAND` does."""
    held = 0
    with contextlib.suppress(OSError, ValueError), Path("/proc/self/status").open() as lines:
        held = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    for name, bit in _CAPABILITIES.items():
        if not held >> bit & 1:
            raise MissingFeatureError(
                f"`turnout {command}` needs root (here: no {name}); try `sudo turnout {command} ...`"
            )


def need_interfaces(names: Sequence[str]) -> None:
    """Raise UsageError unless there are interfaces of all these names."""
    present = [name for _, name in socket.if_nameindex()]
    for name in names:
        if name not in present:
            from lb.fields import did_you_mean

            hint = did_you_mean(name, present)
            cure = hint if hint.startswith("; did") else "; see `ip -br link`"
            if "," in name:
                cure = f"; several are given with spaces between them: -i {' '.join(filter(None, name.split(',')))}"
            raise UsageError(f"{name}: no such interface in this network namespace{cure}")


def need_cgroup(cgroup: Path, engine: str) -> None:
    """Raise UsageError unless sockets of `cgroup` can be led to endpoints with this engine."""
    from xdp.mounts import is_cgroup

    if engine == "raw":
        raise UsageError("--socket-cgroup needs BPF, which engine raw does without; leave out one of the two")
    if not is_cgroup(cgroup):
        raise UsageError(
            f"{cgroup}: is not the folder of a cgroup v2; `findmnt -t cgroup2` shows where they are mounted"
        )
