"""What the demo has seen, in words for somebody who sees it for the first time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from perf.clients import Result
from perf.demo.cost import FLOWS, Comparison, NotCompared
from perf.demo.scene import ENDPOINTS, Port

_COLUMN = 11


@dataclass(frozen=True)
class Traffic:
    """What real clients saw through turnout, by protocol, and what became of their packets on the node."""

    loads: Mapping[str, Result]
    in_xdp: int
    in_userspace: int
    lost: Mapping[str, int]  # {where, in words: packets}
    engine: str  # in words: how packets were taken
    drops: Mapping[str, int] = field(default_factory=dict)  # {reason: packets}

    @property
    def answered(self) -> int:
        """Requests that were answered."""
        return sum(load.answered for load in self.loads.values())


def problems(traffic: Traffic, costs: Comparison | NotCompared) -> list[str]:
    """Return what did not work, in words; nothing when all is well."""
    found = []
    for protocol, load in traffic.loads.items():
        if load.failed:
            causes = ", ".join(f"{cause} {count:,}" for cause, count in load.failures.items())
            found.append(f"{load.failed:,} of {load.answered + load.failed:,} {protocol} requests failed: {causes}")
        if load.moved:
            found.append(f"{load.moved:,} {protocol} connections were answered by more than one endpoint")
        if silent := [name for name in ENDPOINTS if not load.answers.get(name)]:
            found.append(f"{', '.join(silent)} answered no {protocol} request")
    if not traffic.in_xdp:
        found.append("XDP forwarded no packet")
    if isinstance(costs, NotCompared) and costs.is_failure:
        found.append(f"the comparison with iptables: {costs.why}")
    return found


def text(
    services: Mapping[str, Port], traffic: Traffic, costs: Comparison | NotCompared, next_steps: Sequence[str]
) -> str:
    """Return the summary."""
    parts = [_verdict(traffic, problems(traffic, costs)), _spread(services, traffic), _paths(traffic), _costs(costs)]
    parts.append(["What to try next", *(f"  {line}" for line in next_steps)])
    return "\n\n".join("\n".join(part) for part in parts)


def _verdict(traffic: Traffic, found: Sequence[str]) -> list[str]:
    if not found:
        return [f"All {traffic.answered:,} requests were answered, and no connection ever changed its endpoint."]
    return ["Something did not work:", *(f"  {problem}" for problem in found)]


def _row(label: str, cells: Sequence[str], end: str = "") -> str:
    return f"  {label:<34}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells) + (f"   {end}" if end else "")


def _spread(services: Mapping[str, Port], traffic: Traffic) -> list[str]:
    lines = ["How connections spread over the endpoints", _row("", list(ENDPOINTS))]
    for protocol, load in traffic.loads.items():
        port = services[protocol]
        kind = "connections" if protocol == "tcp" else "flows"
        counts = [f"{load.flows_by_server.get(name, 0):,}" for name in ENDPOINTS]
        lines.append(_row(f"{port.key} {port.target}/{protocol.upper()}", counts, f"{kind}, {load.answered:,} answers"))
    lines += [
        "  Each new connection is given an endpoint by its addresses and ports (Maglev hashing), and stays there.",
    ]
    return lines


def _paths(traffic: Traffic) -> list[str]:
    total = max(1, traffic.in_xdp + traffic.in_userspace)
    rows = [
        ("XDP, inside the kernel", traffic.in_xdp, "packets of connections that are known"),
        ("userspace", traffic.in_userspace, "the first packet of each connection"),
    ]
    lines = [f"Who forwarded the packets ({traffic.engine})"]
    lines += [_row(name, [f"{count:,}", f"{count / total:.1%}"], what) for name, count, what in rows]
    why = ", ".join(f"{reason} {count:,}" for reason, count in traffic.drops.items())
    lines += [_row(how, [f"{count:,}"], why) for how, count in traffic.lost.items() if count]
    lines.append("  Userspace writes a connection into memory that XDP reads too: from then on XDP forwards it alone.")
    return lines


def _costs(costs: Comparison | NotCompared) -> list[str]:
    title = "What the same costs through iptables"
    if isinstance(costs, NotCompared):
        return [title, f"  not compared: {costs.why}"]
    ours, theirs = costs.by_side["turnout"], costs.by_side["iptables"]
    low, high = costs.ratio.low, costs.ratio.high
    return [
        f"{title} (kube-proxy's rules, on a second node like the first; measured in turns)",
        _row("", ["turnout", "iptables"]),
        _row(
            "a packet of a known connection",
            [f"{ours.packet_ns:,.0f} ns", f"{theirs.packet_ns:,.0f} ns"],
            f"iptables takes {costs.ratio.median:.1f} times as long (quartiles {low:.1f} to {high:.1f})",
        ),
        _row(
            "opening a TCP connection, median",
            [f"{ours.connect_us:,.0f} us", f"{theirs.connect_us:,.0f} us"],
            _first_packet(ours.connect_us, theirs.connect_us),
        ),
        _row(
            "a request on it, median",
            [f"{ours.request_us:,.0f} us", f"{theirs.request_us:,.0f} us"],
            "mostly the server's own time",
        ),
        f"  A packet: what one CPU takes to make, receive and forward 64-byte UDP of {FLOWS:,} known flows; making it",
        "  costs the same in both. Times are those of this machine at this moment; the ratio tells more.",
    ]


def _first_packet(ours_us: float, theirs_us: float) -> str:
    if ours_us > theirs_us * 1.05:
        return "the first packet wakes userspace; many Services slow down iptables, not us"
    return ""
