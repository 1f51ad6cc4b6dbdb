"""What a node is told at start, by flags or by a file, and the places that follow from its name.

`OPTIONS` is the one list of options: the command line and the configuration file both read values with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any, Literal, NamedTuple

DEFAULT_NAME = "node"
DEFAULT_RUN_FOLDER = "/run/turnout"
ENGINES = ("auto", "xdp", "afxdp", "raw")
MASQUERADES = ("auto", "none", "external", "all")
XDP_MODES = ("auto", "native", "generic")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MOST_CONNECTIONS = 500_000_000  # 165 bytes each: 82 GB
_LONGEST_INTERFACE = 15  # IFNAMSIZ, without its end
_LINK, _EGRESS, _HOOK = "link-", "egress-", "hook-"
_Network = IPv4Network | IPv6Network
_Address = IPv4Address | IPv6Address


class PortRange(NamedTuple):
    """Ports from `first` to `last`, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


class VlanRange(NamedTuple):
    """VLANs from `first` to `last`, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}" if self.first < self.last else f"{self.first}"


ALL_VLANS = VlanRange(0, 4094)  # 4095 is reserved
PRIORITY_VLAN = 0  # of tags that name none: the kernel takes frames with them for untagged ones


def joined_vlans(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what is served, as ranges that neither meet nor overlap: those that are given, and priority tags."""
    found: list[tuple[int, int]] = []
    for first, last in sorted([(PRIORITY_VLAN, PRIORITY_VLAN), *ranges]):
        if found and first <= found[-1][1] + 1:
            begin, end = found.pop()
            found.append((begin, max(end, last)))
        else:
            found.append((first, last))
    return found


DEFAULT_SNAT_PORTS = PortRange(61000, 65535)  # beyond those that Linux gives to its own connections
PRIVILEGED_SNAT_PORTS = PortRange(600, 1023)  # for clients with a privileged port; nf_nat draws them from there, too


def _run_folder() -> Path:
    return Path(os.environ.get("TURNOUT_RUN") or DEFAULT_RUN_FOLDER)


