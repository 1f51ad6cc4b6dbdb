"""Kinds of interfaces: each is served, in the mode that its driver can, or refused with the kernel's reason."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dataplane.ethtool import has_feature, has_gro
from perf import clients
from perf.world import Host, World
from tests.daemon import Daemon
from tests.scenarios.site import HOSTS, Site

pytestmark = [pytest.mark.root, pytest.mark.bpf]
LARGE_BYTES = 20_000_000
_FAR_END_OF_9000 = """link add made0 type veth peer name made1 mtu 9000
link set made0 up
link set made1 up
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(f"tk{os.getpid() % 100_000}", HOSTS) as world:
        yield world


@pytest.fixture
def daemon(world: World) -> Iterator[Daemon]:
    """A daemon that takes the mode that there is."""
    with Daemon(world, "xdp-auto") as daemon:
        yield daemon


def serving(daemon: Daemon, *interfaces: str) -> Daemon:
    daemon.settings = replace(daemon.settings, interfaces=interfaces)
    return daemon


def refusal(daemon: Daemon) -> tuple[int, str]:
    """Start it; return its exit code and what it said last."""
    with pytest.raises(AssertionError):
        daemon.start()
    assert daemon.process is not None
    return int(daemon.process.returncode), daemon.said().splitlines()[-1]


def shown_modes(daemon: Daemon) -> dict[str, str | None]:
    return {one["name"]: one["xdp_mode"] for one in daemon.ask("interfaces")}


@pytest.fixture
def made(world: World, request: pytest.FixtureRequest) -> Iterator[str]:
    """An interface of some kind, called made0."""
    world.node.run(["ip", *request.param.split()])
    world.node.run(["ip", "link", "set", "made0", "up"])
    yield "made0"
    world.node.run(["ip", "link", "delete", "made0"])


@pytest.mark.faults(3)
@pytest.mark.parametrize(
    ("made", "mode", "why"),
    [
        pytest.param("link add made0 type bridge", "generic", "Underlying driver does not support XDP", id="bridge"),
        pytest.param(
            "link add made0 link eth0 type macvlan", "generic", "Underlying driver does not support XDP", id="macvlan"
        ),
        pytest.param(
            "link add made0 type vxlan id 5 dstport 4789", "generic", "Underlying driver does not support", id="vxlan"
        ),
        pytest.param("link add made0 type veth peer name made1", "native", "", id="veth"),
        pytest.param("tuntap add made0 mode tap", "native", "", id="tap"),
        pytest.param("link add made0 mtu 9000 type veth peer name made1 mtu 9000", None, "MTU 9000", id="large MTU"),
        pytest.param(
            "link add made0 mtu 3819 type veth peer name made1 mtu 3819",
            None,
            "MTU 3819 does not fit into an AF_XDP frame; `ip link set made0 mtu 3818` or less",
            id="no room for tags",
        ),
        pytest.param("tuntap add made0 mode tun", None, "has no Ethernet address (tun)", id="tun"),
    ],
    indirect=["made"],
)
def test_each_kind_is_served_or_refused_with_the_reason(daemon, made, mode, why):
    serving(daemon, "eth0", made)
    if mode is None:
        code, told = refusal(daemon)
        assert (code, f"{made}: {why}" in told) == (1 if "MTU" in why else 2, True), told
        assert not daemon.settings.link_pins()
        return
    daemon.start()
    shown = {one["name"]: one for one in daemon.ask("interfaces")}
    assert shown["eth0"]["xdp_mode"] == "native"
    assert shown[made]["xdp_mode"] == mode
    assert why in shown[made]["why"]
    assert bool(why) == bool(shown[made]["why"])


@pytest.mark.parametrize(
    ("made", "how"),
    [
        pytest.param("link add made0 type bridge", "packet sockets", id="bridge"),
        pytest.param("link add made0 link eth0 type macvlan", "packet sockets", id="macvlan"),
        pytest.param("link add made0 type vxlan id 5 dstport 4789", "packet sockets", id="vxlan"),
        pytest.param("tuntap add made0 mode tap", "packet sockets", id="tap"),
        pytest.param("link add made0 mtu 9000 type veth peer name made1 mtu 9000", "packet sockets", id="large MTU"),
        pytest.param("tuntap add made0 mode tun", None, id="tun"),
    ],
    indirect=["made"],
)
def test_engine_raw_serves_whatever_has_ethernet_frames(world, made, how):
    with Daemon(world, "raw") as daemon:
        serving(daemon, "eth0", made)
        if how is None:
            code, told = refusal(daemon)
            assert (code, f"{made}: has no Ethernet address (tun)" in told) == (2, True)
            return
        daemon.start()
        assert f"{made}: {how} (asked for)" in daemon.said()
        assert shown_modes(daemon) == {"eth0": None, made: None}


