"""Interfaces that change while the node runs: it follows, and what has nothing to do with them goes on."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf import clients
from perf.world import Host, World, wait_until
from tests.daemon import Daemon
from tests.programs import returning
from tests.scenarios.site import DNS_PORT, HOSTS, Site, undisturbed
from xdp import kernel, links
from xdp.schema import Reason

pytestmark = [pytest.mark.root, pytest.mark.bpf]

QUEUES = 4  # that there is room for; two are used at first
FOLLOWED_S = 1.0
BUSY_S = 1.0  # what the commands take, and whatever else is running

ONLY_XDP = pytest.mark.parametrize("site", ["xdp"], indirect=True)


@pytest.fixture(scope="module", params=["xdp", "raw"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A node with a second client on an interface of its own, eth2, and more queues on every interface."""
    hosts = {**HOSTS, "other": "others"}
    with World(f"ti{os.getpid() % 100_000}", hosts, queues=QUEUES) as world, Daemon(world, request.param) as daemon:
        for host in (world.node, world["other"]):
            interface = "eth2" if host is world.node else "eth0"
            host.run(["ethtool", "-L", interface, "rx", "2", "tx", "2"])
        made = Site(world, daemon)
        daemon.start()
        yield made


@pytest.fixture(autouse=True)
def _services(site: Site) -> Iterator[None]:
    site.serve()
    yield
    site.wait_until_ok()
    site.check_accounts()


