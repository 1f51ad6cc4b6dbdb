"""Announcements as frames, and when they are due."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from dataplane.announce import Announcer, announcement, group_of
from dataplane.netdev import NetDev
from perf import echo
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


@pytest.mark.root
@pytest.mark.parametrize("room", [0, 1], ids=["for-none", "for-the-link"])
def test_what_could_not_be_opened_is_tried_again(room):
    """Whoever has no file left once is a member of the groups of its VIPs, and announces them, a moment later."""
    vip = number_of(IPv6Address("fd96::1:2345"))

    def is_member() -> bool:
        lines = Path("/proc/thread-self/net/igmp6").read_text().splitlines()
        return any(line.split()[1:3] == ["a0", group_of(vip).hex()] for line in lines)

    with echo.own_network(), NetDev() as netdev:
        echo.veth_pair("a0", "a1")
        interfaces = {link.name: link for link in netdev.interfaces() if link.name == "a0"}
        announcer = Announcer()
        least = os.dup(0)
        os.close(least)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (least + room, limits[1]))
        try:
            announcer.announce([vip], interfaces, 0.0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        announcer.announce([vip], interfaces, 1.0)
        assert is_member()
        announcer.turn(1.0)
        assert announcer.sent == 1
        announcer.announce([], interfaces, 2.0)
        assert not is_member()
        announcer.withdraw()


@pytest.mark.root
def test_an_interface_that_goes_down_and_comes_back_is_announced_on_again():
    with echo.own_network(), NetDev() as netdev:
        echo.veth_pair("a0", "a1")
        (up,) = (link for link in netdev.interfaces() if link.name == "a0")
        announcer = Announcer()
        announcer.announce([VIP], {"a0": up}, 0.0)
        announcer.turn(0.0)
        announcer.announce([VIP], {"a0": replace(up, is_up=False)}, 1.0)
        announcer.turn(2.0)
        assert announcer.sent == 1
        announcer.announce([VIP], {"a0": up}, 3.0)
        announcer.turn(3.0)
        assert announcer.sent == 2
        announcer.turn(5.0)
        assert announcer.sent == 3
        announcer.withdraw()
