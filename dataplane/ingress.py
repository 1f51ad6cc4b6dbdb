"""The ingress filter of engine `raw`: an nftables table that drops the originals of packets that are ours.

Packet sockets get copies (the tap comes before the hook), so the kernel must lose its originals, or it would route
each packet a second time. Dropped are, of the packets that the pipeline takes:

* all that is to a VIP; where that is an address of the node's own, what is to a frontend (address, protocol, port), a
  first fragment too, and ICMP errors about what has come from one;
* from an endpoint's address, protocol and port, and ICMP errors about packets to one: to a port of the node that
  masqueraded connections leave from and no socket of the node has (`spared`), and to what is reached through an
  interface that we serve. What else goes to this machine, or by another interface, stays the kernel's;
* replies of endpoints to echo requests, on their way through. Those to the node itself are the kernel's as well: its
  own `ping` is to be answered, and to an identifier that nobody here has asked with it says nothing.

`retired` are frontends that are none any more while connections to them last: a SYN there is the kernel's again.
All this of frames that are to this machine: to the MAC address of their interface, or of a device on top of it. And of
untagged frames, and of those with the VLAN tag of a VLAN that is served. Behind a second tag nothing here
looks: such originals are the kernel's, which makes nothing of them unless it has VLAN devices for both tags.

Of datagrams to the node the kernel gets the other fragments, and never the first: it waits for that one, and forgets
them without a word (RFC 1122 section 3.3.2, RFC 8200 section 4.5).

All changes are transactions of nft(8): packets see the old sets or the new ones. A file beside the control socket
says that there is a table, and is written before it: what a killed daemon leaves is found, and removed.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dataplane.settings import DEFAULT_SNAT_PORTS, PRIVILEGED_SNAT_PORTS, PortRange, VlanRange, joined_vlans
from xdp.addresses import address_of, is_ipv6
from xdp.errors import AttachError, Error, MissingFeatureError
from xdp.schema import Protocol
from xdp.writing import remove as remove_file
from xdp.writing import write

if TYPE_CHECKING:
    from dataplane.originals import Place  # brings compiled code with it, which removing a filter needs not

log = logging.getLogger(__name__)

_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Places:
    """What is in the sets: addresses as in xdp/addresses.py, ports, and protocols, the same for both families."""

    frontends: frozenset[Place] = frozenset()
    retired: frozenset[Place] = frozenset()
    endpoints: frozenset[Place] = frozenset()
    own: frozenset[int] = frozenset()  # the node's addresses
    answering: frozenset[int] = frozenset()  # addresses of endpoints that echo requests are forwarded to

    @property
    def own_frontends(self) -> frozenset[Place]:
        """The frontends at the node's own addresses: all else there may be the kernel's."""
        return frozenset(place for place in self.frontends if place[0] in self.own)


class Filter:
    """The table `turnout_NAME` of one node, on `interfaces`; `record` is the file that tells of it.

    `snat_ports` are those that masqueraded connections leave from, beside the privileged ones, `vlans` those that are
    served.
    """

    def __init__(
        self,
        name: str,
        record: Path,
        snat_ports: PortRange = DEFAULT_SNAT_PORTS,
        vlans: Sequence[VlanRange] = (),
    ) -> None:
        self._table = table_of(name)
        self._record = record
        self._snat_ports = snat_ports
        self._vlans = vlans
        self._places = Places()
        self._spared: frozenset[int] = frozenset()
        self._stations: frozenset[bytes] = frozenset()
        self.interfaces: Sequence[str] = ()

    def start(self, places: Places, interfaces: Sequence[str]) -> None:
        """Put the table there, in place of an earlier one: packets see the one or the other.

        Without interfaces there is none. MissingFeatureError or AttachError: it cannot be had; errors as
        writing.explained: nobody could be told of it.
        """
        was_noted = self._record.exists()
        if interfaces:
            write(self._record, " ".join([self._table, *interfaces]) + "\n")
        before, self.interfaces = self.interfaces, interfaces
        if not interfaces:
            self.remove()
            return
        lines = [f"add table netdev {self._table}", f"delete table netdev {self._table}", self._declaration()]
        spared = self._differences(_spared(frozenset()), _spared(self._spared))
        stations = self._differences(_stations(frozenset()), _stations(self._stations))
        try:
            _nft([*lines, *self._changes(Places(), places), *spared, *stations])
        except BaseException:
            self.interfaces = before
            if not was_noted:
                remove_file(self._record)
            raise
        self._places = places

    def update(self, places: Places) -> None:
        """Make these the places, at once."""
        lines = self._changes(self._places, places)
        has_gone = bool(lines) and not self._apply(lines)
        self._places = places
        if has_gone:
            self.put_back()

    def spare(self, ports: frozenset[int]) -> None:
        """Make these the ports at which what endpoints send is the kernel's, at once."""
        lines = self._differences(_spared(self._spared), _spared(ports)) if self.interfaces else []
        has_gone = bool(lines) and not self._apply(lines)
        self._spared = ports
        if has_gone:
            self.put_back()

    def hear(self, stations: frozenset[bytes]) -> None:
        """Make these the MAC addresses by which frames are ours, beside what the kernel says is to it, at once."""
        lines = self._differences(_stations(self._stations), _stations(stations)) if self.interfaces else []
        has_gone = bool(lines) and not self._apply(lines)
        self._stations = stations
        if has_gone:
            self.put_back()

    def put_back(self) -> None:
        """Put the table back if it has gone: whoever reloads a firewall may take it away."""
        if self.interfaces and not self._is_there():
            log.warning("somebody has removed the ingress filter: it is put back")
            self.start(self._places, self.interfaces)

    def _apply(self, lines: Iterable[str]) -> bool:
        """Change the table; return False if there is none."""
        try:
            _nft(lines)
        except AttachError:
            if self._is_there():
                raise
            return False
        return True

    def _is_there(self) -> bool:
        return _run(["list", "chain", "netdev", self._table, "ingress"]).returncode == 0

    def remove(self) -> None:
        """Take the table away."""
        remove(self._record)

    def _declaration(self) -> str:
        ours = ", ".join(f'"{name}"' for name in self.interfaces)
        # Not every nft(8) takes 1-1 for a range.
        both = ("-".join(map(str, sorted({*ports}))) for ports in (PRIVILEGED_SNAT_PORTS, self._snat_ports))
        ports = f"{{ {', '.join(both)} }}"
        return f"""
table netdev {self._table} {{
  set stations {{ type ether_addr; }}
  set spared {{ type inet_service; }}
  set spared_quoted {{ typeof @th,{_IPV4.ports},16; }}
  set spared_quoted6 {{ typeof @th,{_IPV6.ports},16; }}
  {_IPV4.sets()}
  {_IPV6.sets()}
  chain ipv4 {{
    ip ttl < 2 accept
    ip daddr @vips fib daddr type != local drop
    ip frag-off & 0x1fff != 0 accept
    {_IPV4.to_us(ports)}
    ip frag-off & 0x3fff != 0 accept
    {_IPV4.rest(ports, ours)}
  }}
  chain ipv6 {{
    ip6 hoplimit < 2 accept
    ip6 daddr @vips6 fib daddr type != local drop
    frag frag-off != 0 accept
    {_IPV6.to_us(ports)}
    frag more-fragments 1 accept
    {_IPV6.rest(ports, ours)}
  }}
  chain ingress {{
    type filter hook ingress devices = {{ {ours} }} priority 0; policy accept;
    meta pkttype != host ether daddr != @stations accept
    ether type ip jump ipv4
    ether type ip6 jump ipv6
    {self._tagged()}
  }}
}}"""

    def _tagged(self) -> str:
        """Return the rules about frames with a VLAN tag, which the kernel has taken out and yet lets be asked for."""
        served = ", ".join(
            f"{first}-{last}" if first < last else f"{first}" for first, last in joined_vlans(self._vlans)
        )
        return "\n    ".join(
            f"ether type {kind} vlan id {{ {served} }} meta protocol {family} jump {chain}"
            for kind in ("8021q", "8021ad")
            for family, chain in (("ip", "ipv4"), ("ip6", "ipv6"))
        )

    def _changes(self, old: Places, new: Places) -> list[str]:
        return self._differences(_sets(old), _sets(new))

    def _differences(self, old: list[tuple[str, set[str]]], new: list[tuple[str, set[str]]]) -> list[str]:
        lines = []
        for before, after in zip(old, new, strict=True):
            for word, (name, elements) in (("add", _less(after, before)), ("delete", _less(before, after))):
                if elements:
                    lines.append(f"{word} element netdev {self._table} {name} {{ {', '.join(sorted(elements))} }}")
        return lines