@contextlib.contextmanager
def within_a_second() -> Iterator[None]:
    """Fail if what is done takes longer than the time in which a change is to be followed."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < FOLLOWED_S + BUSY_S


def why(site: Site) -> str:
    return "\n".join(site.daemon.ask("status")["why"])


def shown(site: Site, name: str) -> dict[str, object]:
    """Return what `get interfaces` says of one."""
    return next(one for one in site.daemon.ask("interfaces") if one["name"] == name)


def is_attached(site: Site, name: str) -> bool:
    how = shown(site, name)
    return (how["xdp_mode"], how["why"]) == {"xdp": ("native", ""), "raw": (None, "asked for")}[site.daemon.engine]


def is_served(site: Site, name: str) -> bool:
    return is_attached(site, name) and not site.daemon.ask("status")["why"]


def make_eth2(site: Site) -> None:
    """Make the wire of the second client, as the world does."""
    node, other = site.world.node, site.world["other"]
    end = node.interface_to("others")
    far = f"peer name eth0 address {other.mac} netns {other.namespace} numrxqueues {QUEUES} numtxqueues {QUEUES}"
    near = f"link add made2 address {end.mac} numrxqueues {QUEUES} numtxqueues {QUEUES} type veth {far}"
    batch(node, near)
    node.run(["ethtool", "-L", "made2", "rx", "2", "tx", "2"])  # before it is called eth2, and is served
    other.run(["ethtool", "-L", "eth0", "rx", "2", "tx", "2"])
    batch(node, "link set made2 name eth2", f"address add {end.address} dev eth2", "link set eth2 up")
    batch(
        other,
        f"address add {other.interfaces[0].address} dev eth0",
        "link set eth0 up",
        f"route add default via {end.ip}",
    )
    other.run(["ethtool", "-K", "eth0", "tx", "off", "gro", "on"])


def batch(host: Host, *lines: str) -> None:
    host.run(["ip", "-batch", "-"], text_in="\n".join(lines) + "\n")


@pytest.mark.faults(93)
def test_an_interface_is_deleted_and_made_again(site):
    with undisturbed(site), site.asking("other") as ask:
        assert ask() is not None
        site.world.node.run(["ip", "link", "delete", "eth2"])
        with within_a_second():
            site.daemon.wait_for(lambda: "eth2: the interface has gone" in why(site))
        assert not is_attached(site, "eth2")
        assert "eth2 not attached" in site.daemon.turnout("status", check=False).stdout
        make_eth2(site)
        with within_a_second():
            site.daemon.wait_for(lambda: is_served(site, "eth2"))
        site.daemon.wait_for(lambda: ask(0.2) is not None)
    with site.asking("other") as ask:
        assert ask() is not None  # and new flows begin


@pytest.mark.faults(93, 109)
def test_one_made_again_at_once_with_the_same_number_is_not_mistaken_for_the_old(site):
    node = site.world.node
    number = index_of(node, "eth2")
    site.daemon.signal(19)  # SIGSTOP: it must not see that there was nothing in between
    try:
        node.run(["ip", "link", "delete", "eth2"])
        far = f"peer name eth0 address {site.world['other'].mac} netns {site.world['other'].namespace}"
        batch(node, f"link add eth2 index {number} address {node.interface_to('others').mac} type veth {far}")
        node.run(["ip", "link", "delete", "eth2"])
        make_eth2(site)
    finally:
        site.daemon.signal(18)  # SIGCONT
    with site.asking("other") as ask:
        site.daemon.wait_for(lambda: ask(0.2) is not None)
    assert is_served(site, "eth2")


def index_of(host: Host, name: str) -> int:
    return int(host.run(["cat", f"/sys/class/net/{name}/ifindex"], check=False).stdout or 0) or next(
        int(line.split(":")[0]) for line in host.run(["ip", "-o", "link"]).stdout.splitlines() if f" {name}@" in line
    )


def test_the_way_to_the_servers_is_deleted_and_made_again(site):
    """The interface of all endpoints: their neighbours and routes go with it, and come back."""
    node, switch, end = site.world.node, site.world.switch("servers"), site.world.node.interface_to("servers")
    with site.asking() as ask:
        assert ask() is not None
        node.run(["ip", "link", "delete", "eth1"])
        site.daemon.wait_for(lambda: "eth1: the interface has gone" in why(site))
        batch(node, f"link add eth1 address {end.mac} type veth peer name node netns {switch.namespace}")
        batch(switch, "link set node master br0 up")
        switch.run(["ethtool", "-K", "node", "tx", "off", "gro", "on"])
        batch(node, f"address add {end.address} dev eth1", "link set eth1 up")
        with within_a_second():
            site.daemon.wait_for(lambda: is_attached(site, "eth1"))
        site.daemon.wait_for(lambda: ask(0.2) is not None)


@pytest.mark.faults(93)
def test_a_renamed_interface_is_followed(site):
    node = site.world.node
    with undisturbed(site), site.asking("other") as ask:
        assert ask() is not None
        node.run(["ip", "link", "set", "eth2", "name", "lan2"])
        try:
            with within_a_second():
                site.daemon.wait_for(lambda: "eth2: is called lan2 now" in why(site))
            assert ask() is not None
            assert is_attached(site, "eth2")
            with site.asking("other") as another:
                assert another() is not None
        finally:
            node.run(["ip", "link", "set", "lan2", "name", "eth2"])
        site.wait_until_ok()
        assert ask() is not None


@ONLY_XDP
def test_a_restart_finds_the_program_of_an_interface_that_was_renamed_meanwhile(site):
    site.daemon.signal(9)
    site.daemon.wait()
    site.world.node.run(["ip", "link", "set", "eth2", "name", "lan2"])
    site.daemon.rename("eth2", "lan2")
    try:
        site.daemon.start()
        site.wait_until_ok()
        with site.asking("other") as ask:
            assert ask() is not None
    finally:
        site.daemon.signal(9)
        site.daemon.wait()
        site.world.node.run(["ip", "link", "set", "lan2", "name", "eth2"])
        site.daemon.rename("lan2", "eth2")
        site.daemon.start()
    site.wait_until_ok()


@pytest.mark.faults(93)
def test_an_interface_is_moved_to_another_namespace_and_back(site):
    node, elsewhere = site.world.node, site.world.switch("servers")
    with undisturbed(site), site.asking("other") as ask:
        assert ask() is not None
        node.run(["ip", "link", "set", "eth2", "netns", elsewhere.namespace])
        with within_a_second():
            site.daemon.wait_for(lambda: "eth2: the interface has gone" in why(site))
        left = elsewhere.run(["ip", "-j", "link", "show", "dev", "eth2"]).stdout
        assert '"xdp"' not in left  # nor does our program go with it
        elsewhere.run(["ip", "link", "set", "eth2", "netns", node.namespace])
        batch(node, f"address add {node.interface_to('others').address} dev eth2", "link set eth2 up")
        site.daemon.wait_for(lambda: is_served(site, "eth2"))
        site.daemon.wait_for(lambda: ask(0.2) is not None)


def workers_of(site: Site) -> int:
    with site.tables() as shared:
        return int((shared.tables.workers["heartbeat"] != 0).sum())


@pytest.mark.faults(91)
@ONLY_XDP
def test_more_queues_get_workers(site):
    node, other = site.world.node, site.world["other"]
    before = workers_of(site)
    with undisturbed(site), site.asking("other") as ask:
        assert ask() is not None
        program = program_of(site, "eth2")
        node.run(["ethtool", "-L", "eth2", "rx", "4", "tx", "2"])
        # The kernel runs a program on new queues when it is attached anew, for which it has to be compiled.
        site.daemon.wait_for(lambda: workers_of(site) == before + 2 and program_of(site, "eth2") != program)
        other.run(["ethtool", "-L", "eth0", "rx", "4", "tx", "4"])
        punted = site.counted(Reason.NEW_FLOW)
        for _ in range(40):
            with site.asking("other") as another:
                assert another() is not None
        assert site.counted(Reason.NEW_FLOW) >= punted + 40
        assert site.counted(Reason.STALLED_DROPPED) == 0
        assert ask() is not None


@pytest.mark.faults(93)
@pytest.mark.parametrize("mtu", [3000, 1400])
def test_another_mtu_is_followed(site, mtu):
    """Frames longer than the memory's chunks need another memory, which all sockets are opened on again."""
    node, other = site.world.node, site.world["other"]
    with undisturbed(site), site.asking("other") as ask:
        assert ask() is not None
        try:
            for host, interface in ((other, "eth0"), (node, "eth2")):
                host.run(["ip", "link", "set", interface, "mtu", str(mtu)])
            site.daemon.wait_for(lambda: mtu_to_other(site) == mtu)
            # Engine raw opens the sockets of that interface again, and has nothing that forwards meanwhile.
            assert ask() is not None or (site.daemon.engine == "raw" and ask() is not None)
            with site.asking("other") as another:
                site.daemon.wait_for(lambda: another(0.2) is not None)
        finally:
            for host, interface in ((node, "eth2"), (other, "eth0")):
                host.run(["ip", "link", "set", interface, "mtu", "1500"])
        site.daemon.wait_for(lambda: mtu_to_other(site) == 1500)


