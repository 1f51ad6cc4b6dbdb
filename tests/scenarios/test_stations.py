"""Frames that are to other machines, and interfaces that get other MAC addresses.

A veth takes every frame, as an interface does that listens to all of them; a bridge and a hub bring such.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import packets
from tests.daemon_node import DaemonNode
from tests.packets import OTHER_MAC, VIRTUAL_MAC, ack, data, echo_request, syn, udp
from tests.services import Service, text_of
from tests.whole_node import whole_node
from xdp.schema import Limit, Reason

pytestmark = [pytest.mark.root, pytest.mark.bpf]

FOLLOWED_S = 2.0  # a second, and what the commands take
ONE_MORE = int(Limit.STATIONS)  # than there is room for, with those that the interfaces have


@pytest.fixture
def web(node):
    service = node.of_family(Service("web", "10.96.0.1:80")).with_endpoints(node.endpoint("web-1"))
    node.apply(service)
    return service


def addressed(frame: bytes, mac: bytes) -> bytes:
    return mac + frame[6:]


def ignored(node, frame: bytes, host: str = "client") -> None:
    """Send a frame to another machine: the kernel gets it as it is, and nobody else anything."""
    there = addressed(frame, OTHER_MAC)
    sent = node.send(there, host)
    assert (sent.left, sent.reason) == ([], Reason.OTHER_STATION)
    assert sent.passed == [node.on_the_wire(there, host)]


@pytest.mark.faults(6)
def test_what_is_to_another_machine_is_neither_forwarded_nor_answered(node, web):
    client, (vip, port) = node.client(), web.at
    for frame in (
        syn(client, (vip, port)),
        ack(client, (vip, port)),
        syn(client, (vip, 81)),
        udp(client, (vip, 82)),
        echo_request((vip, 0), client),
        packets.tagged(syn(client, (vip, port)), 0),
    ):
        ignored(node, frame)
    assert node.flows(client=text_of(client)) == []


@pytest.mark.faults(6)
def test_a_known_connection_goes_on_by_the_node_s_address_alone(node, web):
    client, endpoint = node.client(), node.at("web-1", 8080)
    assert node.send(syn(client, web.at)).only[0] == "web-1"
    before = node.flow(client)
    ignored(node, data(client, web.at))
    ignored(node, data(endpoint, client), "web-1")
    ignored(node, packets.icmp_error(data(web.at, client), "too-big", client))
    assert node.flow(client)["packets"] == before["packets"]
    assert node.send(data(client, web.at)).only[0] == "web-1"
    assert node.send(data(endpoint, client), "web-1").only[0] == "client"


def _is_arp(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\x06"


class Changing:
    """A node whose interfaces change."""

    def __init__(self, node: DaemonNode) -> None:
        self.node = node
        self.world = node.daemon.world
        self.service = node.of_family(Service("web", "10.96.0.1:80")).with_endpoints(node.endpoint("web-1"))
        node.apply(self.service)
        self.end = node.network_of("client").node_interface

    def ip(self, line: str) -> None:
        self.world.node.run(["ip", *line.split()])

    def call(self, mac: bytes) -> None:
        """Give the client's interface another MAC address, with which the kernel forgets who is there."""
        client = self.node.end_of("client")
        self.ip(f"link set {self.end.name} address {mac.hex(':')}")
        for address in (client.address.ip, client.address6.ip)[: 1 if self.node.family == 4 else 2]:
            self.ip(f"neighbour replace {address} lladdr {client.mac} dev {self.end.name} nud permanent")

    def wait_for(self, *macs: bytes) -> None:
        """Return when these, and no others of their kind, are the node's, for its filter, too."""
        wanted = {int.from_bytes(mac, "little") for mac in macs}

        def is_followed() -> bool:
            words = {int(word) for word in self.node._shared.tables.control[0]["stations"]}
            ours = {word for word in words if word & 0xFFFFFF == 0x5E0002}
            return 0 not in words and ours == wanted and self._is_filtered(macs)

        self.node.daemon.wait_for(is_followed, FOLLOWED_S)

    def _is_filtered(self, macs: tuple[bytes, ...]) -> bool:
        if self.node.engine != "raw":
            return True
        listed = self.world.node.run(["nft", "list", "ruleset"]).stdout
        return all((mac.hex(":") in listed) == (mac in macs) for mac in (OTHER_MAC, VIRTUAL_MAC))

    def begins_by(self, mac: bytes) -> Reason:
        """Send what begins a connection to a MAC address; return what became of it."""
        frame = addressed(syn(self.node.client(), self.service.at), mac)
        self.node._collect()  # its kernel tells of a new address, and asks who else is there
        sent = self.node.send(frame)
        hosts = [host for host, left in sent.left if not _is_arp(left)]
        if hosts:
            assert (hosts, sent.passed) == (["web-1"], [])
        else:
            assert sent.passed == [self.node.on_the_wire(frame, "client")]
        return sent.reason


