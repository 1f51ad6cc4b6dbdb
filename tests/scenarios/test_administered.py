"""Endpoints that an operator drains, takes into maintenance and gives back, with real clients and each engine."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from dataplane.output import counted
from perf import clients
from tests.daemon import TURNOUT
from tests.scenarios.site import DNS_PORT, EACH_PATH, WEB_PORT, Site, who_answers
from tests.services import split, write_manifests

pytestmark = [pytest.mark.root, pytest.mark.bpf]
PATIENCE_S = 20.0
everywhere = pytest.mark.parametrize("site", EACH_PATH, indirect=True, scope="session")
# What only the control plane does is the same with every engine.
twice = pytest.mark.parametrize("site", ["xdp", "raw-6"], indirect=True, scope="session")


@pytest.fixture(autouse=True)
def _services(site: Site) -> Iterator[None]:
    site.serve()
    two = ("web-1", "web-2")
    web, dns = site.places(WEB_PORT, *two), site.places(DNS_PORT, *two)
    site.daemon.apply(site.web.with_endpoints(*web), site.dns.with_endpoints(*dns))
    yield
    site.daemon.turnout("ready", *site.addresses(*two))
    site.check_accounts()


def say(site: Site, state: str, *words: str) -> list[dict[str, object]]:
    return json.loads(site.daemon.turnout(state, *words, "-o", "json").stdout)  # type: ignore[no-any-return]


def states(site: Site) -> set[tuple[str, str]]:
    return {(shown["address"], shown["state"]) for shown in site.daemon.ask("endpoints")}


def ask_anew(site: Site, count: int = 12) -> set[str | None]:
    """Return who answers so many new UDP flows."""
    found = set()
    for _ in range(count):
        with site.asking() as ask:
            found.add(ask())
    return found


@pytest.mark.faults(129)
@everywhere
def test_L_a_drained_endpoint_keeps_what_it_has_and_gets_no_more(site):
    (place,) = site.places(WEB_PORT, "web-1")
    with site.load("http-load", site.web, flows=30, concurrent=30) as load:
        site.daemon.wait_for(lambda: sum(f["state"] == "established" for f in site.daemon.ask("flows")) >= 30)
        told = say(site, "drain", place)
        assert [(row["address"], row["state"]) for row in told] == [(place, "drain")]
        assert told[0]["open"], "Maglev gives it some of thirty"
        assert (place, "drain") in states(site)
        late = site.daemon.turnout("drain", place, "--wait", "0.1", check=False)
        assert (late.returncode, late.stdout) == (6, "")
        assert (
            f"{counted(told[0]['open'], 'connection')} still open after 0.1 s; the endpoints stay drained"
            in late.stderr
        )
        new = clients.load_http(site.client, site.web.frontend, connections=20)
    assert (load.result.failures, load.result.moved) == ({}, 0)
    assert set(load.result.flows_by_server) == {"web-1", "web-2"}
    assert (new.answers, new.failures) == ({"web-2": 20}, {})
    assert [row["open"] for row in say(site, "drain", place, "--wait", "10")] == [0]
    assert ask_anew(site) == {"web-1", "web-2"}, "another port of the same address is another endpoint"


@everywhere
def test_L_maintenance_resets_connections_and_moves_datagrams(site):
    with site.asking() as ask:
        name = ask()
        (address,) = site.addresses(name)
        with site.client.entered():
            sock = socket.socket(site.socket_family)
        alone = site.web.with_endpoints(*site.places(WEB_PORT, name))
        site.daemon.apply(alone, site.dns.with_endpoints(*site.places(DNS_PORT, "web-1", "web-2")))
        with sock:
            sock.settimeout(5)
            sock.connect(split(site.web.frontend))
            told = say(site, "maint", address)
            assert {row["address"] for row in told} == {*site.places(WEB_PORT, name), *site.places(DNS_PORT, name)}
            site.daemon.wait_for(lambda: {"reset"} == {f["state"] for f in site.daemon.ask("flows", endpoint=address)})
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with pytest.raises(ConnectionResetError):
                sock.recv(100)
        assert ask() == ({"web-1", "web-2"} - {name}).pop()
    say(site, "ready", address)
    assert ask_anew(site) == {"web-1", "web-2"}


@twice
def test_L_what_an_operator_has_said_outlasts_a_restart_but_not_the_endpoint(site):
    (place,) = site.places(DNS_PORT, "web-1")
    say(site, "drain", place)
    site.daemon.restart()
    assert (place, "drain") in states(site)
    assert ask_anew(site) == {"web-2"}
    site.daemon.apply(site.web, site.dns.with_endpoints(*site.places(DNS_PORT, "web-2")))
    site.daemon.apply(site.web, site.dns.with_endpoints(*site.places(DNS_PORT, "web-1", "web-2")))
    assert ask_anew(site) == {"web-1", "web-2"}


@contextlib.contextmanager
def held(site: Site, server: str) -> Iterator[socket.socket]:
    """Have a connection of a client that asks a server by HTTP."""
    with contextlib.ExitStack() as stack:
        while True:
            with site.client.entered():
                sock = stack.enter_context(socket.socket(site.socket_family))
            sock.settimeout(5)
            sock.connect(split(site.web.frontend))
            if who_answers(sock) == server:
                yield sock
                return


def answers_before_reset(sock: socket.socket) -> int:
    """Ask until the connection is reset; return how many answers there were."""
    answers, end = 0, time.monotonic() + PATIENCE_S
    with contextlib.suppress(ConnectionResetError):
        while who_answers(sock):
            answers += 1
            assert time.monotonic() < end, f"not reset after {answers} answers"
    return answers


@pytest.mark.faults(87)
@everywhere
def test_L_a_client_that_holds_on_to_a_drained_endpoint_is_reset_at_the_deadline(site):
    """However busy it keeps its connection; those to the other endpoint do not notice."""
    (place,), both = site.places(WEB_PORT, "web-1"), site.web.with_endpoints(*site.places(WEB_PORT, "web-1", "web-2"))
    site.daemon.apply(both.with_endpoints(*site.places(WEB_PORT, "web-2")), site.dns)
    with site.load("http-load", site.web) as load:
        site.daemon.wait_for(lambda: sum(f["state"] == "established" for f in site.daemon.ask("flows")) >= 20)
        site.daemon.apply(both, site.dns)
        with held(site, "web-1") as sock:
            command = [*TURNOUT, "drain", place, "--deadline", "1", "--wait", "30", "-o", "json"]
            draining = site.world.node.popen([*command, "--name", site.daemon.settings.name], stdout=subprocess.PIPE)
            site.daemon.wait_for(lambda: (place, "drain") in states(site))
            assert answers_before_reset(sock), "until the deadline it goes on"
        told, _ = draining.communicate(timeout=20)
    assert draining.returncode == 0
    row = {"address": place, "state": "maint", "deadline_s": None, "open": 0, "without_endpoint": []}
    assert json.loads(told) == [row]
    assert (load.result.flows, load.result.failures, load.result.moved) == (20, {}, 0)
    assert set(load.result.flows_by_server) == {"web-2"}
    assert site.daemon.ask("status")["taken_out"] | {"ended": 0} == {
        "drain": 0, "maint": 1, "next_deadline_s": None, "ended": 0,
    }  # fmt: skip


@pytest.mark.faults(87)
@twice
def test_L_a_deadline_outlasts_a_restart(site):
    (place,) = site.places(DNS_PORT, "web-1")
    say(site, "drain", place, "--deadline", "3600")
    site.daemon.restart()
    assert (place, "drain") in states(site)
    assert 0 < site.daemon.ask("status")["taken_out"]["next_deadline_s"] < 3600
    say(site, "drain", place, "--deadline", "1")
    site.daemon.restart()
    site.daemon.wait_for(lambda: (place, "maint") in states(site))
    say(site, "ready", place)
    assert ask_anew(site) == {"web-1", "web-2"}


@pytest.mark.faults(129)
@twice
def test_L_who_comes_back_in_a_file_among_others_is_ready_too(site, tmp_path):
    """What has changed in a folder is read alone, and changes nothing else."""
    (place,), both = site.places(DNS_PORT, "web-1"), site.places(DNS_PORT, "web-1", "web-2")
    write_manifests(site.daemon.file, ())
    write_manifests(tmp_path / "dns.json", [site.dns.with_endpoints(*both)])
    try:
        site.daemon.restart("-f", str(tmp_path))
        say(site, "maint", place)
        assert ask_anew(site) == {"web-2"}
        for endpoints in (both[1:], both):
            write_manifests(tmp_path / "dns.json", [site.dns.with_endpoints(*endpoints)])
            site.daemon.wait_for(lambda: {shown["address"] for shown in site.daemon.ask("endpoints")} == {*endpoints})  # noqa: B023
        assert states(site) == {(each, "ready") for each in both}
        assert ask_anew(site) == {"web-1", "web-2"}
    finally:
        site.daemon.restart()
        site.serve()


@twice
def test_L_waiting_for_an_endpoint_that_goes_from_the_manifests_goes_on(site):
    (place,) = site.places(WEB_PORT, "web-1")
    with site.load("http-load", site.web, flows=20, concurrent=20) as load:
        site.daemon.wait_for(lambda: sum(f["state"] == "established" for f in site.daemon.ask("flows")) >= 20)
        waiting = site.world.node.popen([*TURNOUT, "drain", place, "--wait", "30", "--name", site.daemon.settings.name])
        site.daemon.wait_for(lambda: (place, "drain") in states(site))
        site.daemon.apply(site.web.with_endpoints(*site.places(WEB_PORT, "web-2")), site.dns)
        assert waiting.poll() is None
    assert waiting.wait(20) == 0
    assert load.result.failures == {}


@everywhere
def test_L_without_an_endpoint_that_is_ready_new_clients_are_refused(site):
    say(site, "drain", *site.addresses("web-1", "web-2"))
    done = site.client.run(["curl", "-sS", "-g", "-m", "5", f"http://{site.web.frontend}/"], check=False)
    assert done.returncode == 7, done.stderr


@twice
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["192.0.2.9"], "192.0.2.9 is no endpoint of any Service; `turnout get endpoints` lists them"),
        (["192.0.2.9:80"], "192.0.2.9:80 is no endpoint of any Service; `turnout get endpoints` lists them"),
        (["web-1"], "'web-1' is not an endpoint; write it as 10.0.0.1:8080, or 10.0.0.1 for all ports"),
        (["--deadline", "0"], "0 s is no deadline; expected 1 to 31622400, or none"),
    ],
    ids=["address", "place", "name", "deadline"],
)
def test_an_endpoint_that_there_is_not_is_refused_and_changes_nothing(site, words, message):
    before = states(site)
    done = site.daemon.turnout("drain", *words, *site.addresses("web-1"), check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"turnout: {message}\n")
    assert states(site) == before
