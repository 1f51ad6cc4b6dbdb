"""What a node left on purpose is removed, from the kernel's memory too."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from dataplane import namespace, reserved
from dataplane.detach import detach
from dataplane.netdev import NeighbourKey, NetDev
from dataplane.settings import PortRange, Settings
from perf import echo
from perf.world import World, wait_until
from tests.programs import returning
from xdp import links, loader, mounts, sysctl
from xdp.errors import Error

pytestmark = [pytest.mark.root, pytest.mark.bpf]

PASS = 2


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(f"td{os.getpid() % 100_000}", ["client", "web"]) as world:
        yield world


@pytest.fixture
def settings(world: World) -> Iterator[Settings]:
    """The settings of a node that has ended, and left its links on eth0 and eth1."""
    settings = Settings(f"test-detach-{os.getpid()}", (), ("eth0", "eth1"), run_folder=Path("/run/turnout"))
    mounts.mount_bpffs(settings.bpffs)
    program = returning(PASS)
    with world.node.entered():
        for name in settings.interfaces:
            loader.attach(program, name, "native", settings.link_pin(name))
        namespace.note(settings)
    os.close(program)
    yield settings
    with world.node.entered():
        detach(settings)
    settings.lock_path.unlink(missing_ok=True)


def keep(world: World, interface: str, address: str) -> NeighbourKey:
    """Have the kernel keep a neighbour, as a node does."""
    with world.node.entered(), NetDev() as netdev:
        key = socket.if_nametoindex(interface), int(IPv4Address(address))
        assert netdev.resolve([key], keep=True) == {}
    return key


def kept(world: World) -> set[NeighbourKey]:
    with world.node.entered(), NetDev() as netdev:
        return {neighbour.key for neighbour in netdev.neighbours() if neighbour.is_managed}


def test_neighbours_are_kept_no_longer_on_the_interfaces_that_are_left(world: World, settings: Settings):
    client, web = keep(world, "eth0", "10.77.1.2"), keep(world, "eth1", "10.77.2.2")
    assert kept(world) == {client, web}
    with world.node.entered():
        detach(settings, ["eth0"])
    assert kept(world) == {web}
    with world.node.entered():
        detach(settings)
    assert kept(world) == set()


def test_an_interface_of_the_same_name_elsewhere_keeps_its_neighbours(world: World, settings: Settings):
    key = keep(world, "eth0", "10.77.1.2")
    with world.node.entered():
        other = returning(PASS)
        loader.detach(settings.link_pin("eth0"))
        link = links.create_xdp(other, socket.if_nametoindex("eth0"), "native")
    with world["client"].entered():
        loader.attach(other, "eth0", "native", settings.link_pin("eth0"))
    with world.node.entered():  # another node serves eth0 here
        detach(settings, ["eth0"])
        assert links.xdp_state(socket.if_nametoindex("eth0")) is not None
    assert kept(world) == {key}
    for descriptor in (link, other):
        os.close(descriptor)


def test_another_network_namespace_is_refused_and_told_where_to_go(world: World, settings: Settings):
    name = "net/ipv4/ip_local_reserved_ports"
    with world.node.entered():
        reserved.reserve(PortRange(61000, 61009), settings.reserved_path)
    cure = f"`nsenter --net=/run/netns/{world.node.namespace} turnout detach --name {settings.name}`"
    with world["client"].entered(), pytest.raises(Error, match=re.escape(cure)):
        detach(settings)
    assert settings.link_pins()
    with world.node.entered():
        assert sysctl.read(name) == "61000-61009"


def test_what_was_left_in_a_namespace_that_has_gone_is_removed_and_nothing_here_is_changed(
    world: World, settings: Settings
):
    name = "net/ipv4/ip_local_reserved_ports"
    with world.node.entered():
        detach(settings)
    with echo.own_network():
        echo.veth_pair("eth0", "eth1")
        program = returning(PASS)
        loader.attach(program, "eth0", "native", settings.link_pin("eth0"))
        os.close(program)
        reserved.reserve(PortRange(61000, 61009), settings.reserved_path)
        namespace.note(settings)
    with world.node.entered():
        sysctl.write(name, "61000-61009")
        wait_until(lambda: loader.link_at(settings.link_pin("eth0")).ifindex == 0, 5)  # the kernel takes its time
        detach(settings)
        assert sysctl.read(name) == "61000-61009"
        sysctl.write(name, "")
    assert not settings.link_pins()
    assert not settings.namespace_path.exists()
    assert not settings.reserved_path.exists()


def test_C12_ports_that_were_reserved_are_given_back_with_the_last_link(world: World, settings: Settings):
    name = "net/ipv4/ip_local_reserved_ports"
    with world.node.entered():
        reserved.reserve(PortRange(61000, 61009), settings.reserved_path)
        detach(settings, ["eth0"])
        assert sysctl.read(name) == "61000-61009"
        detach(settings)
        assert sysctl.read(name) == ""
    assert not settings.reserved_path.exists()
