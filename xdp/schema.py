"""schema.h, seen from Python: numpy dtypes and IntEnums. Nothing is defined here."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path

import cffi
import numpy as np

HEADER = Path(__file__).parent / "bpf" / "schema.h"

# The kernel's names for fixed-width types, for a parser that reads no other header.
_KERNEL_TYPES = """
typedef uint8_t __u8; typedef uint16_t __u16; typedef uint32_t __u32; typedef uint64_t __u64;
typedef uint16_t __be16; typedef uint32_t __be32;
"""

_ffi = cffi.FFI()
_ffi.cdef(_KERNEL_TYPES + HEADER.read_text().replace("#pragma once", ""))


def _dtype(ctype: cffi.FFI.CType) -> np.dtype:
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


BUCKET = _struct("bucket")
FLOW = _struct("flow")
FRONTEND = _struct("frontend")
SERVICE = _struct("service")
MAGLEV_LINE = _struct("maglev_line")
ENDPOINT = _struct("endpoint")
NEXT_HOP = _struct("next_hop")
CONTROL = _struct("control")
WORKER = _struct("worker")
MACHINE = _struct("machine")
COUNTERS = _struct("counters")
LAYOUT = _struct("layout")

Limit = IntEnum("Limit", _enum("limits"))  # type: ignore[misc]
Tag = IntEnum("Tag", _enum("tag", "TAG_"))  # type: ignore[misc]
Verdict = IntEnum("Verdict", _enum("verdict", "VERDICT_"))  # type: ignore[misc]
Reason = IntEnum("Reason", _enum("reason", "REASON_"))  # type: ignore[misc]
Direction = IntEnum("Direction", _enum("direction"))  # type: ignore[misc]
Protocol = IntEnum("Protocol", _enum("protocol", "PROTOCOL_"))  # type: ignore[misc]
State = IntEnum("State", _enum("state", "STATE_"))  # type: ignore[misc]
Event = IntEnum("Event", _enum("event", "EVENT_"))  # type: ignore[misc]
WhenStalled = IntEnum("WhenStalled", _enum("when_stalled", "WHEN_STALLED_"))  # type: ignore[misc]
HopState = IntEnum("HopState", _enum("hop_state", "HOP_"))  # type: ignore[misc]


def verdict_of(reason: int) -> Verdict:
    """Return what a packet that ended for `reason` met: reasons come in blocks of 32 by verdict."""
    return Verdict(reason // 32)


def describe() -> dict[str, object]:
    """Return the layout (fields with offsets and formats, enum values) as plain data, to be stored beside the maps."""
    structs = {
        name.lower(): {
            field: [str(kind), offset] for field, (kind, offset, *_) in (value.fields or {}).items()
        } | {"size": value.itemsize}
        for name, value in globals().items()
        if isinstance(value, np.dtype)
    }
    enums = {kind.__name__: {member.name: member.value for member in kind} for kind in (Reason, State, Event, Tag)}
    return {"structs": structs, "enums": enums}
