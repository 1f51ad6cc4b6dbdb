"""Announcements as frames, and when they are due."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from scapy.layers.l2 import ARP, Ether

from dataplane.announce import Announcer, announcement

MAC = b"\2\0\0\0\0\2"
VIP = int(IPv4Address("10.96.0.1"))


def test_an_announcement_claims_the_vip_for_our_address():
    mac, vip = "02:00:00:00:00:02", "10.96.0.1"
    claim = ARP(op=1, hwsrc=mac, psrc=vip, hwdst="00:00:00:00:00:00", pdst=vip)
    assert announcement(MAC, VIP) == bytes(Ether(dst="ff:ff:ff:ff:ff:ff", src=mac) / claim)


@pytest.mark.parametrize("turns", [1, 3])
def test_without_interfaces_nothing_is_sent(turns):
    announcer = Announcer()
    announcer.announce([VIP], {}, 0.0)
    for turn in range(turns):
        announcer.turn(float(turn))
    assert (announcer.sent, announcer.conflicts(0.0)) == (0, [])
