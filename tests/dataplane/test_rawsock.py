"""Packet sockets and their rings, on veth pairs in a network namespace of the test's own:

a0 ---- a1 [sockets] b0 ---- b1
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import subprocess

import numpy as np
import pytest
from scapy.layers.inet6 import ICMPv6ND_NS, IPv6
from scapy.layers.l2 import Ether

from dataplane import packetrings
from dataplane.loop import BURST
from dataplane.netdev import NetDev
from dataplane.packetrings import FRAME, HEAD, VNET_BYTES
from dataplane.rawsock import BLOCK_BYTES, BLOCKS, PacketSocket
from dataplane.stations import words_of
from perf import echo
from perf.world import wait_until
from tests.named_packets import NAMED
from tests.packets import tagged
from xdp import schema
from xdp.errors import AttachError
from xdp.schema import Reason

pytestmark = pytest.mark.root

DEADLINE_S = 10
NO_STATIONS = words_of(())


@pytest.fixture
def network():
    with echo.own_network():
        for near, far in (("a0", "a1"), ("b0", "b1")):
            echo.veth_pair(near, far)
        yield


@pytest.fixture
def raw(network):
    with opened("a1") as sock:
        sock.listen()
        yield sock


def opened(name):
    with NetDev() as netdev:
        return PacketSocket(netdev.interface(name))


@pytest.fixture
def counters():
    return np.zeros(1, schema.COUNTERS)[0]


@contextlib.contextmanager
def wire(name):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as sock:
        sock.bind((name, 3))
        sock.settimeout(DEADLINE_S)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        yield sock


def mac(name):
    with NetDev() as netdev:
        return netdev.interface(name).mac


def frame_to(name, number=0, length=60):
    """Return an IPv4 frame to an interface that says its number."""
    return (mac(name) + b"\x02\0\0\0\0\x07\x08\0" + struct.pack("=I", number)).ljust(length, b"z")


def number_of(frame):
    return struct.unpack_from("=I", frame, 14)[0]


def received(sock, count, handle=None, stations=NO_STATIONS):
    """Return the next `count` frames, as (bytes, reason); `handle` gets where each begins, and its length."""
    burst, frames = np.zeros(BURST, FRAME), []

    def is_complete():
        for row in burst[: packetrings.receive(sock.queue, burst, BURST, stations)]:
            start, length = int(row["addr"]), int(row["len"])
            frames.append((sock.queue.frames[start : start + length].tobytes(), Reason(int(row["reason"]))))
            if handle:
                handle(start, length)
        return len(frames) >= count

    assert wait_until(is_complete, DEADLINE_S, 0.001), len(frames)
    return frames


@pytest.mark.faults(94)
def test_frames_arrive_in_order_through_every_block(raw):
    count = 3 * BLOCK_BYTES * BLOCKS // 2 // 1700  # once and a half round the ring
    with wire("a0") as far:
        frame = frame_to("a1", length=1500)
        sent = 0
        while sent < count:
            some = min(1000, count - sent)
            for number in range(sent, sent + some):
                far.send(frame[:14] + struct.pack("=I", number) + frame[18:])
            got = received(raw, some)
            assert [number_of(data) for data, _ in got] == list(range(sent, sent + some))
            assert all(reason == Reason.FORWARDED and len(data) == 1500 for data, reason in got)
            sent += some
    assert raw.lost() == 0


def test_what_is_for_another_machine_is_not_ours(raw):
    with wire("a0") as far:
        for frame in (frame_to("a1"), frame_to("b1"), b"\xff" * 6 + frame_to("a1")[6:]):
            far.send(frame)
        reasons = [reason for _, reason in received(raw, 3)]
    assert reasons == [Reason.FORWARDED, Reason.OTHER_STATION, Reason.NOT_IPV4]


@pytest.mark.faults(6)
def test_what_is_for_a_device_on_top_of_the_interface_is_ours(raw):
    macs = [mac("a1"), b"\0\0\x5e\0\1\5"]
    to_it, to_another, to_nobody = (each + frame_to("a1")[6:] for each in (macs[1], b"\0\0\x5e\0\1\6", bytes(6)))
    with wire("a0") as far:
        for frame in (to_it, to_another, to_nobody):
            far.send(frame)
        reasons = [reason for _, reason in received(raw, 3, stations=words_of(macs))]
        assert reasons == [Reason.FORWARDED, Reason.OTHER_STATION, Reason.OTHER_STATION]
        for frame in (to_it, frame_to("a1"), to_nobody):
            far.send(frame)
        reasons = [reason for _, reason in received(raw, 3)]  # where nobody tells of any
        assert reasons == [Reason.OTHER_STATION, Reason.FORWARDED, Reason.OTHER_STATION]


def question(kind):
    """Return a frame to all, or to a group, that is ours: ARP, or a question for a neighbour."""
    if kind == "arp":
        return b"\xff" * 6 + NAMED["arp"][6:]
    group = IPv6(src="2001:db8::1", dst="ff02::1:ff00:2", hlim=255)
    return bytes(Ether(dst="33:33:ff:00:00:02") / group / ICMPv6ND_NS(tgt="2001:db8::2"))


@pytest.mark.faults(5)
@pytest.mark.parametrize(
    ("kind", "vlans"),
    [
        *itertools.product(("host", "arp", "ndp"), [(5,), (0,), (4095,), (100, 7)]),
        ("host", (1, 2, 3)),
    ],
    ids=str,
)
def test_N6_the_tag_that_the_kernel_takes_out_is_put_back(raw, kind, vlans):
    frame = tagged(frame_to("a1") if kind == "host" else question(kind), *vlans)
    others = tagged(b"\xff" * 6 + frame_to("a1")[6:], *vlans)
    with wire("a0") as far:
        far.send(frame)
        far.send(others)
        vnets = []
        got = received(raw, 2, lambda start, _: vnets.append(raw.queue.frames[start - VNET_BYTES : start].tobytes()))
    assert got[0] == (frame, Reason.FORWARDED)
    assert got[1][1] == Reason.NOT_IPV4
    assert vnets[0] == struct.pack("=BBHHHH", 0, 0, 4, 0, 0, 0)  # nothing to be finished


@pytest.mark.parametrize("vlans", [(), (5,), (100, 7)], ids=str)
def test_N6_a_checksum_that_a_device_is_to_finish_is_found_behind_tags(raw, counters, vlans):
    more = 4 * len(vlans)
    frame = tagged(mac("a1") + NAMED["data-odd"][6:], *vlans)
    vnet = struct.pack("=BBHHHH", packetrings.VNET_NEEDS_CSUM, 0, 54 + more, 0, 34 + more, 16)
    memory, vnets = np.frombuffer(bytearray(vnet + frame), np.uint8), []
    with opened("a0") as far:
        way = socket.if_nametoindex("a0")
        packetrings.send(far.queue, memory, VNET_BYTES, len(frame), way, int(Reason.FORWARDED), counters)
        packetrings.flush(far.queue, counters)
        got = received(raw, 1, lambda start, _: vnets.append(raw.queue.frames[start - VNET_BYTES : start].tobytes()))
    assert got == [(frame, Reason.FORWARDED)]
    needs_csum, _, _, _, start, offset = struct.unpack("=BBHHHH", vnets[0])
    assert (needs_csum, start, offset) == (packetrings.VNET_NEEDS_CSUM, 34 + more, 16)


def test_what_this_machine_sends_is_not_received(raw):
    with wire("a1") as near, wire("a0") as far:
        near.send(frame_to("a0", 1))
        far.send(frame_to("a1", 2))
        assert [number_of(data) for data, _ in received(raw, 1)] == [2]


@pytest.mark.faults(94)
def test_what_finds_no_room_is_counted_and_what_is_unread_too(raw):
    frame, count = frame_to("a1", length=1500), 2 * BLOCK_BYTES * BLOCKS // 1500
    with wire("a0") as far:
        for _ in range(count):
            far.send(frame)
    assert wait_until(lambda: raw.lost() + raw.unread() == count, DEADLINE_S)
    assert raw.lost() > count // 4
    taken = received(raw, 100)
    assert raw.lost() + raw.unread() == count - len(taken)


def test_frames_leave_by_the_interface_they_are_for_in_order(raw, counters):
    ways = {name: socket.if_nametoindex(name) for name in ("a1", "b0")}
    memory = np.zeros(4096, np.uint8)
    frame = frame_to("b1", length=1000)
    memory[VNET_BYTES : VNET_BYTES + len(frame)] = list(frame)
    slots = len(raw.queue.reasons)
    count = 3 * slots  # three times round the ring
    with wire("a0") as a0, wire("b1") as b1:
        for number in range(count):
            memory[VNET_BYTES + 14 : VNET_BYTES + 18] = list(struct.pack("=I", number))
            way = ways["a1" if number % 5 == 0 else "b0"]
            packetrings.send(raw.queue, memory, VNET_BYTES, len(frame), way, int(Reason.FORWARDED), counters)
            if number % 64 == 63:
                packetrings.flush(raw.queue, counters)
        packetrings.flush(raw.queue, counters)
        assert counters["packets"][Reason.FORWARDED] == count
        for sock, wanted in ((a0, range(0, count, 5)), (b1, [n for n in range(count) if n % 5])):
            assert [number_of(sock.recv(2000)) for _ in wanted] == list(wanted)


def test_what_cannot_be_sent_is_dropped_and_does_not_go_elsewhere(raw, counters):
    memory = np.zeros(4096, np.uint8)
    down, up = socket.if_nametoindex("b0"), socket.if_nametoindex("a1")
    subprocess.run(["ip", "link", "set", "b0", "down"], check=True)

    def send(number, way):
        memory[VNET_BYTES : VNET_BYTES + 60] = list(frame_to("a0", number))
        packetrings.send(raw.queue, memory, VNET_BYTES, 60, way, int(Reason.FORWARDED), counters)

    with wire("a0") as a0:
        for number in range(10):
            send(number, down)
        for number in range(10, 20):
            send(number, up)
        packetrings.flush(raw.queue, counters)
        assert [number_of(a0.recv(2000)) for _ in range(10)] == list(range(10, 20))
    assert (counters["packets"][Reason.FORWARDED], counters["packets"][Reason.TX_FULL]) == (10, 10)
    assert raw.queue.at[HEAD] == 10


@pytest.mark.parametrize("vlans", [(), (5,), (100, 7)], ids=str)
def test_a_frame_larger_than_a_slot_is_cut_by_the_device(raw, counters, vlans):
    segment, payload = 1000, b"x" * 10_000
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40 + len(payload), 1, 0, 64, 6, 0, bytes(4), bytes(4))
    tcp = struct.pack("!HHIIBBHHH", 1, 2, 0, 0, 0x50, 0x10, 100, 0, 0)
    more, flag = 4 * len(vlans), packetrings.VNET_NEEDS_CSUM
    frame = tagged(mac("b1") + bytes(6) + b"\x08\0" + ip + tcp + payload, *vlans)
    vnet = struct.pack("=BBHHHH", flag, packetrings.GSO_TCPV4, 54 + more, segment, 34 + more, 16)
    memory = np.frombuffer(bytearray(vnet + frame), np.uint8)
    subprocess.run(["ethtool", "-K", "b0", "tx", "off"], check=True, capture_output=True)
    with opened("b1") as far:
        far.listen()
        way = socket.if_nametoindex("b0")
        packetrings.send(raw.queue, memory, VNET_BYTES, len(frame), way, int(Reason.FORWARDED), counters)
        assert counters["packets"][Reason.FORWARDED] == 1
        pieces = [piece for piece, _ in received(far, 10)]
    assert {piece[: 14 + more] for piece in pieces} == {frame[: 14 + more]}
    assert {len(piece) for piece in pieces} == {54 + more + segment}
    assert b"".join(piece[54 + more :] for piece in pieces) == payload
    assert {piece[16 + more : 18 + more] for piece in pieces} == {struct.pack("!H", 40 + segment)}


def test_an_interface_that_was_down_receives_again(raw):
    polls = np.zeros(1, [("fd", "i4"), ("events", "i2"), ("revents", "i2")])
    polls["fd"], polls["events"] = raw.fd, 1
    for state in ("down", "up"):
        subprocess.run(["ip", "link", "set", "a1", state], check=True)
        packetrings.wait(raw.queue, polls, 0)  # takes note that it is down: else every poll returned at once
    packetrings.wait(raw.queue, polls, 0)
    assert polls["revents"][0] == 0
    with wire("a0") as far:
        far.send(frame_to("a1", 5))
        assert [number_of(data) for data, _ in received(raw, 1)] == [5]


def test_many_sockets_share_an_interface_by_flow(network):
    with opened("a1") as one, opened("a1") as two, wire("a0") as far:
        assert two.listen(True, one.listen(True)) is not None
        begin, source = mac("a1") + bytes(6) + b"\x08\0", bytes.fromhex("0a000001")
        for port in range(100):
            udp = struct.pack("!HHHH", port, 53, 8, 0)
            ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 1, 0, 64, 17, 0, source, bytes.fromhex("0a000002"))
            for _ in range(2):
                far.send((begin + ip + udp).ljust(60, b"\0"))
        assert wait_until(lambda: one.unread() + two.unread() == 200, DEADLINE_S)
        ports = [
            {struct.unpack_from("!H", data, 34)[0] for data, _ in received(sock, sock.unread())} for sock in (one, two)
        ]
    assert ports[0] | ports[1] == set(range(100))
    assert not ports[0] & ports[1]
    assert min(map(len, ports)) > 10


def test_a_closed_socket_is_gone(network):
    sock = opened("a1")
    sock.listen()
    sock.close()
    with wire("a0") as far:
        far.send(frame_to("a1"))
    assert sock.unread() == 0
    with open("/proc/net/packet") as lines:  # noqa: PTH123
        assert len(lines.readlines()) == 1


def test_an_interface_that_has_gone_is_told(network):
    sock = opened("a1")
    subprocess.run(["ip", "link", "delete", "a1"], check=True)
    with sock, pytest.raises(AttachError, match="a1: the interface has gone"):
        sock.listen()
