"""The front program: it makes a frame the next flow's again and calls the program whose cost is wanted.

Running a program repeatedly (BPF_PROG_TEST_RUN) would feed it the packet that it has just rewritten, so
perf/bpf/restore.c writes the packet anew before each call. The cost of a program is that of the front with it, less
that of the front with a bare one that exchanges MAC addresses. Flows are visited in an order that is no neighbourhood
in a table.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from perf.traffic import PINS, PROGRAMS, Order, Traffic, Words
from xdp import kernel, loader, removing
from xdp.schema import Protocol

CLIENTS, VIP, ENDPOINT = (int(IPv4Address(text)) for text in ("10.1.0.0", "10.96.0.1", "10.2.0.2"))
PREFIX6 = 0x20010DB8  # of IPv6 addresses, which end as those of IPv4
VIP_PORT, ENDPOINT_PORT = 80, 8080
VLAN = 100
PACKETS = 1_000_000
_STRIDE = 7919  # a prime that divides no number of flows here


class Kind(NamedTuple):
    """Packets that are measured: of a protocol, perhaps replies, perhaps with VLAN tags."""

    protocol: int = Protocol.UDP
    is_reply: bool = False
    vlan_tags: int = 0

    @property
    def name(self) -> str:
        """The packets, but for their direction."""
        family = " over IPv6" if self.protocol & Protocol.IPV6 else ""
        return Protocol(self.protocol & ~Protocol.IPV6).name + family + ("", " in a VLAN", " in QinQ")[self.vlan_tags]


class Front(NamedTuple):
    """The front program, the map of which it calls what is measured, its orders, the bare program, and its pins."""

    program: int
    measured: int
    orders: npt.NDArray[np.uint64]  # a row for each CPU
    bare: int
    folder: Path
    frame: bytes  # room for what the front program writes

    def call(self, program: int) -> None:
        """Call this one from now on."""
        kernel.map_update(self.measured, struct.pack("=I", 0), struct.pack("=I", program))

    def run_ns(self, packets: int = PACKETS) -> float:
        """Return the nanoseconds that a packet takes, front program included."""
        return kernel.prog_test_run(self.program, self.frame, repeat=packets)[2]

    def pair_ns(self, program: int, packets: int = PACKETS) -> tuple[float, float]:
        """Return what a packet takes with the bare program, then with this one."""
        self.call(self.bare)
        base = self.run_ns(packets)
        self.call(program)
        return base, self.run_ns(packets)


@contextmanager
def loaded(flows: int, kind: Kind, *, cpus: int = 1) -> Iterator[Front]:
    """Load the front program for so many flows; each of `cpus` CPUs has its own part of them.

    Of several CPUs, the part of each must be a multiple of SOURCE_PORTS flows.
    """
    folder = PINS / f"perf-front-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    part, (protocol, is_reply, vlan_tags) = flows // cpus, kind
    with ExitStack() as stack:
        stack.callback(removing.maps, folder)
        words = Words(folder, "orders", os.cpu_count() or 1, len(Order))
        stack.callback(words.close)
        measured = kernel.map_create("measured", 4, 4, 2, 0, kernel.PROG_ARRAY)
        stack.callback(os.close, measured)
        kernel.pin(measured, folder / "measured")
        for cpu, order in enumerate(words.rows):
            order[Order.FLOWS] = part
            order[Order.CLIENT] = CLIENTS + cpu % cpus * part // int(Traffic.SOURCE_PORTS)
            order[Order.SERVER], order[Order.SERVER_PORT] = (ENDPOINT, ENDPOINT_PORT) if is_reply else (VIP, VIP_PORT)
        defines = {
            "FLOWS": part,
            "STRIDE": _STRIDE,
            "PROTOCOL": protocol & ~Protocol.IPV6,
            "IPV6": int(bool(protocol & Protocol.IPV6)),
            "PREFIX6": PREFIX6,
            "REPLY": int(is_reply),
            "VLAN_TAGS": vlan_tags,
            "VLAN": VLAN,
        }
        program = loader.load(folder, PROGRAMS / "restore.c", "restore", defines)
        stack.callback(os.close, program)
        bare = loader.load(folder, PROGRAMS / "bare.c", "bare")
        stack.callback(os.close, bare)
        frame = bytes(int(Traffic.FRAME6_BYTES if protocol & Protocol.IPV6 else Traffic.FRAME_BYTES) + 4 * vlan_tags)
        yield Front(program, measured, words.rows, bare, folder, frame)
