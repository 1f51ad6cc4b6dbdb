"""Bytes turned round: the same for Python and for compiled code, and twice is not at all."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from xdp.byteorder import swap16, swap32, swapped16, swapped32
from xdp.jit import compiled


@compiled
def _swapped(value, size):
    return np.uint32(swapped16(value)) if size == 2 else swapped32(value)


@pytest.mark.parametrize("value", [0, 1, 80, 0x1234, 0xFF00, 0xFFFF])
@pytest.mark.parametrize("kind", [int, np.uint16, np.uint32, np.uint64])
def test_a_port_in_network_order_and_back(value: int, kind: type):
    assert swap16(kind(value)) == _swapped(kind(value), 2) == socket.htons(value)
    assert swap16(swap16(kind(value))) == value


@pytest.mark.parametrize("value", [0, 1, 0x0A600001, 0x12345678, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("kind", [int, np.uint32, np.uint64])
def test_an_address_in_network_order_and_back(value: int, kind: type):
    assert swap32(kind(value)) == _swapped(kind(value), 4) == socket.htonl(value)
    assert swap32(swap32(kind(value))) == value
