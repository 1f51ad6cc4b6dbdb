"""What the kernel knows about interfaces, routes and neighbours, through netlink; the only importer of pyroute2.

The sockets are plain ones: pyroute2's own want the event loop for themselves. pyroute2 knows the many attributes of a
link; neighbours and routes come by the ten thousand, where its 70 us per message would hold up the node, so these two
are read with `struct` (about 5 us). It is imported with the first link, because that takes 0.2 s.

Addresses are numbers as in xdp/addresses.py, MAC addresses are six bytes. Everything happens in the network namespace
in which the object was made.

Neighbours are read of both families: an IPv4 route may lead through an IPv6 gateway (RFC 8950). Link-local networks are
no routes here: each interface has them, and nothing is forwarded to them (RFC 4291 2.5.6).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple, Self

from dataplane.ethtool import queues_of
from xdp import sysctl
from xdp.addresses import IPV6, from_wire, is_ipv6, masked, to_wire
from xdp.errors import Error, UsageError
from xdp.netlink import (
    BUFFER_BYTES,
    CREATE,
    GETLINK,
    HEADER,
    IFINFOMSG,
    REPLACE,
    NetlinkSocket,
    attribute,
    attributes,
    messages,
)

NeighbourKey = tuple[int, int]  # (ifindex, address)

# include/uapi/linux: netlink.h, rtnetlink.h, neighbour.h, if.h, genetlink.h, netdev.h
_ADD_MEMBERSHIP = 1
_SO_RCVBUFFORCE = 33
_NETLINK_GENERIC = 16
_NEWLINK, _DELLINK = 16, 17
_NEWADDR, _DELADDR = 20, 21
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_NEWNEIGH, _DELNEIGH, _GETNEIGH = 28, 29, 30
_GROUPS = (1, 3)  # RTNLGRP_LINK, _NEIGH: of both families
# RTNLGRP_IPV4_IFADDR, _IPV4_ROUTE; the same of IPv6
_GROUPS_OF: Mapping[int, tuple[int, int]] = {socket.AF_INET: (5, 7), socket.AF_INET6: (9, 11)}
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_METRICS, _RTA_MULTIPATH = 1, 4, 5, 6, 7, 8, 9
_RTA_TABLE, _RTA_VIA, _RTAX_MTU = 15, 18, 2
_RTM_F_CLONED = 0x200
_RTNH_F_DEAD = 1
_NDA_DST, _NDA_LLADDR, _NDA_PROTOCOL, _NDA_FLAGS_EXT = 1, 2, 12, 15
_NTF_USE, _NTF_EXT_LEARNED, _NTF_EXT_MANAGED = 0x01, 0x10, 0x1
_IFF_UP, _IFF_LOWER_UP = 0x1, 0x10000
_NDO_XMIT = 1 << 2
_IFLA_GRO_MAX_SIZE, _IFLA_GRO_IPV4_MAX_SIZE = 58, 64  # pyroute2 does not know the second
_PAIRS = ("veth", "netkit")  # IFLA_LINK is the other end of these, and not a lower device

TABLE_MAIN, TABLE_LOCAL = 254, 255
FORWARDING = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}  # what has the kernel route, by family
OUR_PROTOCOL = 84  # marks the neighbour entries that we asked for, so that a successor knows them

_EVENT_BUFFER_BYTES = 8 << 20  # of the socket: about 10,000 neighbour events

_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_RTNEXTHOP = struct.Struct("=HBBi")  # length, flags, hops, ifindex
_NDMSG = struct.Struct("=B3xiHBB")  # family, ifindex, state, flags, type
_U32 = struct.Struct("=I")
_MULTICAST, _LINK_LOCAL = IPV6 | 0xFF << 120, IPV6 | 0xFE80 << 112  # ff00::/8, fe80::/10


class NeighbourState(IntFlag):
    """NUD_*: how sure the kernel is of a neighbour's MAC address."""

    NONE = 0
    INCOMPLETE = 0x01
    REACHABLE = 0x02
    STALE = 0x04
    DELAY = 0x08
    PROBE = 0x10
    FAILED = 0x20
    NOARP = 0x40
    PERMANENT = 0x80


class RouteKind(IntEnum):
    """RTN_*: what a route does with a packet."""

    UNSPEC = 0
    UNICAST = 1
    LOCAL = 2
    BROADCAST = 3
    ANYCAST = 4
    MULTICAST = 5
    BLACKHOLE = 6
    UNREACHABLE = 7
    PROHIBIT = 8
    THROW = 9
    NAT = 10
    XRESOLVE = 11