def mtu_to_other(site: Site) -> int:
    hops = {hop["destination"]: hop for hop in site.daemon.ask("nexthops")}
    return int(hops[site.world["other"].ip]["mtu"])


@ONLY_XDP
def test_frames_that_go_on_being_lost_on_their_way_out_are_told(site):
    """A burst is not; but nothing else tells of a far end whose MTU is smaller than ours."""
    other, told = site.world["other"], "eth2: frames are being lost on their way out"

    def is_told() -> bool:
        with contextlib.suppress(TimeoutError):
            ask.large(bytes(1000), 0.2)
        return told in why(site)

    with site.asking("other") as ask:
        other.run(["ip", "link", "set", "eth0", "mtu", "600"])
        try:
            assert not is_told()
            assert wait_until(is_told, 15)
        finally:
            other.run(["ip", "link", "set", "eth0", "mtu", "1500"])
    site.daemon.wait_for(lambda: told not in why(site))


@pytest.mark.faults(93)
@pytest.mark.parametrize("interface", ["eth0", "eth1"])
def test_an_interface_that_goes_down_and_comes_up_serves_again(site, interface):
    node = site.world.node
    with site.asking() as ask:
        name = ask()
        assert name is not None
        try:
            node.run(["ip", "link", "set", interface, "down"])
            site.daemon.wait_for(lambda: site.daemon.ask("status")["state"] == "degraded")
            told = site.daemon.turnout("status", check=False)
            assert (told.returncode, f"{interface}: the interface is down" in told.stdout) == (5, True)
            assert ask(0.1) is None
        finally:
            node.run(["ip", "link", "set", interface, "up"])
        site.wait_until_ok()
        site.daemon.wait_for(lambda: ask(0.2) == name)
    with site.asking() as ask:
        site.daemon.wait_for(lambda: ask(0.2) is not None)
    result = clients.load_http(site.client, site.web.frontend, connections=10)
    assert (result.answered, result.failures) == (10, {})


