"""What the driver of an interface does with frames, asked and told as ethtool(8) does: ioctl(2), SIOCETHTOOL.

An interface is called by its name in the current network namespace. One that has gone, and a driver that has no such
notion, are answers, not errors.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
from typing import NamedTuple

# include/uapi/linux: sockios.h, ethtool.h
_SIOCETHTOOL, _GET_CHANNELS, _GET_GRO, _SET_GRO, _GET_FLAGS = 0x8946, 0x3C, 0x2B, 0x2C, 0x25
_GET_FEATURES, _SET_FEATURES, _GET_LENGTH, _GET_STRINGS = 0x3A, 0x3B, 0x37, 0x1B
_FEATURE_NAMES, _STRING_BYTES = 4, 32  # ETH_SS_FEATURES, ETH_GSTRING_LEN
_FLAG_LRO = 1 << 15


def _ethtool(name: str, command: array.array[int]) -> bool:
    """Make an ethtool request, whose answer takes its place; return whether there is one."""
    request = struct.pack("=16sQ16x", os.fsencode(name), command.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door, contextlib.suppress(OSError):
        fcntl.ioctl(door, _SIOCETHTOOL, request)
        return True
    return False


def queues_of(name: str) -> tuple[int, int] | None:
    """Return how many queues an interface receives and sends with now; None: the driver tells nothing of them."""
    # struct ethtool_channels: cmd, max_rx, max_tx, max_other, max_combined, rx, tx, other, combined
    channels = array.array("I", [_GET_CHANNELS, *[0] * 8])
    if not _ethtool(name, channels):
        return None
    rx, tx, combined = channels[5], channels[6], channels[8]
    return rx + combined or 1, tx + combined or 1


def has_gro(name: str) -> bool:
    """Return whether an interface of this network namespace merges received frames (GRO)."""
    value = array.array("I", [_GET_GRO, 0])
    return _ethtool(name, value) and bool(value[1])


def set_gro(name: str, *, is_on: bool) -> bool:
    """Switch GRO on or off; return whether it is so now: a macvlan has what its lower device has, without an error."""
    return _ethtool(name, array.array("I", [_SET_GRO, int(is_on)])) and has_gro(name) == is_on


def has_lro(name: str) -> bool:
    """Return whether an interface merges received frames so that they cannot be cut again as they were (LRO)."""
    value = array.array("I", [_GET_FLAGS, 0])
    return _ethtool(name, value) and bool(value[1] & _FLAG_LRO)


def has_feature(name: str, feature: str) -> bool:
    """Return whether a feature, by the kernel's name of it, is on; not so if the interface or the kernel has none."""
    found = _feature(name, feature)
    return found is not None and bool(found.active & found.mask)


def set_feature(name: str, feature: str, *, is_on: bool) -> bool:
    """Switch a feature on or off; return whether the driver let us, which may well ignore it without an error."""
    found = _feature(name, feature)
    if found is None:
        return False
    # struct ethtool_sfeatures: cmd, words, and of each word: valid, requested
    blocks = [0] * (2 * found.words)
    blocks[2 * found.word] = found.mask
    blocks[2 * found.word + 1] = found.mask if is_on else 0
    done = _ethtool(name, array.array("I", [_SET_FEATURES, found.words, *blocks]))
    return done and has_feature(name, feature) == is_on


class _Feature(NamedTuple):
    """Where a feature stands in the kernel's words, and that word as it is."""

    words: int
    word: int
    mask: int
    active: int


def _feature(name: str, feature: str) -> _Feature | None:
    """Look a feature up by its name: its number is another with another kernel."""
    # struct ethtool_sset_info: cmd, reserved, which sets (64 bits), and their lengths
    asked = array.array("I", [_GET_LENGTH, 0, *struct.unpack("=2I", struct.pack("=Q", 1 << _FEATURE_NAMES)), 0])
    if not _ethtool(name, asked):
        return None
    count = asked[4]
    words = -(-count // 32)
    # struct ethtool_gstrings: cmd, which set, its length, and its strings
    names = array.array("I", [_GET_STRINGS, _FEATURE_NAMES, count, *[0] * (count * _STRING_BYTES // 4)])
    # struct ethtool_gfeatures: cmd, words, and of each word: available, requested, active, never_changed
    values = array.array("I", [_GET_FEATURES, words, *[0] * (4 * words)])
    if not (_ethtool(name, names) and _ethtool(name, values)):
        return None
    text = names.tobytes()[12:]
    known = [text[at : at + _STRING_BYTES].rstrip(b"\0").decode() for at in range(0, len(text), _STRING_BYTES)]
    if feature not in known:
        return None
    word, bit = divmod(known.index(feature), 32)
    return _Feature(words, word, 1 << bit, values[2 + 4 * word + 2])