def _less(one: tuple[str, set[str]], other: tuple[str, set[str]]) -> tuple[str, set[str]]:
    return one[0], one[1] - other[1]


@dataclass(frozen=True)
class _Family:
    """What the rules say of IPv4, and the same of IPv6: its sets have names that end with `suffix`.

    `source`, `destination`, `protocol` and `ports` are where an ICMP error quotes these, in bits behind its own header.
    """

    word: str
    suffix: str
    errors: str
    reply: str
    address_bits: int
    source: int
    destination: int
    protocol: int
    ports: int

    @property
    def _quoted_source(self) -> str:
        return f"@th,{self.source},{self.address_bits} . @th,{self.protocol},8 . @th,{self.ports},16"

    @property
    def _quoted_destination(self) -> str:
        return f"@th,{self.destination},{self.address_bits} . @th,{self.protocol},8 . @th,{self.ports + 16},16"

    def sets(self) -> str:
        """Return the declarations of the sets."""
        address, s = f"ipv{self.suffix or 4}_addr", self.suffix
        return f"""
  set vips{s} {{ type {address}; }}
  set frontends{s} {{ type {address} . inet_proto . inet_service; }}
  set retired{s} {{ type {address} . inet_service; }}
  set endpoints{s} {{ type {address} . inet_proto . inet_service; }}
  set own{s} {{ type {address}; }}
  set answering{s} {{ type {address}; }}
  set quoted_from{s} {{ typeof {self._quoted_source}; }}
  set quoted_to{s} {{ typeof {self._quoted_destination}; }}"""

    def to_us(self, ports: str) -> str:
        """Return the rules about what is to the node itself."""
        ip, s = self.word, self.suffix
        return f"""
    {ip} daddr . meta l4proto . th dport @frontends{s} drop
    th dport {ports} th dport != @spared {ip} daddr @own{s} {ip} saddr . meta l4proto . th sport @endpoints{s} drop"""

    def rest(self, ports: str, ours: str) -> str:
        """Return those about frontends that are none any more, about errors, and about what endpoints send."""
        ip, s = self.word, self.suffix
        to_endpoint = f"{self._quoted_destination} @quoted_to{s}"
        quoted_port = f"@th,{self.ports},16"
        return f"""
    tcp flags & (syn | ack) != syn {ip} daddr . tcp dport @retired{s} drop
    {self.errors} {self._quoted_source} @quoted_from{s} drop
    {self.errors} {quoted_port} {ports} {quoted_port} != @spared_quoted{s} {ip} daddr @own{s} {to_endpoint} drop
    fib daddr oifname != {{ {ours} }} accept
    {ip} saddr . meta l4proto . th sport @endpoints{s} drop
    {self.reply} {ip} saddr @answering{s} drop
    {self.errors} {to_endpoint} drop"""