@dataclass(frozen=True)
class Settings:
    """The settings of one node, all valid by themselves. Defaults are those of the flags."""

    name: str
    files: tuple[str, ...]
    interfaces: tuple[str, ...]
    engine: str = "auto"
    xdp_mode: Literal["auto", "native", "generic"] = "auto"
    capacity: int = 1_000_000  # connections
    announce: str = "none"
    ping: str = "answer"
    on_exit: str | None = None  # None: keep after SIGTERM, detach after Ctrl-C
    node_name: str = ""
    zone: str = ""
    allow_external_ips: tuple[_Network, ...] = ()
    nodeport_addresses: tuple[_Network, ...] = ()  # none: all addresses of the interfaces
    masquerade: str = "auto"
    cluster_cidr: tuple[_Network, ...] = ()
    snat_ports: PortRange = DEFAULT_SNAT_PORTS
    snat_addresses: tuple[_Address, ...] = ()  # none: the node's own on the way
    vlans: tuple[VlanRange, ...] = ()  # that are served beside untagged and priority-tagged frames
    socket_cgroup: Path | None = None  # whose sockets are led to endpoints as they connect
    seed_file: Path | None = None  # holds the secret that Maglev's seed is made of; none: the seed is public
    metrics: tuple[str, int] | None = None  # address and port
    log_format: str = "text"
    run_folder: Path = field(default_factory=_run_folder)

    @property
    def announces(self) -> bool:
        """Whether VIPs are announced."""
        return self.announce == "arp"

    @property
    def masquerades(self) -> str:
        """Who is masqueraded: none, external or all (docs/adr/0022)."""
        if self.masquerade != "auto":
            return self.masquerade
        return "external" if self.cluster_cidr else "none"

    @property
    def flag(self) -> str:
        """What commands that mean this node are given behind their own name: nothing for the default."""
        return "" if self.name == DEFAULT_NAME else f" --name {self.name}"

    @property
    def socket_path(self) -> Path:
        """Where the control socket listens."""
        return self.run_folder / f"{self.name}.sock"

    @property
    def lock_path(self) -> Path:
        """The file that a running node holds locked; it contains the node's pid."""
        return self.run_folder / f"{self.name}.lock"

    @property
    def offloads_path(self) -> Path:
        """The file that says what is to be switched on again at the end."""
        return self.run_folder / f"{self.name}.offloads"

    @property
    def reserved_path(self) -> Path:
        """The file that says which ports the node has reserved."""
        return self.run_folder / f"{self.name}.ports"

    @property
    def namespace_path(self) -> Path:
        """The file that says which network namespace the node works in."""
        return self.run_folder / f"{self.name}.namespace"

    @property
    def administered_path(self) -> Path:
        """The file that says which endpoints an operator wants drained, or in maintenance."""
        return self.run_folder / f"{self.name}.administered"

    @property
    def whereabouts_path(self) -> Path:
        """The file that says which Pod was seen where last."""
        return self.run_folder / f"{self.name}.pods"

    @property
    def bpffs(self) -> Path:
        """The mount that holds the pins of all nodes."""
        return self.run_folder / "bpf"

    @property
    def pins(self) -> Path:
        """The folder of this node's pins."""
        return self.bpffs / self.name

    @property
    def table_folder(self) -> Path:
        """The folder of the tables of engine `raw`."""
        return self.run_folder / "tables" / self.name

    @property
    def filter_record(self) -> Path:
        """The file that tells of the ingress filter of engine `raw`."""
        return self.run_folder / f"{self.name}.filter"

    def link_pin(self, interface: str) -> Path:
        """Return where the link to `interface` is pinned. A bpffs takes no dots, which interfaces may have."""
        return self._pin(_LINK, interface)

    def egress_pin(self, interface: str) -> Path:
        """Return where the link of the program is pinned that frames meet as they leave by `interface`."""
        return self._pin(_EGRESS, interface)

    def _pin(self, kind: str, interface: str) -> Path:
        return self.pins / f"{kind}{interface.replace('%', '%25').replace('.', '%2e')}"

    def link_pins(self) -> list[Path]:
        """Return the links of XDP programs that are pinned, whichever interface they are on."""
        return self._pins_of(_LINK)

    def link_pins_of_all(self) -> list[Path]:
        """Return the links of XDP programs that any node has pinned, each in the folder of its node."""
        return sorted(self.bpffs.glob(f"*/{_LINK}*"))

    def egress_pins(self) -> list[Path]:
        """Return the others."""
        return self._pins_of(_EGRESS)

    def hook_pin(self, hook: str) -> Path:
        """Return where the link of the program is pinned that sockets meet at a hook of their cgroup."""
        return self.pins / f"{_HOOK}{hook}"

    def hook_pins(self) -> list[Path]:
        """Return the links that are pinned of such programs."""
        return self._pins_of(_HOOK)

    def _pins_of(self, kind: str) -> list[Path]:
        try:
            return sorted(pin for pin in self.pins.iterdir() if pin.name.startswith(kind))
        except (FileNotFoundError, NotADirectoryError):
            return []


def interface_of(pin: Path) -> str:
    """Return the interface that a pin of `Settings.link_pins` is for."""
    return pin.name.removeprefix(_LINK).replace("%2e", ".").replace("%25", "%")


# Readers of one value: text -> value. ValueError says what is wrong with the text, to be put after the option's name.


def read_name(text: str) -> str:
    """Return the name of a node."""
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is no name; expected letters, digits, - and _, at most 64")
    return text


def _read_path(text: str) -> str:
    if not text:
        raise ValueError("is empty; expected a file, a folder or - for stdin")
    return text


def _read_file(text: str) -> Path:
    if not text:
        raise ValueError("is empty; expected the path of a file")
    return Path(text)


