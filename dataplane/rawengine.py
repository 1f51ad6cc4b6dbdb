"""Engine `raw`: packet sockets and workers on every interface, and a filter that drops the originals. No BPF.

Nothing forwards while no worker runs. The filter goes when the daemon ends, unless it is told to keep everything: then
packets of Services are dropped until a successor comes, and connections outlast the change. What a killed daemon
leaves is the same; its successor, or `turnout detach`, removes it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from conntrack.table import FlowTable
from dataplane.context import Masquerading, new_node
from dataplane.crew import Crew, Queue, in_words, need_ethernet, set_link
from dataplane.fragments import new_fragments
from dataplane.hops_compiled import Hops
from dataplane.ingress import Filter, Places, need_nft
from dataplane.netdev import Interface, has_lro
from dataplane.originals import Kind, Place, new_originals, publish
from dataplane.rawsock import PacketSocket
from dataplane.settings import Settings
from dataplane.worker import RawWorker
from lb.rows import ServiceRow
from xdp.addresses import IPAddress, address_of, is_ipv6, number_of
from xdp.byteorder import swap16, swap32
from xdp.clock import Clock
from xdp.errors import AttachError, Error, UsageError
from xdp.names import Names
from xdp.schema import Limit, Protocol
from xdp.tables import Capacity, Tables

_OWN_ADDRESSES = 1024  # of a node, that there is room for
_ECHOES = (Protocol.ICMP, Protocol.ICMPV6)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attachment:
    """An interface that the engine serves, as xdp.loader.Attachment is for a program."""

    ifindex: int
    why: str  # not a better engine
    mode: None = field(default=None)


@dataclass
class Line:
    """An interface that was given: as it is now, with its sockets, and a worker for each.

    `why` says what keeps it from being served as it should, and is empty if nothing does.
    """

    interface: Interface
    sockets: list[PacketSocket] = field(default_factory=list)
    workers: list[RawWorker] = field(default_factory=list)
    why: str = ""


class RawEngine(Crew):
    """The sockets, workers and filter of a node: used as dataplane.engine.Engine is."""

    name = "raw"
    offloads = False
    needs_rows = True
    goes_on_alone = False

    def __init__(
        self, settings: Settings, tables: Tables, capacity: Capacity, clock: Clock, seed: int, why: str
    ) -> None:
        super().__init__(tables, clock)
        self._settings = settings
        self._seed = seed
        self._why = why
        self._hops: Hops | None = None
        self._masquerading: Masquerading | None = None
        self._datagrams = new_fragments()
        self._lines: dict[str, Line] = {}
        self._following = threading.Lock()
        self._is_over = False  # a `follow` that comes late, in its thread, changes nothing any more
        self._closing = threading.Lock()  # losses are read while sockets are being closed
        self._lost_before = 0  # by sockets that have been closed
        self._filter = Filter(settings.name, settings.filter_record, settings.snat_ports, settings.vlans)
        self._names = Names(tables)
        self._numbers: dict[int, int] = {}  # of the IPv6 addresses that are held: pinned, and so nobody else's
        self._is_pinged = settings.ping == "forward"
        self._originals = new_originals(_OWN_ADDRESSES + 2 * capacity.frontends + 3 * capacity.endpoints)
        self._places_lock = threading.Lock()
        self._sparing = threading.Lock()
        self._present = Places()
        self._held = Places()  # what was present, or has connections
        self._occupied: frozenset[int] = frozenset()  # ports that sockets of the node have ...
        self._spared: frozenset[int] = frozenset()  # ... and no masqueraded connection leaves from
        self.attachments: dict[str, Attachment] = {}
        self._is_filtering = False

    def prepare(self, interfaces: Sequence[Interface]) -> None:
        """Open the sockets of `interfaces`; they get nothing yet."""
        need_nft()
        queues = sum(interface.rx_queues for interface in interfaces)
        if queues > Limit.MAX_WORKERS:
            raise UsageError(
                f"{queues} queues on {len(interfaces)} interfaces: a node serves {Limit.MAX_WORKERS}; "
                "reduce them with `ethtool -L`"
            )
        for interface in interfaces:
            line = self._lines[interface.name] = Line(interface)
            _open(line)

    def start(self, hops: Hops, masquerading: Masquerading) -> None:
        """Start the workers, give them packets, and take these from the kernel. On an error nothing stays."""
        self._hops, self._masquerading = hops, masquerading
        for line in self._lines.values():
            self._start_workers(line)
        with self._places_lock:
            self._publish()
        self._put_filter()
        try:
            for name in self._lines:
                self._listen(name)
        except BaseException:
            self._filter.remove()
            raise

    # A line's beginning and end.

    def _start_workers(self, line: Line) -> None:
        assert self._hops is not None
        taken = {worker.number for other in self._lines.values() for worker in other.workers}
        free = (number for number in range(Limit.MAX_WORKERS) if number not in taken)
        for sock, number in zip(line.sockets, free, strict=False):
            node = new_node(self._tables, self._hops, self._seed, self._masquerading, self._datagrams)
            set_link(node, line.interface)
            line.workers.append(RawWorker(node, self._originals, number, sock, self._clock))
        self._list_workers()
        self._run(line.workers)

    def _put_filter(self) -> None:
        """Put the filter on the interfaces that have sockets."""
        with self._places_lock:
            self._filter.start(self._held, [line.interface.name for line in self._lines.values() if line.sockets])
            self._is_filtering = True

    def _listen(self, name: str) -> None:
        """Give the workers of a line its packets."""
        line = self._lines[name]
        group = None
        for sock in line.sockets:
            group = sock.listen(len(line.sockets) > 1, group)
        self.attachments[name] = Attachment(line.interface.ifindex, self._why)

    def _close(self, line: Line) -> None:
        """End workers and sockets, while those of other lines go on."""
        workers, line.workers = line.workers, []
        self._list_workers()
        for worker in workers:
            worker.stop()
        with self._closing:
            self._lost_before += sum(sock.lost() + sock.unread() for sock in line.sockets)
            for sock in line.sockets:
                sock.close()
            line.sockets = []

    def _list_workers(self) -> None:
        self._workers = [worker for line in self._lines.values() for worker in line.workers]
        self.queues = [Queue(line.interface, n) for line in self._lines.values() for n in range(len(line.workers))]

    # What the filter drops.

    def expect(self, rows: Sequence[ServiceRow], own: Collection[IPAddress]) -> None:
        """Take the packets of these Service ports from the kernel, before the tables have them."""
        present = self._places_of(rows, own)
        with self._places_lock:
            self._add(present, present.own)
            self._present = present

    @contextmanager
    def expecting(self, rows: Sequence[ServiceRow], own: Collection[IPAddress]) -> Iterator[None]:
        """The same; after an error, what was taken from the kernel before is kept, and the rest is left with `tidy`."""
        before = self._present
        self.expect(rows, own)
        try:
            yield
        except BaseException:
            with self._places_lock:
                self._present = before
            raise

    def expect_more(self, rows: Sequence[ServiceRow]) -> None:
        """Take the packets of more Service ports from the kernel."""
        with self._places_lock:
            self._add(self._places_of(rows), self._present.own)

    def _add(self, more: Places, own: frozenset[int]) -> None:
        held = self._held
        frontends = more.frontends | held.frontends
        endpoints, answering = more.endpoints | held.endpoints, more.answering | held.answering
        self._change(Places(frontends, held.retired - frontends, endpoints, own, answering))

    def _places_of(self, rows: Sequence[ServiceRow], own: Collection[IPAddress] = ()) -> Places:
        places = _places_of_rows(rows, own)
        answering = {address for address, _, _ in places.endpoints} if self._is_pinged else ()
        return replace(places, answering=frozenset(answering))

    def spare(self, ports: frozenset[int], flows: FlowTable) -> None:
        """Leave to the kernel what endpoints send to these ports, once no masqueraded connection leaves from there."""
        with self._sparing:
            self._occupied = ports
        self._spare(flows)

    def hear(self, stations: frozenset[bytes]) -> None:
        """Take the packets that come by these MAC addresses from the kernel, those of devices on ours among them."""
        with self._places_lock:
            self._filter.hear(stations)

    def _spare(self, flows: FlowTable) -> None:
        with self._sparing:
            if self._occupied == self._spared:
                return
            if self._workers:  # of which one may have looked at a port just before it was occupied
                flows.wait_for_grace()
            spared = self._occupied - _masqueraded_ports(flows)
            with self._places_lock:
                self._filter.spare(spared)
            self._spared = spared

    def tidy(self, flows: FlowTable) -> None:
        """Leave to the kernel what neither Services nor connections have any more; put back a filter that is gone."""
        self._spare(flows)
        if not self._is_filtering or self._held != self._present:
            served, serving = places_of(flows, self._names)
            with self._places_lock:
                present = self._present
                served -= {place for place in served if place[2] in _ECHOES}
                tcp = {place for place in served if place[2] == Protocol.TCP}
                frontends, retired = present.frontends | (served - tcp), frozenset(tcp - present.frontends)
                answering = frozenset(address for address, _, protocol in serving if protocol in _ECHOES)
                endpoints = present.endpoints | frozenset(each for each in serving if each[2] not in _ECHOES)
                self._change(Places(frontends, retired, endpoints, present.own, present.answering | answering))
        with self._places_lock:
            if self._is_filtering:
                self._filter.put_back()

    def _change(self, places: Places) -> None:
        """Hold these places and no others. TableFullError, with nothing changed: there is no room for their names."""
        if places == self._held:
            return
        try:
            self._pin(places)  # first: packet loops are to know whatever the filter drops
            if self._is_filtering:
                self._filter.update(places)
            self._held = places
        finally:
            self._publish()

    def _pin(self, places: Places) -> None:
        """Have names for what packet loops are to know."""
        for address in _named(places) - self._numbers.keys():
            self._numbers[address] = self._names.pin(address_of(address))  # type: ignore[arg-type]

    def _publish(self) -> None:
        """Tell packet loops what is held; let go of the names of all else."""
        places = _of_kinds(self._held)
        publish(self._originals, {kind: map(self._known_as, those) for kind, those in places.items()})
        for address in self._numbers.keys() - _named(self._held):
            self._names.release(self._numbers.pop(address))

    def _known_as(self, place: Place) -> Place:
        """Return a place as packets know it, with the name of an IPv6 address in its stead."""
        address, port, protocol = place
        return (self._numbers[address], port, protocol | Protocol.IPV6) if is_ipv6(address) else place

    # Keeping up.

    def is_in_step(self, given: Mapping[str, Interface]) -> bool:
        """Return whether `follow` would find nothing to do."""
        return all(
            given.get(name) == line.interface and not line.why and not any(sock.is_dead() for sock in line.sockets)
            for name, line in self._lines.items()
        )

    def follow(self, given: Mapping[str, Interface], flows: FlowTable) -> None:  # noqa: ARG002
        """Bring sockets, workers and the filter in line with the interfaces, by the names that were given.

        Trouble with one of them is told in `why`, and tried again with the next call; the others go on.
        """
        with self._following:
            for name, line in self._lines.items() if not self._is_over else ():
                before = line.why
                try:
                    line.why = self._follow(name, line, given.get(name))
                except (Error, OSError) as error:
                    line.why = in_words(name, error)
                if line.why != before:
                    log.log(logging.WARNING if line.why else logging.INFO, "%s", line.why or f"{name}: served again")

    def _follow(self, name: str, line: Line, link: Interface | None) -> str:
        """Bring one line up to date; return what is wrong with it."""
        if link is None:
            self._close(line)
            self.attachments.pop(name, None)
            return f"{name}: the interface has gone"
        is_another = link.ifindex != line.interface.ifindex
        if is_another or any(sock.is_dead() or not sock.takes(link.mtu) for sock in line.sockets):
            self._close(line)
            self.attachments.pop(name, None)
        was_called, line.interface = line.interface.name, link
        for worker in line.workers:
            set_link(worker.node, link)
        if not line.sockets:
            _open(line)
            self._start_workers(line)
        if name not in self.attachments:
            self._put_filter()
            self._listen(name)
        elif link.name != was_called:
            self._put_filter()
        return f"{name}: is called {link.name} now; give -i {link.name} at the next start" if link.name != name else ""

    def complaints(self) -> list[str]:
        """Return what is wrong with the interfaces, in words."""
        return [line.why for line in self._lines.values() if line.why]

    def lost(self) -> int:
        """Return how many frames the sockets have lost; with the workers stopped, those unread are lost too."""
        with self._closing:
            sockets = [sock for line in self._lines.values() for sock in line.sockets]
            unread = 0 if self._workers else sum(sock.unread() for sock in sockets)
            return self._lost_before + unread + sum(sock.lost() for sock in sockets)

    # Ending.

    def stop_workers(self) -> None:
        """End the packet loops."""
        with self._following:
            self._is_over = True
        super().stop_workers()

    def detach(self) -> None:
        """Remove the filter: packets are the kernel's again."""
        with self._places_lock:
            self._is_filtering = False
            self._filter.remove()
        self.attachments = {}

    def stop(self) -> None:
        """End workers and sockets. The filter stays."""
        self.stop_workers()
        for line in self._lines.values():
            line.workers = []
            self._close(line)