_IPV4 = _Family("ip", "", "icmp type { 3, 4, 11, 12 }", "icmp type echo-reply", 32, 160, 192, 136, 224)
_IPV6 = _Family("ip6", "6", "icmpv6 type { 1, 2, 3, 4 }", "icmpv6 type echo-reply", 128, 128, 256, 112, 384)


def _sets(places: Places) -> list[tuple[str, set[str]]]:
    """Return the sets of the table by name, as text."""
    return [*_sets_of(places, ""), *_sets_of(places, "6")]


def _stations(addresses: frozenset[bytes]) -> list[tuple[str, set[str]]]:
    return [("stations", {address.hex(":") for address in addresses})]


def _spared(ports: frozenset[int]) -> list[tuple[str, set[str]]]:
    return [(name, set(map(str, ports))) for name in ("spared", "spared_quoted", "spared_quoted6")]


def _sets_of(places: Places, suffix: str) -> Iterator[tuple[str, set[str]]]:
    def mine(those: Iterable[Place]) -> list[Place]:
        return [place for place in those if is_ipv6(place[0]) == bool(suffix)]

    yield f"vips{suffix}", {str(address_of(address)) for address, _, _ in mine(places.frontends)}
    yield f"frontends{suffix}", set(map(_text, mine(places.frontends)))
    yield f"retired{suffix}", {f"{address_of(address)} . {port}" for address, port, _ in mine(places.retired)}
    yield f"endpoints{suffix}", set(map(_text, mine(places.endpoints)))
    for name, addresses in (("own", places.own), ("answering", places.answering)):
        yield f"{name}{suffix}", {str(address_of(each)) for each in addresses if is_ipv6(each) == bool(suffix)}
    yield f"quoted_from{suffix}", set(map(_quoted, mine(places.own_frontends | places.retired)))
    yield f"quoted_to{suffix}", set(map(_quoted, mine(places.endpoints)))


def _text(place: Place) -> str:
    address, port, protocol = place
    return f"{address_of(address)} . {Protocol(protocol).name.lower()} . {port}"


def _quoted(place: Place) -> str:
    address, port, protocol = place
    return f"{int(address_of(address))} . {protocol} . {port}"


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
    remove_file(record)
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
