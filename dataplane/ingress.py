"""The ingress filter of engine `raw`: an nftables table that drops the originals of packets that are ours.

Packet sockets get copies (the tap comes before the hook), so the kernel must lose its originals, or it would route
each packet a second time. Dropped are, of the packets that the pipeline takes:

* all that is to a VIP; where that is an address of the node's own, what is to a frontend (address, protocol, port), a
  first fragment too, and ICMP errors about what has come from one;
* from an endpoint's address, protocol and port, and ICMP errors about packets to one: to a port of the node that
  masqueraded connections leave from, and to what is reached through an interface that we serve. What else goes to this
  machine, or by another interface, stays the kernel's.

`retired` are frontends that are none any more while connections to them last: a SYN there is the kernel's again.
Of datagrams to the node the kernel gets the other fragments, and never the first: it waits for that one, and forgets
them without a word (RFC 1122 section 3.3.2).

All changes are transactions of nft(8): packets see the old sets or the new ones. A file beside the control socket
says that there is a table, and is written before it: what a killed daemon leaves is found, and removed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from dataplane.originals import Place
from dataplane.settings import DEFAULT_SNAT_PORTS, PortRange
from xdp.errors import AttachError, Error, MissingFeatureError
from xdp.schema import Protocol

_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Places:
    """What is in the sets. Addresses, ports and protocols are numbers."""

    frontends: frozenset[Place] = frozenset()
    retired: frozenset[Place] = frozenset()
    endpoints: frozenset[Place] = frozenset()
    own: frozenset[int] = frozenset()  # the node's addresses

    @property
    def own_frontends(self) -> frozenset[Place]:
        """The frontends at the node's own addresses: all else there may be the kernel's."""
        return frozenset(place for place in self.frontends if place[0] in self.own)


class Filter:
    """The table `turnout_NAME` of one node, on `interfaces`; `record` is the file that tells of it.

    `snat_ports` are those that masqueraded connections leave from.
    """

    def __init__(self, name: str, record: Path, snat_ports: PortRange = DEFAULT_SNAT_PORTS) -> None:
        self._table = table_of(name)
        self._record = record
        self._snat_ports = snat_ports
        self._places = Places()
        self.interfaces: Sequence[str] = ()

    def start(self, places: Places, interfaces: Sequence[str]) -> None:
        """Put the table there, in place of an earlier one: packets see the one or the other.

        Without interfaces there is none. MissingFeatureError or AttachError: it cannot be had.
        """
        self.interfaces = interfaces
        if not interfaces:
            self.remove()
            return
        self._record.write_text(" ".join([self._table, *interfaces]) + "\n")
        lines = [f"add table netdev {self._table}", f"delete table netdev {self._table}", self._declaration()]
        _nft([*lines, *self._changes(Places(), places)])
        self._places = places

    def update(self, places: Places) -> None:
        """Make these the places, at once."""
        lines = self._changes(self._places, places)
        if lines:
            _nft(lines)
            self._places = places

    def is_there(self) -> bool:
        """Whether the table is still there: whoever reloads a firewall may take it away."""
        return _run(["list", "chain", "netdev", self._table, "ingress"]).returncode == 0

    def remove(self) -> None:
        """Take the table away."""
        remove(self._record)

    def _declaration(self) -> str:
        ours = ", ".join(f'"{name}"' for name in self.interfaces)
        errors = "icmp type { 3, 4, 11, 12 }"
        ports = "-".join(map(str, sorted({*self._snat_ports})))  # not every nft(8) takes 1-1 for a range
        return f"""
