"""VLAN tags: C, compiled code and plain Python see the same ones, and what has them is what it would be without."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from conntrack import compiled as flows
from dataplane import vlans
from dataplane.context import Node, new_node
from dataplane.settings import joined_vlans
from tests.named_packets import NAMED
from tests.native import Native, at_the_edge
from tests.packets import CLIENT, ENDPOINT, VIP, rewritten, syn, tagged
from tests.reference import vlan_tags
from tests.small_node import SMALL, write_hops
from xdp import schema
from xdp.jit import compiled
from xdp.schema import Reason
from xdp.tables import Tables

SERVED = ((5, 5), (63, 64), (4094, 4094))
NUMBERS = {0, 5, 63, 64, 4094}


@pytest.fixture(scope="module")
def native() -> Native:
    return Native()


@pytest.fixture(scope="module")
def node() -> Node:
    tables = Tables.in_memory(SMALL)
    made = new_node(tables, write_hops(tables))
    tables.control[0]["vlans"] = vlans.words_of(SERVED)
    return made


@compiled
def taken_off(node, frames, start, length):
    return vlans.take_off(node, frames, start, length)


@compiled
def put_back(node, frames, start):
    vlans.put_back(node, frames, start)


def heads() -> list[bytes]:
    """Return how frames may begin: with tags of all kinds of VLANs, and cut wherever they may be."""
    random, made = Random(6), list(NAMED.values())
    for _ in range(2000):
        count = random.randrange(4)
        numbers = [random.choice((0, 5, 6, 62, 63, 64, 65, 4094, 4095)) for _ in range(count)]
        kinds = [random.choice((0x8100, 0x88A8, 0x8100, 0x88A8, 0x9100)) for _ in range(count)]
        made.append(tagged(syn(), *numbers, kinds=kinds)[: random.choice((60, random.randrange(12, 30)))])
    return made


def test_N6_c_compiled_code_and_the_model_see_the_same_tags(native: Native):
    served, seen = vlans.words_of(SERVED), set()
    for head in heads():
        frame = at_the_edge(len(head))
        frame[:] = np.frombuffer(head, np.uint8)
        reason, count = vlans.parse(frame, 0, len(head), served)
        assert native.parse_vlan_tags(frame, len(head), served) == (reason, count)
        if reason == Reason.NOT_IPV4:  # has none
            reason = Reason.FORWARDED
        assert vlan_tags(head, NUMBERS) == (reason, count), head.hex()
        seen.add((Reason(int(reason)), int(count)))
    assert seen == {(Reason.FORWARDED, n) for n in (0, 4, 8)} | {(Reason.TOO_SHORT, 0), (Reason.OTHER_VLAN, 0)}


@pytest.mark.parametrize("name", [name for name in NAMED if len(NAMED[name]) >= 14 and not name.startswith("vlan")])
def test_N6_what_is_taken_off_is_an_untagged_frame_and_comes_back(name: str, node: Node):
    frame = NAMED[name]
    for numbers in ((), (0,), (5,), (0, 5), (5, 7)):
        given = tagged(frame, *numbers)
        memory = at_the_edge(len(given))
        memory[:] = np.frombuffer(given, np.uint8)
        assert taken_off(node, memory, 0, len(given)) == Reason.FORWARDED
        assert memory[4 * len(numbers) :].tobytes() == frame
        node.packet[0]["length"] = len(frame)
        put_back(node, memory, 0)
        assert memory.tobytes() == given
        assert node.packet[0]["length"] == len(given)


@pytest.mark.parametrize("numbers", [(6,), (4095,), (5, 4095), (0, 6), (5, 5, 5)], ids=str)
def test_N6_what_is_passed_stays_as_it_is(numbers: tuple[int, ...], node: Node):
    given = tagged(syn(), *numbers)
    memory = np.frombuffer(given, np.uint8).copy()
    assert taken_off(node, memory, 0, len(given)) == Reason.OTHER_VLAN
    assert (memory.tobytes(), node.packet[0]["length"], node.packet[0]["vlan_bytes"]) == (given, len(given), 0)


@pytest.mark.parametrize("numbers", [(), (5,), (5, 7)], ids=str)
def test_N6_c_writes_mac_addresses_before_the_tags(numbers: tuple[int, ...], native: Native):
    tables, macs = Tables.in_memory(SMALL), bytes(range(12))
    hop = np.zeros(1, schema.NEXT_HOP)
    hop[0]["dst_mac"], hop[0]["src_mac"] = list(macs[:6]), list(macs[6:])
    ends = (CLIENT, VIP), (CLIENT, ENDPOINT)
    (addrs, ports), (new_addrs, new_ports) = (
        (
            int.from_bytes(b"".join(host.to_bytes(4, "big") for host, _ in pair), "little"),
            int.from_bytes(b"".join(port.to_bytes(2, "big") for _, port in pair), "little"),
        )
        for pair in ends
    )
    slot = flows.insert(
        tables, np.uint64(addrs), np.uint32(ports), np.uint64(new_addrs), np.uint32(new_ports),
        np.uint8(6), np.uint8(schema.State.ESTABLISHED), np.uint32(1), np.uint32(1), np.uint32(0),
    )  # fmt: skip
    frame = bytearray(tagged(syn(), *numbers))
    assert native.rewrite(frame, 34, tables.flows[slot].tobytes(), hop.tobytes(), 4 * len(numbers)) == 0
    assert bytes(frame) == tagged(rewritten(syn(), CLIENT, ENDPOINT, macs), *numbers)
    short = bytearray(frame[: 4 * len(numbers) + 40])
    assert native.rewrite(short, 34, tables.flows[slot].tobytes(), hop.tobytes(), 4 * len(numbers)) == -1


@pytest.mark.parametrize(
    ("ranges", "joined"),
    [
        ((), [(0, 0)]),
        (((5, 5), (7, 9)), [(0, 0), (5, 5), (7, 9)]),
        (((7, 9), (1, 5), (6, 6), (8, 20)), [(0, 20)]),
        (((10, 20), (12, 13)), [(0, 0), (10, 20)]),
        (((0, 4094),), [(0, 4094)]),
    ],
)
def test_N6_which_vlans_are_served(ranges: tuple[tuple[int, int], ...], joined: list[tuple[int, int]]):
    assert joined_vlans(ranges) == joined
    words = vlans.words_of(ranges)
    served = {number for number in range(4096) if int(words[number // 64]) >> number % 64 & 1}
    assert served == {number for first, last in joined for number in range(first, last + 1)}
