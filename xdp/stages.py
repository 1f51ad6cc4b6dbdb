"""The load balancer's XDP program, and those that it hands packets on to (xdp/bpf/lb.c).

A new connection is admitted by a program of its own and its packet sent on by another: each is verified by itself, and
what packets of known flows meet stays small (docs/adr/0024).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from xdp import kernel, loader
from xdp.maps import SharedMaps
from xdp.schema import Stage

SOURCE = Path(__file__).resolve().parent / "bpf" / "lb.c"
_FUNCTIONS = {Stage.ADMIT: "xdp_admit", Stage.SEND: "xdp_send"}


def load(shared: SharedMaps, *, offloads: bool) -> int:
    """Load the programs over `shared`; return a descriptor of the one to attach.

    From now on, earlier programs hand on to these, too. Without `offloads`, every packet of a flow is punted while its
    worker lives. Errors as loader.load.
    """
    functions = ["xdp_lb", *_FUNCTIONS.values()]
    program, *others = loader.load_all(shared.folder, SOURCE, functions, {"OFFLOAD": int(offloads)})
    try:
        for stage, other in zip(_FUNCTIONS, others, strict=True):
            kernel.map_update(shared.stages_fd, struct.pack("=I", stage), struct.pack("=I", other))
    except BaseException:
        os.close(program)
        raise
    finally:
        for other in others:
            os.close(other)
    return program
