"""What is sent through both nodes, case by case: frames with the hosts that send them, a connection each.

Every Service here has one endpoint, so that the frames are known beforehand and both nodes' can be compared whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from scapy.layers.inet import fragment
from scapy.layers.l2 import Ether

from tests import packets
from tests.differential.services import (
    ELSEWHERE,
    NAMED,
    NOBODY,
    NOBODY_NAMED,
    NODE_PORT,
    NOT_HERE,
    NOT_HERE_INSIDE,
    RANGED,
    WEB,
)
from tests.node import ScenarioNode
from tests.packets import Address, data, icmp_error, syn, syn_ack, tcp_packet, tcp_with, udp

Step = tuple[bytes, str]  # (frame, host)
Case = Callable[["Places"], Iterator[Step]]

CASES: dict[str, Case] = {}


class Places:
    """Whom a case is about: a client on a port that no other case has, and endpoints."""

    def __init__(self, node: ScenarioNode, number: int) -> None:
        port = 30_100 + number
        self.client = node.at("client", port)
        self.other = node.at("other", port)
        self.web = node.at("web-1", 8080)
        self.dns = node.at("web-1", 5353)
        self.pod = node.at("web-1", port)  # the endpoint as a client
        self.own_client = node.own("client", NODE_PORT)
        self.own_web = node.own("web-1", port)  # whom an endpoint sees where its client is masqueraded
        self._next = [1000, 5000]  # sequence numbers of client and endpoint

    def say(self, flags: str, payload: bytes = b"", **fields: Any) -> Step:
        """Return the client's next segment."""
        return self._segment(0, self.client, WEB, flags, payload, fields), "client"

    def answer(self, flags: str, payload: bytes = b"", **fields: Any) -> Step:
        """Return the endpoint's next segment."""
        return self._segment(1, self.web, self.client, flags, payload, fields), "web-1"

    def _segment(
        self, who: int, source: Address, destination: Address, flags: str, payload: bytes, fields: dict[str, Any]
    ) -> bytes:
        return segment(source, destination, flags, self._next, payload, who, fields)


def segment(
    source: Address,
    destination: Address,
    flags: str,
    numbers: list[int],
    payload: bytes = b"",
    who: int = 0,
    fields: dict[str, Any] | None = None,
) -> bytes:
    """Return the next segment of side `who` of a connection, and count it in `numbers`: what is next of each side."""
    has_df = (fields := dict(fields or {})).pop("df", False)
    packet = tcp_packet(source, destination, flags, payload, **fields)
    if has_df:
        packet["IP"].flags = "DF"
    packet["TCP"].seq, packet["TCP"].ack = numbers[who], numbers[1 - who] if "A" in flags else 0
    numbers[who] += len(payload) + ("S" in flags) + ("F" in flags)
    return bytes(packet)


def case(function: Case) -> Case:
    """Note a case under its name, as docs/behaviours.md has it."""
    CASES[function.__name__.removeprefix("_").replace("_", " ")] = function
    return function


def opened(places: Places, **fields: Any) -> Iterator[Step]:
    yield places.say("S", **fields)
    yield places.answer("SA", **fields)
    yield places.say("A", **fields)


def _masqueraded(places: Places, client: Address, host: str, dialled: Address) -> Iterator[Step]:
    numbers = [1000, 5000]
    yield segment(client, dialled, "S", numbers), host
    yield segment(places.web, places.own_web, "SA", numbers, who=1), "web-1"
    yield segment(client, dialled, "PA", numbers, b"GET / "), host


def closed(places: Places) -> Iterator[Step]:
    yield from opened(places)
    yield places.say("FA")
    yield places.answer("FA")
    yield places.say("A")


@case
def _connection(places: Places) -> Iterator[Step]:
    yield from opened(places)
    yield places.say("PA", b"GET / ")
    yield places.answer("PA", bytes(1400))
    yield places.say("A")
    yield places.say("FA")
    yield places.answer("A")
    yield places.answer("FA")
    yield places.say("A")


@case
def _reset_by_client(places: Places) -> Iterator[Step]:
    yield from opened(places)
    yield places.say("R")


@case
def _reset_by_endpoint(places: Places) -> Iterator[Step]:
    yield syn(places.client, WEB), "client"
    yield places.answer("RA")


@case
def _data_after_a_reset(places: Places) -> Iterator[Step]:
    yield from opened(places)
    yield places.say("R")
    yield places.say("PA", b"GET / ")


@case
def _data_out_of_window(places: Places) -> Iterator[Step]:
    yield from opened(places)
    far = tcp_packet(places.client, WEB, "PA", b"far")
    far["TCP"].seq = 1 << 31
    yield bytes(far), "client"


@case
def _SYN_on_TIME_WAIT(places: Places) -> Iterator[Step]:
    yield from closed(places)
    again = tcp_packet(places.client, WEB, "S")
    again["TCP"].seq = 9000
    yield bytes(again), "client"


@case
def _SYN_on_an_established_connection(places: Places) -> Iterator[Step]:
    yield from opened(places)
    yield syn(places.client, WEB), "client"


