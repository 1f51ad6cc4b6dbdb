"""What `status` and `get` show, as plain data: the JSON of the control socket."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from conntrack.table import Connection
from dataplane.netdev import FORWARDING, Interface
from dataplane.output import counted
from lb.model import AdminState, Endpoint, Place
from lb.rows import Here, echo_protocol, frontends_of, known_as
from xdp.addresses import read_place, with_port
from xdp.byteorder import swap16, swap32
from xdp.errors import UsageError
from xdp.links import interface_name
from xdp.names import Names
from xdp.schema import ENDPOINT, Protocol, Reason, Verdict, verdict_of

if TYPE_CHECKING:
    from dataplane.node import Node

_TROUBLE_SHOWN_S = 60.0
_MOST_TOLD = 100  # endpoints or Service ports of which all that is wrong is told one by one
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
    """Return the accounts: xdp.received = forwarded + passed + dropped + punted; userspace's likewise.

    `egress` is what the kernel sends by our interfaces: replies that are translated there, and all else.
    """
    node.read_losses()
    xdp, user = _totals(node.shared.tables.xdp_counters), _totals(node.shared.tables.worker_counters)
    x, u = by_verdict(node.shared.tables.xdp_counters), by_verdict(node.shared.tables.worker_counters)
    e = by_verdict(node.shared.tables.egress_counters)
    return {
        "xdp": {
            "received": sum(x.values()),
            "forwarded": x[Verdict.FORWARD],
            "passed": x[Verdict.PASS],
            "dropped": x[Verdict.DROP],
            "punted": x[Verdict.PUNT],
            "admitted": xdp.get(Reason.ADMITTED, 0),
            "redirect_failed": sum(node.losses.counts(_ours(node)).values()),
        },
        "userspace": {
            "received": sum(u.values()),
            "forwarded": u[Verdict.FORWARD],
            "passed": u[Verdict.PASS],
            "dropped": u[Verdict.DROP],
            "punt_lost": user.get(Reason.PUNT_LOST, 0),
            "originated": int(node.shared.tables.worker_counters["originated"].sum())
            + (node.announcer.sent if node.announcer else 0),
        },
        "egress": {
            "received": sum(e.values()),
            "forwarded": e[Verdict.FORWARD],
            "passed": e[Verdict.PASS],
        },
    }


def sockets(node: Node) -> dict[str, Any] | None:
    """Return what became of clients on this node as they connected, or sent a datagram; None if they are not led."""
    if node.clients is None:
        return None
    rows = node.shared.tables.connect_counters
    verdicts = by_verdict(rows)
    return {
        "led": verdicts[Verdict.FORWARD],
        "passed": verdicts[Verdict.PASS],
        "refused": verdicts[Verdict.DROP],
        "reasons": {reason.name: count for reason, count in sorted(_totals(rows).items())},
    }


def _ours(node: Node) -> set[int]:
    return {queue.interface.ifindex for queue in node.engine.queues}


def reasons(node: Node) -> dict[str, int]:
    """Return {reason: packets}, XDP and userspace added up."""
    tables = node.shared.tables
    both = Counter(_totals(tables.xdp_counters)) + Counter(_totals(tables.worker_counters))
    return {reason.name: count for reason, count in sorted(both.items())}


def _complaints(node: Node) -> list[str]:
    """Return what is not as it should be, worst first."""
    found = list(node.engine.stalled())
    now = time.monotonic()
    found += [f"{job}: {text}" for job, (at, text) in node.jobs.troubles.items() if now - at < _TROUBLE_SHOWN_S]
    if node.manifests.rejected is not None:
        problems = str(node.manifests.rejected).splitlines()
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        what = "cannot be applied yet" if node.manifests.may_pass else "is not valid"
        found.append(f"the configuration of before goes on, the new one {what}: {problems[0]}{more}")
    found += node.engine.complaints()
    found += _complaints_of_clients(node)
    if node.announcer:
        found += node.announcer.conflicts(now)
    given = node.next_hops.given()
    found += [f"{name}: the interface is down" for name, link in given.items() if not link.is_up]
    found += _out_of_reach(node)
    found += [
        f"{name}: takes no redirected frames, and what leaves there is routed by the kernel; "
        "a veth's far end needs an XDP program or GRO"
        for name in node.losses.refusing.values()
    ]
    found += [
        f"endpoints on this node: the kernel does not forward to them; set {FORWARDING[family]} to 1"
        for family in sorted(node.next_hops.families_of_local())
        if not node.netdev.is_forwarding(family)
    ]
    return found + node.losses.complaints(_ours(node), interface_name, now)


def _complaints_of_clients(node: Node) -> list[str]:
    if node.settings.socket_cgroup is not None and node.clients is None:
        return [f"clients on this node are not led: engine {node.engine.name} has no BPF; see its interfaces for why"]
    return [part.why for part in (node.clients, node.led) if part is not None and part.why]


def _out_of_reach(node: Node) -> Iterator[str]:
    """Yield the endpoints that no packets get to, and why, in words."""
    numbers = node.next_hops.out_of_reach()
    if not len(numbers):
        return
    numbers = np.intersect1d(numbers, node.services.next_hops())  # the others are clients', or of endpoints that were
    for hop in node.next_hops.describe(set(numbers[:_MOST_TOLD].tolist())):
        if hop["state"] == "foreign":
            unless = f" ({node.engine.why_no_egress})" if node.engine.why_no_egress else ""
            here = f"the nodeName {node.settings.node_name}" if node.settings.node_name else "--node-name"
            yield (
                f"endpoint {hop['destination']}: reached through {hop['interface']}, which is not given; "
                f"add -i {hop['interface']}, or {here} if it is on this node{unless}"
            )
        else:
            yield f"endpoint {hop['destination']}: no route, or its neighbour does not answer"
    if len(numbers) > _MOST_TOLD:
        yield f"{len(numbers) - _MOST_TOLD} more endpoints are out of reach; `turnout get nexthops` lists all"


def status(node: Node) -> dict[str, Any]:
    """Return the state of the node in one answer."""
    why = _complaints(node)
    return {
        "state": "failed" if not node.engine.is_alive else "degraded" if why else "ok",
        "why": why,
        "engine": node.engine.name,
        "seed": node.seed.fingerprint,
        "uptime_s": round(time.monotonic() - node.started, 1),
        "services": node.in_force.live.services,
        "endpoints": node.in_force.live.endpoints,
        "interfaces": interfaces(node),
        "flows": {"used": node.flows.used(), "capacity": node.settings.capacity},
        "snat_ports_left_out": len(node.occupied.ports) if node.occupied else 0,
        "taken_out": taken_out(node),
        "without_endpoint": without_endpoint(node),
        "revision": {"desired": node.manifests.desired, "programmed": node.manifests.programmed},
        "applied_at_s": round(node.manifests.applied_at_s, 3),
        "packets": packets(node),
        "sockets": sockets(node),
        "reasons": reasons(node),
    }


def taken_out(node: Node) -> dict[str, Any]:
    """Return how many endpoints an operator has taken out, when the next drain is over, and what maintenance ended."""
    said = node.in_force.here.administered
    states = Counter(each.state for each in said.values())
    return {
        "drain": states[AdminState.DRAIN],
        "maint": states[AdminState.MAINT],
        "next_deadline_s": _left_s(node, node.deadlines.next_s()),
        "ended": node.strays.ended_out,
    }


def without_endpoint(node: Node) -> dict[str, Any]:
    """Return how many Service ports refuse new clients, as they have no endpoint, and the first of them."""
    keys = sorted({port.key for port in node.in_force.without_endpoint.values()})
    return {"count": len(keys), "ports": keys[:_MOST_TOLD]}


def interfaces(node: Node) -> list[dict[str, Any]]:
    """Return the interfaces that take part: those that were given, and those that the kernel reaches endpoints by."""
    given, local = node.next_hops.given(), node.next_hops.interfaces_of_local()
    here = {link.name: link for link in (node.netdev.interfaces() if local else ())}

    def shown(name: str, link: Interface | None, engine: str, mode: str | None, why: str) -> dict[str, Any]:
        return {"name": name, "engine": engine, "xdp_mode": mode, "why": why, "rx_packets": _received(node, link)}

    found = []
    for name in node.settings.interfaces:
        attachment = node.engine.attachments.get(name)
        mode, why = (attachment.mode, attachment.why) if attachment else (None, "not attached: see `turnout status`")
        found.append(shown(name, given.get(name), node.engine.name, mode, why))
    for name, count in sorted(local.items()):
        why = f"{counted(count, 'endpoint')} on this node"
        found.append(shown(name, here.get(name), "kernel", None, why))
    return found


def _received(node: Node, link: Interface | None) -> int:
    """Return how many packets have come by an interface, 0 if it has gone."""
    with contextlib.suppress(UsageError):
        return node.netdev.statistics(link.ifindex).rx_packets if link else 0
    return 0


def _services_by_frontend(node: Node) -> dict[tuple[int, int, int], str]:
    """Return the Service port of every frontend, and of every VIP's echoes, that of its lowest port."""
    here, addresses = node.in_force.here, Names(node.shared.tables)
    found = {
        known_as(frontend, addresses): port.key
        for port in node.in_force.snapshot.ports
        for _, frontend in frontends_of(port, here)
    }
    if node.settings.ping == "forward":
        for (address, _, protocol), key in sorted(found.items(), reverse=True):
            found[address, 0, echo_protocol(6 if protocol & Protocol.IPV6 else 4)] = key
    return found