# Programs.


def program_of(site: Site, name: str) -> int | None:
    """Return the number of the XDP program on an interface of the node."""
    with site.world.node.entered():
        state = links.xdp_state(index_of(site.world.node, name))
    return state.program_id if state else None


def link_at(pin: Path) -> int:
    """Return the number of a pinned link."""
    link = kernel.open_pinned(pin)
    try:
        return links.info(link).id
    finally:
        os.close(link)


def take_off(site: Site, name: str) -> int:
    """Take the program off by force, as `bpftool link detach` does; return the number of its link."""
    link = kernel.open_pinned(site.daemon.settings.link_pin(name))
    try:
        links.detach(link)
        return links.info(link).id
    finally:
        os.close(link)


@ONLY_XDP
def test_F100_a_program_that_is_taken_off_by_force_comes_back(site):
    with site.asking("other") as ask:
        assert ask() is not None
        pin = site.daemon.settings.link_pin("eth2")
        with within_a_second():
            taken_off = take_off(site, "eth2")
            site.daemon.wait_for(lambda: pin.exists() and link_at(pin) != taken_off)
            site.daemon.wait_for(lambda: program_of(site, "eth2") is not None)
        assert ask() is not None


@ONLY_XDP
def test_F100_a_pin_that_is_removed_comes_back(site):
    pin = site.daemon.settings.link_pin("eth2")
    with site.asking("other") as ask:
        assert ask() is not None
        pin.unlink()
        with within_a_second():
            site.daemon.wait_for(lambda: program_of(site, "eth2") is not None and pin.exists())
        assert ask() is not None


def pass_everything() -> int:
    """Load a program that leaves every packet to the kernel."""
    return returning(2)


@ONLY_XDP
def test_F098_a_program_of_somebody_else_is_told_and_followed_by_ours_when_it_goes(site):
    other = pass_everything()
    site.daemon.signal(19)
    try:
        take_off(site, "eth2")
        with site.world.node.entered():
            link = links.create_xdp(other, index_of(site.world.node, "eth2"), "native")
    finally:
        site.daemon.signal(18)
    site.daemon.wait_for(lambda: "eth2: another XDP program (native" in why(site))
    with site.asking() as ask:
        assert ask() is not None  # the other interfaces go on
    os.close(link)
    os.close(other)
    with within_a_second():
        site.daemon.wait_for(lambda: is_served(site, "eth2"))
    with site.asking("other") as ask:
        assert ask() is not None


@ONLY_XDP
def test_F098_our_link_made_to_run_another_program_runs_ours_again(site):
    ours, other = program_of(site, "eth2"), pass_everything()
    link = kernel.open_pinned(site.daemon.settings.link_pin("eth2"))
    links.update(link, other)
    with within_a_second():
        site.daemon.wait_for(lambda: program_of(site, "eth2") == ours)
    os.close(link)
    os.close(other)


# Neighbours and routes.


def mac_of(site: Site, destination: str) -> str:
    """Return the MAC address of a next hop."""
    hops = {hop["destination"]: hop for hop in site.daemon.ask("nexthops")}
    return str(hops[destination]["mac"])


@pytest.mark.faults(10, 108)
def test_the_new_mac_of_an_endpoint_is_followed(site):
    host = site.world["web-1"]
    site.daemon.apply(site.web, site.dns.with_endpoints(*site.places(DNS_PORT, "web-1")))
    host.sysctl("net/ipv4/conf/eth0/arp_notify", 1)  # announce it, as a failover does
    with site.asking() as ask:
        assert ask() == "web-1"
        try:
            host.run(["ip", "link", "set", "eth0", "address", "02:00:00:00:be:ef"])
            site.daemon.wait_for(lambda: mac_of(site, host.ip) == "02:00:00:00:be:ef")
            assert ask() == "web-1"
        finally:
            host.run(["ip", "link", "set", "eth0", "address", host.mac])
        site.daemon.wait_for(lambda: mac_of(site, host.ip) == host.mac)
        assert ask() == "web-1"