@case
def _retransmitted_SYN(places: Places) -> Iterator[Step]:
    yield syn(places.client, WEB), "client"
    yield syn(places.client, WEB), "client"


@case
def _IPv4_options(places: Places) -> Iterator[Step]:
    yield from opened(places, options=packets.options(12))


@case
def _ToS_ECN_and_id(places: Places) -> Iterator[Step]:
    yield from opened(places, tos=0x2E << 2 | 3, id=0xBEEF)


@case
def _DF(places: Places) -> Iterator[Step]:
    yield from opened(places, df=True, id=0)


@case
def _SYN_padded(places: Places) -> Iterator[Step]:
    yield syn(places.client, WEB) + bytes(6), "client"


def _without_flow(name: str, flags: str) -> None:
    def only(places: Places) -> Iterator[Step]:
        yield tcp_with(flags, places.client, WEB), "client"

    CASES[f"{name} without a flow"] = only


for _name, _flags in {
    "ACK": "A",
    "data": "PA",
    "FIN": "FA",
    "RST": "R",
    "SYN-ACK": "SA",
    "null": "",
    "Xmas": "FPU",
    "SYN-FIN": "SF",
    "SYN-RST": "SR",
    "lone FIN": "F",
}.items():
    _without_flow(_name, _flags)


@case
def _invalid_flags_on_a_connection(places: Places) -> Iterator[Step]:
    yield from opened(places)
    yield places.say("SF")


@case
def _data_of_an_endpoint_without_a_flow(places: Places) -> Iterator[Step]:
    yield data(places.web, places.client), "web-1"


@case
def _SYN_ACK_of_an_endpoint_without_a_flow(places: Places) -> Iterator[Step]:
    yield syn_ack(places.web, places.client), "web-1"


@case
def _UDP(places: Places) -> Iterator[Step]:
    yield udp(places.client, NAMED), "client"
    yield udp(places.dns, places.client, b"answer"), "web-1"
    yield udp(places.client, NAMED, b""), "client"


@case
def _UDP_without_checksum(places: Places) -> Iterator[Step]:
    yield packets.udp_unsummed(places.client, NAMED), "client"
    yield packets.udp_unsummed(places.dns, places.client), "web-1"


def _edge(check: int) -> None:
    def only(places: Places) -> Iterator[Step]:
        yield packets.udp_with_checksum(check, places.client, NAMED), "client"
        yield packets.udp_with_checksum(check, places.dns, places.client), "web-1"

    CASES[f"UDP checksum {check:04x}"] = only


for _check in (0x0001, 0xFFFE, 0xFFFF):
    _edge(_check)


@case
def _UDP_wrong_checksum(places: Places) -> Iterator[Step]:
    yield packets.with_wrong_checksum(udp(places.client, NAMED)), "client"


@case
def _TCP_wrong_checksum(places: Places) -> Iterator[Step]:
    yield packets.with_wrong_checksum(syn(places.client, WEB)), "client"


@case
def _TCP_wrong_checksum_on_a_connection(places: Places) -> Iterator[Step]:
    yield from opened(places)
    yield packets.with_wrong_checksum(places.say("PA", b"GET / ")[0]), "client"


@case
def _IPv4_wrong_checksum(places: Places) -> Iterator[Step]:
    frame = bytearray(syn(places.client, WEB))
    frame[24] ^= 0x55
    yield bytes(frame), "client"


@case
def _TTL_1(places: Places) -> Iterator[Step]:
    yield syn(places.client, WEB, ttl=1), "client"


@case
def _TTL_1_on_a_connection(places: Places) -> Iterator[Step]:
    yield from opened(places)
    yield places.say("PA", b"GET / ", ttl=1)


@case
def _TTL_1_of_a_reply(places: Places) -> Iterator[Step]:
    yield from opened(places)
    yield places.answer("PA", b"200", ttl=1)


@case
def _TTL_2(places: Places) -> Iterator[Step]:
    yield from opened(places, ttl=2)


@case
def _source_route(places: Places) -> Iterator[Step]:
    hop = bytes([131, 7, 4, 10, 1, 0, 1, 0])  # LSRR to 10.1.0.1
    yield syn(places.client, WEB, options=[hop]), "client"


def _errors(kind: str, quoted: int | None) -> None:
    def to_client(places: Places) -> Iterator[Step]:
        """An endpoint's side complains about what the client sent."""
        yield syn(places.client, WEB), "client"
        yield icmp_error(syn(places.client, places.web, ttl=63), kind, places.web, quoted), "web-1"

    def to_endpoint(places: Places) -> Iterator[Step]:
        """A client's side complains about what the endpoint sent."""
        yield from opened(places)
        about = places.answer("PA", b"200 ", ttl=63)[0]
        yield icmp_error(packets.rewritten(about, WEB, places.client, bytes(12)), kind, places.client, quoted), "client"

    of = f"{kind} error" + (f" quoting {quoted - 20} bytes" if quoted else "")
    CASES[f"{of} to the client"] = to_client
    CASES[f"{of} to the endpoint"] = to_endpoint


