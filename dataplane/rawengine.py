"""Engine `raw`: packet sockets and workers on every interface, and a filter that drops the originals. No BPF.

Nothing forwards while no worker runs. The filter goes when the daemon ends, unless it is told to keep everything: then
packets of Services are dropped until a successor comes, and connections outlast the change. What a killed daemon
leaves is the same; its successor, or `turnout detach`, removes it.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from conntrack.table import FlowTable
from dataplane import crew
from dataplane.context import Masquerading
from dataplane.crew import need_ethernet
from dataplane.ethtool import has_lro
from dataplane.hops_compiled import Hops
from dataplane.ingress import Filter, Places, need_nft
from dataplane.netdev import Interface
from dataplane.originals import Kind, Place, new_originals, publish
from dataplane.rawsock import PacketSocket
from dataplane.settings import Settings
from dataplane.worker import RawWorker
from lb.rows import ServiceRow
from xdp.addresses import IPAddress, address_of, is_ipv6, number_of
from xdp.byteorder import swap16, swap32
from xdp.clock import Clock
from xdp.errors import AttachError, UsageError
from xdp.names import Names
from xdp.schema import Limit, Protocol
from xdp.tables import Capacity, Tables

_OWN_ADDRESSES = 1024  # of a node, that there is room for
_LONGEST_PACKET = 65_536  # that a packet socket hands over whole, whatever is merged (BIG TCP)
_ECHOES = (Protocol.ICMP, Protocol.ICMPV6)


@dataclass(frozen=True)
class Attachment:
    """An interface that the engine serves, as xdp.loader.Attachment is for a program."""

    ifindex: int
    why: str  # not a better engine
    mode: None = field(default=None)


class Line(crew.Line[PacketSocket, RawWorker]):
    """An interface with its packet sockets."""

    def suits(self, link: Interface) -> bool:
        """Return whether the sockets are of use for what the interface is now: its frames fit into their slots, too."""
        return super().suits(link) and all(sock.takes(link.mtu) for sock in self.sockets)


class RawEngine(crew.Crew[Line]):
    """The sockets, workers and filter of a node: used as dataplane.engine.Engine is."""

    name = "raw"
    offloads = False
    needs_rows = True
    goes_on_alone = False

    def __init__(self, settings: Settings, tables: Tables, capacity: Capacity, clock: Clock, why: str) -> None:
        super().__init__(tables, clock)
        self._why = why
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
            line = self._lines[interface.name] = Line(interface.name, interface)
            _open(line)

    def start(self, hops: Hops, masquerading: Masquerading) -> None:
        """Start the workers, give them packets, and take these from the kernel. On an error nothing stays."""
        self._start_all(hops, masquerading)
        with self._places_lock:
            self._publish()
        self._put_filter()
        try:
            for line in self._lines.values():
                self._listen(line)
        except BaseException:
            self._filter.remove()
            raise

    # A line's beginning and end.

    def _new_worker(self, line: Line, sock: PacketSocket, number: int) -> RawWorker:
        return RawWorker(self._new_node(line.interface), self._originals, number, sock, self._clock)

    def _put_filter(self) -> None:
        """Put the filter on the interfaces that have sockets."""
        with self._places_lock:
            self._filter.start(self._held, [line.interface.name for line in self._lines.values() if line.sockets])
            self._is_filtering = True

    def _listen(self, line: Line) -> None:
        """Give the workers of a line its packets."""
        group = None
        for sock in line.sockets:
            group = sock.listen(len(line.sockets) > 1, group)
        self.attachments[line.name] = Attachment(line.interface.ifindex, self._why)

    def _leave(self, line: Line, flows: FlowTable) -> None:  # noqa: ARG002
        self._end(line)
        self.attachments.pop(line.name, None)

    def _end(self, line: Line) -> None:
        self._end_workers([line])
        self._close_sockets([line])

    def _serve(self, line: Line) -> None:
        if line.name not in self.attachments:
            try:
                _open(line)
                self._start_workers(line)
                self._put_filter()
                self._listen(line)
            except BaseException:
                self._end(line)  # the next call begins from the beginning
                raise
        elif line.interface.name not in self._filter.interfaces:
            self._put_filter()

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

    def complaints(self) -> list[str]:
        """Return what is wrong with the interfaces, in words."""
        links = (line.interface for line in self._lines.values())
        told = [_cut_short(link) for link in links if link.gro_bytes > _LONGEST_PACKET]
        return super().complaints() + told

    # Ending.

    def detach(self) -> None:
        """Remove the filter: packets are the kernel's again."""
        with self._places_lock:
            self._is_filtering = False
            self._filter.remove()
        self.attachments = {}

    def stop(self) -> None:
        """End workers and sockets. The filter stays."""
        self.stop_workers()
        self._close_sockets(self._lines.values())


def _open(line: Line) -> None:
    """Open a socket for every queue. UsageError or AttachError: the interface is not one that can be served."""
    interface = line.interface
    need_ethernet(interface)
    if has_lro(interface.name):  # it merges packets so that they cannot be cut again
        raise AttachError(f"{interface.name}: large receive offload is on; `ethtool -K {interface.name} lro off`")
    for _ in range(interface.rx_queues):
        line.sockets.append(PacketSocket(interface))


def _cut_short(link: Interface) -> str:
    return (
        f"{link.name}: GRO merges packets up to {link.gro_bytes} bytes, and those above {_LONGEST_PACKET} are lost; "
        f"`ip link set dev {link.name} gro_max_size {_LONGEST_PACKET} gro_ipv4_max_size {_LONGEST_PACKET}`"
    )


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
