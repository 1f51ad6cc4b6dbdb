"""What `status` and `get` show, as plain data: the JSON of the control socket."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

import numpy as np

from conntrack.table import Connection
from xdp import kernel
from xdp.byteorder import swap16, swap32
from xdp.errors import UsageError
from xdp.redirects import Lost
from xdp.schema import Protocol, Reason, Verdict, verdict_of

if TYPE_CHECKING:
    from dataplane.netdev import Interface
    from dataplane.node import Node

_TROUBLE_SHOWN_S = 60.0
_UNTOLD = (Reason.PUNT_LOST,)  # not the end of a packet that userspace received


def _totals(rows: Any) -> dict[Reason, int]:
    """Return {reason: packets} over all rows of a table of counters, zeros left out."""
    sums = rows["packets"].sum(axis=0)
    return {Reason(int(number)): int(sums[number]) for number in np.flatnonzero(sums)}


def by_verdict(rows: Any) -> Counter[Verdict]:
    """Return {verdict: packets} over all rows of a table of counters."""
    verdicts: Counter[Verdict] = Counter()
    for reason, packets in _totals(rows).items():
        if reason not in _UNTOLD:
            verdicts[verdict_of(reason)] += packets
    return verdicts


def packets(node: Node) -> dict[str, dict[str, int]]:
    """Return the accounts: xdp.received = forwarded + passed + dropped + punted; userspace's likewise."""
    node.read_losses()
    xdp, user = _totals(node.shared.tables.xdp_counters), _totals(node.shared.tables.worker_counters)
    x, u = by_verdict(node.shared.tables.xdp_counters), by_verdict(node.shared.tables.worker_counters)
    return {
        "xdp": {
            "received": sum(x.values()),
            "forwarded": x[Verdict.FORWARD],
            "passed": x[Verdict.PASS],
            "dropped": x[Verdict.DROP],
            "punted": x[Verdict.PUNT],
            "admitted": xdp.get(Reason.ADMITTED, 0),
            "redirect_failed": sum(_redirect_failures(node).values()),
        },
        "userspace": {
            "received": sum(u.values()),
            "forwarded": u[Verdict.FORWARD],
            "dropped": u[Verdict.DROP],
            "punt_lost": user.get(Reason.PUNT_LOST, 0),
            "originated": 0,
        },
    }


def _redirect_failures(node: Node) -> dict[Lost, int]:
    """Return {(from, to, errno): frames} of redirects from our interfaces that failed.

    Those to no interface are punts: the sockets count them (PUNT_LOST).
    """
    if node.redirects is None:
        return {}
    ours = {queue.interface.ifindex for queue in node.engine.queues}
    counts = node.redirects.counts()
    return {lost: frames for lost, frames in counts.items() if lost.from_ifindex in ours and lost.to_ifindex}


def reasons(node: Node) -> dict[str, int]:
    """Return {reason: packets}, XDP and userspace added up."""
    tables = node.shared.tables
    both = Counter(_totals(tables.xdp_counters)) + Counter(_totals(tables.worker_counters))
    return {reason.name: count for reason, count in sorted(both.items())}


def _complaints_of(node: Node, link: Interface) -> list[str]:
    """Return what has happened to an interface since its program was attached."""
    served = sum(queue.interface.name == link.name for queue in node.engine.queues)
    if link.ifindex != node.engine.attachments[link.name].ifindex:
        what = "deleted and made again since"
    elif kernel.xdp_state(link.ifindex) is None:
        what = "its XDP program was taken off"
    elif node.netdev.interface(link.name).rx_queues != served:
        what = "the number of its queues has changed"
    else:
        return []
    return [f"{link.name}: {what}; restart the daemon"]