for _kind in packets.ICMP_ERRORS:
    _errors(_kind, None)
for _quoted in (28, 27):
    _errors("too-big", _quoted)


@case
def _error_of_a_router_to_the_client(places: Places) -> Iterator[Step]:
    yield syn(places.client, WEB), "client"
    yield icmp_error(syn(places.client, places.web, ttl=63), "time-exceeded"), "web-1"


@case
def _UDP_error_to_the_client(places: Places) -> Iterator[Step]:
    yield udp(places.client, NAMED), "client"
    yield icmp_error(udp(places.client, places.dns, ttl=63), source=places.dns), "web-1"


@case
def _error_about_no_flow(places: Places) -> Iterator[Step]:
    yield icmp_error(data(WEB, places.client), "port-unreachable", places.client), "client"


@case
def _no_endpoints(places: Places) -> Iterator[Step]:
    yield syn(places.client, NOBODY), "client"


@case
def _no_endpoints_UDP(places: Places) -> Iterator[Step]:
    yield udp(places.client, NOBODY_NAMED), "client"


@case
def _no_local_endpoint_external_policy(places: Places) -> Iterator[Step]:
    yield syn(places.other, NOT_HERE), "other"


@case
def _no_local_endpoint_internal_policy(places: Places) -> Iterator[Step]:
    yield syn(places.client, NOT_HERE_INSIDE), "client"


@case
def _source_range_refused(places: Places) -> Iterator[Step]:
    yield syn(places.client, RANGED), "client"


@case
def _source_range_admitted(places: Places) -> Iterator[Step]:
    yield from _masqueraded(places, places.other, "other", RANGED)


@case
def _port_not_served(places: Places) -> Iterator[Step]:
    yield syn(places.client, (WEB[0], 81)), "client"


@case
def _protocol_not_served(places: Places) -> Iterator[Step]:
    yield udp(places.client, WEB), "client"


@case
def _echo_request(places: Places) -> Iterator[Step]:
    frame = bytearray(packets.echo_request(WEB))
    frame[26:30] = places.client[0].to_bytes(4)
    frame[24:26] = b"\0\0"
    packet = Ether(bytes(frame))
    del packet["IP"].chksum
    yield bytes(packet), "client"


@case
def _node_port(places: Places) -> Iterator[Step]:
    yield from _masqueraded(places, places.client, "client", places.own_client)


@case
def _hairpin(places: Places) -> Iterator[Step]:
    yield from _masqueraded(places, places.pod, "web-1", WEB)


@case
def _client_outside_the_cluster(places: Places) -> Iterator[Step]:
    yield from _masqueraded(places, places.other, "other", WEB)


@case
def _client_with_a_privileged_port(places: Places) -> Iterator[Step]:
    client, own, numbers = (places.other[0], 700), (places.own_web[0], 700), [1000, 5000]
    yield segment(client, WEB, "S", numbers), "other"
    yield segment(places.web, own, "SA", numbers, who=1), "web-1"


@case
def _error_about_a_masqueraded_packet(places: Places) -> Iterator[Step]:
    yield syn(places.other, WEB), "other"
    yield icmp_error(syn(places.own_web, places.web, ttl=63), "too-big", places.web), "web-1"


@case
def _fragments(places: Places) -> Iterator[Step]:
    whole = packets.udp_packet(places.client, NAMED, bytes(range(256)))
    for piece in (bytes(piece) for piece in fragment(whole, 128)):
        yield piece, "client"


@case
def _not_for_a_Service(places: Places) -> Iterator[Step]:
    yield udp(places.client, places.other), "client"
    yield syn(places.client, places.web), "client"


@case
def _to_nobody(places: Places) -> Iterator[Step]:
    yield syn(places.client, ELSEWHERE), "client"


@case
def _source_is_the_VIP(places: Places) -> Iterator[Step]:
    yield syn(WEB, WEB), "client"


@case
def _source_is_loopback(places: Places) -> Iterator[Step]:
    yield syn((0x7F000001, places.client[1]), WEB), "client"


@case
def _source_is_multicast(places: Places) -> Iterator[Step]:
    yield syn((0xE0000001, places.client[1]), WEB), "client"


@case
def _source_is_broadcast(places: Places) -> Iterator[Step]:
    yield syn((0xFFFFFFFF, places.client[1]), WEB), "client"


@case
def _source_is_zero(places: Places) -> Iterator[Step]:
    yield syn((9, places.client[1]), WEB), "client"


@case
def _source_port_0(places: Places) -> Iterator[Step]:
    yield syn((places.client[0], 0), WEB), "client"


@case
def _TCP_data_offset_too_small(places: Places) -> Iterator[Step]:
    packet = tcp_packet(places.client, WEB, "S")
    packet["TCP"].dataofs = 4
    yield bytes(packet), "client"


@case
def _UDP_length_beyond_the_packet(places: Places) -> Iterator[Step]:
    packet = packets.udp_packet(places.client, NAMED)
    packet["UDP"].len = 400
    yield bytes(packet), "client"
