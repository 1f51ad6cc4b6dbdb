"""ICMP errors about connections that a node does not know go to the endpoint that every node would choose, if any."""

from __future__ import annotations

import struct

import pytest

from conntrack.table import FlowTable
from dataplane.context import AWAITED, NOWHERE
from tests import packets
from tests.packets import (
    CLIENT,
    CLIENT6,
    DNS_VIP,
    DNS_VIP6,
    ENDPOINT,
    OTHER_CLIENT,
    OTHER_CLIENT6,
    OTHER_VIP,
    STRANGER,
    VIP,
    VIP6,
    Address,
)
from tests.reference import Key, Outcome, adjusted
from tests.small_node import (
    CLOSED_VIP,
    DEAD_VIP,
    DEAD_VIP6,
    ELSEWHERE_VIP,
    EXTERNAL_VIP,
    HAIRPIN,
    HERE_VIP,
    HERE_VIP6,
    HOPS,
    LOADS_VIP,
    LOST_VIP,
    MARTIANS,
    MARTIANS6,
    NAMELESS_VIP,
    NARROWED_VIP,
    OUTER_VIP,
    OUTER_VIP6,
    PASSED_VIP6,
    PASSING_VIP,
    PASSING_VIP6,
    POD_DNS_VIP,
    POD_DNS_VIP6,
    POD_VIP,
    RANDOM_VIP,
    RESET_VIP6,
    RESETTING_VIP,
    SERVICES,
    SMALL,
    STICKY_TOO_VIP,
    STICKY_VIP,
    STICKY_VIP6,
    TURNS_VIP,
    Pipeline,
    flows_of,
    service_ports,
    service_table,
)
from xdp.addresses import IPV6
from xdp.clock import ManualClock
from xdp.schema import Protocol, Reason, State
from xdp.tables import Tables

pytestmark = pytest.mark.faults(75)
MTUS = (0, 67, 68, 1280, 1499, 1500, 9000, 0xFFFF)


class NodeOfSeveral:
    """One of the nodes that share the VIPs."""

    def __init__(self) -> None:
        self.tables = Tables.in_memory(SMALL)
        self.clock = ManualClock()
        self.flows = FlowTable(self.tables, self.clock)
        self.flows.create()
        self._pipeline = Pipeline(self.tables)
        service_table(self.tables).apply(service_ports())

    def send(self, frame: bytes) -> Outcome:
        return self._pipeline.send(frame, self.clock.now())

    def begin(self, client: Address, vip: Address) -> Address:
        """Begin a connection; return its endpoint."""
        assert self.send(first_of(client, vip)).reason in (Reason.ADMITTED, Reason.TO_KERNEL)
        return flows_of(self.tables)[Key(client, vip, protocol_of(vip))].after.destination

    def remembers(self) -> list[bytes]:
        """Return all that it could remember a packet by."""
        tables = self.tables
        return [
            array.tobytes() for array in (tables.tags, tables.flows, tables.affinity, tables.names, tables.services)
        ]


def is_udp(vip: Address) -> bool:
    return vip in (DNS_VIP, DNS_VIP6, POD_DNS_VIP, POD_DNS_VIP6)


def protocol_of(vip: Address) -> int:
    family = Protocol.IPV6 if vip[0] & IPV6 else 0
    return (Protocol.UDP if is_udp(vip) else Protocol.TCP) | family


def first_of(client: Address, vip: Address) -> bytes:
    return packets.udp(client, vip) if is_udp(vip) else packets.syn(client, vip)


def answer_of(source: Address, client: Address, vip: Address, **fields: int) -> bytes:
    return packets.udp(source, client, **fields) if is_udp(vip) else packets.data(source, client, **fields)


def error_about(client: Address, vip: Address, kind: str = "too-big", **fields: int) -> bytes:
    """Return what a router says of an answer on its way to the client."""
    return packets.icmp_error(answer_of(vip, client, vip, ttl=63), kind, **fields)


@pytest.fixture
def there() -> NodeOfSeveral:
    """The node that a connection was made through."""
    return NodeOfSeveral()


@pytest.fixture
def here() -> NodeOfSeveral:
    """The node that hears of it."""
    return NodeOfSeveral()