def _complaints(node: Node) -> list[str]:
    """Return what is not as it should be, worst first."""
    found = list(node.engine.stalled())
    now = time.monotonic()
    found += [f"{job}: {text}" for job, (at, text) in node.troubles.items() if now - at < _TROUBLE_SHOWN_S]
    if node.rejected is not None:
        problems = str(node.rejected).splitlines()
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        found.append(f"the configuration of before goes on, the new one is not valid: {problems[0]}{more}")
    links = {link.name: link for link in node.netdev.interfaces()}
    for name in node.settings.interfaces:
        link = links.get(name)
        if link is None:
            found.append(f"{name}: the interface has gone")
        elif not link.is_up:
            found.append(f"{name}: the interface is down")
        elif name in node.engine.attachments:
            found += _complaints_of(node, link)
    endpoints = {str(endpoint.address) for port in node.snapshot.ports for endpoint in port.cluster}
    for hop in node.next_hops.describe():
        if hop["destination"] in endpoints and hop["state"] == "foreign":
            found.append(
                f"endpoint {hop['destination']}: reached through {hop['interface']}, which is not given; "
                f"add -i {hop['interface']}"
            )
        elif hop["destination"] in endpoints and hop["state"] == "unresolved":
            found.append(f"endpoint {hop['destination']}: no route, or its neighbour does not answer")
    for (_, to, error), frames in _redirect_failures(node).items():
        name = next((link.name for link in links.values() if link.ifindex == to), f"interface {to}")
        found.append(
            f"{name}: {frames} frames were lost on their way out (errno {error}); "
            "a veth's far end needs an XDP program or GRO"
        )
    return found


def status(node: Node) -> dict[str, Any]:
    """Return the state of the node in one answer."""
    why = _complaints(node)
    keys = {port.key for port in node.snapshot.ports}
    return {
        "state": "failed" if not node.engine.is_alive else "degraded" if why else "ok",
        "why": why,
        "engine": node.engine.name,
        "uptime_s": round(time.monotonic() - node.started, 1),
        "services": len({key.partition(":")[0] for key in keys}),
        "endpoints": len({(e.address, e.port) for port in node.snapshot.ports for e in port.cluster}),
        "interfaces": interfaces(node),
        "flows": {"used": node.flows.used(), "capacity": node.settings.capacity},
        "revision": {"desired": node.desired, "programmed": node.programmed},
        "applied_at_s": round(node.applied_at_s, 3),
        "packets": packets(node),
        "reasons": reasons(node),
    }


def interfaces(node: Node) -> list[dict[str, Any]]:
    """Return the interfaces that take part."""
    known = {link.name: link for link in node.netdev.interfaces()}
    shown = []
    for name, attachment in node.engine.attachments.items():
        link = known.get(name)
        received = node.netdev.statistics(link.ifindex).rx_packets if link else 0
        shown.append(
            {
                "name": name,
                "engine": node.engine.name,
                "xdp_mode": attachment.mode,
                "why": attachment.why,
                "rx_packets": received,
            }
        )
    return shown


def _place(address: int, port: int) -> str:
    return f"{IPv4Address(address)}:{port}"


def _services_by_frontend(node: Node) -> dict[tuple[int, int, int], str]:
    return {
        (int(frontend.address), frontend.port, Protocol[port.protocol]): port.key
        for port in node.snapshot.ports
        for frontend in port.frontends
        if frontend.address is not None
    }


def _shown(connection: Connection, service: str | None, offloaded: bool) -> dict[str, Any]:
    return {
        "protocol": Protocol(connection.protocol).name,
        "client": _place(*connection.client),
        "frontend": _place(*connection.frontend),
        "endpoint": _place(*connection.endpoint),
        "service": service,
        "state": connection.state.name.lower(),
        "offloaded": offloaded,
        "packets": dict(zip(("original", "reply"), connection.packets, strict=True)),
        "bytes": dict(zip(("original", "reply"), connection.bytes, strict=True)),
        "idle_s": round(connection.idle_s, 3),
        "expires_s": round(connection.expires_s, 3),
    }


def _wire_place(text: str) -> tuple[int, int | None]:
    """Return (address, port) of "ip" or "ip:port" as they lie in a record; the port is None if it is not given."""
    address, _, port = text.partition(":")
    return swap32(int(IPv4Address(address))), swap16(int(port)) if port else None


def _is_at(records: Any, way: str, text: str) -> Any:
    """Return which records have the place `text` as their src or dst (or new_src, new_dst)."""
    try:
        address, port = _wire_place(text)
    except ValueError:
        raise UsageError(f"{text!r} is not an address, with a port or without: like 10.0.0.1 or 10.0.0.1:80") from None
    found = records[f"{way}_addr"] == address
    return found if port is None else found & (records[f"{way}_port"] == port)


