"""Clients on the node itself, which are led to endpoints as they connect. Ids are those of docs/behaviours.md."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from dataplane.seeds import read_seed
from lb import maglev
from perf import clients
from perf.world import World, wait_until
from tests import cgroups
from tests.daemon import Daemon
from tests.node import NODE_NAME
from tests.reference import hash_of
from tests.scenarios.site import DNS_PORT, HOSTS, NODE_PORT, SERVERS, WEB_PORT, Site, at_node_port, who_answers
from tests.services import Service, split, write_manifests
from xdp import kernel, links, loader
from xdp.addresses import with_port

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.parametrize("site", ["xdp", "xdp-6"], indirect=True, scope="module"),
]

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
HERE, THERE = {"nodeName": NODE_NAME}, {"nodeName": "node-2"}
BALANCERS = {4: "198.51.100.7", 6: "2001:db8:51::7"}
SO_COOKIE = 57  # include/uapi/asm-generic/socket.h; Python does not name it
FOLLOWED_S = 5.0  # a second, on a busy machine


@pytest.fixture(scope="module")
def cgroup() -> Iterator[Path]:
    with cgroups.made(f"tk{os.getpid() % 100_000}") as folder:
        yield folder


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, cgroup: Path) -> Iterator[Site]:
    """Servers around a daemon that leads sockets of a cgroup."""
    engine, is_ipv6 = request.param.removesuffix("-6"), request.param.endswith("-6")
    with (
        World(f"tk{os.getpid() % 100_000}", HOSTS, ipv6=is_ipv6) as world,
        Daemon(world, engine, flags={"socket-cgroup": str(cgroup)}) as daemon,
    ):
        made = Site(world, daemon, 6 if is_ipv6 else 4)
        clients.serve_http(world.node, "node", f"{'[::]' if is_ipv6 else '0.0.0.0'}:{WEB_PORT}")
        daemon.start()
        yield made


@pytest.fixture(autouse=True)
def _served(site: Site) -> None:
    site.serve()


@pytest.fixture
def make(site: Site, cgroup: Path) -> Iterator[Client]:
    with contextlib.ExitStack() as stack:
        yield Client(site, cgroup, stack)


class Client:
    """A program on the node, in the cgroup."""

    def __init__(self, site: Site, cgroup: Path, stack: contextlib.ExitStack) -> None:
        self._site, self._cgroup, self._stack = site, cgroup, stack

    def __call__(
        self,
        kind: int = TCP,
        family: int | None = None,
        protocol: int = 0,
        *,
        is_led: bool = True,
        host: str = "node",
    ) -> socket.socket:
        """Make a socket, which is closed at the end."""
        with self._site.world[host].entered(), cgroups.entered(self._cgroup) if is_led else contextlib.nullcontext():
            sock = self._stack.enter_context(socket.socket(family or self._site.socket_family, kind, protocol))
        sock.settimeout(5)
        return sock

    def connected(self, service: Service, kind: int = TCP) -> socket.socket:
        """Connect a socket to a Service."""
        sock = self(kind)
        sock.connect(split(service.frontend))
        return sock

    def who(self, place: str) -> str:
        """Return which server answers a connection to a place."""
        sock = self()
        sock.connect(split(place))
        return who_answers(sock)


def name_of(answer: bytes) -> str:
    return answer.partition(b" ")[0].decode()


def far_end(sock: socket.socket) -> str:
    return with_port(ip_address(sock.getpeername()[0]), sock.getpeername()[1])


def counted(site: Site) -> Counter[str]:
    return Counter(site.daemon.ask("status")["sockets"]["reasons"])


def at_one(site: Site, service: Service, server: str, **more: object) -> Service:
    """Return a Service whose only endpoint is at a server."""
    port = WEB_PORT if service.protocol == "TCP" else DNS_PORT
    return replace(service.with_endpoints(*site.places(port, server)), **more)


def local(site: Site, service: Service, here: str, there: str, spec: dict[str, object]) -> Service:
    """Return a Service with an endpoint on this node, as its slice says, and one elsewhere."""
    places = site.places(WEB_PORT, here, there)
    about = dict(zip(places, (HERE, THERE), strict=True))
    return replace(service.with_endpoints(*places), spec=spec, about=about)


# Who is led where.


def test_T4_a_client_on_the_node_reaches_an_endpoint_and_believes_that_it_is_the_vip(site, make):
    before = counted(site)
    sock = make.connected(site.web)
    assert who_answers(sock) in SERVERS
    assert far_end(sock) == site.web.frontend
    assert (counted(site) - before)["LED"] == 1
    assert not [flow for flow in site.daemon.ask("flows") if flow["frontend"] == site.web.frontend]


def test_L_connections_are_spread_over_the_endpoints(site, make):
    answered = Counter(make.who(site.web.frontend) for _ in range(60))
    assert set(answered) == set(SERVERS)
    assert min(answered.values()) >= 5  # of 20; fewer is a matter of 10^-5


def test_C1_datagrams_of_a_socket_go_to_one_endpoint_and_come_from_the_vip(site, make):
    for is_connected in (False, True):
        sock = make.connected(site.dns, UDP) if is_connected else make(UDP)
        names = set()
        for number in range(10):
            if is_connected:
                sock.send(b"%d" % number)
            else:
                sock.sendto(b"%d" % number, split(site.dns.frontend))
            answer, source = sock.recvfrom(100)
            assert answer.endswith(b" %d" % number)
            assert source[:2] == split(site.dns.frontend)
            names.add(name_of(answer))
        assert len(names) == 1


def test_C1_who_asks_two_services_with_one_endpoint_is_answered_by_the_one_asked_last(site, make):
    first, second = (
        replace(at_one(site, site.dns, "web-1"), name=f"dns-{n}", frontend=site.vip(n, 53)) for n in (11, 12)
    )
    site.daemon.apply(first, second)
    sock = make(UDP)
    for service in (first, second, first):
        sock.sendto(b"who", split(service.frontend))
        answer, source = sock.recvfrom(100)
        assert (answer, source[:2]) == (b"web-1 who", split(service.frontend))


def test_L_sockets_of_datagrams_are_spread_over_the_endpoints(site, make):
    names = set()
    for _ in range(40):
        sock = make(UDP)
        sock.sendto(b"who", split(site.dns.frontend))
        names.add(name_of(sock.recv(100)))
    assert names == set(SERVERS)


def test_T11_what_is_not_for_a_service_goes_where_it_was_to_go(site, make):
    before = counted(site)
    (place,) = site.places(WEB_PORT, "web-2")
    sock = make()
    sock.connect(split(place))
    assert (who_answers(sock), far_end(sock)) == ("web-2", place)
    asking, (at,) = make(UDP), site.places(DNS_PORT, "web-3")
    asking.sendto(b"who", split(at))
    answer, source = asking.recvfrom(100)
    assert (answer, source[:2]) == (b"web-3 who", split(at))
    assert counted(site) - before == Counter({"NOT_OURS": 2})


def test_T4_sockets_of_pods_in_the_cgroup_are_led_too(site, make):
    before = counted(site)
    sock = make(host="client")
    sock.connect(split(site.web.frontend))
    assert who_answers(sock) in SERVERS
    assert far_end(sock) == site.web.frontend
    assert counted(site) - before == Counter({"LED": 1})


def test_T4_sockets_outside_the_cgroup_are_left_alone(site, make):
    before = counted(site)
    outside = make(UDP, is_led=False)
    with contextlib.suppress(OSError):  # there is no route to the VIP, but what it is a packet
        outside.sendto(b"who", split(site.dns.frontend))
    assert counted(site) == before


def test_T11_who_pings_is_left_alone(site, make):
    """Echo requests go to no endpoint: their sockets are no business of ours."""
    site.world.node.sysctl("net/ipv4/ping_group_range", "0 2147483647")
    before = counted(site)
    protocol = socket.IPPROTO_ICMP if site.family == 4 else socket.IPPROTO_ICMPV6
    pinging = make(UDP, protocol=protocol)
    with contextlib.suppress(OSError):  # there may be no route to the VIP
        pinging.connect((split(site.web.frontend)[0], 0))
    assert counted(site) - before == Counter({"NOT_TCP_UDP": 1})


# Who is refused.


def test_T7_without_an_endpoint_connections_are_refused_at_once(site, make):
    site.daemon.apply(site.web.with_endpoints(), site.dns.with_endpoints())
    with pytest.raises(ConnectionRefusedError):
        make.connected(site.web)
    with pytest.raises(ConnectionRefusedError):
        make.connected(site.dns, UDP)
    with pytest.raises(ConnectionRefusedError):
        make(UDP).sendto(b"who", split(site.dns.frontend))


def test_T9_a_port_or_protocol_of_a_vip_that_no_service_has_is_refused(site, make):
    before = counted(site)
    with pytest.raises(ConnectionRefusedError):
        make.connected(replace(site.web, frontend=site.vip(1, 81)))
    with pytest.raises(ConnectionRefusedError):
        make(UDP).sendto(b"who", split(site.web.frontend))
    assert (counted(site) - before)["NOT_SERVED"] == 2


# Policies.


def test_S9_the_internal_policy_local_leaves_the_endpoints_of_this_node(site, make):
    site.daemon.apply(local(site, site.web, "web-1", "web-2", {"internalTrafficPolicy": "Local"}))
    assert {make.who(site.web.frontend) for _ in range(10)} == {"web-1"}


def test_T8_endpoints_that_are_all_on_other_nodes_are_no_endpoints(site, make):
    (place,) = site.places(WEB_PORT, "web-2")
    elsewhere = replace(site.web.with_endpoints(place), spec={"internalTrafficPolicy": "Local"}, about={place: THERE})
    site.daemon.apply(elsewhere)
    with pytest.raises(OSError, match="No route to host"):
        make.connected(site.web)
    assert counted(site)["NO_LOCAL_ENDPOINT"] >= 1


def test_T4_the_external_policy_local_is_not_for_clients_on_the_node(site, make):
    external = {"type": "LoadBalancer", "externalTrafficPolicy": "Local"}
    service = local(site, site.web, "web-1", "web-2", external)
    site.daemon.apply(replace(service, ingress=(BALANCERS[site.family],)))
    balancer = with_port(ip_address(BALANCERS[site.family]), 80)
    assert {make.who(balancer) for _ in range(20)} == {"web-1", "web-2"}
    assert {make.who(site.web.frontend) for _ in range(20)} == {"web-1", "web-2"}


def test_S7_a_service_with_source_ranges_is_left_to_its_packets(site, make):
    spec = {"type": "LoadBalancer", "loadBalancerSourceRanges": ["192.0.2.0/24", "2001:db8::/32"]}
    site.daemon.apply(replace(site.web, spec=spec, ingress=(BALANCERS[site.family],)))
    before = counted(site)
    sock = make()
    sock.settimeout(0.2)
    with pytest.raises(OSError, match=r"timed out|unreachable"):
        sock.connect((BALANCERS[site.family], 80))
    assert counted(site) - before == Counter({"LEFT_TO_PACKETS": 1})
    assert make.who(site.web.frontend) in SERVERS  # its cluster IP is open


def test_S11_with_affinity_all_clients_of_the_node_have_one_endpoint(site, make):
    affine = replace(site.web, spec={"sessionAffinity": "ClientIP"})
    site.daemon.apply(affine)
    assert len({make.who(affine.frontend) for _ in range(20)}) == 1


def test_T6_a_node_port_is_served_at_the_node_s_own_addresses(site, make):
    site.daemon.apply(at_node_port(site.web))
    for end in site.world.node.interfaces:
        place = site.own(end, NODE_PORT)
        sock = make()
        sock.connect(split(place))
        assert who_answers(sock) in SERVERS
        assert far_end(sock) == place


def test_T6_other_ports_of_the_node_are_its_own(site, make):
    site.daemon.apply(at_node_port(site.web))
    assert make.who(site.own(site.world.node.interfaces[0], WEB_PORT)) == "node"


@pytest.mark.families(4, why="an IPv6 address is mapped into none")
def test_N9_an_ipv4_address_in_an_ipv6_socket_is_an_ipv4_address(site, make):
    host, port = split(site.web.frontend)
    sock = make(family=socket.AF_INET6)
    sock.connect((f"::ffff:{host}", port))
    assert who_answers(sock) in SERVERS
    assert sock.getpeername()[:2] == (f"::ffff:{host}", port)
    host, port = split(site.dns.frontend)
    for is_connected in (False, True):
        asking = make(UDP, socket.AF_INET6)
        if is_connected:
            asking.connect((f"::ffff:{host}", port))
            asking.send(b"who")
        else:
            asking.sendto(b"who", (f"::ffff:{host}", port))
        answer, source = asking.recvfrom(100)
        assert name_of(answer) in SERVERS
        assert source[:2] == (f"::ffff:{host}", port)
    refused = make(family=socket.AF_INET6)
    with pytest.raises(ConnectionRefusedError):
        refused.connect((f"::ffff:{host}", port + 1))


@pytest.mark.families(4, why="an IPv6 address is mapped into none")
def test_C8_mapped_ones_are_ended_like_others(site, make):
    site.daemon.apply(site.web, at_one(site, site.dns, "web-1"))
    host, port = split(site.dns.frontend)
    asking = make(UDP, socket.AF_INET6)
    asking.connect((f"::ffff:{host}", port))
    site.daemon.apply(site.web, at_one(site, site.dns, "web-2"))
    assert wait_until(lambda: has_ended(asking), FOLLOWED_S)


# Endpoints that go.


def test_C8_datagrams_move_when_their_endpoint_goes(site, make):
    site.daemon.apply(site.web, at_one(site, site.dns, "web-1"))
    loose, connected = make(UDP), make.connected(site.dns, UDP)
    loose.sendto(b"1", split(site.dns.frontend))
    connected.send(b"1")
    assert (loose.recv(100), connected.recv(100)) == (b"web-1 1", b"web-1 1")
    site.daemon.apply(site.web, at_one(site, site.dns, "web-2"))
    loose.sendto(b"2", split(site.dns.frontend))
    assert loose.recv(100) == b"web-2 2"
    assert wait_until(lambda: has_ended(connected), FOLLOWED_S)
    connected.connect(split(site.dns.frontend))
    connected.send(b"2")
    assert connected.recv(100) == b"web-2 2"


def has_ended(sock: socket.socket) -> bool:
    """Tell whether the kernel has ended a socket, which is told once."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def test_C8_tcp_connections_go_on_when_their_endpoint_goes(site, make):
    site.daemon.apply(at_one(site, site.web, "web-1"))
    sock = make.connected(site.web)
    site.daemon.apply(at_one(site, site.web, "web-2"))
    assert who_answers(sock) == "web-1"
    assert make.who(site.web.frontend) == "web-2"