@pytest.fixture(params=["xdp", "xdp-6", "xdp-generic", "afxdp", "raw", "raw-6"])
def changing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Changing]:
    engine, is_ipv6 = request.param.removesuffix("-6"), request.param.endswith("-6")
    with whole_node(engine, tmp_path, f"tm{os.getpid() % 100_000}", family=6 if is_ipv6 else 4) as made:
        assert isinstance(made, DaemonNode)
        yield Changing(made)
        made.check_accounts()


@pytest.mark.faults(6, 93)
def test_a_change_of_an_interface_s_mac_address_is_followed_within_a_second(changing):
    own = bytes.fromhex(changing.end.mac.replace(":", ""))
    assert changing.begins_by(OTHER_MAC) == Reason.OTHER_STATION
    changing.call(OTHER_MAC)
    changing.wait_for(OTHER_MAC)
    assert changing.begins_by(OTHER_MAC) in (Reason.FORWARDED, Reason.ADMITTED)
    assert changing.begins_by(own) == Reason.OTHER_STATION
    changing.call(own)
    changing.wait_for()
    assert changing.begins_by(own) in (Reason.FORWARDED, Reason.ADMITTED)


@contextlib.contextmanager
def virtual(changing: Changing, name: str, mac: bytes) -> Iterator[None]:
    """A device on top of the client's interface, as a virtual router has one."""
    changing.ip(f"link add {name} link {changing.end.name} address {mac.hex(':')} type macvlan mode private")
    changing.ip(f"link set {name} up")
    yield
    changing.ip(f"link delete {name}")


@pytest.mark.faults(6)
def test_a_device_on_top_of_an_interface_is_served_while_it_is_up(changing):
    assert changing.begins_by(VIRTUAL_MAC) == Reason.OTHER_STATION
    with virtual(changing, "virtual0", VIRTUAL_MAC):
        changing.wait_for(VIRTUAL_MAC)
        assert changing.begins_by(VIRTUAL_MAC) in (Reason.FORWARDED, Reason.ADMITTED)
        assert changing.begins_by(OTHER_MAC) == Reason.OTHER_STATION
        changing.ip("link set virtual0 down")
        changing.wait_for()
        assert changing.begins_by(VIRTUAL_MAC) == Reason.OTHER_STATION


@pytest.mark.faults(6)
@pytest.mark.parametrize("changing", ["xdp"], indirect=True)
def test_more_addresses_than_there_is_room_for_are_not_compared_which_is_told(changing):
    with contextlib.ExitStack() as stack:
        for number in range(ONE_MORE):
            stack.enter_context(virtual(changing, f"virtual{number}", VIRTUAL_MAC[:5] + bytes((0x10 + number,))))
        changing.node.daemon.wait_for(lambda: "room for 8" in changing.node.daemon.said(), FOLLOWED_S)
        assert changing.begins_by(OTHER_MAC) in (Reason.FORWARDED, Reason.ADMITTED)
    changing.wait_for()
    assert changing.begins_by(OTHER_MAC) == Reason.OTHER_STATION