table netdev {self._table} {{
  set vips {{ type ipv4_addr; }}
  set frontends {{ type ipv4_addr . inet_proto . inet_service; }}
  set retired {{ type ipv4_addr . inet_service; }}
  set endpoints {{ type ipv4_addr . inet_proto . inet_service; }}
  set own {{ type ipv4_addr; }}
  set quoted_from {{ typeof @th,160,32 . @th,136,8 . @th,224,16; }}
  set quoted_to {{ typeof @th,192,32 . @th,136,8 . @th,240,16; }}
  chain ingress {{
    type filter hook ingress devices = {{ {ours} }} priority 0; policy accept;
    meta pkttype != host accept
    ether type != ip accept
    ip ttl < 2 accept
    ip daddr @vips fib daddr type != local drop
    ip frag-off & 0x1fff != 0 accept
    ip daddr . meta l4proto . th dport @frontends drop
    th dport {ports} ip daddr @own ip saddr . meta l4proto . th sport @endpoints drop
    ip frag-off & 0x3fff != 0 accept
    tcp flags & (syn | ack) != syn ip daddr . tcp dport @retired drop
    {errors} @th,160,32 . @th,136,8 . @th,224,16 @quoted_from drop
    {errors} @th,224,16 {ports} ip daddr @own @th,192,32 . @th,136,8 . @th,240,16 @quoted_to drop
    fib daddr oifname != {{ {ours} }} accept
    ip saddr . meta l4proto . th sport @endpoints drop
    {errors} @th,192,32 . @th,136,8 . @th,240,16 @quoted_to drop
  }}
}}"""

    def _changes(self, old: Places, new: Places) -> list[str]:
        lines = []
        for before, after in zip(_sets(old), _sets(new), strict=True):
            for word, (name, elements) in (("add", _less(after, before)), ("delete", _less(before, after))):
                if elements:
                    lines.append(f"{word} element netdev {self._table} {name} {{ {', '.join(sorted(elements))} }}")
        return lines


def _less(one: tuple[str, set[str]], other: tuple[str, set[str]]) -> tuple[str, set[str]]:
    return one[0], one[1] - other[1]


def _sets(places: Places) -> list[tuple[str, set[str]]]:
    """Return the sets of the table by name, as text."""
    return [
        ("vips", {str(IPv4Address(address)) for address, _, _ in places.frontends}),
        ("frontends", set(map(_text, places.frontends))),
        ("retired", {f"{IPv4Address(address)} . {port}" for address, port, _ in places.retired}),
        ("endpoints", set(map(_text, places.endpoints))),
        ("own", {str(IPv4Address(address)) for address in places.own}),
        ("quoted_from", set(map(_quoted, places.own_frontends | places.retired))),
        ("quoted_to", set(map(_quoted, places.endpoints))),
    ]


def _text(place: Place) -> str:
    address, port, protocol = place
    return f"{IPv4Address(address)} . {Protocol(protocol).name.lower()} . {port}"


def _quoted(place: Place) -> str:
    address, port, protocol = place
    return f"{address} . {protocol} . {port}"


def table_of(name: str) -> str:
    """Return the name of the table of a node."""
    return f"turnout_{name}"


def remove(record: Path) -> list[str] | None:
    """Take away the table that `record` tells of; return the interfaces that it was on, None without a record."""
    try:
        table, *interfaces = record.read_text().split() or [""]
    except FileNotFoundError:
        return None
    if table:
        _nft([f"add table netdev {table}", f"delete table netdev {table}"])
    record.unlink(missing_ok=True)
    return interfaces


def need_nft() -> None:
    """Raise MissingFeatureError unless nft(8) is here and the kernel has what the filter needs."""
    probe = Filter("probe", Path())
    probe.interfaces = ["lo"]
    done = _run(["--check", "-f", "-"], probe._declaration())
    if done.returncode:
        raise MissingFeatureError(
            f"nftables refuses a filter at ingress ({_first(done)}); engine raw needs CONFIG_NF_TABLES_NETDEV and "
            "CONFIG_NFT_FIB_NETDEV"
        )


def _nft(lines: Iterable[str]) -> None:
    done = _run(["-f", "-"], "\n".join(lines) + "\n")
    if done.returncode:
        raise AttachError(
            f"nftables refuses the ingress filter: {_first(done)}; `nft list ruleset` shows what is there"
        )


def _run(arguments: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["nft", *arguments], input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise MissingFeatureError("nft is not installed, which engine raw needs; `apt install nftables`") from None
    except subprocess.TimeoutExpired:
        raise Error(f"nft has not answered for {_TIMEOUT_S:.0f} s; is another one stuck?") from None


def _first(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
    return lines[0]