def test_C8_tcp_connections_are_reset_where_the_service_says_so(site, make):
    impatient = {"annotations": {"turnout.dev/endpoint-removed": "reset"}}
    others = replace(at_one(site, site.web, "web-1"), name="patient", frontend=site.vip(3, 80))
    site.daemon.apply(at_one(site, site.web, "web-1", **impatient), others)
    sock, patient = make.connected(site.web), make.connected(others)
    assert who_answers(sock) == who_answers(patient) == "web-1"
    site.daemon.apply(at_one(site, site.web, "web-2", **impatient), at_one(site, others, "web-2"))
    assert wait_until(lambda: has_ended(sock), FOLLOWED_S)
    assert who_answers(patient) == "web-1"
    fresh = make.connected(site.web)
    assert who_answers(fresh) == "web-2"
    site.daemon.apply(replace(at_one(site, site.web, "web-2", **impatient), endpoints=site.web.endpoints), others)
    assert who_answers(fresh) == "web-2"


def test_C10_a_service_that_is_deleted_ends_its_datagrams_and_leaves_tcp(site, make):
    sock, asking = make.connected(site.web), make.connected(site.dns, UDP)
    server = who_answers(sock)
    site.daemon.apply()
    assert wait_until(lambda: has_ended(asking), FOLLOWED_S)
    assert who_answers(sock) == server


