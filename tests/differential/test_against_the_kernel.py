"""The same traffic through the kernel's NAT and through turnout: what comes out is the same, or docs/behaviours.md says
what is not, and why. A difference that is not explained there fails, and so does one that is no longer there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.l2 import Ether

from tests.daemon_node import DaemonNode
from tests.differential.cases import CASES, Places
from tests.differential.services import INSIDE, MANY, RULES, SNAT_PORTS, STICKY, manifests
from tests.differential.sides import KernelSide, Left, Side, TurnoutSide, kernel_side
from tests.packets import Address, ports_of, rewritten, syn
from tests.test_docs import DOCS, rows, section
from tests.whole_node import whole_node

pytestmark = [pytest.mark.root, pytest.mark.bpf]

EXPLAINED = {
    name: (kernel, turnout)
    for name, kernel, turnout, _ in rows(
        section((DOCS / "behaviours.md").read_text(), "## Where turnout differs from the kernel's NAT")
    )
}


class Sides(NamedTuple):
    """Both nodes, and the plan of their wires."""

    kernel: KernelSide
    turnout: TurnoutSide
    node: DaemonNode


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    prefix, cpus = f"td{os.getpid() % 100_000}", os.sched_getaffinity(0)
    flags = {"cluster-cidr": INSIDE, "snat-ports": SNAT_PORTS}
    with (
        whole_node("xdp", tmp_path_factory.mktemp("node"), prefix, flags) as node,
        kernel_side(f"{prefix}k", node, RULES) as kernel,
    ):
        assert isinstance(node, DaemonNode)
        turnout = TurnoutSide(node)
        node.apply(*manifests(node))
        os.sched_setaffinity(0, {min(cpus)})  # frames stay in order only on one CPU's queue
        try:
            yield Sides(kernel, turnout, node)
        finally:
            os.sched_setaffinity(0, cpus)


def word_for(sent: bytes, left: tuple[str, bytes]) -> str:
    """Return in a few words what a host got because a frame was sent."""
    host, frame = left
    packet = Ether(frame)
    if IP not in packet:
        return f"{packet.summary()} to {host}"
    if ICMP in packet and packet[IP].id != Ether(sent)[IP].id:
        return f"ICMP {packet[ICMP].type}/{packet[ICMP].code} to {host}"
    if TCP in packet and "R" in packet[TCP].flags and "R" not in Ether(sent)[TCP].flags:
        return f"RST to {host}"
    return f"to {host}"


def without_chance(sent: bytes, left: Left) -> Left:
    """Return what hosts got without what a kernel draws for a packet of its own: the identification."""
    cleaned: Left = []
    for host, frame in left:
        if word_for(sent, (host, frame)) != f"to {host}":
            frame = frame[:18] + b"\0\0" + frame[20:24] + b"\0\0" + frame[26:]  # noqa: PLW2901
        cleaned.append((host, frame))
    return sorted(cleaned)


def fields_that_differ(kernel: bytes, turnout: bytes) -> str:
    """Return the names of header fields in which two frames differ."""
    one, two, names = Ether(kernel), Ether(turnout), []
    while one and two and one.name == two.name:
        names += [f"{one.name}.{name}" for name in one.fields if one.fields[name] != two.fields.get(name)]
        one, two = one.payload, two.payload
    return ", ".join(names) or "payload"


def said(sent: bytes, left: Left, against: Left | None = None) -> str:
    """Return in a few words what became of a frame; `against` is what it became on the other node."""
    words = "; ".join(word_for(sent, one) for one in left) or "nothing"
    if against is not None and words == said(sent, against):
        words += ": " + ", ".join(
            fields_that_differ(one[1], two[1]) for one, two in zip(against, left, strict=True) if one != two
        )
    return words


@pytest.mark.faults(62)
@pytest.mark.parametrize("name", CASES)
def test_what_comes_out_is_what_the_kernel_makes_of_it_or_the_difference_is_explained(name: str, sides: Sides):
    found = None
    for sent, host in CASES[name](Places(sides.node, list(CASES).index(name))):
        kernel, turnout = (without_chance(sent, side.send(sent, host)) for side in (sides.kernel, sides.turnout))
        if kernel != turnout and found is None:
            found = said(sent, kernel), said(sent, turnout, kernel)
    assert found == EXPLAINED.get(name), name


def test_every_difference_that_is_explained_is_a_case_of_its_own():
    assert set(EXPLAINED) <= set(CASES)


def _goes_to(sides: Sides, side: Side, client: Address, vip: Address) -> str:
    """Open a connection; return the host that got it, as nothing but the choice of it made it."""
    frame = syn(client, vip)
    ((host, got),) = side.send(frame, "client")
    node = sides.node
    assert got == rewritten(frame, client, node.at(host, 8080), node.macs(host))
    assert ports_of(got) == (client[1], 8080)
    return host


def test_T1_whichever_endpoint_is_chosen_the_packet_is_the_same(sides: Sides):
    for side in (sides.kernel, sides.turnout):
        hosts = {_goes_to(sides, side, sides.node.at("client", 30_500 + n), MANY) for n in range(24)}
        assert hosts == {"web-1", "web-2", "web-3"}


def test_S11_both_keep_a_client_at_its_endpoint(sides: Sides):
    for side in (sides.kernel, sides.turnout):
        hosts = [_goes_to(sides, side, sides.node.at("client", 30_600 + n), STICKY) for n in range(12)]
        assert len(set(hosts)) == 1