@dataclass(frozen=True, slots=True)
class Interface:
    """A link. `is_up` wants both: set up by the administrator, and a carrier."""

    name: str
    ifindex: int
    mac: bytes  # empty where the link has no Ethernet address
    mtu: int
    is_up: bool
    rx_queues: int = 1  # in use; there may be room for more
    tx_queues: int = 1
    kind: str = ""  # "veth", "vlan", ...; empty for hardware
    lower_ifindex: int = 0  # the device that it is on top of; 0: none, or one of another network namespace
    master_ifindex: int = 0  # the bridge or bond that it is a port of; 0: none
    gro_bytes: int = 0  # how long GRO lets packets grow, of whichever family; 0: not told
    beneath: tuple[int, ...] = ()  # what its frames come through before: lower devices and ports, the lowest first


@dataclass(frozen=True, slots=True)
class Statistics:
    """Packets and bytes of an interface since it was made."""

    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int
    rx_dropped: int
    tx_dropped: int


class Way(NamedTuple):
    """One of the next hops of a route. Gateway 0: the destination is on the link."""

    ifindex: int
    gateway: int = 0


class Route(NamedTuple):
    """A route of the tables main or local. Of several next hops, `ifindex` and `gateway` are the first's."""

    network: int
    prefix_len: int
    kind: RouteKind = RouteKind.UNICAST
    ifindex: int = 0
    gateway: int = 0  # 0: the destination is on the link
    table: int = TABLE_MAIN
    metric: int = 0
    preferred_source: int = 0
    mtu: int = 0  # 0: the interface's
    others: tuple[Way, ...] = ()  # next hops that live, beside the first

    @property
    def ways(self) -> tuple[Way, ...]:
        """Return all next hops that live."""
        return (Way(self.ifindex, self.gateway), *self.others)


class Neighbour(NamedTuple):
    """A neighbour entry."""

    ifindex: int
    address: int
    mac: bytes  # empty while unknown
    state: NeighbourState
    is_managed: bool = False  # the kernel keeps it alive by itself
    is_ours: bool = False  # asked for by this program, or by one before it

    @property
    def key(self) -> NeighbourKey:
        """Return what identifies the entry."""
        return self.ifindex, self.address


@dataclass(slots=True)
class Changes:
    """What has happened since the last look."""

    is_overrun: bool = False  # events were lost: read everything again
    links_or_routes: bool = False
    neighbours: list[tuple[Neighbour, bool]] = field(default_factory=list)  # (entry, whether it is gone), in order

    def __bool__(self) -> bool:
        """Return whether anything has happened."""
        return self.is_overrun or self.links_or_routes or bool(self.neighbours)


def parse_neighbour(body: memoryview) -> Neighbour | None:
    """Return the neighbour entry in the payload of a RTM_*NEIGH message; None for other families, and for groups."""
    family, ifindex, state, _flags, _kind = _NDMSG.unpack_from(body)
    if family not in _GROUPS_OF:
        return None
    address, mac, protocol, extended = 0, b"", 0, 0
    for kind, value in attributes(body[_NDMSG.size :]):
        if kind == _NDA_DST:
            address = from_wire(value)
        elif kind == _NDA_LLADDR and len(value) == 6:
            mac = bytes(value)
        elif kind == _NDA_PROTOCOL:
            protocol = value[0]
        elif kind == _NDA_FLAGS_EXT:
            (extended,) = _U32.unpack(value)
    if is_ipv6(address) and masked(address, 8) == _MULTICAST:
        return None
    is_managed = bool(extended & _NTF_EXT_MANAGED)
    return Neighbour(ifindex, address, mac, NeighbourState(state), is_managed, protocol == OUR_PROTOCOL)


