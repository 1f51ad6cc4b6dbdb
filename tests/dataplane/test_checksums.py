"""Packets whose checksums nobody finishes are noticed by those that begin connections."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether

from dataplane.checksums import Begun, Checksums, begun
from tests.memory_node import MemoryNode
from tests.packets import syn, udp
from tests.services import Service

DROPPED = "packets come with unfinished checksums, which endpoints drop: `ethtool -K PEER tx off` at the far end"


def bare(frame: bytes) -> bytes:
    """Return a frame as a local kernel leaves it to a device: with the checksum of the pseudo header alone."""
    packet = Ether(frame)
    transport = packet[TCP] if TCP in packet else packet[UDP]
    ip, length = packet.payload, len(bytes(transport))
    ends = bytes(ip)[12:20] if isinstance(ip, IP) else bytes(ip)[8:40]
    pseudo = ends + bytes([0, 6 if TCP in packet else 17]) + length.to_bytes(2, "big")
    total = sum(int.from_bytes(pseudo[at : at + 2], "big") for at in range(0, len(pseudo), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    transport.chksum = total
    return bytes(packet)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("make", [syn, udp])
def test_connections_that_begin_with_unfinished_checksums_are_counted(tmp_path, family, make):
    node = MemoryNode(tmp_path, family=family)
    protocol = "UDP" if make is udp else "TCP"
    service = node.of_family(Service("web", "10.96.0.1:80", protocol=protocol)).with_endpoints(node.endpoint("web-1"))
    node.apply(service)

    def counted() -> Begun:
        return begun(node._path.link)

    node.send(make(node.client(), service.at))
    assert counted() == Begun(1, 0)
    client = node.client()
    node.send(bare(make(client, service.at)))
    node.send(bare(make(client, service.at)))
    assert counted() == Begun(2, 1), "one that is known is not looked at"


def test_a_few_that_look_so_by_chance_are_not_told_and_a_good_part_is():
    checksums = Checksums()
    for packets, unfinished, is_told in (
        (1, 1, False),
        (2, 2, True),
        (100, 3, False),
        (200, 10, False),
        (216, 12, True),
    ):
        told = list(checksums.news({"eth0": Begun(packets, unfinished), "eth1": Begun(0, 0)}))
        assert [name for name, _ in told] == (["eth0"] if is_told else [])
        assert all(text.startswith(DROPPED) for _, text in told)


def test_workers_that_begin_anew_count_anew():
    checksums = Checksums()
    assert not list(checksums.news({"eth0": Begun(1000, 3)}))
    assert not list(checksums.news({"eth0": Begun(0, 0)}))
    assert list(checksums.news({"eth0": Begun(2, 2)}))
