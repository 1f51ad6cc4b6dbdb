"""The ports that masqueraded connections leave from, as compiled code sees them.

There are two ranges, one for clients with a privileged port and one for all others, less the ports that sockets of the
node have. Ports are u64 in host order.
"""

from __future__ import annotations

import numpy as np

from dataplane.settings import PRIVILEGED_SNAT_PORTS
from xdp.atomic import load_acquire
from xdp.jit import inlined

_UNPRIVILEGED = 1024  # the first of them
_FIRST, _LAST = PRIVILEGED_SNAT_PORTS


@inlined
def range_for(masquerading, port):
    """Return (first, count) of the ports that stand for a client's: a privileged one becomes another privileged one.

    Servers may ask for that, as those of NFS do, and the kernel's NAT keeps to it.
    """
    if port < np.uint64(_UNPRIVILEGED):
        return np.uint64(_FIRST), np.uint64(_LAST - _FIRST + 1)
    return masquerading.first_port, masquerading.ports


@inlined
def is_occupied(masquerading, port):
    """Tell whether a socket of the node has a port."""
    word = load_acquire(masquerading.occupied, np.int64(port >> np.uint64(6)))
    return word >> (port & np.uint64(63)) & np.uint64(1) != 0


@inlined
def is_masqueraded(masquerading, port):
    """Tell whether masqueraded connections leave from a port."""
    first, count = range_for(masquerading, port)
    return port - first < count and not is_occupied(masquerading, port)  # u64: not if it is below