def pod(site: Site, uid: str) -> Service:
    (place,) = site.places(WEB_PORT, "web-1")
    about = {place: {"targetRef": {"kind": "Pod", "uid": uid}}}
    return replace(site.web.with_endpoints(place), about=about)


@pytest.mark.parametrize("is_away", [False, True], ids=["while-it-runs", "while-it-is-away"])
def test_C9_another_pod_at_a_place_gets_no_connections_of_the_one_before(site, make, is_away):
    site.daemon.apply(pod(site, "first"))
    sock = make.connected(site.web)
    assert who_answers(sock) == "web-1"
    if is_away:
        site.daemon.signal(signal.SIGKILL)
        site.daemon.wait()
        write_manifests(site.daemon.file, [pod(site, "second")])
        site.daemon.start()
    else:
        site.daemon.apply(pod(site, "second"))
    assert wait_until(lambda: has_ended(sock), FOLLOWED_S)
    assert make.who(site.web.frontend) == "web-1"


def test_L_an_endpoint_in_maintenance_loses_its_connections(site, make):
    site.daemon.apply(at_one(site, site.web, "web-1"))
    sock = make.connected(site.web)
    (place,) = site.places(WEB_PORT, "web-1")
    site.daemon.turnout("maint", place)
    try:
        with pytest.raises(ConnectionRefusedError):
            make.connected(site.web)
        assert wait_until(lambda: has_ended(sock), FOLLOWED_S)
    finally:
        site.daemon.turnout("ready", place)


