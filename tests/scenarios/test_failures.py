"""What clients notice when something fails. Known flows are never affected."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address

import pytest

from perf import clients
from perf.world import Host, wait_until
from tests.scenarios.site import WEB_PORT, Site, count_active, undisturbed, who_answers
from tests.services import Service, split, write_manifests
from xdp import maps
from xdp.addresses import with_port
from xdp.schema import Reason, WhenStalled

pytestmark = [pytest.mark.root, pytest.mark.bpf]
both_families = pytest.mark.parametrize("site", ["xdp", "xdp-6"], indirect=True, scope="session")


@pytest.fixture(autouse=True)
def _services(site: Site) -> Iterator[None]:
    site.serve()
    yield
    if site.daemon.is_answering():
        site.check_accounts()


def packets_forwarded(site: Site) -> int:
    return site.counted(Reason.FORWARDED)


def wait_for_packets(site: Site, count: int) -> None:
    """Return when XDP has forwarded `count` more packets."""
    goal = packets_forwarded(site) + count
    assert wait_until(lambda: packets_forwarded(site) >= goal, 30, 0.05)


# The daemon.


@pytest.mark.faults(95, 101, 125)
@both_families
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_a_restart_loses_and_moves_nothing(site, number):
    with undisturbed(site):
        before = site.endpoints_of_flows(active=True)
        assert before
        site.daemon.signal(number)
        code = site.daemon.wait()
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        wait_for_packets(site, 2000)  # with nobody there
        site.daemon.start()
        wait_for_packets(site, 1000)
        after = site.endpoints_of_flows()
        assert {key: after.get(key) for key in before} == before
    assert "took over" in site.daemon.said()
    with site.asking() as ask:
        assert ask() is not None  # and new ones begin


@both_families
@pytest.mark.parametrize("is_another", [False, True], ids=["same-pod", "another-pod"])
def test_C9_who_has_a_pods_address_after_a_restart_has_its_connections_only_if_it_is_that_pod(site, is_another):
    (place,) = site.places(WEB_PORT, "web-1")

    def pod(uid: str) -> Service:
        about = {place: {"targetRef": {"kind": "Pod", "uid": uid}}}
        return replace(site.web.with_endpoints(place), about=about)

    site.daemon.apply(pod("first"))
    with site.client.entered():
        sock = socket.create_connection(split(site.web.frontend), timeout=10)
    with sock:
        assert who_answers(sock) == "web-1"
        site.daemon.signal(signal.SIGKILL)
        site.daemon.wait()
        with maps.open_tables(site.daemon.settings.pins) as shared:  # as if it had been in the middle of a turn
            shared.tables.workers[0]["heartbeat"], shared.tables.workers[0]["turn"] = 1 << 32, 1
        write_manifests(site.daemon.file, [pod("second" if is_another else "first")])
        site.daemon.start()
        if is_another:
            with pytest.raises(ConnectionResetError):
                who_answers(sock)
        else:
            assert who_answers(sock) == "web-1"
    with site.client.entered(), socket.create_connection(split(site.web.frontend), timeout=10) as another:
        assert who_answers(another) == "web-1"


@pytest.mark.parametrize("site", ["afxdp"], indirect=True, scope="session")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_where_userspace_forwards_xdp_does_while_it_is_away(site, number):
    """What lies in the rings of the worker that ends is lost; TCP sends it again."""
    with site.load("http-load", site.web) as http:
        site.daemon.wait_for(lambda: count_active(site) == 20)
        before = site.endpoints_of_flows(active=True)
        assert before
        site.daemon.signal(number)
        site.daemon.wait()
        wait_for_packets(site, 1000)
        site.daemon.start()
        after = site.endpoints_of_flows()
        assert {key: after.get(key) for key in before} == before
        punted = site.counted(Reason.NOT_OFFLOADED)
        assert wait_until(lambda: site.counted(Reason.NOT_OFFLOADED) > punted + 1000, 30, 0.05)
    assert (http.result.flows, http.result.failures, http.result.moved) == (20, {}, 0)


def test_a_restart_with_other_services_moves_nothing_that_is_known(site):
    with undisturbed(site):
        site.daemon.signal(signal.SIGKILL)
        site.daemon.wait()
        write_manifests(site.daemon.file, [site.web.with_endpoints(*site.places(WEB_PORT, "web-1")), site.dns])
        site.daemon.start()
        wait_for_packets(site, 1000)
        result = clients.load_http(site.client, site.web.frontend, connections=10)
        assert result.answers == {"web-1": 10}


@contextlib.contextmanager
def standing_still(site: Site) -> Iterator[None]:
    """Stop the daemon where it is; it goes on afterwards."""
    site.daemon.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        site.daemon.signal(signal.SIGCONT)


def ask_until(site: Site, condition: Callable[[], bool]) -> None:
    """Begin new UDP flows, without waiting for answers, until a condition holds."""

    def attempt() -> bool:
        with site.asking() as ask:
            ask(0.005)
        return condition()

    assert wait_until(attempt, 5, 0)


@pytest.mark.faults(95)
@both_families
@pytest.mark.parametrize(
    ("word", "reason"), [("drop", Reason.STALLED_DROPPED), ("pass", Reason.STALLED_PASSED)], ids=["drop", "pass"]
)
def test_while_the_daemon_stands_still_known_flows_go_on_and_new_ones_meet_what_the_service_says(site, word, reason):
    other = {Reason.STALLED_DROPPED: Reason.STALLED_PASSED, Reason.STALLED_PASSED: Reason.STALLED_DROPPED}[reason]
    site.daemon.apply(site.web, replace(site.dns, annotations={"turnout.dev/when-stalled": word}))
    site.daemon.wait_for(lambda: site.row(site.dns)["when_stalled"] == WhenStalled[word.upper()])
    with undisturbed(site):
        counted, others = site.counted(reason), site.counted(other)
        with standing_still(site):
            stopped = time.monotonic()
            ask_until(site, lambda: site.counted(reason) > counted)
            assert time.monotonic() - stopped < 1  # 50 ms and a bit; the machine may be busy
            wait_for_packets(site, 2000)
            ask_until(site, lambda: site.counted(reason) > counted + 3)
            assert site.counted(other) == others
        with site.asking() as ask:
            site.daemon.wait_for(lambda: ask(0.2) is not None)


@pytest.mark.faults(95)
@both_families
def test_while_the_daemon_is_dead_xdp_admits_new_connections(site):
    """Nobody reads the rings; clients notice nothing, and the next daemon finds what was begun meanwhile."""
    with undisturbed(site):
        site.daemon.signal(signal.SIGKILL)
        site.daemon.wait()
        admitted = site.counted(Reason.ADMITTED)
        result = clients.load_http(site.client, site.web.frontend, connections=30)
        assert (result.answered, result.failures, len(result.answers)) == (30, {}, 3)
        with site.asking() as ask:
            name = ask()
            assert name is not None
            assert site.counted(Reason.ADMITTED) == admitted + 31
            site.daemon.start()
            assert ask() == name
            client = with_port(ip_address(site.ip("client")), ask.port)
            assert any(flow["client"] == client for flow in site.daemon.ask("flows"))


@both_families
def test_while_the_daemon_stands_still_xdp_admits_new_connections(site):
    with undisturbed(site), standing_still(site):
        admitted = site.counted(Reason.ADMITTED)
        ask_until(site, lambda: site.counted(Reason.ADMITTED) > admitted)
        result = clients.load_http(site.client, site.web.frontend, connections=30)
        assert (result.answered, result.failures, len(result.answers)) == (30, {}, 3)


@pytest.mark.parametrize("site", ["xdp", "xdp-6", "xdp-generic"], indirect=True, scope="session")
def test_a_service_may_have_xdp_admit_always(site):
    site.daemon.apply(site.web, replace(site.dns, annotations={"turnout.dev/admit": "xdp"}))
    site.daemon.wait_for(lambda: site.row(site.dns)["admits_here"] == 1)
    with site.asking() as ask:
        assert ask() is not None  # its client may be unknown: then userspace looks for the way back
    admitted, punted = site.counted(Reason.ADMITTED), site.counted(Reason.NEW_FLOW)
    for _ in range(10):
        with site.asking() as ask:
            assert ask() is not None
    assert site.counted(Reason.ADMITTED) == admitted + 10
    assert site.counted(Reason.NEW_FLOW) == punted


# Manifests.


def test_a_bad_manifest_changes_nothing_and_is_told_until_it_is_put_right(site):
    with undisturbed(site):
        site.daemon.file.write_text("kind: [")
        site.daemon.wait_for(lambda: site.daemon.ask("status")["state"] == "degraded")
        told = site.daemon.turnout("status", check=False)
        assert told.returncode == 5
        assert str(site.daemon.file) in told.stdout
        with site.asking() as ask:
            assert ask() is not None
        wait_for_packets(site, 500)
        write_manifests(site.daemon.file, [site.web, site.dns])
        site.wait_until_ok()
        assert site.daemon.turnout("status").returncode == 0


@pytest.mark.faults(127)
def test_changes_of_services_move_no_connection(site):
    with undisturbed(site):
        for hosts in (("web-1",), ("web-2", "web-3"), ("web-3",), ("web-1", "web-2", "web-3")):
            web = site.web.with_endpoints(*site.places(WEB_PORT, *hosts))
            more = Service(f"more-{len(hosts)}", "10.96.0.77:80", web.endpoints)
            site.daemon.apply(web, site.dns, more)
            wait_for_packets(site, 300)


def test_F122_told_to_read_again_and_again_it_changes_nothing(site):
    """While files change, too: the last state of them is what runs."""
    with undisturbed(site):
        before = site.daemon.ask("status")["revision"]["programmed"]
        for number in range(100):
            site.daemon.signal(signal.SIGHUP)
            if number % 20 == 10:
                more = Service(f"more-{number}", site.vip(78, 80), site.web.endpoints)
                write_manifests(site.daemon.file, [site.web, site.dns, more])
        write_manifests(site.daemon.file, [site.web, site.dns])
        site.daemon.signal(signal.SIGHUP)
        site.daemon.wait_for_services(site.web, site.dns)
        site.wait_until_ok()
        assert site.daemon.ask("status")["revision"]["programmed"] > before
        wait_for_packets(site, 300)


# The network.


@contextlib.contextmanager
def silent_address(host: Host, number: int = 100) -> Iterator[str]:
    """Give a host another address of its network, and answer no question for its MAC address."""
    address = str(host.interfaces[0].address.ip + number)
    host.sysctl("net/ipv4/conf/all/arp_ignore", 1)  # what is on another interface is not answered for ...
    host.sysctl("net/ipv4/conf/all/arp_announce", 2)  # ... nor told of in questions
    host.run(["ip", "address", "add", f"{address}/32", "dev", "lo"])
    try:
        yield address
    finally:
        host.run(["ip", "address", "delete", f"{address}/32", "dev", "lo"])
        for name in ("arp_ignore", "arp_announce"):
            host.sysctl(f"net/ipv4/conf/all/{name}", 0)


@pytest.mark.faults(108)
def test_the_first_packet_of_a_client_waits_until_its_answer_can_go_back(site):
    node = site.world.node
    with silent_address(site.client) as address:
        with site.client.entered():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sock:
            sock.bind((address, 0))
            sock.settimeout(1.0)
            sock.sendto(b"asked once", split(site.dns.frontend))
            site.daemon.wait_for(lambda: address in node.run(["ip", "neigh", "show"]).stdout)
            assert not site.daemon.ask("flows", client=address), "nothing is begun"
            node.run(["ip", "neigh", "replace", address, "lladdr", site.client.mac, "dev", node.interfaces[0].name])
            assert sock.recv(100).endswith(b" asked once")
        node.run(["ip", "neigh", "delete", address, "dev", node.interfaces[0].name])


@pytest.mark.faults(108)
def test_who_never_answers_takes_no_place_from_who_does(site):
    node = site.world.node
    with silent_address(site.client) as silent, silent_address(site.client, 101) as address:
        with site.client.entered():
            flood, sock = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        with flood, sock:
            flood.bind((silent, 0))
            sock.bind((address, 0))
            sock.settimeout(1.0)
            for _ in range(100):
                flood.sendto(b"from nowhere", split(site.dns.frontend))
            sock.sendto(b"asked once", split(site.dns.frontend))
            site.daemon.wait_for(lambda: address in node.run(["ip", "neigh", "show"]).stdout)
            node.run(["ip", "neigh", "replace", address, "lladdr", site.client.mac, "dev", node.interfaces[0].name])
            assert sock.recv(100).endswith(b" asked once")
        node.run(["ip", "neigh", "delete", address, "dev", node.interfaces[0].name])


# The end.


def left_behind(site: Site) -> list[str]:
    """Return what is left of the node, in words."""
    settings = site.daemon.settings
    paths = (settings.pins, settings.socket_path)
    return [*site.has_programs(), *(str(path) for path in paths if path.exists())]


def test_a_stopped_node_forwards_what_it_knows_until_detach_removes_everything(site):
    with site.asking() as ask:
        name = ask()
        assert name is not None
        site.daemon.signal(signal.SIGTERM)
        assert site.daemon.wait() == 0
        assert site.has_programs() == ["eth0", "eth1"]
        assert ask() == name
        assert "turnout detach" in site.daemon.said()
    site.daemon.turnout("detach")
    assert left_behind(site) == []
    assert site.daemon.turnout("detach").returncode == 0  # there is nothing to do, and nothing wrong with that


def test_F126_told_to_stop_twice_it_stops_once(site):
    with site.asking() as ask:
        name = ask()
        for _ in range(5):
            site.daemon.signal(signal.SIGTERM)
        assert site.daemon.wait() == 0
        assert ask() == name
    assert "Traceback" not in site.daemon.said()
    site.daemon.start()


def test_ctrl_c_removes_everything(site):
    site.daemon.signal(signal.SIGINT)
    assert site.daemon.wait() == 0
    assert left_behind(site) == []
