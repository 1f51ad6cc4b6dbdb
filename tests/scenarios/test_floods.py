"""Floods, in small: of SYNs from invented addresses, and of datagrams until the table is full.

Connections that are open go on meanwhile, and lose nothing; what a flood gets is counted, and is gone soon after it.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from perf.world import wait_until
from tests.node import CONNECTIONS
from tests.packets import Address, syn, udp
from tests.scenarios.site import Site, undisturbed
from tests.services import Service, split
from xdp.schema import Limit, Reason

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.parametrize("site", ["xdp", "afxdp", "raw"], indirect=True, scope="session"),
]

MORE_THAN_FIT = CONNECTIONS * 5 // 4
SHORT_LIVED = {"turnout.dev/timeouts": "syn=1s, udp-unreplied=1s"}
ENDS = {Reason.ADMITTED, Reason.TABLE_FULL, Reason.NO_NEXT_HOP}  # of packets that begin a flow


@pytest.fixture(autouse=True)
def _services(site: Site) -> Iterator[None]:
    site.serve()
    yield
    site.check_accounts()


@pytest.fixture
def default_route(site: Site) -> Iterator[None]:
    """Have everybody be reached by way of the client."""
    node, route = site.world.node, ["default", "via", site.ip("client")]
    node.run(["ip", "route", "add", *route])
    yield
    node.run(["ip", "route", "delete", *route])


class Flood:
    """Frames that the client host puts on its wire, no faster than the node takes them; and what became of them."""

    def __init__(self, site: Site, first: bytes) -> None:
        self._site = site
        macs = bytes.fromhex((site.world.node.interfaces[0].mac + site.client.interfaces[0].mac).replace(":", ""))
        self._frame = np.frombuffer(macs + first[12:], np.uint8)
        with site.client.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.bind(("eth0", 0))
        self._shared = site.tables()

    def close(self) -> None:
        self._socket.close()
        self._shared.close()

    def send(self, sources: npt.NDArray[np.uint8], ports: npt.NDArray[np.uint16]) -> Counter[Reason]:
        """Send a frame for each row of sources and ports; return why the node did what it did, new flows only."""
        frames = np.tile(self._frame, (len(sources), 1))
        frames[:, 26:30] = sources
        _sum_headers(frames)
        frames[:, 34:36] = ports.astype(">u2").view(np.uint8).reshape(-1, 2)
        before = self._counted()
        for start in range(0, len(frames), Limit.BURST):
            burst = frames[start : start + Limit.BURST]
            for frame in burst:
                self._socket.send(frame)
            goal = start + len(burst)
            assert wait_until(lambda goal=goal: (self._counted() - before).total() >= goal, 10, 0.0002)
        return self._counted() - before

    def _counted(self) -> Counter[Reason]:
        tables = self._shared.tables
        rows = (tables.xdp_counters, tables.worker_counters)
        sums = np.sum([each["packets"].sum(axis=0, dtype=np.int64) for each in rows], axis=0)
        return Counter({reason: int(sums[reason]) for reason in ENDS})


def _sum_headers(frames: npt.NDArray[np.uint8]) -> None:
    """Write the checksums of IPv4 headers, all of which are as long."""
    frames[:, 24:26] = 0
    total = frames[:, 14:34].copy().view(">u2").sum(axis=1, dtype=np.uint32)
    total = (total & 0xFFFF) + (total >> 16)
    check = ~(total + (total >> 16)).astype(np.uint16)
    frames[:, 24:26] = check.astype(">u2").view(np.uint8).reshape(-1, 2)


@contextlib.contextmanager
def flooding(site: Site, first: bytes) -> Iterator[Flood]:
    """Make a flood of frames like `first`, each from another source."""
    flood = Flood(site, first)
    try:
        yield flood
    finally:
        flood.close()


def invented(count: int, network: str = "") -> npt.NDArray[np.uint8]:
    """Return IPv4 addresses that nobody has, any or of one network of 24 bits, a row each."""
    random = np.random.default_rng(80)
    rows = random.integers(0, 256, (count, 4), np.uint8)
    rows[:, 0] = random.integers(100, 126, count)  # none of ours, and no martians
    if network:
        rows[:, :3] = list(map(int, network.split(".")[:3]))
    return rows


def test_F080_F081_F084_floods_take_nothing_from_open_connections(site: Site, default_route: None):
    """P5: of open ones none loses a packet, fails or moves while the table is full; nor one that is idle."""
    drowned = Service("drowned", site.vip(80, 80), site.places(9, "web-1"), annotations=SHORT_LIVED)
    named = Service("named", site.vip(81, 53), site.places(9, "web-2"), "UDP", annotations=SHORT_LIVED)
    site.daemon.apply(site.web, site.dns, drowned, named)
    client: Address = (site.dns.at[0], 1)  # another takes its place
    ports = np.arange(1, 60_000, dtype=np.uint16)
    before = site.daemon.ask("status")["flows"]["used"]
    with contextlib.ExitStack() as stack, undisturbed(site):
        idle = [stack.enter_context(site.asking()) for _ in range(40)]
        assert all(ask() for ask in idle)
        ports_of_idle = {ask.port for ask in idle}
        with flooding(site, syn(client, drowned.at)) as flood:
            for network in ("", "198.51.100.0"):
                assert flood.send(invented(2000, network), ports[:2000]) == Counter({Reason.ADMITTED: 2000})
        with flooding(site, udp(client, named.at)) as flood:
            churn = flood.send(np.repeat(invented(1), MORE_THAN_FIT, axis=0), ports[:MORE_THAN_FIT])
        assert churn.keys() == {Reason.ADMITTED, Reason.TABLE_FULL}
        assert site.daemon.ask("status")["flows"]["used"] > 0.9 * CONNECTIONS
        known = site.daemon.ask("flows", client=site.ip("client"))
        assert ports_of_idle <= {split(flow["client"])[1] for flow in known}
    site.daemon.wait_for(lambda: "new connections found no room" in "\n".join(site.daemon.ask("status")["why"]))
    site.daemon.apply(site.web, site.dns)
    site.daemon.wait_for(lambda: site.daemon.ask("status")["flows"]["used"] <= before + 100)
    site.daemon.signal(signal.SIGTERM)  # which it would tell of for a minute
    site.daemon.wait()
    site.daemon.start()


def test_F084_neighbours_that_are_made_up_take_no_rows_and_leave_nothing_in_the_kernel(site: Site):
    """Of as many as wait at a time, so that all are asked for."""
    network = ".".join(site.ip("client").split(".")[:3])
    sources = np.array([[*map(int, network.split(".")), host] for host in range(180, 220)], np.uint8)
    with flooding(site, syn((site.web.at[0], 1), site.web.at)) as flood:
        became = flood.send(sources, np.full(len(sources), 4000, np.uint16))
    assert became == Counter({Reason.NO_NEXT_HOP: len(sources)})
    made_up = {".".join(map(str, row)) for row in sources.tolist()}
    assert not made_up & {hop["destination"] for hop in site.daemon.ask("nexthops")}

    def known() -> set[str]:
        listed = site.world.node.run(["ip", "neigh", "show"]).stdout
        return made_up & {line.split()[0] for line in listed.splitlines()}

    site.daemon.wait_for(lambda: not known(), 15)
