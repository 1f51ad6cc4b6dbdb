"""All cases, in the order of the report."""

from __future__ import annotations

from perf.bed import Shape
from perf.cases import EVERYBODY, PEERS, Case, Point
from perf.cases.delays import FirstPacket, HalfLoad
from perf.cases.memory import Memory
from perf.cases.rates import Connections, Rate
from perf.cases.updates import Update
from perf.traffic import Load

_ONE_ENDPOINT = Shape(endpoints=1)
_TCP = Shape(protocol="tcp")
_THOUSAND, _TEN_THOUSAND = Shape(services=1000), Shape(services=10_000)
_SLOW = frozenset({"iptables-nft"})  # five minutes for ten thousand Services
_IPV6, _TAGGED = Shape(family=6), Shape(vlan=5)
_NEW = Load(new_every=1)


def _services(shape: Shape, *, quick: bool = True, uniform: bool = True, quick_uniform: bool = True) -> list[Point]:
    """Return points of new flows: to the last of the Services and, if there are several, to all in turn."""
    left_out = _SLOW if shape.services >= 10_000 else frozenset()
    points = [Point(_NEW, shape, "to the last", quick, left_out)]
    if uniform and shape.services > 1:
        points.append(
            Point(Load(new_every=1, services=shape.services), shape, "uniform", quick and quick_uniform, left_out)
        )
    return points


# Those that can share testbeds follow each other.
CASES = (
    Case(
        "established",
        "how close is the forwarding of known flows to an XDP program that only redirects?",
        Rate(),
        EVERYBODY,
        "bare-xdp",
        [Point(Load(1), quick=False), Point(Load(1000)), Point(Load(100_000)), Point(Load(1_000_000), quick=False)],
    ),
    Case(
        "sizes",
        "known flows in frames of the internet mix, and in long ones",
        Rate(),
        EVERYBODY,
        "bare-xdp",
        [
            Point(Load(1000, is_mixed=True), variant="IMIX", quick=False),
            Point(Load(1000, frame_bytes=1514), variant="MTU", quick=False),
        ],
    ),
    Case(
        "mixed",
        "some packets begin flows: how much does that take from the others?",
        Rate(in_step=True),
        EVERYBODY,
        "bare-xdp",
        [
            Point(Load(1000), variant="0 % new"),
            Point(Load(1000, new_every=100), variant="1 % new"),
            Point(Load(1000, new_every=20), variant="5 % new", quick=False),
            Point(Load(1000, new_every=5), variant="20 % new"),
        ],
    ),
    Case(
        "latency",
        "how long is a packet of a known flow under way at half load?",
        HalfLoad(),
        EVERYBODY,
        "bare-xdp",
        [Point(Load(1000))],
    ),
    Case(
        "replies",
        "the same in the other direction",
        Rate(is_reply=True),
        EVERYBODY,
        "bare-xdp",
        [Point(Load(1000), _ONE_ENDPOINT), Point(Load(100_000), _ONE_ENDPOINT, quick=False)],
    ),
    Case(
        "ipv6",
        "known flows over IPv6",
        Rate(),
        ("bare-xdp", "turnout-xdp", "iptables-nft"),
        "bare-xdp",
        [Point(Load(1000), _IPV6), Point(Load(100_000), _IPV6, quick=False)],
    ),
    Case(
        "vlan",
        "known flows in frames with a VLAN tag",
        Rate(),
        ("bare-xdp", "turnout-xdp"),
        "bare-xdp",
        [Point(Load(1000), _TAGGED)],
    ),
    Case(
        "new-flows",
        "every packet begins a flow: how close is the decision in userspace to a loop that only forwards?",
        Rate(in_step=True),
        ("bare-afxdp", "turnout-xdp", *PEERS),
        "bare-afxdp",
        [Point(_NEW)],
    ),
    Case(
        "ipv6-new-flows",
        "the same over IPv6",
        Rate(in_step=True),
        ("bare-afxdp", "turnout-xdp", "iptables-nft"),
        "bare-afxdp",
        [Point(_NEW, _IPV6)],
    ),
    Case(
        "first-packet",
        "how long is a flow's first packet under way, on a node with nothing else to do?",
        FirstPacket(),
        ("bare-afxdp", "turnout-xdp", *PEERS),
        "bare-afxdp",
        [
            *_services(Shape(), uniform=False),
            *_services(_THOUSAND, uniform=False, quick=False),
            *_services(_TEN_THOUSAND, uniform=False, quick=False),
        ],
    ),
    Case(
        "update",
        "one endpoint of a Service changes: when does the first packet arrive at the new one?",
        Update(),
        ("turnout-xdp", *PEERS),
        "",
        [
            *_services(Shape(), uniform=False),
            *_services(_THOUSAND, uniform=False),
            *_services(_TEN_THOUSAND, uniform=False, quick=False),
        ],
    ),
    Case(
        "services",
        "every packet begins a flow: what does the number of Services do?",
        Rate(in_step=True),
        ("bare-afxdp", "turnout-xdp", *PEERS),
        "bare-afxdp",
        [
            *_services(Shape(), quick=False),
            *_services(_THOUSAND, quick_uniform=False),
            *_services(_TEN_THOUSAND, quick=False),
        ],
    ),
    Case(
        "connections",
        "TCP connections from SYN to the last ACK, six packets each: how many in a second?",
        Connections(),
        EVERYBODY,
        "bare-xdp",
        [Point(_NEW, _TCP)],
    ),
    Case(
        "afxdp",
        "all in userspace: how close is the pipeline to a loop that only forwards?",
        Rate(in_step=True),
        ("bare-afxdp", "turnout-afxdp", "turnout-raw", "iptables-nft"),
        "bare-afxdp",
        [Point(Load(1000)), Point(Load(100_000), quick=False)],
    ),
    Case(
        "memory",
        "what does a connection take, and the daemon?",
        Memory(),
        ("turnout-xdp", "iptables-nft"),
        "",
        [Point(Load(100_000))],
        rounds=1,
    ),
)