def parse_route(body: memoryview) -> Route | None:
    """Return the route in the payload of a RTM_*ROUTE message; None if it is none of the tables main and local.

    Those for a TOS or for sources are left out, and so are IPv6's for what is link-local or multicast.
    """
    family, prefix_len, src_len, tos, table, _protocol, _scope, kind, flags = _RTMSG.unpack_from(body)
    if family not in _GROUPS_OF or tos or src_len or flags & _RTM_F_CLONED:
        return None
    found: dict[int, int] = {_RTA_DST: IPV6 if family == socket.AF_INET6 else 0}
    mtu, hops = 0, memoryview(b"")
    for name, value in attributes(body[_RTMSG.size :]):
        if name in (_RTA_DST, _RTA_PREFSRC):
            found[name] = from_wire(value)
        elif name in (_RTA_GATEWAY, _RTA_VIA):
            found[_RTA_GATEWAY] = _gateway(name, value)
        elif name in (_RTA_OIF, _RTA_PRIORITY, _RTA_TABLE):
            (found[name],) = _U32.unpack(value)
        elif name == _RTA_METRICS:
            mtu = next((_U32.unpack(metric)[0] for which, metric in attributes(value) if which == _RTAX_MTU), 0)
        elif name == _RTA_MULTIPATH:
            hops = value
    table = found.get(_RTA_TABLE, table)
    network = found[_RTA_DST]
    if table not in (TABLE_MAIN, TABLE_LOCAL) or _is_of_a_link(network, prefix_len):
        return None
    ways = list(_living_ways(hops)) if hops else [Way(found.get(_RTA_OIF, 0), found.get(_RTA_GATEWAY, 0))]
    if not hops and flags & _RTNH_F_DEAD:
        return None
    first, *others = ways or [Way(0)]
    return Route(
        network=network,
        prefix_len=prefix_len,
        kind=RouteKind(kind) if kind <= RouteKind.XRESOLVE else RouteKind.UNSPEC,
        ifindex=first.ifindex,
        gateway=first.gateway,
        table=table,
        metric=found.get(_RTA_PRIORITY, 0),
        preferred_source=found.get(_RTA_PREFSRC, 0),
        mtu=mtu,
        others=tuple(others),
    )


def _living_ways(hops: memoryview) -> Iterator[Way]:
    """Yield the next hops of a multipath route that are not dead."""
    offset = 0
    while offset + _RTNEXTHOP.size <= len(hops):
        length, flags, _weight, ifindex = _RTNEXTHOP.unpack_from(hops, offset)
        if length < _RTNEXTHOP.size:
            break
        if not flags & _RTNH_F_DEAD:
            gateways = (
                _gateway(name, value)
                for name, value in attributes(hops[offset + _RTNEXTHOP.size : offset + length])
                if name in (_RTA_GATEWAY, _RTA_VIA)
            )
            yield Way(ifindex, next(gateways, 0))
        offset += (length + 3) & ~3


def _gateway(name: int, value: memoryview) -> int:
    """Return the address in RTA_GATEWAY or, of another family than the route's, in RTA_VIA: behind two bytes."""
    return from_wire(value[2:] if name == _RTA_VIA else value)


def _is_of_a_link(network: int, prefix_len: int) -> bool:
    """Return whether a network is IPv6's and link-local or multicast: every interface has it."""
    if not is_ipv6(network):
        return False
    is_multicast = prefix_len >= 8 and masked(network, 8) == _MULTICAST
    return is_multicast or (prefix_len >= 10 and masked(network, 10) == _LINK_LOCAL)


def _links(answers: Iterable[tuple[int, bytes]]) -> Iterator[tuple[Any, memoryview]]:
    """Yield each link of a RTMGETLINK answer as pyroute2 decodes it, and its attributes as they came."""
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    for kind, body in answers:
        if kind == _NEWLINK:
            message = ifinfmsg(HEADER.pack(HEADER.size + len(body), kind, 0, 0, 0) + body)
            message.decode()
            yield message, memoryview(body)[IFINFOMSG.size :]


def _interface(link: Any, values: memoryview) -> Interface:
    info = link.get_attr("IFLA_LINKINFO")
    kind = (info.get_attr("IFLA_INFO_KIND") or "") if info else ""
    has_lower = kind not in _PAIRS and link.get_attr("IFLA_LINK_NETNSID") is None
    mac = bytes.fromhex((link.get_attr("IFLA_ADDRESS") or "").replace(":", ""))
    names = (_IFLA_GRO_MAX_SIZE, _IFLA_GRO_IPV4_MAX_SIZE)
    limits = [_U32.unpack(value)[0] for name, value in attributes(values) if name in names]
    is_up = link["flags"] & _IFF_UP and link["flags"] & _IFF_LOWER_UP
    return Interface(
        name=link.get_attr("IFLA_IFNAME"),
        ifindex=link["index"],
        mac=mac if len(mac) == 6 and any(mac) else b"",
        mtu=link.get_attr("IFLA_MTU") or 0,
        is_up=bool(is_up),
        rx_queues=link.get_attr("IFLA_NUM_RX_QUEUES") or 1,
        tx_queues=link.get_attr("IFLA_NUM_TX_QUEUES") or 1,
        kind=kind,
        lower_ifindex=(link.get_attr("IFLA_LINK") or 0) if has_lower else 0,
        master_ifindex=link.get_attr("IFLA_MASTER") or 0,
        gro_bytes=max(limits, default=0),
    )