def test_the_loopback_is_refused(daemon):
    code, told = refusal(serving(daemon, "lo"))
    assert (code, "lo: has no Ethernet address (loopback)" in told) == (2, True)


def test_what_native_xdp_needs_of_the_far_end_is_told_in_the_kernels_words(world, daemon):
    """Where native was asked for it is an error; `auto` takes generic and says why."""
    world.node.run(["ip", "-batch", "-"], text_in=_FAR_END_OF_9000)
    try:
        daemon.start_with = ["--xdp-mode", "native"]
        serving(daemon, "eth0", "made0")
        code, told = refusal(daemon)
        assert code == 1
        assert "made0: native XDP refused" in told
        assert "Peer MTU is too large to set XDP" in told
        with world.node.entered():
            assert all(has_feature(name, "rx-vlan-hw-parse") for name in ("eth0", "made0"))
        assert not daemon.settings.offloads_path.exists()
        daemon.start_with = []
        daemon.start()
        shown = {one["name"]: one for one in daemon.ask("interfaces")}
        assert shown["made0"]["xdp_mode"] == "generic"
        assert "Peer MTU is too large to set XDP" in shown["made0"]["why"]
    finally:
        world.node.run(["ip", "link", "delete", "made0"])
    daemon.wait_for(lambda: "made0: the interface has gone" in daemon.ask("status")["why"])
    assert shown_modes(daemon) == {"eth0": "native", "made0": None}


def test_one_given_twice_is_one(daemon):
    serving(daemon, "eth0", "eth0", "eth1").start()
    assert [one["name"] for one in daemon.ask("interfaces")] == ["eth0", "eth1"]


# Generic XDP sees what GRO has merged.


@pytest.fixture(scope="module")
def site(world: World) -> Iterator[Site]:
    """Servers that hand frames of any size to their device, a switch that cuts them, and GRO on at the node."""
    for name in ("web-1", "web-2", "web-3"):
        world[name].run(["ethtool", "-K", "eth0", "tx", "on", "tso", "on", "gso", "on", "gro", "on"])
    with Daemon(world, "xdp-generic") as daemon:
        yield Site(world, daemon)


@pytest.fixture(autouse=True)
def _gro_on(world: World, request: pytest.FixtureRequest) -> Iterator[None]:
    for name in ("eth0", "eth1"):
        world.node.run(["ethtool", "-K", name, "gro", "on"])
    yield
    if "site" in request.fixturenames:
        daemon = request.getfixturevalue("site").daemon
        if daemon.process.poll() is None:
            daemon.signal(signal.SIGINT)
            daemon.wait()


def gro(node: Host) -> list[bool]:
    with node.entered():
        return [has_gro(name) for name in ("eth0", "eth1")]


@pytest.mark.faults(106)
def test_large_answers_arrive_through_generic_xdp_and_gro_comes_back(site):
    node, daemon = site.world.node, site.daemon
    assert gro(node) == [True, True]
    site.serve()
    assert gro(node) == [False, False]
    result = clients.load_http(site.client, site.web.frontend, connections=3, bytes=LARGE_BYTES, timeout=30)
    assert (result.answered, result.failures) == (3, {})
    assert daemon.ask("status")["reasons"].get("TOO_BIG", 0) == 0
    record = json.loads(daemon.settings.offloads_path.read_text())
    assert len(record["gro_was_on"]) == 2
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    assert gro(node) == [False, False]  # its program is still there
    daemon.turnout("detach")
    assert gro(node) == [True, True]
    assert not daemon.settings.offloads_path.exists()


