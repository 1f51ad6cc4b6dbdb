"""What every engine has in common: a socket and a worker for every queue, started, watched, ended.

Interfaces come, go and change while the node runs: `follow` brings what serves them in line with what is there now, one
after the other, and the others are not disturbed.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from conntrack.table import FlowTable
from dataplane.context import Masquerading, Node, new_node
from dataplane.fragments import new_fragments
from dataplane.hops_compiled import Hops
from dataplane.netdev import Interface
from dataplane.worker import Thread
from lb.rows import ServiceRow
from xdp.addresses import IPAddress
from xdp.clock import Clock
from xdp.errors import Error, UsageError
from xdp.schema import Limit
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


class _Socket(Protocol):
    """What workers receive from, whichever kind of socket it is."""

    def lost(self) -> int: ...
    def unread(self) -> int: ...
    def is_dead(self) -> bool: ...
    def close(self) -> None: ...


_S = TypeVar("_S", bound=_Socket)
_W = TypeVar("_W", bound=Thread)


@dataclass
class Line(Generic[_S, _W]):
    """An interface that was given by a name: as it is now, with its sockets, and a worker for each.

    `why` says what keeps it from being served as it should, and is empty if nothing does.
    """

    name: str
    interface: Interface
    sockets: list[_S] = field(default_factory=list)
    workers: list[_W] = field(default_factory=list)
    why: str = ""

    def suits(self, link: Interface) -> bool:
        """Return whether the sockets are of use for what the interface is now."""
        return link.ifindex == self.interface.ifindex and not any(sock.is_dead() for sock in self.sockets)

    def close(self) -> int:
        """Close the sockets; return how many frames they have lost, those included that nobody has read."""
        lost = sum(sock.lost() + sock.unread() for sock in self.sockets)
        for sock in self.sockets:
            sock.close()
        self.sockets = []
        return lost


_L = TypeVar("_L", bound=Line[Any, Any])


class Crew(ABC, Generic[_L]):
    """The base of engines: `queues`, and a worker for each. Interfaces are called by the names that were given."""

    def __init__(self, tables: Tables, clock: Clock) -> None:
        self._tables = tables
        self._clock = clock
        self._hops: Hops | None = None
        self._masquerading: Masquerading | None = None
        self._datagrams = new_fragments()
        self._lines: dict[str, _L] = {}
        self._workers: Sequence[Thread] = []
        self.queues: list[Queue] = []
        self._following = threading.Lock()
        self._is_over = False  # a `follow` that comes late, in its thread, changes nothing any more
        self._closing = threading.Lock()  # losses are read while sockets are being closed
        self._lost_before = 0  # by sockets that have been closed

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

    # Beginning.

    @abstractmethod
    def _new_worker(self, line: _L, sock: Any, number: int) -> Thread:
        """Return a worker for a socket of a line."""

    def _new_node(self, interface: Interface) -> Node:
        """Return what the packet loop of a worker at an interface reads and writes."""
        assert self._hops is not None
        node = new_node(self._tables, self._hops, self._masquerading, self._datagrams)
        set_link(node, interface)
        return node

    def _start_all(self, hops: Hops, masquerading: Masquerading) -> None:
        """Start a worker for every socket."""
        self._hops, self._masquerading = hops, masquerading
        for line in self._lines.values():
            self._start_workers(line)

    def _start_workers(self, line: _L) -> None:
        """Have a worker run for every socket of a line. What came to no end the last time is done now."""
        taken = {worker.number for worker in self._workers}
        free = (number for number in range(Limit.MAX_WORKERS) if number not in taken)
        try:
            for sock, number in zip(line.sockets[len(line.workers) :], free, strict=False):
                line.workers.append(self._new_worker(line, sock, number))
        finally:
            self._list_workers()
        self._run([worker for worker in line.workers if not worker.has_begun])

    def _list_workers(self) -> None:
        self._workers = [worker for line in self._lines.values() for worker in line.workers]
        self.queues = [Queue(line.interface, n) for line in self._lines.values() for n in range(len(line.workers))]

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

    # Keeping up.

    def is_in_step(self, given: Mapping[str, Interface]) -> bool:
        """Return whether `follow` would find nothing to do: a few system calls for each interface."""
        return all(self._is_served(line, given.get(name)) for name, line in self._lines.items())

    def _is_served(self, line: _L, link: Interface | None) -> bool:
        return link is not None and link == line.interface and not line.why and line.suits(link)

    def follow(self, given: Mapping[str, Interface], flows: FlowTable) -> None:
        """Bring all that serves the interfaces in line with what they are now.

        Trouble with one of them is told in `complaints`, and tried again with the next call; the others go on.
        """
        with self._following:
            if self._is_over:
                return
            self._make_room(given, flows)
            for line in self._lines.values():
                before = line.why
                try:
                    line.why = self._follow(line, given.get(line.name), flows)
                except (Error, OSError) as error:
                    line.why = _in_words(line.name, error)
                if line.why != before:
                    level = logging.WARNING if line.why else logging.INFO
                    log.log(level, "%s", line.why or f"{line.name}: served again")

    def _make_room(self, given: Mapping[str, Interface], flows: FlowTable) -> None:
        """Make ready for what the interfaces have become, together."""

    def _follow(self, line: _L, link: Interface | None, flows: FlowTable) -> str:
        """Bring one line up to date; return what is wrong with it."""
        if link is None or not line.suits(link):
            self._leave(line, flows)
        if link is None:
            return f"{line.name}: the interface has gone"
        line.interface = link
        for worker in line.workers:
            set_link(worker.node, link)
        self._serve(line)
        if why := self._shortcoming(line):
            return why
        if link.name != line.name:
            return f"{line.name}: is called {link.name} now; give -i {link.name} at the next start"
        return ""

    @abstractmethod
    def _leave(self, line: _L, flows: FlowTable) -> None:
        """End all that serves a line: its interface has gone, or is another one."""

    @abstractmethod
    def _serve(self, line: _L) -> None:
        """Have all that serves a line, as its interface is now. What failed half-way is brought to its end."""

    def _shortcoming(self, line: _L) -> str:  # noqa: ARG002
        """Return what a line that is served cannot do, in words."""
        return ""

    def complaints(self) -> list[str]:
        """Return what is wrong with the interfaces, in words."""
        return [line.why for line in self._lines.values() if line.why]

    def unfinished(self) -> Iterator[tuple[str, str]]:
        """Yield (interface, words) where packets have come since the last call whose checksums nobody finishes."""
        yield from ()

    def lost(self) -> int:
        """Return how many frames the sockets have lost; with the workers stopped, those unread are lost too."""
        with self._closing:
            sockets = [sock for line in self._lines.values() for sock in line.sockets]
            unread: int = 0 if self._workers else sum(sock.unread() for sock in sockets)
            lost: int = sum(sock.lost() for sock in sockets)
            return self._lost_before + unread + lost

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

    # Ending.

    def stop_workers(self) -> None:
        """End the packet loops."""
        with self._following:
            self._is_over = True
        self._end_workers(self._lines.values())

    def _end_workers(self, lines: Collection[_L]) -> list[Any]:
        """End the workers of lines, while all others go on; return them."""
        workers = [worker for line in lines for worker in line.workers]
        for line in lines:
            line.workers = []
        self._list_workers()
        for worker in workers:
            worker.stop()
        return workers

    def _close_sockets(self, lines: Collection[_L]) -> None:
        """Close the sockets of lines, which have no workers any more."""
        with self._closing:
            self._lost_before += sum(line.close() for line in lines)


def _in_words(name: str, error: Error | OSError) -> str:
    """Return what keeps an interface from being served, its name first."""
    return str(error) if str(error).startswith((f"{name}: ", f"{name} ")) else f"{name}: {error}"


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
