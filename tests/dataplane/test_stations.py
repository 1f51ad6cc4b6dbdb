"""By which MAC addresses frames are ours: of interfaces as they are told of, and as the kernel has them."""

from __future__ import annotations

import os
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from dataplane.netdev import Interface, NetDev
from dataplane.stations import Stations, stations_of, words_of
from perf import echo
from xdp.schema import Limit

ROOM = int(Limit.STATIONS)


def mac(number: int) -> bytes:
    return bytes((2, 0, 0, 0, 1, number))


def link(number: int, *, up: bool = True, kind: str = "", on: int = 0, port_of: int = 0) -> Interface:
    """Return an interface that has its number's MAC address."""
    return Interface(f"eth{number}", number, mac(number), 1500, up, kind=kind, lower_ifindex=on, master_ifindex=port_of)


@pytest.mark.parametrize(
    ("others", "found"),
    [
        pytest.param([], [1], id="nothing"),
        pytest.param([link(2, kind="macvlan", on=1)], [1, 2], id="macvlan"),
        pytest.param([link(2, kind="macvlan", on=1, up=False)], [1], id="macvlan-of-a-standby-router"),
        pytest.param([link(3, kind="macvlan", on=2), link(2, kind="vlan", on=1)], [1, 2, 3], id="macvlan-on-a-vlan"),
        pytest.param([link(3, kind="macvlan", on=2), link(2, kind="vlan", on=1, up=False)], [1], id="vlan-down"),
        pytest.param([replace(link(2, kind="gre", on=1), mac=b"")], [1], id="tunnel"),
        pytest.param([link(2), link(3, kind="macvlan", on=2)], [1], id="elsewhere"),
        pytest.param([link(9, kind="bridge"), link(2, port_of=9)], [1, 9], id="bridge"),
        pytest.param([link(9, kind="bond", port_of=8), link(8, kind="bridge")], [1, 9, 8], id="bridge-over-a-bond"),
        pytest.param([link(9, kind="bond"), link(7, kind="vlan", on=9)], [1, 9, 7], id="vlan-on-a-bond"),
    ],
)
def test_devices_on_top_of_ours_are_ours(others: list[Interface], found: list[int]):
    ours = link(1, port_of=9)
    assert stations_of([ours], [*others, ours]) == tuple(map(mac, found))


def test_what_several_have_is_told_once_and_ours_come_first():
    ours = [link(4), Interface("eth5", 5, mac(4), 1500, is_up=False), link(1)]
    assert stations_of(ours, [link(2, kind="macvlan", on=1), *ours]) == (mac(4), mac(1), mac(2))


def test_one_of_ours_without_an_address_is_told():
    ours = [replace(link(4), mac=b""), link(1)]
    assert stations_of(ours, ours) == (b"", mac(1))


def test_words_lie_as_in_a_frame_and_fill_the_room():
    one, two = b"\2\0\0\0\1\5", b"\xfe\1\2\3\4\5"
    frame = one + two + b"\x08\0"
    words = words_of([one, two])
    assert int(words[0]) == int.from_bytes(frame[:6], "little")
    assert words.tobytes() == (one + bytes(2)) + (two + bytes(2)) + (one + bytes(2)) * (ROOM - 2)


@pytest.mark.parametrize("count", [0, ROOM + 1])
def test_none_and_too_many_are_not_compared(count: int):
    assert not any(words_of(map(mac, range(1, count + 1))))


def test_what_cannot_be_compared_is_told_once(caplog: pytest.LogCaptureFixture):
    written, told = [], []
    stations = Stations(lambda words: written.append(list(words)), told.append)
    few, many = tuple(map(mac, range(1, ROOM + 1))), tuple(map(mac, range(1, ROOM + 2)))
    for addresses in (few, few, many, many, (mac(1), b""), few):
        stations.follow(addresses)
    none = [0] * ROOM
    assert written == [list(words_of(few)), none, none, list(words_of(few))]
    assert told == [frozenset(few), frozenset(), frozenset(), frozenset(few)]
    assert len(caplog.messages) == 2
    assert f"{ROOM + 1} of them, and room for {ROOM}" in caplog.messages[0]
    assert "an interface has none" in caplog.messages[1]


def test_what_could_not_be_told_is_told_the_next_time():
    told = []

    def tell(addresses: frozenset[bytes]) -> None:
        told.append(addresses)
        if len(told) == 1:
            raise OSError("no netlink")

    stations = Stations(lambda _: None, tell)
    with pytest.raises(OSError, match="no netlink"):
        stations.follow((mac(1),))
    stations.follow((mac(1),))
    stations.follow((mac(1),))
    assert told == [frozenset({mac(1)})] * 2


@pytest.mark.root
def test_the_kernel_tells_what_is_on_top_of_what():
    def of(name: str) -> bytes:
        return next(link.mac for link in netdev.interfaces() if link.name == name)

    with echo.own_network(), NetDev() as netdev:
        for near, far in (("a0", "a1"), ("b0", "b1")):
            echo.veth_pair(near, far)
        for line in (
            "link add bridge0 address 02:00:5e:00:00:09 type bridge",
            "link set bridge0 up",
            "link set a0 master bridge0",
            "link add virtual0 link b0 address 02:00:5e:00:00:05 type macvlan mode private",
            "link set virtual0 up",
            "link add standby0 link b0 address 02:00:5e:00:00:06 type macvlan mode private",
            "link add upper0 link bridge0 address 02:00:5e:00:00:07 type macvlan mode private",
            "link set upper0 up",
        ):
            subprocess.run(["ip", *line.split()], check=True)
        links = netdev.interfaces()
        ours = [link for link in links if link.name in ("a0", "b0")]
        found = stations_of(ours, links)
        assert set(found) == {of(name) for name in ("a0", "b0", "bridge0", "virtual0", "upper0")}


@pytest.mark.root
def test_what_is_on_top_of_another_networks_interface_is_on_top_of_none_of_ours_whatever_its_number():
    here = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net")
    with echo.own_network(), NetDev() as netdev, here.open() as network:
        echo.veth_pair("a0", "a1")
        with echo.own_network():  # of a host whose container we are in: its numbers are the same
            echo.veth_pair("a0", "a1")
            for line in (
                "link add virtual0 link a0 type macvlan",
                f"link set virtual0 up netns /proc/{os.getpid()}/fd/{network.fileno()}",
            ):
                subprocess.run(["ip", *line.split()], check=True)
            links = netdev.interfaces()
            assert "virtual0" in [link.name for link in links]
            (ours,) = (link for link in links if link.name == "a0")
            assert stations_of([ours], [replace(link, is_up=True) for link in links]) == (ours.mac,)