def flows(
    node: Node,
    service: str | None = None,
    endpoint: str | None = None,
    client: str | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Return the connections, filtered; an address matches with or without a port, a Service with or without its port.

    Records are chosen while they are arrays: there may be a million.
    """
    names = _services_by_frontend(node)
    originals, replies = node.flows.records()
    wanted = np.ones(len(originals), bool)
    if endpoint is not None:
        wanted &= _is_at(originals, "new_dst", endpoint)
    if client is not None:
        wanted &= _is_at(originals, "src", client)
    if service is not None:
        keys = [key for key, name in names.items() if service in (name, name.partition(":")[0])]
        wanted &= np.isin(_frontend_keys(originals), np.array([_frontend_key(*key) for key in keys], np.uint64))
    chosen = np.flatnonzero(wanted)[:limit]
    return [
        _shown(connection, names.get((*connection.frontend, connection.protocol)), node.engine.offloads)
        for connection in node.flows.connections(originals[chosen], replies[chosen])
    ]


def _frontend_key(address: int, port: int, protocol: int) -> int:
    return swap32(address) | swap16(port) << 32 | protocol << 48


def _frontend_keys(records: Any) -> Any:
    """Return `_frontend_key` of the destination of every record."""
    words = [records[name].astype(np.uint64) for name in ("dst_addr", "dst_port", "protocol")]
    return words[0] | words[1] << np.uint64(32) | words[2] << np.uint64(48)


def services(node: Node) -> list[dict[str, Any]]:
    """Return every Service port with its frontends and endpoints."""
    held = _flows_by_endpoint(node)
    return [
        {
            "namespace": port.namespace,
            "name": port.name,
            "port": port.port_name or port.port,
            "protocol": port.protocol,
            "frontends": [f"{frontend.address}:{frontend.port}" for frontend in port.frontends],
            "endpoints": [
                {
                    "address": f"{endpoint.address}:{endpoint.port}",
                    "state": endpoint.state.value,
                    "weight": endpoint.weight,
                    "flows": held[port.key, f"{endpoint.address}:{endpoint.port}"],
                }
                for endpoint in port.endpoints
            ],
        }
        for port in node.snapshot.ports
    ]


def _flows_by_endpoint(node: Node) -> Counter[tuple[str, str]]:
    """Return {(Service port, endpoint): connections}."""
    names = {_frontend_key(*key): name for key, name in _services_by_frontend(node).items()}
    originals, _ = node.flows.records()
    frontends = _frontend_keys(originals)
    places = originals["new_dst_addr"].astype(np.uint64) | originals["new_dst_port"].astype(np.uint64) << np.uint64(32)
    order = np.lexsort((places, frontends))
    frontends, places = frontends[order], places[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (frontends[1:] != frontends[:-1]) | (places[1:] != places[:-1])
    firsts = np.flatnonzero(is_first)
    connections = np.diff(firsts, append=len(order))
    counted: Counter[tuple[str, str]] = Counter()
    for frontend, place, count in zip(
        frontends[firsts].tolist(), places[firsts].tolist(), connections.tolist(), strict=True
    ):
        counted[names.get(frontend, ""), _place(swap32(place & 0xFFFFFFFF), swap16(place >> 32))] += count
    return counted


def endpoints(node: Node) -> list[dict[str, Any]]:
    """Return every endpoint of every Service port: the same as `services`, an endpoint a row."""
    return [
        {
            "service": f"{service['namespace']}/{service['name']}:{service['port']}",
            "protocol": service["protocol"],
            **entry,
        }
        for service in services(node)
        for entry in service["endpoints"]
    ]


def nexthops(node: Node) -> Iterable[dict[str, object]]:
    """Return where packets go next."""
    return node.next_hops.describe()


VIEWS: dict[str, Callable[..., Any]] = {
    view.__name__: view for view in (status, services, endpoints, flows, nexthops, interfaces, reasons)
}
LONG = (services, endpoints, flows)  # they look at every flow, and at nothing that the event loop changes