GUESSED = [
    pytest.param(CLIENT, VIP, id="TCP"),
    pytest.param(CLIENT, OTHER_VIP, id="another-vip"),
    pytest.param(CLIENT, DNS_VIP, id="UDP"),
    pytest.param(OTHER_CLIENT, CLOSED_VIP, id="in-source-ranges"),
    pytest.param(OTHER_CLIENT, OUTER_VIP, id="not-masqueraded"),
    pytest.param(OTHER_CLIENT, NARROWED_VIP, id="short-cut"),
    pytest.param(CLIENT, STICKY_VIP, id="affinity"),
    pytest.param(CLIENT, HERE_VIP, id="admitted-by-XDP"),
    pytest.param(CLIENT, POD_DNS_VIP, id="kernel-routes"),
    pytest.param(CLIENT6, VIP6, id="IPv6-TCP"),
    pytest.param(CLIENT6, PASSING_VIP6, id="IPv6-another-vip"),
    pytest.param(CLIENT6, DNS_VIP6, id="IPv6-UDP"),
    pytest.param(OTHER_CLIENT6, OUTER_VIP6, id="IPv6-not-masqueraded"),
    pytest.param(CLIENT6, STICKY_VIP6, id="IPv6-affinity"),
    pytest.param(CLIENT6, HERE_VIP6, id="IPv6-admitted-by-XDP"),
    pytest.param(CLIENT6, POD_DNS_VIP6, id="IPv6-kernel-routes"),
]
NOT_GUESSED = [
    pytest.param(CLIENT, DEAD_VIP, id="no-endpoint"),
    pytest.param(CLIENT, ELSEWHERE_VIP, id="no-local-endpoint"),
    pytest.param(CLIENT, CLOSED_VIP, id="refused"),
    pytest.param(CLIENT, OUTER_VIP, id="masqueraded"),
    pytest.param(CLIENT, EXTERNAL_VIP, id="masqueraded-towards-another-node"),
    pytest.param(CLIENT, NAMELESS_VIP, id="masqueraded-without-an-address"),
    pytest.param(HAIRPIN, STICKY_TOO_VIP, id="masqueraded-towards-itself"),
    pytest.param(CLIENT, NARROWED_VIP, id="outside"),
    pytest.param(CLIENT, RANDOM_VIP, id="random"),
    pytest.param(CLIENT, TURNS_VIP, id="round-robin"),
    pytest.param(CLIENT, LOADS_VIP, id="least-connections"),
    pytest.param(CLIENT, PASSING_VIP, id="passed"),
    pytest.param(CLIENT, RESETTING_VIP, id="reset"),
    pytest.param(CLIENT, (VIP[0], 81), id="no-frontend"),
    pytest.param(CLIENT, STRANGER, id="no-vip"),
    *(pytest.param(client, VIP, id=f"martian-{n}") for n, client in enumerate(MARTIANS)),
    pytest.param(CLIENT6, DEAD_VIP6, id="IPv6-no-endpoint"),
    pytest.param(CLIENT6, OUTER_VIP6, id="IPv6-masqueraded"),
    pytest.param(CLIENT6, PASSED_VIP6, id="IPv6-passed"),
    pytest.param(CLIENT6, RESET_VIP6, id="IPv6-reset"),
    pytest.param(CLIENT6, (VIP6[0], 81), id="IPv6-no-frontend"),
    *(pytest.param(client, VIP6, id=f"IPv6-martian-{n}") for n, client in enumerate(MARTIANS6)),
]


@pytest.mark.parametrize(("client", "vip"), GUESSED)
def test_n1_n2_an_error_reaches_the_endpoint_by_any_node_that_would_adopt_its_connection(here, there, client, vip):
    for port in range(40_000, 40_016):
        client = (client[0], port)
        endpoint = there.begin(client, vip)
        kinds = packets.ICMPV6_ERRORS if vip[0] & IPV6 else packets.ICMP_ERRORS
        for kind in kinds:
            before = here.remembers()
            told = here.send(error_about(client, vip, kind))
            assert here.remembers() == before, "nothing of it, and no name"
            is_local = told.reason is Reason.TO_KERNEL
            expected = packets.icmp_error(answer_of(endpoint, client, vip, ttl=63), kind, ttl=60 if is_local else 59)
            assert told.frame[12:] == expected[12:]
            assert told == there.send(error_about(client, vip, kind)), "as of a connection that is known"