NETWORK, BEHIND = "10.88.0.0/24", "10.88.0.1"


@pytest.fixture
def behind(site: Site) -> Iterator[str]:
    """An address that web-1 and web-2 both have, behind whichever is the gateway; the Service's only endpoint."""
    for name in ("web-1", "web-2"):
        site.world[name].run(["ip", "address", "add", f"{BEHIND}/32", "dev", "lo"])
    yield BEHIND
    site.daemon.apply(site.web, site.dns)
    site.world.node.run(["ip", "route", "delete", NETWORK], check=False)
    for name in ("web-1", "web-2"):
        site.world[name].run(["ip", "address", "delete", f"{BEHIND}/32", "dev", "lo"])


def test_the_new_gateway_of_an_endpoint_is_followed(site, behind):
    node = site.world.node
    node.run(["ip", "route", "replace", NETWORK, "via", site.world["web-1"].ip])
    site.daemon.apply(site.web, site.dns.with_endpoints(f"{behind}:{DNS_PORT}"))
    site.wait_until_ok()
    with site.asking() as ask:
        assert ask() == "web-1"
        node.run(["ip", "route", "replace", NETWORK, "via", site.world["web-2"].ip])
        with within_a_second():
            site.daemon.wait_for(lambda: ask(0.2) == "web-2")


@pytest.mark.faults(109)
def test_a_route_with_several_next_hops_leads_to_one_that_lives(site, behind):
    node = site.world.node
    for name, value in (("base_reachable_time_ms", 500), ("delay_first_probe_time", 1), ("retrans_time_ms", 100)):
        node.sysctl(f"net/ipv4/neigh/eth1/{name}", value)
    node.sysctl("net/ipv4/neigh/eth1/interval_probe_time_ms", 500)
    batch(node, "link set eth1 down", "link set eth1 up")  # what is known of neighbours holds for up to 45 s otherwise
    ways = [word for name in ("web-1", "web-2") for word in ("nexthop", "via", site.world[name].ip)]
    node.run(["ip", "route", "replace", NETWORK, *ways])
    site.daemon.apply(site.web, site.dns.with_endpoints(f"{behind}:{DNS_PORT}"))
    site.wait_until_ok()
    with site.asking() as ask:
        first = ask()
        for _ in range(2):  # there, and back again
            gateway, other = (first, "web-2" if first == "web-1" else "web-1")
            site.world[gateway].run(["ip", "link", "set", "eth0", "arp", "off"])
            site.world[gateway].run(["ip", "link", "set", "eth0", "down"])
            try:
                site.daemon.wait_for(lambda: ask(0.2) == other, 30)  # noqa: B023
            finally:
                batch(
                    site.world[gateway],
                    "link set eth0 arp on",
                    "link set eth0 up",
                    f"route replace default via {node.interface_to('servers').ip}",
                )
            first = other
    for name, value in (("base_reachable_time_ms", 30000), ("delay_first_probe_time", 5), ("retrans_time_ms", 1000)):
        node.sysctl(f"net/ipv4/neigh/eth1/{name}", value)
    node.sysctl("net/ipv4/neigh/eth1/interval_probe_time_ms", 5000)


@pytest.mark.faults(109)
def test_a_route_that_is_withdrawn_leaves_the_one_that_covers_it(site, behind):
    node = site.world.node
    node.run(["ip", "route", "replace", NETWORK, "via", site.world["web-1"].ip])
    node.run(["ip", "route", "replace", f"{behind}/32", "via", site.world["web-2"].ip])
    site.daemon.apply(site.web, site.dns.with_endpoints(f"{behind}:{DNS_PORT}"))
    site.wait_until_ok()
    with site.asking() as ask:
        assert ask() == "web-2"
        node.run(["ip", "route", "delete", f"{behind}/32"])
        with within_a_second():
            site.daemon.wait_for(lambda: ask(0.2) == "web-1")
        node.run(["ip", "route", "delete", NETWORK])
        with within_a_second():
            site.daemon.wait_for(lambda: f"endpoint {behind}: no route" in why(site))
        assert ask(0.1) is None