@pytest.mark.faults(127)
@pytest.mark.parametrize("how", ["SIGINT", "native"])
def test_gro_comes_back_at_the_end_and_with_the_native_mode(site, how):
    node, daemon = site.world.node, site.daemon
    site.serve()
    assert gro(node) == [False, False]
    if how == "SIGINT":
        daemon.signal(signal.SIGINT)
        daemon.wait()
    else:
        daemon.signal(signal.SIGTERM)
        daemon.wait()
        daemon.start_with = ["--xdp-mode", "native"]
        daemon.start()
        assert gro(node) == [True, True]
        assert json.loads(daemon.settings.offloads_path.read_text())["gro_was_on"] == []
        daemon.signal(signal.SIGINT)
        daemon.wait()
    assert gro(node) == [True, True]
    assert not daemon.settings.offloads_path.exists()


@pytest.fixture
def over(site: Site, request: pytest.FixtureRequest) -> Iterator[Site]:
    """Have made0, over eth1, lead to the servers in its place."""
    world, settings = site.world, site.daemon.settings
    end = world.node.interface_to("servers")
    lines = {
        "macvlan": ["link add made0 link eth1 type macvlan mode private"],
        "bridge": ["link add made0 type bridge", "link set eth1 master made0"],
    }[request.param]
    lines += ["addr flush dev eth1", "link set made0 up", f"addr add {end.address} dev made0"]
    world.node.run(["ip", "-batch", "-"], text_in="\n".join(lines) + "\n")
    _forget_neighbours(world)
    serving(site.daemon, "eth0", "made0").start_with = []
    yield site
    site.daemon.settings = settings
    lines = ["link delete made0", f"addr add {end.address} dev eth1"]
    world.node.run(["ip", "-batch", "-"], text_in="\n".join(lines) + "\n")
    _forget_neighbours(world)


def _forget_neighbours(world: World) -> None:
    for name in ("web-1", "web-2", "web-3"):
        world[name].run(["ip", "neigh", "flush", "all"])


@pytest.mark.faults(106)
@pytest.mark.parametrize("over", ["macvlan", "bridge"], indirect=True)
def test_large_answers_arrive_through_a_device_on_top_of_one_that_has_gro(over):
    """The lower device merges, and has its GRO again at the end, whoever cleans up."""
    node, daemon = over.world.node, over.daemon
    over.serve()
    assert gro(node) == [False, False]
    result = clients.load_http(over.client, over.web.frontend, connections=3, bytes=LARGE_BYTES, timeout=30)
    assert (result.answered, result.failures) == (3, {})
    assert daemon.ask("status")["reasons"].get("TOO_BIG", 0) == 0
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    daemon.turnout("detach", "-i", "eth0")
    assert gro(node) == [True, False]
    daemon.turnout("detach")
    assert gro(node) == [True, True]
    daemon.start()
    assert gro(node) == [False, False]
    daemon.signal(signal.SIGINT)
    daemon.wait()
    assert gro(node) == [True, True]


@pytest.mark.parametrize("over", ["bridge"], indirect=True)
def test_a_port_that_joins_later_loses_its_gro_and_one_that_leaves_has_it_again(over):
    node, daemon = over.world.node, over.daemon
    daemon.start()
    lines = ["link add made1 type veth peer name made2", "link set made1 up", "link set made2 up"]
    node.run(["ip", "-batch", "-"], text_in="\n".join(lines) + "\n")
    try:
        node.run(["ethtool", "-K", "made1", "gro", "on"])
        for joins in (True, False):
            node.run(["ip", "link", "set", "made1", *(["master", "made0"] if joins else ["nomaster"])])
            with node.entered():
                daemon.wait_for(lambda joins=joins: has_gro("made1") is not joins)
    finally:
        node.run(["ip", "link", "delete", "made1"])


def rxvlan(node: Host) -> list[bool]:
    with node.entered():
        return [has_feature(name, "rx-vlan-hw-parse") for name in ("eth0", "eth1")]


@pytest.mark.faults(5)
@pytest.mark.parametrize("mode", ["generic", "native"])
def test_N6_drivers_leave_vlan_tags_in_frames_while_xdp_is_there(site, mode):
    """What a driver takes out, XDP does not see; what `ethtool -k` says before is so again at the end."""
    node, daemon = site.world.node, site.daemon
    daemon.start_with = ["--xdp-mode", mode]
    assert rxvlan(node) == [True, True]
    site.serve()
    assert rxvlan(node) == [False, False]
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    assert rxvlan(node) == [False, False]
    daemon.start()
    daemon.signal(signal.SIGINT)
    daemon.wait()
    assert rxvlan(node) == [True, True]
    assert not daemon.settings.offloads_path.exists()