def _stacked(links: Sequence[Interface]) -> Iterator[Interface]:
    """Yield links with what is beneath them."""
    lower: dict[int, list[int]] = {}
    for link in links:
        if link.lower_ifindex:
            lower.setdefault(link.ifindex, []).append(link.lower_ifindex)
        if link.master_ifindex:
            lower.setdefault(link.master_ifindex, []).append(link.ifindex)

    def beneath(number: int, seen: set[int]) -> Iterator[int]:
        for one in lower.get(number, ()):
            if one not in seen:  # links that change while they are read may go round in circles
                seen.add(one)
                yield from beneath(one, seen)
                yield one

    for link in links:
        yield replace(link, beneath=tuple(beneath(link.ifindex, {link.ifindex})))


class NetDev:
    """The kernel's interfaces, routes and neighbours in the current network namespace. A context manager.

    Routes, and events of addresses and routes, are those of `families` (AF_INET, AF_INET6).
    """

    def __init__(self, families: Collection[int] = (socket.AF_INET,)) -> None:
        self._families = tuple(families)
        self._requests = NetlinkSocket(socket.NETLINK_ROUTE)
        self._events = NetlinkSocket(socket.NETLINK_ROUTE).raw
        self._events.setblocking(False)
        with contextlib.suppress(PermissionError):  # without the privilege an overrun comes sooner; it is handled
            self._events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _EVENT_BUFFER_BYTES)
        for group in (*_GROUPS, *(group for family in self._families for group in _GROUPS_OF[family])):
            self._events.setsockopt(270, _ADD_MEMBERSHIP, group)  # SOL_NETLINK

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the sockets; the kernel's entries stay."""
        self.close()

    def close(self) -> None:
        """Close the sockets; the kernel's entries stay."""
        self._requests.raw.close()
        self._events.close()

    def fileno(self) -> int:
        """Return the descriptor that is readable when `changes` has something to say."""
        return self._events.fileno()

    def interfaces(self) -> list[Interface]:
        """Return every interface."""
        answers = self._requests.dump(GETLINK, IFINFOMSG.pack(0, 0, 0, 0, 0))
        return [self.with_real_queues(link) for link in _stacked([_interface(*link) for link in _links(answers)])]

    def with_real_queues(self, interface: Interface) -> Interface:
        """Return `interface` with the queues that are in use now, of which netlink tells no changes.

        A veth has room for one per CPU, and uses one.
        """
        queues = queues_of(interface.name)
        return replace(interface, rx_queues=queues[0], tx_queues=queues[1]) if queues else interface

    def interface(self, name: str) -> Interface:
        """Return the interface `name`; UsageError if there is none."""
        interfaces = self.interfaces()
        for interface in interfaces:
            if interface.name == name:
                return interface
        here = ", ".join(interface.name for interface in interfaces)
        message = f"interface {name}: does not exist; the interfaces here are {here}"
        raise UsageError(message)

    def statistics(self, ifindex: int) -> Statistics:
        """Return the counters of an interface; UsageError if there is none of that index."""
        try:
            answers = self._requests.get(GETLINK, IFINFOMSG.pack(0, 0, ifindex, 0, 0))
        except OSError as error:
            message = f"interface with index {ifindex}: does not exist any more"
            raise UsageError(message) from error
        link, _ = next(_links(answers))
        counters = link.get_attr("IFLA_STATS64")
        return Statistics(**{name: counters[name] for name in Statistics.__dataclass_fields__})

    def routes(self) -> list[Route]:
        """Return the routes of the tables main and local (`parse_route`)."""
        parsed = (
            parse_route(memoryview(body))
            for family in self._families
            for kind, body in self._requests.dump(_GETROUTE, _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))
            if kind == _NEWROUTE
        )
        return [route for route in parsed if route is not None]

    def neighbours(self) -> list[Neighbour]:
        """Return the neighbour entries of all interfaces, of both families."""
        parsed = (
            parse_neighbour(memoryview(body))
            for family in _GROUPS_OF
            for kind, body in self._requests.dump(_GETNEIGH, _NDMSG.pack(family, 0, 0, 0, 0))
            if kind == _NEWNEIGH
        )
        return [neighbour for neighbour in parsed if neighbour is not None]

    def changes(self, limit: int = 1024) -> Changes:
        """Return what has happened, without waiting; about `limit` neighbour events at most, the rest next time."""
        changes = Changes()
        while len(changes.neighbours) < limit:
            try:
                datagram = self._events.recv(BUFFER_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    message = f"netlink: reading events failed ({error.strerror}); restart turnout"
                    raise Error(message) from error
                changes.is_overrun = True
                continue
            for kind, _flags, _sequence, body in messages(datagram):
                if kind in (_NEWNEIGH, _DELNEIGH):
                    neighbour = parse_neighbour(body)
                    if neighbour is not None:
                        changes.neighbours.append((neighbour, kind == _DELNEIGH))
                elif kind in (_NEWLINK, _DELLINK, _NEWADDR, _DELADDR, _NEWROUTE, _DELROUTE):
                    changes.links_or_routes = True
        return changes

    def resolve(self, keys: Iterable[NeighbourKey], *, keep: bool) -> dict[NeighbourKey, int]:
        """Make the kernel find the MAC addresses of neighbours; return {neighbour: errno} of those it refused.

        With `keep` the kernel also keeps them alive for ever (NTF_EXT_MANAGED, Linux 5.16; an older one ignores the
        flag, and `Neighbour.is_managed` stays false). They do not count against gc_thresh3, by default 1024. Must
        not be used on PERMANENT entries: they would cease to be permanent.
        """
        wanted = list(keys)
        extended = attribute(_NDA_FLAGS_EXT, _U32.pack(_NTF_EXT_MANAGED)) if keep else b""
        tail = extended + attribute(_NDA_PROTOCOL, bytes([OUR_PROTOCOL]))
        results = self._requests.change(
            (_NEWNEIGH, CREATE | REPLACE, _neighbour_request(key, 0, _NTF_USE | _NTF_EXT_LEARNED) + tail)
            for key in wanted
        )
        return {key: code for key, code in zip(wanted, results, strict=True) if code}

    def let_go(self, keys: Iterable[NeighbourKey]) -> None:
        """Give entries that `resolve` made back to the kernel's own ageing; those without a MAC address go at once."""
        wanted = list(keys)
        results = self._requests.change(
            (_NEWNEIGH, REPLACE, _neighbour_request(key, NeighbourState.STALE, 0)) for key in wanted
        )
        unresolved = [key for key, code in zip(wanted, results, strict=True) if code]
        for _ in self._requests.change((_DELNEIGH, 0, _neighbour_request(key, 0, 0)) for key in unresolved):
            pass  # gone already, like its interface

    def is_forwarding(self, family: int) -> bool:
        """Return whether the kernel routes packets of a family between interfaces."""
        return sysctl.read(FORWARDING[family].replace(".", "/")) == "1"

    def takes_redirects(self, ifindex: int) -> bool | None:
        """Return whether the driver accepts frames that XDP redirects to the interface; None: the kernel cannot tell.

        Asked of the netdev family (Linux 6.3): DEV_GET, xdp-features, NDO_XMIT. A veth says so when its peer has an
        XDP program or GRO.
        """
        features = xdp_features(ifindex)
        return None if features is None else bool(features & _NDO_XMIT)


def _neighbour_request(key: NeighbourKey, state: int, flags: int) -> bytes:
    ifindex, address = key
    family = socket.AF_INET6 if is_ipv6(address) else socket.AF_INET
    return _NDMSG.pack(family, ifindex, state, flags, 0) + attribute(_NDA_DST, to_wire(address))


def xdp_features(ifindex: int) -> int | None:
    """Return NETDEV_XDP_ACT_* of an interface; None where the kernel has no netdev family (before 6.3)."""
    device_get, device_ifindex, device_features = 1, 1, 3  # NETDEV_CMD_DEV_GET, NETDEV_A_DEV_*
    family = _netdev_family()
    if family is None:
        return None
    with NetlinkSocket(_NETLINK_GENERIC) as generic, contextlib.suppress(OSError, KeyError):
        request = struct.pack("=BBxx", device_get, 1) + attribute(device_ifindex, _U32.pack(ifindex))
        found = _generic_attributes(generic.get(family, request))
        return int.from_bytes(found[device_features], "little")
    return None


@functools.cache
def _netdev_family() -> int | None:
    """Return the number of generic netlink's netdev family, which is the kernel's for as long as it runs."""
    controller, get_family, family_name, family_id = 16, 3, 2, 1  # GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_*
    with NetlinkSocket(_NETLINK_GENERIC) as generic, contextlib.suppress(OSError, KeyError):
        request = struct.pack("=BBxx", get_family, 1) + attribute(family_name, b"netdev\0")
        found = _generic_attributes(generic.get(controller, request))
        return int.from_bytes(found[family_id], "little")
    return None


def _generic_attributes(answers: list[tuple[int, bytes]]) -> dict[int, bytes]:
    """Return the attributes of a generic netlink answer by type."""
    return {kind: bytes(value) for _, body in answers for kind, value in attributes(body[4:])}