def _shown(connection: Connection, service: str | None, offloaded: bool, addresses: Names) -> dict[str, Any]:
    protocol = connection.protocol

    def shown(place: tuple[int, int]) -> str:
        return _shown_place(*place, protocol, addresses)

    return {
        "protocol": Protocol(protocol & ~Protocol.IPV6).name,
        "client": shown(connection.client),
        "frontend": shown(connection.frontend),
        "snat": shown(connection.source) if connection.source != connection.client else None,
        "endpoint": shown(connection.endpoint),
        "service": service,
        "state": connection.state.name.lower(),
        "offloaded": offloaded,
        "packets": dict(zip(("original", "reply"), connection.packets, strict=True)),
        "bytes": dict(zip(("original", "reply"), connection.bytes, strict=True)),
        "idle_s": round(connection.idle_s, 3),
        "expires_s": round(connection.expires_s, 3),
    }


def _shown_place(address: int, port: int, protocol: int, addresses: Names) -> str:
    """Return an address and a port of a flow of this protocol, in host order, as text."""
    return with_port(addresses.address_of(address) if protocol & Protocol.IPV6 else address, port)


def _is_at(records: Any, way: str, text: str, addresses: Names) -> Any:
    """Return which records have the place `text` as their src or dst (or new_src, new_dst)."""
    try:
        address, port = read_place(text)
    except ValueError:
        raise UsageError(f"{text!r} is not an address, with a port or without: like 10.0.0.1 or 10.0.0.1:80") from None
    number, _, family = known_as((address, 0, 0), addresses)
    found = (records[f"{way}_addr"] == swap32(number)) & (records["protocol"] & Protocol.IPV6 == family)
    return found if port is None else found & (records[f"{way}_port"] == swap16(port))


