"""Engines `xdp` and `afxdp`: an XDP program on every interface, an AF_XDP socket and a worker for every queue.

They differ in one compile-time constant: with `xdp` the program forwards the packets of known flows itself, with
`afxdp` it hands them to userspace.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataplane import wire
from dataplane.afxdp import Umem
from dataplane.hops_compiled import Hops
from dataplane.loop import new_ports
from dataplane.netdev import Interface
from dataplane.pipeline import Node
from dataplane.settings import Settings
from dataplane.worker import Worker
from xdp import kernel, loader
from xdp.clock import Clock
from xdp.errors import AttachError, Error, UsageError
from xdp.loader import Attachment
from xdp.maps import SharedMaps
from xdp.schema import Limit

_PROGRAM = Path(kernel.__file__).parent / "bpf" / "lb.c"
_CHUNKS_PER_QUEUE = 8192
_COMPILE_S = 300.0  # of the packet loop on a slow machine; a second or two is usual, milliseconds with a warm cache
_PATIENCE_S = 2.0
_COMPLAIN_AFTER_S = 2.0  # XDP minds a stall after 50 ms; a person, one that lasts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Queue:
    """One queue of one interface, and which worker serves it."""

    interface: Interface
    index: int


class Engine:
    """The programs, sockets and workers of a node.

    `prepare` does what may fail without touching what runs; `start` attaches last, and leaves no trace if it fails.
    `stop` ends workers and sockets; programs, links and tables stay and go on forwarding known flows until `detach`.
    """

    def __init__(self, settings: Settings, shared: SharedMaps, clock: Clock, seed: int) -> None:
        self._settings = settings
        self._shared = shared
        self._clock = clock
        self._seed = np.uint64(seed)
        self._program = -1
        self._interfaces: list[Interface] = []
        self._umem: Umem | None = None
        self._workers: list[Worker] = []
        self.queues: list[Queue] = []
        self.attachments: dict[str, Attachment] = {}

    @property
    def name(self) -> str:
        """The engine's name: `xdp` or `afxdp`."""
        return "afxdp" if self._settings.engine == "afxdp" else "xdp"

    @property
    def offloads(self) -> bool:
        """Whether XDP forwards known flows by itself."""
        return self.name == "xdp"

    def prepare(self, interfaces: list[Interface]) -> None:
        """Load the program and open the sockets of `interfaces`; nothing is attached yet."""
        self._interfaces = interfaces
        self._program = loader.load(self._shared.folder, _PROGRAM, "xdp_lb", {"OFFLOAD": int(self.offloads)})
        self._open_sockets(interfaces)

    def start(self, hops: Hops) -> None:
        """Start the workers and attach. On an error nothing stays attached that was not before."""
        self._start_workers(hops)
        self._register_queues()
        self._attach(self._program, self._interfaces)

    def _open_sockets(self, interfaces: list[Interface]) -> None:
        self.queues = [Queue(interface, index) for interface in interfaces for index in range(interface.rx_queues)]
        if len(self.queues) > Limit.MAX_WORKERS:
            raise UsageError(
                f"{len(self.queues)} queues on {len(interfaces)} interfaces: a node serves {Limit.MAX_WORKERS}; "
                "reduce them with `ethtool -L`"
            )
        chunk_bytes = 2048 if max(interface.mtu for interface in interfaces) <= 1500 else 4096
        self._umem = Umem(_CHUNKS_PER_QUEUE * len(self.queues), chunk_bytes)
        for interface in interfaces:
            longest = self._umem.frame_bytes - wire.ETHERNET_BYTES
            if interface.mtu > longest:
                raise AttachError(
                    f"{interface.name}: MTU {interface.mtu} does not fit into an AF_XDP frame; "
                    f"`ip link set {interface.name} mtu {longest}` or less"
                )
        for queue in self.queues:
            self._umem.open(queue.interface.name, queue.index)

    def _start_workers(self, hops: Hops) -> None:
        assert self._umem is not None
        tables, sockets = self._shared.tables, self._umem.sockets
        tables.workers["heartbeat"] = 0
        ports = new_ports(
            [(queue.interface.ifindex, sock.queue) for queue, sock in zip(self.queues, sockets, strict=True)]
        )
        for number, sock in enumerate(sockets):
            node = Node(tables, hops, self._seed, np.zeros(1, wire.PACKET))
            pool = self._umem.new_pool()
            self._workers.append(Worker(node, number, ports, number, sock, pool, self._clock))
        for worker in self._workers:
            worker.start()
        self._await_heartbeats()

    def _await_heartbeats(self) -> None:
        started = time.monotonic()
        said = False
        while not all(worker.is_beating for worker in self._workers):
            waited = time.monotonic() - started
            if waited > _COMPILE_S:
                raise Error(f"the packet loop was not compiled within {_COMPILE_S:.0f} s; is the machine overloaded?")
            if waited > _PATIENCE_S and not said:
                log.info("compiling the packet path, once for this version")
                said = True
            time.sleep(0.005)

    def _register_queues(self) -> None:
        """Tell XDP which worker and which socket serve a queue; queues of an earlier daemon are forgotten."""
        assert self._umem is not None
        for key in list(kernel.map_keys(self._shared.queues_fd, 8)):
            kernel.map_delete(self._shared.queues_fd, key)
        for number, (queue, sock) in enumerate(zip(self.queues, self._umem.sockets, strict=True)):
            kernel.map_update(self._shared.sockets_fd, struct.pack("=I", number), struct.pack("=I", sock.fd))
            place = struct.pack("=II", queue.interface.ifindex, queue.index)
            kernel.map_update(self._shared.queues_fd, place, struct.pack("=I", number))

    def _attach(self, program: int, interfaces: list[Interface]) -> None:
        settings = self._settings
        try:
            for interface in interfaces:
                pin = settings.link_pin(interface.name)
                mode = settings.xdp_mode
                self.attachments[interface.name] = loader.attach(program, interface.name, mode, pin)
        except BaseException:
            for attachment in self.attachments.values():
                if not attachment.was_replaced:
                    loader.detach(attachment.pin)
            raise
        wanted = {settings.link_pin(interface.name) for interface in interfaces}
        for pin in settings.link_pins():
            if pin not in wanted:
                loader.detach(pin)  # an interface that is no longer given

    def lost(self) -> int:
        """Return how many punted frames the sockets have lost; with the workers stopped, those unread are lost too."""
        sockets = self._umem.sockets if self._umem else []
        unread = 0 if self._workers else sum(sock.unread() for sock in sockets)
        return unread + sum(sock.statistics().lost for sock in sockets)

    def stalled(self) -> list[str]:
        """Return what is wrong with the workers, in words."""
        now = self._clock.now()
        beats = self._shared.tables.heartbeats
        found = []
        for worker, queue in zip(self._workers, self.queues, strict=True):
            place = f"worker of {queue.interface.name} queue {queue.index}"
            age = (now - int(beats[worker.number])) & 0xFFFFFFFF
            if worker.failure is not None:
                found.append(f"{place}: ended by {type(worker.failure).__name__}; restart the daemon")
            elif _COMPLAIN_AFTER_S * self._clock.hertz < age < 1 << 31:  # a beat may be a tick ahead of now
                found.append(f"{place}: no heartbeat for {age / self._clock.hertz:.0f} s")
        return found

    @property
    def is_alive(self) -> bool:
        """Whether any worker serves."""
        return any(worker.failure is None for worker in self._workers)

    def stop_workers(self) -> None:
        """End the packet loops."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def stop(self) -> None:
        """End workers and sockets. Programs and tables stay."""
        self.stop_workers()
        if self._umem is not None:
            self._umem.close()
            self._umem = None
        if self._program >= 0:
            os.close(self._program)
            self._program = -1

    def detach(self) -> None:
        """Take the programs off the interfaces."""
        for attachment in self.attachments.values():
            with contextlib.suppress(kernel.KernelError):  # the interface went first, and its link with it
                loader.detach(attachment.pin)
        self.attachments = {}