def _read_folder(text: str) -> Path:
    if not text.startswith("/"):
        raise ValueError(f"{text!r} is not the whole path of a folder; expected one like /sys/fs/cgroup")
    return Path(text)


def _read_interface(text: str) -> str:
    is_name = text not in ("", ".", "..") and text.isprintable() and not set(text) & set("/: \t")
    if not is_name or len(os.fsencode(text)) > _LONGEST_INTERFACE:
        raise ValueError(f"{text!r} is no name of an interface; see `ip -br link`")
    return text


def _read_capacity(text: str) -> int:
    if not re.fullmatch(r"[0-9][0-9_]{0,20}", text) or not 1 <= (number := int(text)) <= _MOST_CONNECTIONS:
        raise ValueError(f"{text!r} is not a number of connections; expected 1 to {_MOST_CONNECTIONS}")
    return number


def _read_word(text: str) -> str:
    if not text or not text.isprintable() or " " in text:
        raise ValueError(f"{text!r} is no name; expected printable characters without spaces")
    return text


def _read_network(text: str) -> _Network:
    try:
        return ip_network(text.strip())
    except ValueError as error:
        raise ValueError(f"{error}; expected a network like 203.0.113.0/24") from None


def _read_source(text: str) -> _Address:
    try:
        address = ip_address(text.strip())
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address") from None
    if address.is_multicast or address.is_loopback or address.is_unspecified or address.is_link_local:
        raise ValueError(f"{address}: nothing that is sent there comes back")
    return address


def _read_ports(text: str) -> PortRange:
    first, _, last = text.partition("-")
    if (
        not all(re.fullmatch(r"[0-9]{1,5}", part) for part in (first, last))
        or not 1023 < int(first) <= int(last) < 65536
    ):
        raise ValueError(f"{text!r} is no range of ports; expected one like {DEFAULT_SNAT_PORTS}, from 1024 on")
    return PortRange(int(first), int(last))


def _read_vlans(text: str) -> VlanRange:
    if text == "all":
        return ALL_VLANS
    first, dash, last = text.partition("-")
    last = last if dash else first
    is_right = all(re.fullmatch(r"[0-9]{1,4}", part) for part in (first, last))
    if not is_right or not int(first) <= int(last) <= ALL_VLANS.last:
        raise ValueError(f"{text!r} is no VLAN; expected a number up to {ALL_VLANS.last}, a range like 100-199, or all")
    return VlanRange(int(first), int(last))


def _read_endpoint(text: str) -> tuple[str, int]:
    """Return (address, port) of `ADDR:PORT` or `[ADDR6]:PORT`; `:PORT` is every address."""
    host, colon, number = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = str(ip_address(bare)) if bare else "0.0.0.0"  # noqa: S104 - asked for
        is_right = bool(colon) and (":" not in bare or bare != host)
    except ValueError:
        is_right = False
    if not is_right or not re.fullmatch(r"[0-9]{1,5}", number) or not 1 <= int(number) <= 65535:
        raise ValueError(f"{text!r} is not ADDR:PORT; expected an address like 127.0.0.1:17420 or [::1]:17420")
    return address, int(number)


class Option(NamedTuple):
    """An option of `run`, as a flag and in a file: where its value goes, and how it is read."""

    field: str
    read: Callable[[str], Any]
    metavar: str
    help: str
    is_list: bool = False
    choices: tuple[str, ...] = ()


def _choice(field_name: str, choices: tuple[str, ...], text: str) -> Option:
    def read(given: str) -> str:
        if given in choices:
            return given
        from lb.fields import did_you_mean

        raise ValueError(f"{given!r} is not one of {', '.join(choices)}{_only_a_hint(did_you_mean(given, choices))}")

    return Option(field_name, read, f"[{'|'.join(choices)}]", text, choices=choices)


def _only_a_hint(cure: str) -> str:
    return "" if cure.startswith("; known are") else cure