def _open(line: Line) -> None:
    """Open a socket for every queue. UsageError or AttachError: the interface is not one that can be served."""
    interface = line.interface
    need_ethernet(interface)
    if has_lro(interface.name):  # it merges packets so that they cannot be cut again
        raise AttachError(f"{interface.name}: large receive offload is on; `ethtool -K {interface.name} lro off`")
    for _ in range(interface.rx_queues):
        line.sockets.append(PacketSocket(interface))


def _places_of_rows(rows: Sequence[ServiceRow], own: Collection[IPAddress] = ()) -> Places:
    frontends, endpoints = set(), set()
    for row in rows:
        frontends |= {(number_of(address), port, protocol) for address, port, protocol in row.frontends}
        protocols = {protocol for _, _, protocol in row.frontends}
        candidates = row.endpoints + (row.inside.endpoints if row.inside else ())
        endpoints |= {(number_of(address), port, protocol) for address, port in candidates for protocol in protocols}
    return Places(frozenset(frontends), endpoints=frozenset(endpoints), own=frozenset(map(number_of, own)))


def _of_kinds(held: Places) -> dict[Kind, Iterable[Place]]:
    """Return what packet loops are to know of the places that are held."""
    return {
        Kind.OWN: [(address, 0, 0) for address in held.own],
        Kind.ENDPOINT: held.endpoints,
        Kind.RETIRED: held.retired,
        Kind.OWN_FRONTEND: held.own_frontends,
        Kind.ANSWERING: [(address, 0, 0) for address in held.answering],
    }


