"""schema.h, seen from Python: numpy dtypes and IntEnums. Nothing is defined here."""

from __future__ import annotations

from collections.abc import Callable
from enum import EnumType, IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from xdp.declared import declared

HEADER = Path(__file__).parent / "bpf" / "schema.h"

# The kernel's names for fixed-width types, for a parser that reads no other header.
_KERNEL_TYPES = """
typedef uint8_t __u8; typedef uint16_t __u16; typedef uint32_t __u32; typedef uint64_t __u64;
typedef uint16_t __be16; typedef uint32_t __be32;
"""

_ffi = declared(_KERNEL_TYPES + HEADER.read_text().replace("#pragma once", ""))


def _dtype(ctype: Any) -> np.dtype:
    """Return the numpy dtype that has the very layout the C compiler chose."""
    if ctype.kind == "primitive":
        return np.dtype(f"u{_ffi.sizeof(ctype)}")
    if ctype.kind == "array":
        return np.dtype((_dtype(ctype.item), (ctype.length,)))
    fields = dict(ctype.fields)
    return np.dtype(
        {
            "names": list(fields),
            "formats": [_dtype(field.type) for field in fields.values()],
            "offsets": [field.offset for field in fields.values()],
            "itemsize": _ffi.sizeof(ctype),
        }
    )


def _struct(name: str) -> np.dtype:
    return _dtype(_ffi.typeof(f"struct {name}"))


def _enum(name: str, prefix: str = "") -> dict[str, int]:
    members = _ffi.typeof(f"enum {name}").relements
    return {key.removeprefix(prefix): value for key, value in sorted(members.items(), key=lambda item: item[1])}


if TYPE_CHECKING:
    _E = TypeVar("_E")

    class _AnyMember(EnumType):
        """A type checker does not read schema.h: to it, every name is a member."""

        def __getattr__(cls: type[_E], name: str) -> _E: ...

    class _FromHeader(IntEnum, metaclass=_AnyMember):
        pass
else:
    _FromHeader = IntEnum


def _members(name: str, prefix: str = "") -> Callable[[type[IntEnum]], type[IntEnum]]:
    """Return a decorator that fills an empty class with the members of `enum name`, without their prefix."""

    def fill(kind: type[IntEnum]) -> type[IntEnum]:
        filled: type[IntEnum] = IntEnum(kind.__name__, _enum(name, prefix), module=kind.__module__)  # type: ignore[misc]
        filled.__doc__ = kind.__doc__
        return filled

    return fill


BUCKET = _struct("bucket")
FLOW = _struct("flow")
FRONTEND = _struct("frontend")
SERVICE = _struct("service")
MAGLEV_LINE = _struct("maglev_line")
ENDPOINT = _struct("endpoint")
AFFINITY = _struct("affinity")
RANGE = _struct("range")
RANGE6 = _struct("range6")
NAME = _struct("name")
NEXT_HOP = _struct("next_hop")
HOST = _struct("host")
DATAGRAM = _struct("datagram")
PREFIX = _struct("prefix")
CONTROL = _struct("control")
WORKER = _struct("worker")
MACHINE = _struct("machine")
PASSAGE = _struct("passage")
LED = _struct("led")
VIP = _struct("vip")
COUNTERS = _struct("counters")
LAYOUT = _struct("layout")


@_members("limits")
class Limit(_FromHeader):
    """What is part of the layout; capacities are map sizes."""


@_members("tag", "TAG_")
class Tag(_FromHeader):
    """Values of a tag that are not a piece of a hash."""


@_members("verdict", "VERDICT_")
class Verdict(_FromHeader):
    """What becomes of a packet."""


@_members("reason", "REASON_")
class Reason(_FromHeader):
    """What became of a packet and why; also its index into the counters."""


@_members("direction")
class Direction(_FromHeader):
    """Which way a packet of a connection goes."""


@_members("protocol", "PROTOCOL_")
class Protocol(_FromHeader):
    """IP protocol numbers."""


@_members("extension", "EXTENSION_")
class Extension(_FromHeader):
    """IPv6 extension headers that are walked over, by the number in the header before."""


@_members("ping", "PING_")
class Ping(_FromHeader):
    """What becomes of an echo request to a VIP."""


@_members("state", "STATE_")
class State(_FromHeader):
    """State of a connection."""


@_members("event", "EVENT_")
class Event(_FromHeader):
    """What a packet tells the state machine."""


@_members("name_state", "NAME_")
class NameState(_FromHeader):
    """Whether a name may be found, used and reused."""


@_members("when_stalled", "WHEN_STALLED_")
class WhenStalled(_FromHeader):
    """What a Service wants for new connections while userspace does not answer."""


@_members("needs", "NEEDS_")
class Needs(_FromHeader):
    """What a Service port asks of admission beyond Maglev; added up."""


@_members("masquerade", "MASQUERADE_")
class Masquerade(_FromHeader):
    """Whose source address becomes the node's on the way to an endpoint."""


@_members("mid_stream", "MID_STREAM_")
class MidStream(_FromHeader):
    """What becomes of a TCP segment without a flow that begins none."""


@_members("scheduler", "SCHEDULER_")
class Scheduler(_FromHeader):
    """How an endpoint is chosen for a new connection."""


@_members("hop_state", "HOP_")
class HopState(_FromHeader):
    """What is known about a next hop."""


@_members("row_use", "ROW_")
class RowUse(_FromHeader):
    """Whose a row of next_hops is."""


@_members("stage", "STAGE_")
class Stage(_FromHeader):
    """The programs that a packet may be handed on to."""


@_members("route_target", "TARGET_")
class RouteTarget(_FromHeader):
    """What a route leads to, unless to a row of next_hops."""


_BLOCK = 32  # reasons come in blocks of so many, by verdict
FIRST_PASS, FIRST_DROP, FIRST_PUNT = (_BLOCK * verdict for verdict in (Verdict.PASS, Verdict.DROP, Verdict.PUNT))


def verdict_of(reason: int) -> Verdict:
    """Return what a packet that ended for `reason` met."""
    return Verdict(reason // _BLOCK)


def describe() -> dict[str, object]:
    """Return the layout (fields with offsets and formats, enum values) as plain data, to be stored beside the maps."""
    structs = {
        name.lower(): {field: [str(kind), offset] for field, (kind, offset, *_) in (value.fields or {}).items()}
        | {"size": value.itemsize}
        for name, value in globals().items()
        if isinstance(value, np.dtype)
    }
    enums = {kind.__name__: {member.name: member.value for member in kind} for kind in (Reason, State, Event, Tag)}
    return {"structs": structs, "enums": enums}
