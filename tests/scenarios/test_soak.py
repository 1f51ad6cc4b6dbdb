"""A node that is killed, changed and asked, again and again, for as many seconds as SOAK_S says: `make soak`.

In the suite it is seconds, so that these tests themselves stay sound; what they look for takes longer to show.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from perf import clients
from tests.scenarios.site import Site
from tests.services import Service, write_manifests

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SOAK_S = float(os.environ.get("SOAK_S", "6"))
FLOWS = int(os.environ.get("FLOWS", "300"))
# Beside other tests, a client may not get a CPU for as long as it waits for an answer.
MAY_FAIL = set() if "SOAK_S" in os.environ else {"timeout"}
REQUESTS_S = 1000  # of all flows together: Python answers them, and the daemon wants a CPU too
LONGEST_LIFE_S = 3.0  # a start takes half of that
FLAPS_S = 0.1
MOST_GROWN_BYTES = 12 << 20  # until all is collected once; allocators keep what they were given
MOST_THREADS = 12  # asyncio has six at most for what blocks, on two CPUs

both_families = pytest.mark.parametrize("site", ["xdp", "xdp-6"], indirect=True, scope="session")


@pytest.fixture(autouse=True)
def _services(site: Site) -> Iterator[None]:
    site.serve()
    yield
    site.daemon.apply()


def soaking() -> Iterator[int]:
    """Count turns until time is over; there is one at least."""
    end, turn = time.monotonic() + SOAK_S, 0
    while not turn or time.monotonic() < end:
        yield turn
        turn += 1


@pytest.mark.faults(125, 101)
@both_families
def test_F125_killed_again_and_again_it_moves_no_connection_and_loses_no_packet(site):
    """Wherever that meets it, in its start too; meanwhile new connections begin, with it and without it."""
    chance = random.Random(125)
    many = {"flows": FLOWS, "concurrent": FLOWS, "interval": 2 * FLOWS / REQUESTS_S}
    with site.load("udp-load", site.dns, **many) as udp, site.load("http-load", site.web, **many) as http:
        site.daemon.wait_for(lambda: len(site.endpoints_of_flows(active=False)) >= 2 * FLOWS, 60)
        before = site.endpoints_of_flows()
        for _ in soaking():
            site.daemon.signal(signal.SIGKILL)
            site.daemon.wait()
            new = clients.load_http(site.client, site.web.frontend, connections=5)
            assert (new.answered, new.failures) == (5, {})
            site.daemon.launch()
            time.sleep(chance.uniform(0.001, LONGEST_LIFE_S))  # of what it does then, nothing is waited for
        site.daemon.signal(signal.SIGKILL)
        site.daemon.wait()
        site.daemon.start()
        after = site.endpoints_of_flows()
        assert {key: after.get(key) for key in before} == before
    reasons = site.daemon.ask("status")["reasons"]
    for load in (udp, http):
        assert (load.result.flows, load.result.moved) == (FLOWS, 0)
        assert load.result.failures.keys() <= MAY_FAIL, (load.result, reasons)


@pytest.mark.faults(128)
@both_families
def test_F128_endpoints_that_come_and_go_ten_times_a_second_get_no_packet_that_is_not_for_them(site):
    """Two Services have an endpoint each that stays, and take turns with one whose rows become free by that."""
    host, port, other = "0.0.0.0" if site.family == 4 else "[::]", 7000, 7001
    services = {name: Service(name, site.vip(20 + number, 53), protocol="UDP") for number, name in enumerate("ab")}
    steady = {"a": site.places(port, "web-1"), "b": site.places(port, "web-2")}
    flapping = {"a": site.places(port, "web-3"), "b": site.places(other, "web-3")}
    where = (("web-1", "a", port), ("web-2", "b", port), ("web-3", "a", port), ("web-3", "b", other))
    servers = [clients.serve_udp(site.world[server], name, f"{host}:{at}") for server, name, at in where]
    both = [services[name].with_endpoints(*steady[name], *flapping[name]) for name in "ab"]
    site.daemon.apply(*both)
    anew = {"flows": 0, "concurrent": 10, "requests": 5, "interval": 0.01}
    with site.load("udp-load", services["a"], **anew) as a, site.load("udp-load", services["b"], **anew) as b:
        for turn in soaking():
            gone = "ab"[turn % 2]
            has = {name: steady[name] if name == gone else steady[name] + flapping[name] for name in "ab"}
            write_manifests(site.daemon.file, [services[name].with_endpoints(*has[name]) for name in "ab"])
            time.sleep(FLAPS_S)
        write_manifests(site.daemon.file, both)
        site.daemon.wait_for_services(*both)
    for name, load in (("a", a), ("b", b)):
        assert load.result.answers.keys() == {name}
        assert load.result.flows > SOAK_S
        # An answer that is under way when its flow ends, as its endpoint has gone (C8), has nowhere to go.
        assert load.result.failures.keys() <= {"timeout"}
        assert load.result.failed <= turn / 10
    for server in servers:
        site.world.end(server)


class Taken(NamedTuple):
    """What a process has of the machine."""

    descriptors: int
    threads: int
    anonymous: int  # bytes

    @classmethod
    def by(cls, pid: int) -> Taken:
        process = Path("/proc", str(pid))
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        kilobytes, _ = status["RssAnon"].split()
        return cls(len(list((process / "fd").iterdir())), int(status["Threads"]), int(kilobytes) << 10)


@pytest.mark.faults(132)
@both_families
def test_F132_memory_descriptors_and_rows_return_to_what_they_were(site):
    process = site.daemon.process
    assert process is not None
    for _ in range(3):
        turn_over(site, 0)
    before, rows = Taken.by(process.pid), rows_in_use(site)
    for turn in soaking():
        turn_over(site, turn)
    after = Taken.by(process.pid)
    assert after.descriptors - before.descriptors <= 2, "those of a question that was being answered"
    assert after.threads <= MOST_THREADS
    assert after.anonymous - before.anonymous < MOST_GROWN_BYTES
    site.daemon.wait_for(lambda: rows_in_use(site) == rows)


def turn_over(site: Site, turn: int) -> None:
    """Have Services that were not there and connections to them, ask, err, say this and that; take it all back."""
    more = [Service(f"more-{turn}-{number}", site.vip(100 + number, 80), site.web.endpoints) for number in range(20)]
    site.daemon.apply(site.web, site.dns, *more)
    result = clients.load_http(site.client, more[turn % 20].frontend, connections=20)
    assert (result.answered, result.failures) == (20, {})
    (place,) = site.places(8080, "web-1")
    for words in (["drain", place], ["ready", place], ["status"], ["get", "services"], ["get", "flows"]):
        assert json.loads(site.daemon.turnout(*words, "-o", "json", check=words != ["status"]).stdout)
    assert site.daemon.turnout("drain", "nonsense", check=False).returncode == 2
    site.daemon.file.write_text("kind: [")
    site.daemon.wait_for(lambda: site.daemon.ask("status")["state"] == "degraded")
    site.daemon.apply(site.web, site.dns)
    site.wait_until_ok()


def rows_in_use(site: Site) -> dict[str, int]:
    """Return how many rows of the tables somebody holds, but for connections, which end in their time."""
    with site.tables() as shared:
        tables = shared.tables
        return {"frontends": int((tables.frontends["used"] != 0).sum())}