def _named(held: Places) -> set[int]:
    """Return the IPv6 addresses among them, which packet loops know by name."""
    return {address for those in _of_kinds(held).values() for address, _, _ in those if is_ipv6(address)}


def places_of(flows: FlowTable, names: Names) -> tuple[frozenset[Place], frozenset[Place]]:
    """Return the frontends and the endpoints that have connections."""
    originals, _ = flows.records()
    return _places(originals, "dst", names), _places(originals, "new_dst", names)


def _masqueraded_ports(flows: FlowTable) -> set[int]:
    """Return the ports that masqueraded connections leave from."""
    originals, _ = flows.records()
    has_ports = ~np.isin(originals["protocol"], [Protocol.ICMP, Protocol.ICMPV6 | Protocol.IPV6])
    ports = originals["new_src_port"][has_ports & (originals["new_src_addr"] != originals["src_addr"])]
    return set(map(swap16, np.unique(ports).tolist()))


def _places(records: np.ndarray, way: str, names: Names) -> frozenset[Place]:
    words = records[f"{way}_addr"].astype(np.uint64) | records[f"{way}_port"].astype(np.uint64) << np.uint64(32)
    words |= records["protocol"].astype(np.uint64) << np.uint64(48)
    return frozenset(
        _place(swap32(word & 0xFFFFFFFF), swap16(word >> 32 & 0xFFFF), word >> 48, names)
        for word in np.unique(words).tolist()
    )


def _place(number: int, port: int, protocol: int, names: Names) -> Place:
    """Return a place with the address that packets know by a number."""
    if protocol & Protocol.IPV6:
        return number_of(names.address_of(number)), port, protocol & ~Protocol.IPV6
    return number, port, protocol