def flows(
    node: Node,
    service: str | None = None,
    endpoint: str | None = None,
    client: str | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Return the connections, filtered; an address matches with or without a port, a Service with or without its port.

    Records are chosen while they are arrays: there may be a million. UsageError: there is no such Service, or no such
    endpoint; one that has gone and has connections still is one.
    """
    names, addresses = _services_by_frontend(node), Names(node.shared.tables)
    originals, replies = node.flows.records()
    wanted = np.ones(len(originals), bool)
    if endpoint is not None:
        wanted &= _is_at(originals, "new_dst", endpoint, addresses)
        if not wanted.any():
            places_of(node, endpoint)
    if client is not None:
        wanted &= _is_at(originals, "src", client, addresses)
    if service is not None:
        if not any(service in (port.key, port.key.partition(":")[0]) for port in node.in_force.snapshot.ports):
            raise UsageError(f"{service} is no Service; `turnout get services` lists them as NAMESPACE/NAME:PORT")
        keys = [key for key, name in names.items() if service in (name, name.partition(":")[0])]
        wanted &= np.isin(_frontend_keys(originals), np.array([_frontend_key(*key) for key in keys], np.uint64))
    chosen = np.flatnonzero(wanted)[:limit]
    return [
        _shown(connection, names.get((*connection.frontend, connection.protocol)), node.engine.offloads, addresses)
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
    here = node.in_force.here
    return [
        {
            "namespace": port.namespace,
            "name": port.name,
            "port": port.port_name or port.port,
            "protocol": port.protocol,
            "frontends": [with_port(address, number) for _, (address, number, _) in frontends_of(port, here)],
            "endpoints": [
                {
                    "address": with_port(endpoint.address, endpoint.port),
                    "state": _state_of(endpoint, here),
                    "weight": endpoint.weight,
                    "flows": held[port.key, with_port(endpoint.address, endpoint.port)],
                    **_deadline_of(node, endpoint),
                }
                for endpoint in port.endpoints
            ],
        }
        for port in node.in_force.snapshot.ports
    ]


def _deadline_of(node: Node, endpoint: Endpoint) -> dict[str, float]:
    """Return how long the drain of an endpoint lasts, if it has a deadline."""
    left_s = _left_s(node, node.in_force.here.said_of((endpoint.address, endpoint.port)).deadline_s)
    return {} if left_s is None else {"deadline_s": left_s}


def _state_of(endpoint: Endpoint, here: Here) -> str:
    wanted = here.state_of(endpoint)
    return endpoint.state.value if wanted is AdminState.READY else wanted.value


def _flows_by_endpoint(node: Node) -> Counter[tuple[str, str]]:
    """Return {(Service port, endpoint): connections}."""
    names = {_frontend_key(*key): name for key, name in _services_by_frontend(node).items()}
    originals, _ = node.flows.records()
    addresses = Names(node.shared.tables)
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
        shown = _shown_place(swap32(place & 0xFFFFFFFF), swap16(place >> 32), frontend >> 48, addresses)
        counted[names.get(frontend, ""), shown] += count
    return counted


def place_of(text: str) -> Place:
    """Return the address and port that a text says. UsageError: it says none."""
    with contextlib.suppress(ValueError):
        address, port = read_place(text)
        if port is not None:
            return address, port
    raise UsageError(f"{text!r} is not an address and a port; write it as 10.0.0.1:8080")


def places_of(node: Node, text: str) -> set[Place]:
    """Return where the endpoints are that an operator means: an address, with a port or without."""
    try:
        address, port = read_place(text)
    except ValueError:
        raise UsageError(f"{text!r} is not an endpoint; write it as 10.0.0.1:8080, or 10.0.0.1 for all ports") from None
    found = {place for place in node.in_force.live.places() if place[0] == address and port in (None, place[1])}
    if not found:
        raise UsageError(f"{text} is no endpoint of any Service; `turnout get endpoints` lists them")
    return found


def administered(node: Node, places: Sequence[Place]) -> list[dict[str, Any]]:
    """Return endpoints with what an operator wants of them, and how many connections to each are open.

    Each with those of its Service ports that have no endpoint for new clients.
    """
    names = Names(node.shared.tables)
    rows = np.zeros(len(places), ENDPOINT)
    for row, place in zip(rows, places, strict=True):
        address, port, _ = known_as((*place, 0), names)
        row["addr"], row["port"] = swap32(address), swap16(port)
    here = node.in_force.here
    without: dict[Place, set[str]] = {}
    for refusing in list(node.in_force.without_endpoint.values()):  # at once: the event loop may be changing it
        for endpoint in refusing.endpoints:
            without.setdefault((endpoint.address, endpoint.port), set()).add(refusing.key)
    return [
        {
            "address": with_port(*place),
            "state": here.said_of(place).state.value,
            "deadline_s": _left_s(node, here.said_of(place).deadline_s),
            "open": int(count),
            "without_endpoint": sorted(without.get(place, ())),
        }
        for place, count in zip(places, node.flows.count_open(rows), strict=True)
    ]


def _left_s(node: Node, deadline_s: float | None) -> float | None:
    """Return the seconds until a deadline, if there is one."""
    left_s = node.deadlines.left_s(deadline_s)
    return None if left_s is None else round(left_s, 1)


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