@pytest.mark.parametrize(("client", "vip"), NOT_GUESSED)
def test_f075_an_error_about_what_no_node_would_adopt_or_nobody_can_guess_is_dropped(here, client, vip):
    error, before = error_about(client, vip), here.remembers()
    assert here.send(error) == (Reason.ICMP_UNUSABLE, error, NOWHERE)
    assert here.remembers() == before


@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["IPv4", "IPv6"])
def test_f075_an_error_that_is_not_to_whom_it_says_has_sent_the_packet_is_dropped(here, vip):
    client = CLIENT6 if vip == VIP6 else CLIENT
    error = bytearray(error_about(client, vip))
    last = 53 if vip == VIP6 else 33
    error[last] ^= 1  # of the outer destination
    assert here.send(bytes(error)).reason is Reason.ICMP_UNUSABLE


@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("mtu", MTUS)
def test_f075_any_mtu_is_passed_on_as_it_is(here, there, vip, mtu):
    client = CLIENT6 if vip == VIP6 else CLIENT
    endpoint = there.begin(client, vip)
    about = packets.icmp_error(answer_of(endpoint, client, vip, ttl=63), "too-big", ttl=59)
    told = here.send(with_mtu(error_about(client, vip), mtu))
    assert (told.reason, told.frame[12:]) == (Reason.FORWARDED, with_mtu(about, mtu)[12:])


def with_mtu(error: bytes, mtu: int) -> bytes:
    """Return an error about too long a packet that says how long it may be."""
    icmp, at, new = (
        (54, 58, struct.pack("!I", mtu)) if error[12:14] == b"\x86\xdd" else (34, 40, struct.pack("!H", mtu))
    )
    old = error[at : at + len(new)]
    check = adjusted(int.from_bytes(error[icmp + 2 : icmp + 4]), old, new).to_bytes(2)
    return error[: icmp + 2] + check + error[icmp + 4 : at] + new + error[at + len(new) :]


def test_f075_an_endpoint_that_is_remembered_of_a_client_is_told_and_not_remembered_anew(here):
    clients = [(host, 40_000) for host in (CLIENT[0], OTHER_CLIENT[0])]
    unlike = [client for client in clients if NodeOfSeveral().begin(client, STICKY_VIP) != ENDPOINT]
    assert unlike, "Maglev gives it another endpoint than the one that is remembered"
    for client in unlike:
        assert here.begin(client, STICKY_TOO_VIP) == ENDPOINT
        here.clock.advance(5)
        before = here.remembers()
        told = here.send(error_about((client[0], 40_002), STICKY_VIP))
        assert told.frame[:12] == HOPS[ENDPOINT[0]].macs
        assert here.remembers() == before


def test_f075_an_expired_connection_is_as_good_as_none_and_one_to_be_reset_is_not(here):
    endpoint = here.begin(CLIENT, VIP)
    error = error_about(CLIENT, VIP)
    here.clock.advance(8001)
    assert here.send(error).frame[:12] == HOPS[endpoint[0]].macs
    assert here.flows.reset_others(Protocol.TCP, [VIP], []) == 1
    assert flows_of(here.tables)[Key(CLIENT, VIP, Protocol.TCP)].state is State.RESET
    assert here.send(error) == (Reason.ICMP_UNUSABLE, error, NOWHERE)


@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["IPv4", "IPv6"])
def test_f075_at_the_end_of_its_life_an_error_is_the_kernel_s(here, vip):
    error = error_about(CLIENT6 if vip == VIP6 else CLIENT, vip, ttl=1)
    assert here.send(error) == (Reason.TTL_EXPIRED, error, NOWHERE)


def test_f075_a_pod_behind_the_kernel_that_is_masqueraded_towards_is_not_guessed_for_itself(here):
    client = (next(iter(SERVICES[*POD_VIP, Protocol.TCP].endpoints))[0], 40_000)
    error = error_about(client, POD_VIP)
    assert here.send(error) == (Reason.ICMP_UNUSABLE, error, NOWHERE)


def test_f075_an_error_waits_for_the_neighbour_that_it_goes_to(here):
    error = error_about(CLIENT, LOST_VIP)
    assert here.send(error) == (Reason.NO_NEXT_HOP, error, AWAITED)
