"""Engines `xdp` and `afxdp`: an XDP program on every interface, an AF_XDP socket and a worker for every queue.

They differ in one compile-time constant: with `xdp` the program forwards the packets of known flows itself, with
`afxdp` it hands them to userspace.

A packet loop may transmit on any socket, so one is closed only after it has left the ports and every loop has turned
since.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from conntrack.table import FlowTable
from dataplane import crew, vlans, wire
from dataplane.afxdp import Mode, NoZeroCopyError, Socket, Umem
from dataplane.checksums import Checksums, begun
from dataplane.context import Masquerading
from dataplane.crew import need_ethernet
from dataplane.handback import open_handback
from dataplane.hops_compiled import Hops
from dataplane.loop import new_ports, open_port, shut_port
from dataplane.netdev import Interface
from dataplane.offloads import Offloads
from dataplane.settings import PRIORITY_VLAN, Settings
from dataplane.worker import Worker
from xdp import kernel, links, loader, stages
from xdp.clock import Clock
from xdp.errors import AttachError, KernelError, MissingFeatureError, UsageError
from xdp.loader import Attachment, WantedMode
from xdp.maps import SharedMaps
from xdp.schema import Limit

_EGRESS_PROGRAM = stages.SOURCE.with_name("egress.c")
_CHUNKS_PER_QUEUE = 8192
_CHUNKS_LEAST = 4096  # of a queue: a full fill ring, and as much again to work with

log = logging.getLogger(__name__)


@dataclass
class Line(crew.Line[Socket, Worker]):
    """An interface with its AF_XDP sockets. `handback` gives frames of the workers to the kernel."""

    handback: socket.socket | None = None

    def close(self) -> int:
        """Close the sockets; return how many frames they have lost, those included that nobody has read."""
        if self.handback is not None:
            self.handback.close()
            self.handback = None
        return super().close()


class Engine(crew.Crew[Line]):
    """The programs, sockets and workers of a node.

    `prepare` does what may fail without touching what runs; `start` attaches last, and leaves no trace if it fails;
    `follow` keeps up with the interfaces, in any thread. `stop` ends workers and sockets; programs, links and tables
    stay and go on forwarding known flows until `detach`.
    """

    def __init__(self, settings: Settings, shared: SharedMaps, clock: Clock) -> None:
        super().__init__(shared.tables, clock)
        self._settings = settings
        self._shared = shared
        self._program = -1
        self._program_id = 0
        self._egress = -1
        self._egress_id = 0
        self._umem: Umem | None = None
        self._socket_mode: Mode = "auto"  # of all sockets: the first decides, and all must be able to
        self._ports = new_ports()
        self._offloads = Offloads(settings.offloads_path)
        self._checksums = Checksums()
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
            mode_for(interface, self._settings.xdp_mode)
            longest = _longest_mtu(self._umem)
            if interface.mtu > longest:
                raise AttachError(f"{interface.name}: {_does_not_fit(interface, longest)}")
            self._lines[interface.name] = Line(interface.name, interface)
        try:
            self._open_all()
        except NoZeroCopyError:
            self._close_sockets(self._lines.values())
            self._umem.close()
            self._umem = Umem(*_umem_size(interfaces), mode=self._socket_mode)
            self._open_all()

    def start(self, hops: Hops, masquerading: Masquerading) -> None:
        """Start the workers and attach. On an error nothing stays attached that was not before."""
        for key in list(kernel.map_keys(self._shared.queues_fd, 8)):  # of an earlier daemon
            kernel.map_delete(self._shared.queues_fd, key)
        self._start_all(hops, masquerading)
        self._attach_all()

    # A line's beginning and end.

    def _open_all(self) -> None:
        for line in self._lines.values():
            self._open_sockets(line)

    def _open_sockets(self, line: Line) -> None:
        """Open a socket for every queue that has none.

        NoZeroCopyError: others are zero-copy, and this one cannot be; all are to be in copy mode, with a new memory.
        """
        assert self._umem is not None
        for index in range(len(line.sockets), line.interface.rx_queues):
            if len(self._umem.sockets) == Limit.MAX_WORKERS:
                raise UsageError(
                    f"{line.interface.name} queue {index}: a node serves {Limit.MAX_WORKERS} queues in all; "
                    "reduce them with `ethtool -L`"
                )
            try:
                line.sockets.append(self._umem.open(line.interface.name, index))
            except NoZeroCopyError as error:
                log.warning("%s; all interfaces are served in copy mode", error)
                self._socket_mode = "copy"
                raise

    def _new_worker(self, line: Line, sock: Socket, number: int) -> Worker:
        assert self._umem is not None
        assert line.handback is not None
        node = self._new_node(line.interface)
        node.link[0]["kernel"] = line.handback.fileno()
        worker = Worker(node, number, self._ports, number, sock, self._umem.new_pool(), self._clock)
        self._suit_port(line, worker)
        return worker

    def _suit_port(self, line: Line, worker: Worker) -> None:
        """Let the loops transmit on a worker's queue if the interface has such a queue to send by.

        One may have more to receive by. A loop whose own queue is none of the ports takes another of the interface.
        """
        if worker.sock.queue_id < line.interface.tx_queues:
            open_port(self._ports, worker.number, line.interface.ifindex, worker.sock.queue)
        else:
            shut_port(self._ports, worker.number)

    def _start_workers(self, line: Line) -> None:
        """Have a worker run for every socket, and tell XDP of it."""
        if line.handback is None:
            try:
                line.handback = open_handback(line.interface.name)
            except OSError as error:
                raise AttachError(f"{line.interface.name}: no packet socket ({error.strerror})") from None
        super()._start_workers(line)
        for worker in line.workers:
            key = struct.pack("=I", worker.number)
            kernel.map_update(self._shared.sockets_fd, key, struct.pack("=I", worker.sock.fd))
            kernel.map_update(self._shared.queues_fd, _place_of(line, worker), key)

    def _close(self, lines: Collection[Line], flows: FlowTable) -> None:
        """End workers and sockets, while all other loops go on."""
        for line in lines:
            for worker in line.workers:  # first of all XDP must not punt there any more
                kernel.map_delete(self._shared.queues_fd, _place_of(line, worker))
        workers = self._end_workers(lines)
        for worker in workers:
            shut_port(self._ports, worker.number)
        flows.wait_for_grace()  # of XDP runs that have found the queue, and of loops that have found the port
        self._close_sockets(lines)
        for worker in workers:
            self._umem.drop_pool(worker.pool)  # type: ignore[union-attr]

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
            os.close(links.create_egress(self._egress, interface.ifindex))
        except MissingFeatureError as error:
            self.why_no_egress = str(error)
            if self._egress >= 0:
                os.close(self._egress)
                self._egress = -1

    def _attach_all(self) -> None:
        settings = self._settings
        try:
            for line in self._lines.values():
                self._attach(line)
            self._suit_gro()
        except BaseException:
            for attachment in (*self.attachments.values(), *self.egress_attachments.values()):
                if not attachment.was_replaced:
                    loader.detach(attachment.pin)
            # Those that nothing was on before, either.
            left = [line.name for line in self._lines.values() if not settings.link_pin(line.interface.name).exists()]
            kept = self._passed(self._lines.keys() - left)
            self._offloads.restore(set(self._passed(left)).difference(kept))
            raise
        wanted = {pin(name) for name in self._lines for pin in (settings.link_pin, settings.egress_pin)}
        for pin in (*settings.link_pins(), *settings.egress_pins()):
            if pin not in wanted:
                loader.detach(pin)  # an interface that is no longer given

    def _attach(self, line: Line) -> None:
        interface, ifindex = line.interface.name, line.interface.ifindex
        pin = self._settings.link_pin(interface)
        self._offloads.switch_off(ifindex, "rxvlan")
        if any(last > PRIORITY_VLAN for _first, last in self._settings.vlans):
            self._offloads.switch_off(ifindex, "vlanfilter")
        else:
            self._offloads.restore([ifindex], ["vlanfilter"])
        mode, why = mode_for(line.interface, self._settings.xdp_mode)
        attachment = loader.attach(self._program, interface, mode, pin)
        self.attachments[line.name] = replace(attachment, why=why) if why else attachment
        self._attach_egress(line)

    def _suit_gro(self) -> None:
        """Have GRO off where it is in a program's way, the lowest devices first, and nowhere else."""
        generic = [name for name, attachment in self.attachments.items() if attachment.mode == "generic"]
        self._offloads.keep_off("gro", self._passed(generic))

    def _passed(self, names: Iterable[str]) -> list[int]:
        """Return the devices that frames come through on their way to lines, these last."""
        links = [self._lines[name].interface for name in names]
        return list(dict.fromkeys(number for link in links for number in (*link.beneath, link.ifindex)))

    def _attach_egress(self, line: Line) -> None:
        if self.serves_through_kernel:
            interface = line.interface.name
            pin = self._settings.egress_pin(interface)
            self.egress_attachments[line.name] = loader.attach_egress(self._egress, interface, pin)

    # Keeping up.

    def _is_served(self, line: Line, link: Interface | None) -> bool:
        attachment = self.attachments.get(line.name)
        return (
            super()._is_served(line, link)
            and attachment is not None
            and len(line.workers) == line.interface.rx_queues
            and loader.is_attached(attachment, self._program_id)
            and self._is_egress_attached(line)
        )

    def _is_egress_attached(self, line: Line) -> bool:
        if not self.serves_through_kernel:
            return True
        attachment = self.egress_attachments.get(line.name)
        return attachment is not None and loader.is_attached(attachment, self._egress_id)

    def _leave(self, line: Line, flows: FlowTable) -> None:
        if line.sockets:
            self._close([line], flows)
        if (attachment := self.attachments.pop(line.name, None)) is not None:
            with contextlib.suppress(KernelError):  # it may live on in another namespace
                loader.detach(attachment.pin)
                self._offloads.restore([attachment.ifindex])
            self._suit_gro()
        if (egress := self.egress_attachments.pop(line.name, None)) is not None:
            with contextlib.suppress(KernelError):
                loader.detach(egress.pin)

    def _serve(self, line: Line) -> None:
        attachment = self._renamed(line)
        need_ethernet(line.interface)
        self._open_sockets(line)
        for worker in line.workers:
            self._suit_port(line, worker)
        if 0 < len(line.workers) < len(line.sockets):
            # A veth does not run its program on queues that it gets later, and the kernel does not let the same program
            # replace itself: so another copy of it does, on all interfaces, without a gap.
            self._load()
        self._start_workers(line)
        if attachment is None or not loader.is_attached(attachment, self._program_id):
            self.attachments.pop(line.name, None)
            self._attach(line)
            if attachment is not None and not self.attachments[line.name].was_replaced:
                log.warning("%s: its XDP program had been taken off; it is back", line.name)
        self._suit_gro()
        if not self._is_egress_attached(line):
            self._attach_egress(line)

    def _renamed(self, line: Line) -> Attachment | None:
        """Return how a line is attached, with pins that are called as its interface is now."""
        name, interface = line.name, line.interface.name
        attachment = self.attachments.get(name)
        if attachment is not None and interface != attachment.interface:
            pin = self._settings.link_pin(interface)
            attachment = self.attachments[name] = loader.rename(attachment, interface, pin)
            if (egress := self.egress_attachments.get(name)) is not None:
                pin = self._settings.egress_pin(interface)
                self.egress_attachments[name] = loader.rename(egress, interface, pin)
        return attachment

    def _shortcoming(self, line: Line) -> str:
        assert self._umem is not None
        longest = _longest_mtu(self._umem)
        return f"{line.name}: {_does_not_fit(line.interface, longest)}" if line.interface.mtu > longest else ""

    def _make_room(self, given: Mapping[str, Interface], flows: FlowTable) -> None:
        """Make the memory for frames anew if it is too small for what the interfaces have become, or of another mode.

        It cannot grow while sockets use it: all are closed, and `follow` opens them again. XDP forwards meanwhile.
        """
        assert self._umem is not None
        wanted = _umem_size(list(given.values()))
        queues = sum(link.rx_queues for link in given.values())
        room = self._umem.chunks - self._umem.lost_chunks
        is_large_enough = wanted.chunk_bytes <= self._umem.chunk_bytes and queues * _CHUNKS_LEAST <= room
        if is_large_enough and self._umem.mode == self._socket_mode:
            return
        self._close(self._lines.values(), flows)
        self._umem.close()
        self._umem = Umem(*wanted, mode=self._socket_mode)

    def unfinished(self) -> Iterator[tuple[str, str]]:
        """Yield (interface, words) where packets have come since the last call whose checksums nobody finishes."""
        yield from self._checksums.news(
            {line.interface.name: begun([each.node.link[0] for each in line.workers]) for line in self._lines.values()}
        )

    def complaints(self) -> list[str]:
        """Return what is wrong with the interfaces, in words."""
        return super().complaints() + self._offloads.complaints()

    # Ending.

    def stop(self) -> None:
        """End workers and sockets. Programs and tables stay."""
        self.stop_workers()
        self._close_sockets(self._lines.values())
        if self._umem is not None:
            self._umem.close()
            self._umem = None
        if self._program >= 0:
            os.close(self._program)
            self._program = -1
        if self._egress >= 0:
            os.close(self._egress)
            self._egress = -1

    def detach(self) -> None:
        """Take the programs off the interfaces."""
        for attachment in (*self.egress_attachments.values(), *self.attachments.values()):
            with contextlib.suppress(KernelError):  # the interface went first, and its link with it
                loader.detach(attachment.pin)
        self._offloads.restore()
        self.attachments, self.egress_attachments = {}, {}


def _place_of(line: Line, worker: Worker) -> bytes:
    """Return the queue of a worker as XDP looks it up."""
    return struct.pack("=II", line.interface.ifindex, worker.sock.queue_id)


def mode_for(interface: Interface, wanted: WantedMode) -> tuple[WantedMode, str]:
    """Return the mode to attach in, and why it is another than the one that is wanted. AttachError: there is none.

    Bonding and hv_netvsc, if it has a virtual function, hand a native program on to their ports. There it finds the
    ports' numbers and queues, which we have no sockets for: nothing would ever reach userspace.
    """
    is_handed_on = interface.kind == "bond" or (not interface.kind and bool(interface.beneath))
    if wanted == "generic" or not is_handed_on:
        return wanted, ""
    why = "a native XDP program would run on its ports, where no frame can be handed to userspace"
    if wanted == "native":
        raise AttachError(f"{interface.name}: {why}; give it with --xdp-mode generic, or the ports with -i")
    return "generic", why


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
