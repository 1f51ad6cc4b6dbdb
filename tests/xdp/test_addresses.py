"""Addresses as numbers: both families in one space, and back."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdp.addresses import address_of, from_wire, host_bits, is_ipv6, masked, number_of, to_wire, with_port

ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))


@given(ADDRESSES)
def test_an_address_comes_back_from_its_number_and_from_its_bytes(address: IPv4Address | IPv6Address) -> None:
    number = number_of(address)
    assert address_of(number) == address
    assert (is_ipv6(number), host_bits(number)) == (address.version == 6, address.max_prefixlen)
    assert to_wire(number) == address.packed
    assert from_wire(address.packed) == number
    assert number_of(number) == number


@given(st.ip_addresses(v=4))
def test_no_address_is_taken_for_one_of_the_other_family(address: IPv4Address) -> None:
    assert number_of(IPv6Address(int(address))) != number_of(address)


@given(ADDRESSES, st.data())
def test_a_network_is_that_of_the_standard_library(address: IPv4Address | IPv6Address, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, address.max_prefixlen))
    network = ip_network((address, length), strict=False).network_address
    assert masked(number_of(address), length) == number_of(network)


def test_bytes_are_those_of_the_wire() -> None:
    assert to_wire(number_of(ip_address("2001:db8::7"))) == socket.inet_pton(socket.AF_INET6, "2001:db8::7")
    assert from_wire(socket.inet_aton("10.0.0.1")) == 0x0A000001


def test_a_port_stands_behind_brackets_only_where_colons_are_many() -> None:
    assert [with_port(ip_address(text), 80) for text in ("10.0.0.1", "2001:db8::1")] == [
        "10.0.0.1:80",
        "[2001:db8::1]:80",
    ]


@pytest.mark.parametrize("length", [0, 3, 5, 15, 17])
def test_bytes_of_another_length_are_no_address(length: int) -> None:
    assert from_wire(b"\1" * length) == 0