# The daemon goes, and the hooks.


def test_P1_clients_are_led_while_no_daemon_runs(site, make):
    known, asking = make.connected(site.web), make.connected(site.dns, UDP)
    server = who_answers(known)
    site.daemon.signal(signal.SIGKILL)
    site.daemon.wait()
    assert (who_answers(known), far_end(known)) == (server, site.web.frontend)
    assert make.who(site.web.frontend) in SERVERS
    asking.send(b"who")
    assert name_of(asking.recv(100)) in SERVERS
    before = pinned_links(site)
    site.daemon.start()
    assert pinned_links(site) == before  # taken over: there was no moment without
    assert who_answers(known) == server
    assert make.who(site.web.frontend) in SERVERS


def pinned_links(site: Site) -> list[int]:
    """Return the numbers of the links to the cgroup that are pinned."""
    found = [loader.link_at(pin) for pin in site.daemon.settings.hook_pins()]
    return [link.id for link in found if link is not None and link.cgroup_id]


def test_F100_a_hook_that_was_taken_off_is_put_back(site, make):
    pins, before = site.daemon.settings.hook_pins(), pinned_links(site)
    assert len(pins) == len(before) == len(kernel.CGROUP_HOOKS)
    for pin in pins:
        loader.detach(pin)
    assert wait_until(lambda: len(set(pinned_links(site)) - set(before)) == len(pins), FOLLOWED_S)
    assert make.who(site.web.frontend) in SERVERS
    before = pinned_links(site)
    link = kernel.open_pinned(pins[0])
    links.detach(link)  # by force: the pin is there still
    os.close(link)
    assert wait_until(lambda: len(set(pinned_links(site)) - set(before)) == 1, FOLLOWED_S)
    assert make.who(site.web.frontend) in SERVERS
    assert "had been taken off" in site.daemon.said()
    assert site.daemon.ask("status")["state"] == "ok"


