"""Addresses of both families as numbers in host order: those of IPv6 have a 129th bit, so that none looks like IPv4.

10.0.0.1 is 0x0a000001 and ::1 is IPV6 + 1. A prefix keeps the bit, so its family can be told from its network, too.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

IPV6 = 1 << 128
_LOW_HALF = (1 << 64) - 1


def number_of(address: int | IPAddress) -> int:
    """Return the number of an address; a number is what it is already."""
    return int(address) | IPV6 if isinstance(address, IPv6Address) else int(address)


def address_of(number: int) -> IPAddress:
    """Return the address that a number stands for."""
    return IPv6Address(number ^ IPV6) if is_ipv6(number) else IPv4Address(number)


def with_port(address: int | IPAddress, port: int) -> str:
    """Return address and port as text, an IPv6 address in brackets (RFC 5952 6)."""
    shown = address_of(number_of(address))
    return f"[{shown}]:{port}" if shown.version == 6 else f"{shown}:{port}"


def read_place(text: str) -> tuple[IPAddress, int | None]:
    """Return (address, port) of "ip", "ip:port", "ip6", "[ip6]" or "[ip6]:port"; the port is None if not given.

    ValueError: it is none of these.
    """
    bare, _, port = text.removeprefix("[").partition("]:" if text.startswith("[") else ":")
    if text.count(":") > 1 and not text.startswith("["):
        bare, port = text, ""
    return ip_address(bare.removesuffix("]")), int(port) if port else None


def is_ipv6(number: int) -> bool:
    """Return whether an address is of IPv6."""
    return number >= IPV6


def host_bits(number: int) -> int:
    """Return the prefix length of a single address of its family."""
    return 128 if number >= IPV6 else 32


def masked(number: int, prefix_len: int) -> int:
    """Return the network of so many bits that an address is in."""
    shift = host_bits(number) - prefix_len
    return number >> shift << shift


def halves(number: int) -> tuple[int, int]:
    """Return the higher and the lower 64 bits of an IPv6 address."""
    return number >> 64 & _LOW_HALF, number & _LOW_HALF


def from_wire(octets: bytes | memoryview) -> int:
    """Return the number of an address of 4 or 16 bytes in network byte order; 0 for any other length."""
    if len(octets) == 16:
        return IPV6 | int.from_bytes(octets, "big")
    return int.from_bytes(octets, "big") if len(octets) == 4 else 0


def to_wire(number: int) -> bytes:
    """Return the 4 or 16 bytes of an address in network byte order."""
    return (number ^ IPV6).to_bytes(16, "big") if is_ipv6(number) else number.to_bytes(4, "big")