OPTIONS: Mapping[str, Option] = {
    "name": Option("name", read_name, "NAME", "Which node."),
    "file": Option("files", _read_path, "PATH...", "Manifests: files, folders, or - for stdin.", is_list=True),
    "interface": Option("interfaces", _read_interface, "IFACE...", "Interfaces to serve.", is_list=True),
    "engine": _choice("engine", ENGINES, "What forwards packets; auto: xdp, without BPF raw."),
    "xdp-mode": _choice("xdp_mode", XDP_MODES, "In the driver, or after it; auto: in the driver if it can."),
    "capacity": Option("capacity", _read_capacity, "CONNECTIONS", "Room in the flow table, 165 bytes each."),
    "announce": _choice(
        "announce",
        ("none", "arp"),
        "Whether to answer ARP, and NDP, for the Services' addresses, and to announce them.",
    ),
    "ping": _choice("ping", ("answer", "drop", "forward"), "What becomes of echo requests to the Services' addresses."),
    "on-exit": _choice(
        "on_exit", ("keep", "detach"), "Programs and tables after the end. Default: keep, after Ctrl-C detach."
    ),
    "node-name": Option("node_name", _read_word, "NAME", "This node, as endpoints' nodeName says it."),
    "zone": Option("zone", _read_word, "ZONE", "The topology zone that this node is in."),
    "allow-external-ips": Option(
        "allow_external_ips",
        _read_network,
        "CIDR",
        "A network that externalIPs may be in; repeat for more.",
        is_list=True,
    ),
    "nodeport-addresses": Option(
        "nodeport_addresses",
        _read_network,
        "CIDR",
        "Serve node ports at the node's addresses in this network; repeat for more. Default: at all those of the "
        "interfaces.",
        is_list=True,
    ),
    "masquerade": _choice(
        "masquerade",
        MASQUERADES,
        "Whose source address becomes the node's; auto: external with --cluster-cidr, else none.",
    ),
    "cluster-cidr": Option(
        "cluster_cidr",
        _read_network,
        "CIDR",
        "A network of pods: clients in it are inside the cluster; repeat for more.",
        is_list=True,
    ),
    "snat-ports": Option(
        "snat_ports",
        _read_ports,
        "FIRST-LAST",
        "The node's ports that masqueraded connections leave from; privileged ones from 600-1023.",
    ),
    "snat-addresses": Option(
        "snat_addresses",
        _read_source,
        "IP",
        "An address that masqueraded connections come from, which must lead back to this node; repeat for more. "
        "Default: the node's own on the way to the endpoint.",
        is_list=True,
    ),
    "vlan": Option(
        "vlans",
        _read_vlans,
        "VLAN",
        "Serve frames with this VLAN's tag, a range's, or all; repeat for more. Default: none but untagged and "
        "priority-tagged ones.",
        is_list=True,
    ),
    "socket-cgroup": Option(
        "socket_cgroup",
        _read_folder,
        "CGROUP",
        "Lead clients on this node to endpoints as they connect: those whose sockets are in this cgroup (v2), or below "
        "it.",
    ),
    "seed-file": Option(
        "seed_file",
        _read_file,
        "FILE",
        "A file with a secret, the same on all nodes that share VIPs: whoever does not know it cannot tell which "
        "endpoint a connection will get.",
    ),
    "metrics": Option("metrics", _read_endpoint, "ADDR:PORT", "Serve Prometheus metrics here."),
    "log-format": _choice("log_format", ("text", "json"), "How messages on stderr look."),
}


def merge(flags: Mapping[str, Any], file: Mapping[str, Any]) -> Settings:
    """Return settings from two mappings of fields; a flag wins over the file, None and () mean not given."""
    given = {name: value for source in (file, flags) for name, value in source.items() if value not in (None, ())}
    for option in OPTIONS.values():
        if option.is_list:
            given[option.field] = tuple(dict.fromkeys(given.get(option.field, ())))
    return Settings(**{"name": DEFAULT_NAME, **given})