# NICs may not let rx-vlan-offload or rx-vlan-filter go, and no device here has them fixed on. But a macvlan has highdma
# so: the daemon takes that for the offload in question.
_REFUSED = """import sys
from dataplane import cli, offloads
which = sys.argv.pop(1)
offloads.OFFLOADS[which] = offloads._feature("highdma", "", offloads.OFFLOADS[which].otherwise)
sys.exit(cli.main())
"""


@pytest.mark.faults(5)
@pytest.mark.parametrize("made", ["link add made0 link eth0 type macvlan"], indirect=True)
@pytest.mark.parametrize(
    ("which", "flags", "told"),
    [
        pytest.param("rxvlan", (), "rx-vlan-offload cannot be switched off", id="rx-vlan-offload"),
        pytest.param("vlanfilter", ("--vlan", "100"), "rx-vlan-filter cannot be switched off", id="rx-vlan-filter"),
        pytest.param("vlanfilter", ("--vlan", "0"), "", id="rx-vlan-filter, priority tags only"),
    ],
)
def test_N6_a_driver_that_does_not_let_an_offload_go_is_told_of(monkeypatch, daemon, made, which, flags, told):
    monkeypatch.setattr("tests.daemon.TURNOUT", (sys.executable, "-c", _REFUSED, which))
    daemon.start_with = [*flags]
    serving(daemon, made).start()
    status = daemon.ask("status")
    (why,) = status["why"] or [""]
    assert status["state"] == ("degraded" if told else "ok")
    assert why.startswith(f"{made}: {told}" if told else "")
    assert daemon.said().count("cannot be switched off") == bool(told)
    path = daemon.settings.offloads_path  # macvlan has GRO, too
    assert not path.exists() or json.loads(path.read_text())[f"{which}_was_on"] == []


@pytest.mark.parametrize("flags", [(), ("--vlan", "100-199")], ids=["untagged", "VLANs"])
def test_N6_a_filter_of_vlans_is_off_while_vlans_are_served(monkeypatch, site, flags):
    """No device here has one: tx-gso-list, which veths switch and nothing here needs, stands in for it."""
    code = _REFUSED.replace("highdma", "tx-gso-list")
    node, daemon = site.world.node, site.daemon
    monkeypatch.setattr("tests.daemon.TURNOUT", (sys.executable, "-c", code, "vlanfilter"))
    daemon.start_with = [*flags]
    assert filters(node) == [True, True]
    daemon.start()
    assert filters(node) == [not flags] * 2
    daemon.signal(signal.SIGTERM)
    daemon.wait()
    daemon.start_with = []
    assert filters(node) == [not flags] * 2
    daemon.start()
    assert filters(node) == [True, True], "without --vlan it comes back"
    daemon.start_with = [*flags]
    daemon.signal(signal.SIGTERM)
    daemon.wait()
    daemon.start()
    daemon.signal(signal.SIGINT)
    daemon.wait()
    assert filters(node) == [True, True]


def filters(node: Host) -> list[bool]:
    with node.entered():
        return [has_feature(name, "tx-gso-list") for name in ("eth0", "eth1")]


def test_packets_whose_checksums_nobody_finishes_are_told_with_the_cure():
    """Far ends that play no wire: the endpoint drops what they send, and the client waits in vain."""
    with World(f"tu{os.getpid() % 100_000}", HOSTS, offloads=True) as world, Daemon(world, "xdp") as daemon:
        site = Site(world, daemon)
        site.serve()
        assert clients.load_http(site.client, site.web.frontend, connections=4, timeout=1).answered == 0
        cure = "`ethtool -K PEER tx off` at the far end of the veth"
        expected = f"eth0: packets come with unfinished checksums, which endpoints drop: {cure}"
        daemon.wait_for(lambda: expected in daemon.ask("status")["why"])
        for name in HOSTS:  # those that answer, too
            world[name].run(["ethtool", "-K", "eth0", "tx", "off"])
        assert clients.load_http(site.client, site.web.frontend, connections=4, timeout=5).answered == 4
