"""The workers of an engine: started, watched, ended. What every engine has in common."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from conntrack.table import FlowTable
from dataplane.context import Node
from dataplane.netdev import Interface
from dataplane.worker import Thread
from lb.rows import ServiceRow
from xdp.addresses import IPAddress
from xdp.clock import Clock
from xdp.errors import Error, UsageError
from xdp.tables import Tables

_COMPILE_S = 300.0  # of the packet loop on a slow machine; a second or two is usual, milliseconds with a warm cache
_PATIENCE_S = 2.0
_COMPLAIN_AFTER_S = 2.0  # XDP minds when a frame waits for 50 ms; a person, a stall that lasts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Queue:
    """One queue of one interface, and which worker serves it."""

    interface: Interface
    index: int


class Crew:
    """The base of engines: `queues`, and a worker for each."""

    def __init__(self, tables: Tables, clock: Clock) -> None:
        self._tables = tables
        self._clock = clock
        self._workers: Sequence[Thread] = []
        self.queues: list[Queue] = []

    needs_rows = False  # whether it listens to what is expected
    goes_on_alone = True  # whether known flows are forwarded when no worker runs

    why_no_egress = ""  # why endpoints on this node, behind interfaces that are not ours, cannot be served

    @property
    def serves_through_kernel(self) -> bool:
        """Whether requests may be left to the kernel to route: their replies are translated as they leave."""
        return False

    @property
    def redirects_natively(self) -> bool:
        """Whether a driver that takes no redirected frames loses them."""
        return False

    def expect(self, rows: Sequence[ServiceRow], own: Collection[IPAddress]) -> None:
        """Be told all that the tables are about to say, and the addresses of the node."""

    @contextmanager
    def expecting(self, rows: Sequence[ServiceRow], own: Collection[IPAddress]) -> Iterator[None]:
        """The same, while the tables are made to say it: an error means that they say what they said before."""
        self.expect(rows, own)
        yield

    def expect_more(self, rows: Sequence[ServiceRow]) -> None:
        """Be told what the tables are about to say in addition."""

    def spare(self, ports: frozenset[int], flows: FlowTable) -> None:
        """Be told which ports sockets of the node have: no connection begins to leave from one."""

    def hear(self, stations: frozenset[bytes]) -> None:
        """Be told by which MAC addresses frames are ours; none: by whichever they come."""

    def tidy(self, flows: FlowTable) -> None:
        """Be told that connections may have ended; now and then, in a thread."""

    def _run(self, workers: Sequence[Thread]) -> None:
        """Start workers that are among `_workers` already, and wait until their loops turn."""
        for worker in workers:
            worker.start()
        started = time.monotonic()
        said = False
        while not all(worker.is_beating for worker in workers):
            waited = time.monotonic() - started
            if waited > _COMPILE_S:
                raise Error(f"the packet loop was not compiled within {_COMPILE_S:.0f} s; is the machine overloaded?")
            if waited > _PATIENCE_S and not said:
                log.info("compiling the packet path, once for this version")
                said = True
            time.sleep(0.005)

    def stalled(self) -> list[str]:
        """Return what is wrong with the workers, in words."""
        now = self._clock.now()
        beats = self._tables.heartbeats
        found = []
        for worker, queue in zip(self._workers, self.queues, strict=False):
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


def in_words(name: str, error: Error | OSError) -> str:
    """Return what keeps an interface from being served, its name first."""
    return str(error) if str(error).startswith(f"{name}: ") else f"{name}: {error}"


def set_link(node: Node, interface: Interface) -> None:
    """Tell a packet loop where its answers go out."""
    node.link[0]["mac"] = int.from_bytes(interface.mac, "little")
    node.link[0]["ifindex"] = interface.ifindex


def need_ethernet(interface: Interface) -> None:
    """Raise UsageError for an interface that has no Ethernet frames."""
    if not interface.mac:
        kind = interface.kind or ("loopback" if interface.name == "lo" else "no Ethernet")
        raise UsageError(
            f"{interface.name}: has no Ethernet address ({kind}), and only frames of Ethernet can be forwarded; "
            "give the interface that packets arrive by"
        )
