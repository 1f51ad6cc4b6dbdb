"""Announcements as frames, and when they are due."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from dataplane.announce import Announcer, announcement, group_of
from xdp.addresses import number_of

MAC = b"\2\0\0\0\0\2"
VIP = int(IPv4Address("10.96.0.1"))


def test_an_announcement_claims_the_vip_for_our_address():
    mac, vip = "02:00:00:00:00:02", "10.96.0.1"
    claim = ARP(op=1, hwsrc=mac, psrc=vip, hwdst="00:00:00:00:00:00", pdst=vip)
    assert announcement(MAC, VIP) == bytes(Ether(dst="ff:ff:ff:ff:ff:ff", src=mac) / claim)


def test_an_announcement_by_ipv6_is_an_advertisement_to_all_nodes():
    mac, vip = "02:00:00:00:00:02", "fd96::1:2345"
    claim = ICMPv6ND_NA(R=0, S=0, O=1, tgt=vip) / ICMPv6NDOptDstLLAddr(lladdr=mac)
    header = Ether(dst="33:33:00:00:00:01", src=mac) / IPv6(src=vip, dst="ff02::1", hlim=255)
    number = number_of(IPv6Address(vip))
    assert announcement(MAC, number) == bytes(header / claim)
    assert group_of(number) == IPv6Address("ff02::1:ff01:2345").packed


@pytest.mark.parametrize("turns", [1, 3])
def test_without_interfaces_nothing_is_sent(turns):
    announcer = Announcer()
    announcer.announce([VIP], {}, 0.0)
    for turn in range(turns):
        announcer.turn(float(turn))
    assert (announcer.sent, announcer.conflicts(0.0)) == (0, [])
