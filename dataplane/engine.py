"""Engines `xdp` and `afxdp`: an XDP program on every interface, an AF_XDP socket and a worker for every queue.

They differ in one compile-time constant: with `xdp` the program forwards the packets of known flows itself, with
`afxdp` it hands them to userspace.

Interfaces come, go and change while the node runs: `follow` brings sockets, workers and programs in line with what is
there now, one interface after the other. The others are not disturbed: a packet loop may transmit on any socket, so one
is closed only after it has left the ports and every loop has turned since.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from conntrack.table import FlowTable
from dataplane import vlans, wire
from dataplane.afxdp import Socket, Umem
from dataplane.context import Masquerading, new_node
from dataplane.crew import Crew, Queue, in_words, need_ethernet, set_link
from dataplane.fragments import new_fragments
from dataplane.handback import open_handback
from dataplane.hops_compiled import Hops
from dataplane.loop import new_ports, open_port, shut_port
from dataplane.netdev import Interface
from dataplane.offloads import Offloads
from dataplane.settings import PRIORITY_VLAN, Settings
from dataplane.worker import Worker
from xdp import kernel, loader, stages
from xdp.clock import Clock
from xdp.errors import AttachError, Error, MissingFeatureError, UsageError
from xdp.loader import Attachment
from xdp.maps import SharedMaps
from xdp.schema import Limit

_EGRESS_PROGRAM = stages.SOURCE.with_name("egress.c")
_CHUNKS_PER_QUEUE = 8192
_CHUNKS_LEAST = 4096  # of a queue: a full fill ring, and as much again to work with

log = logging.getLogger(__name__)


@dataclass
class Line:
    """An interface that was given: as it is now, with a socket and a worker for every queue.

    `handback` gives frames of the workers to the kernel. `why` says what keeps it from being served as it should; it is
    empty if nothing does.
    """

    interface: Interface
    sockets: list[Socket] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    handback: socket.socket | None = None
    why: str = ""


class Engine(Crew):
    """The programs, sockets and workers of a node.

    `prepare` does what may fail without touching what runs; `start` attaches last, and leaves no trace if it fails;
    `follow` keeps up with the interfaces, in any thread. `stop` ends workers and sockets; programs, links and tables
    stay and go on forwarding known flows until `detach`. Interfaces are called by the names that were given.
    """

    def __init__(self, settings: Settings, shared: SharedMaps, clock: Clock) -> None:
        super().__init__(shared.tables, clock)
        self._settings = settings
        self._shared = shared
        self._program = -1
        self._program_id = 0
        self._egress = -1
        self._egress_id = 0
        self._hops: Hops | None = None
        self._masquerading: Masquerading | None = None
        self._umem: Umem | None = None
        self._ports = new_ports()
        self._datagrams = new_fragments()
        self._offloads = Offloads(settings.offloads_path)
        self._lines: dict[str, Line] = {}
        self._following = threading.Lock()
        self._is_over = False  # a `follow` that comes late, in its thread, changes nothing any more
        self._closing = threading.Lock()  # losses are read while sockets are being closed
        self._lost_before = 0  # by sockets that have been closed
        self.attachments: dict[str, Attachment] = {}
        self.egress_attachments: dict[str, Attachment] = {}

    @property
    def name(self) -> str:
        """The engine's name: `xdp` or `afxdp`."""
        return "afxdp" if self._settings.engine == "afxdp" else "xdp"

    @property
    def serves_through_kernel(self) -> bool:
        """Whether requests may be left to the kernel to route: their replies are translated as they leave."""
        return self._egress >= 0

    @property
    def redirects_natively(self) -> bool:
        """Whether a driver that takes no redirected frames loses them."""
        return self.offloads and any(attachment.mode == "native" for attachment in self.attachments.values())

    @property
    def offloads(self) -> bool:
        """Whether XDP forwards known flows by itself."""
        return self.name == "xdp"

    def prepare(self, interfaces: Sequence[Interface]) -> None:
        """Load the program and open the sockets of `interfaces`; nothing is attached yet."""
        self._load()
        self._load_egress(interfaces[0])
        self._umem = Umem(*_umem_size(interfaces))
        for interface in interfaces:
            need_ethernet(interface)
            longest = _longest_mtu(self._umem)
            if interface.mtu > longest:
                raise AttachError(f"{interface.name}: {_does_not_fit(interface, longest)}")
            line = self._lines[interface.name] = Line(interface)
            self._open_sockets(line)

    def start(self, hops: Hops, masquerading: Masquerading) -> None:
        """Start the workers and attach. On an error nothing stays attached that was not before."""
        self._hops, self._masquerading = hops, masquerading
        for key in list(kernel.map_keys(self._shared.queues_fd, 8)):  # of an earlier daemon
            kernel.map_delete(self._shared.queues_fd, key)
        for line in self._lines.values():
            self._start_workers(line)
        self._attach_all()

    # A line's beginning and end.

    def _open_sockets(self, line: Line) -> None:
        """Open a socket for every queue that has none."""
        assert self._umem is not None
        for index in range(len(line.sockets), line.interface.rx_queues):
            if len(self._umem.sockets) == Limit.MAX_WORKERS:
                raise UsageError(
                    f"{line.interface.name} queue {index}: a node serves {Limit.MAX_WORKERS} queues in all; "
                    "reduce them with `ethtool -L`"
                )
            line.sockets.append(self._umem.open(line.interface.name, index))

    def _start_workers(self, line: Line) -> None:
        """Start a worker for every socket that has none, and tell XDP of it."""
        assert self._umem is not None
        assert self._hops is not None
        if line.handback is None:
            try:
                line.handback = open_handback(line.interface.name)
            except OSError as error:
                raise AttachError(f"{line.interface.name}: no packet socket ({error.strerror})") from None
        fresh = []
        for sock in line.sockets[len(line.workers) :]:
            number = next(number for number in range(Limit.MAX_WORKERS) if not self._ports[number]["ifindex"])
            open_port(self._ports, number, line.interface.ifindex, sock.queue)
            node = new_node(self._shared.tables, self._hops, self._masquerading, self._datagrams)
            set_link(node, line.interface)
            node.link[0]["kernel"] = line.handback.fileno()
            worker = Worker(node, number, self._ports, number, sock, self._umem.new_pool(), self._clock)
            line.workers.append(worker)
            fresh.append(worker)
        self._list_workers()
        self._run(fresh)
        for worker in fresh:
            key = struct.pack("=I", worker.number)
            kernel.map_update(self._shared.sockets_fd, key, struct.pack("=I", worker.sock.fd))
            place = struct.pack("=II", line.interface.ifindex, worker.sock.queue_id)
            kernel.map_update(self._shared.queues_fd, place, key)

    def _close(self, lines: Collection[Line], flows: FlowTable) -> None:
        """End workers and sockets, while all other loops go on."""
        workers = [worker for line in lines for worker in line.workers]
        for line in lines:
            for worker in line.workers:  # first of all XDP must not punt there any more
                place = struct.pack("=II", line.interface.ifindex, worker.sock.queue_id)
                kernel.map_delete(self._shared.queues_fd, place)
            line.workers = []
        self._list_workers()
        for worker in workers:
            worker.stop()
            shut_port(self._ports, worker.number)
        flows.wait_for_grace()  # of XDP runs that have found the queue, and of loops that have found the port
        with self._closing:
            for line in lines:
                for sock in line.sockets:
                    self._lost_before += sock.statistics().lost + sock.unread()
                    sock.close()
                line.sockets = []
                if line.handback is not None:
                    line.handback.close()
                    line.handback = None
        for worker in workers:
            self._umem.drop_pool(worker.pool)  # type: ignore[union-attr]

    def _list_workers(self) -> None:
        lines = [line for line in self._lines.values() for _ in line.workers]
        workers = [worker for line in self._lines.values() for worker in line.workers]
        self._workers = workers
        self.queues = [Queue(line.interface, worker.sock.queue_id) for line, worker in zip(lines, workers, strict=True)]

    # Programs.

    def _load(self) -> None:
        before = self._program
        self._program = stages.load(self._shared, offloads=self.offloads)
        self._program_id = kernel.prog_info(self._program).id
        if before >= 0:
            os.close(before)

    def _load_egress(self, interface: Interface) -> None:
        """Load the program for frames that leave, and try it: a kernel without tcx takes the program, and no link."""
        try:
            self._egress = loader.load(self._shared.folder, _EGRESS_PROGRAM, "tc_egress", kind="tc")
            self._egress_id = kernel.prog_info(self._egress).id
            os.close(kernel.link_create_egress(self._egress, interface.ifindex))
        except MissingFeatureError as error:
            self.why_no_egress = str(error)
            if self._egress >= 0:
                os.close(self._egress)
                self._egress = -1

    def _attach_all(self) -> None:
        settings = self._settings
        try:
            for name in self._lines:
                self._attach(name)
        except BaseException:
            for attachment in (*self.attachments.values(), *self.egress_attachments.values()):
                if not attachment.was_replaced:
                    loader.detach(attachment.pin)
            for line in self._lines.values():
                if not settings.link_pin(line.interface.name).exists():  # where nothing was before, either
                    self._offloads.restore([line.interface.ifindex])
            raise
        wanted = {pin(name) for name in self._lines for pin in (settings.link_pin, settings.egress_pin)}
        for pin in (*settings.link_pins(), *settings.egress_pins()):
            if pin not in wanted:
                loader.detach(pin)  # an interface that is no longer given

    def _attach(self, name: str) -> None:
        interface, ifindex = self._lines[name].interface.name, self._lines[name].interface.ifindex
        pin = self._settings.link_pin(interface)
        self._offloads.switch_off(ifindex, "rxvlan")
        if any(last > PRIORITY_VLAN for _first, last in self._settings.vlans):
            self._offloads.switch_off(ifindex, "vlanfilter")
        else:
            self._offloads.restore([ifindex], ["vlanfilter"])
        attachment = loader.attach(self._program, interface, self._settings.xdp_mode, pin)
        self.attachments[name] = attachment
        self._suit_gro(attachment)
        self._attach_egress(name)

    def _suit_gro(self, attachment: Attachment) -> None:
        """Have GRO off where it is in the program's way."""
        if attachment.mode == "generic":
            self._offloads.switch_off(attachment.ifindex, "gro")
        else:
            self._offloads.restore([attachment.ifindex], ["gro"])

    def _attach_egress(self, name: str) -> None:
        if self.serves_through_kernel:
            interface = self._lines[name].interface.name
            pin = self._settings.egress_pin(interface)
            self.egress_attachments[name] = loader.attach_egress(self._egress, interface, pin)

    # Keeping up.

    def is_in_step(self, given: Mapping[str, Interface]) -> bool:
        """Return whether `follow` would find nothing to do: a few system calls for each interface."""
        return all(self._is_in_step(name, line, given.get(name)) for name, line in self._lines.items())

    def _is_in_step(self, name: str, line: Line, link: Interface | None) -> bool:
        attachment = self.attachments.get(name)
        return (
            link == line.interface
            and not line.why
            and attachment is not None
            and len(line.workers) == link.rx_queues
            and not any(sock.is_dead() for sock in line.sockets)
            and loader.is_attached(attachment, self._program_id)
            and self._is_egress_attached(name)
        )

    def _is_egress_attached(self, name: str) -> bool:
        if not self.serves_through_kernel:
            return True
        attachment = self.egress_attachments.get(name)
        return attachment is not None and loader.is_attached(attachment, self._egress_id)

    def follow(self, given: Mapping[str, Interface], flows: FlowTable) -> None:
        """Bring sockets, workers and programs in line with the interfaces, by the names that were given.

        Trouble with one of them is told in `why`, and tried again with the next call; the others go on.
        """
        with self._following:
            if not self._is_over:
                self._follow_all(given, flows)

    def _follow_all(self, given: Mapping[str, Interface], flows: FlowTable) -> None:
        self._make_room(given, flows)
        for name, line in self._lines.items():
            before = line.why
            try:
                line.why = self._follow(name, line, given.get(name), flows)
            except (Error, OSError) as error:
                line.why = in_words(name, error)
            if line.why != before:
                log.log(logging.WARNING if line.why else logging.INFO, "%s", line.why or f"{name}: served again")

    def _follow(self, name: str, line: Line, link: Interface | None, flows: FlowTable) -> str:
        """Bring one line up to date; return what is wrong with it."""
        attachment = self.attachments.get(name)
        if link is None or link.ifindex != line.interface.ifindex or any(sock.is_dead() for sock in line.sockets):
            if line.sockets:
                self._close([line], flows)
            if attachment is not None:
                with contextlib.suppress(kernel.KernelError):  # it may live on in another namespace
                    loader.detach(attachment.pin)
                    self._offloads.restore([attachment.ifindex])
                del self.attachments[name]
            if (egress := self.egress_attachments.pop(name, None)) is not None:
                with contextlib.suppress(kernel.KernelError):
                    loader.detach(egress.pin)
            attachment = None
        if link is None:
            return f"{name}: the interface has gone"
        if attachment is not None and link.name != attachment.interface:
            pin = self._settings.link_pin(link.name)
            attachment = self.attachments[name] = loader.rename(attachment, link.name, pin)
            if (egress := self.egress_attachments.get(name)) is not None:
                pin = self._settings.egress_pin(link.name)
                self.egress_attachments[name] = loader.rename(egress, link.name, pin)
        line.interface = link
        for worker in line.workers:
            set_link(worker.node, link)
        need_ethernet(link)
        self._open_sockets(line)
        if len(line.workers) < len(line.sockets):
            has_more_queues = bool(line.workers)
            self._start_workers(line)
            if has_more_queues:
                # A veth does not run its program on queues that it gets later, and the kernel does not let the same
                # program replace itself: so another copy of it does, on all interfaces, without a gap.
                self._load()
        if attachment is None or not loader.is_attached(attachment, self._program_id):
            self.attachments.pop(name, None)
            self._attach(name)
            if attachment is not None and not self.attachments[name].was_replaced:
                log.warning("%s: its XDP program had been taken off; it is back", name)
        else:
            self._suit_gro(attachment)  # it may not have come so far the last time
        if not self._is_egress_attached(name):
            self._attach_egress(name)
        return self._complaint(name, link)

    def _complaint(self, name: str, link: Interface) -> str:
        assert self._umem is not None
        longest = _longest_mtu(self._umem)
        if link.mtu > longest:
            return f"{name}: {_does_not_fit(link, longest)}"
        if link.name != name:
            return f"{name}: is called {link.name} now; give -i {link.name} at the next start"
        return ""

    def _make_room(self, given: Mapping[str, Interface], flows: FlowTable) -> None:
        """Make the memory for frames anew if it is too small for what the interfaces have become.

        It cannot grow while sockets use it: all are closed, and `follow` opens them again. XDP forwards meanwhile.
        """
        assert self._umem is not None
        wanted = _umem_size(list(given.values()))
        queues = sum(link.rx_queues for link in given.values())
        room = self._umem.chunks - self._umem.lost_chunks
        if wanted.chunk_bytes <= self._umem.chunk_bytes and queues * _CHUNKS_LEAST <= room:
            return
        self._close(self._lines.values(), flows)
        self._umem.close()
        self._umem = Umem(*wanted)

    def complaints(self) -> list[str]:
        """Return what is wrong with the interfaces, in words."""
        return [line.why for line in self._lines.values() if line.why] + self._offloads.complaints()

    def lost(self) -> int:
        """Return how many punted frames the sockets have lost; with the workers stopped, those unread are lost too."""
        with self._closing:
            sockets = self._umem.sockets if self._umem else []
            unread = 0 if self._workers else sum(sock.unread() for sock in sockets)
            return self._lost_before + unread + sum(sock.statistics().lost for sock in sockets)

    def stop_workers(self) -> None:
        """End the packet loops."""
        with self._following:
            self._is_over = True
        super().stop_workers()

    def stop(self) -> None:
        """End workers and sockets. Programs and tables stay."""
        self.stop_workers()
        if self._umem is not None:
            self._umem.close()
            self._umem = None
        for line in self._lines.values():
            if line.handback is not None:
                line.handback.close()
                line.handback = None
        if self._program >= 0:
            os.close(self._program)
            self._program = -1
        if self._egress >= 0:
            os.close(self._egress)
            self._egress = -1

    def detach(self) -> None:
        """Take the programs off the interfaces."""
        for attachment in (*self.egress_attachments.values(), *self.attachments.values()):
            with contextlib.suppress(kernel.KernelError):  # the interface went first, and its link with it
                loader.detach(attachment.pin)
        self._offloads.restore()
        self.attachments, self.egress_attachments = {}, {}


class _UmemSize(NamedTuple):
    chunks: int
    chunk_bytes: int


def _umem_size(interfaces: Sequence[Interface]) -> _UmemSize:
    """Return how much memory the interfaces need."""
    queues = sum(interface.rx_queues for interface in interfaces)
    is_small = max((interface.mtu for interface in interfaces), default=0) <= 1500
    return _UmemSize(_CHUNKS_PER_QUEUE * max(queues, 1), 2048 if is_small else 4096)


def _longest_mtu(umem: Umem) -> int:
    return umem.frame_bytes - wire.ETHERNET_BYTES - vlans.MOST_BYTES


def _does_not_fit(interface: Interface, longest: int) -> str:
    return (
        f"MTU {interface.mtu} does not fit into an AF_XDP frame; `ip link set {interface.name} mtu {longest}` or less"
    )