def test_P1_detach_ends_it(site, make, cgroup):
    site.daemon.signal(signal.SIGTERM)
    site.daemon.wait()
    assert len(pinned_links(site)) == len(kernel.CGROUP_HOOKS)
    assert make.who(site.web.frontend) in SERVERS
    looking = kernel.open_pinned(site.daemon.settings.hook_pins()[0])  # as a tool does that lists links
    removed = site.daemon.turnout("detach").stderr
    assert "removed clients on this node: the programs and their links" in removed
    assert not site.daemon.settings.pins.exists()
    assert not attached(cgroup)
    os.close(looking)


def attached(cgroup: Path) -> list[links.LinkInfo]:
    """Return the links to a cgroup, whoever's."""
    return [link for link in links.every() if link.cgroup_id == loader.number_of_cgroup(cgroup)]


def test_an_end_by_ctrl_c_takes_the_hooks_off(site, cgroup):
    assert attached(cgroup)
    site.daemon.signal(signal.SIGINT)
    assert site.daemon.wait() == 0
    assert not attached(cgroup)


def test_a_start_without_the_flag_takes_the_hooks_off(site, cgroup):
    site.daemon.signal(signal.SIGKILL)
    site.daemon.wait()
    assert attached(cgroup)
    flags = site.daemon._flags
    site.daemon._flags = [flag for flag in flags if flag not in ("--socket-cgroup", str(cgroup))]
    try:
        site.daemon.start()
        status = site.daemon.ask("status")
        assert (status["sockets"], status["state"]) == (None, "ok")
    finally:
        site.daemon._flags = flags
        site.daemon.signal(signal.SIGTERM)
        site.daemon.wait()
    assert not attached(cgroup)


@pytest.mark.faults(83)
def test_sockets_are_led_by_the_secret_too(site, make, tmp_path):
    (path := tmp_path / "seed").write_text("what all nodes share")
    path.chmod(0o600)
    try:
        site.daemon.restart("--seed-file", str(path))
        seed = read_seed(path).number
        slots = maglev.positions([(ip_address(host), port) for host, port in map(split, site.web.endpoints)], seed)
        for _ in range(20):
            sock = make.connected(site.web)
            (cookie,) = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
            hashed = hash_of(cookie, 0, 0, seed, ~seed & (1 << 64) - 1)
            assert who_answers(sock) == SERVERS[slots[(hashed >> 32) * len(slots) >> 32]]
    finally:
        site.daemon.restart()
