"""The pure headers of xdp/bpf, built for this machine by gcc: what BPF runs, called from tests."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import cffi
import numpy as np

from xdp import schema

BPF = schema.HEADER.parent
HEADERS = ("schema.h", "hash.h", "checksum.h", "parse.h", "rewrite.h", "ipv6.h")
_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fno-strict-aliasing")

_TYPES = """
typedef uint8_t __u8; typedef uint16_t __u16; typedef uint32_t __u32; typedef uint64_t __u64;
typedef uint16_t __be16; typedef uint32_t __be32; typedef _Bool bool;
"""

# What the headers declare inside, for a parser that reads declarations only.
_DECLARATIONS = """
struct tuple { uint64_t addrs; uint32_t ports; uint32_t protocol; };
struct packet {
  struct tuple tuple; uint64_t datagram; uint32_t l4, quoted, vlan_bytes; uint8_t ttl; uint8_t tcp_flags;
};
uint64_t native_hash(const struct tuple *tuple, uint64_t key0, uint64_t key1);
uint32_t native_first_place(uint64_t hash, uint32_t count);
uint32_t native_second_place(uint64_t hash, uint32_t count);
uint32_t native_home(uint64_t hash);
uint64_t native_tag(uint64_t hash);
uint64_t native_lanes_equal(uint64_t word, uint64_t tag);
uint64_t native_hits(const void *bucket, uint64_t tag);
uint32_t native_lowest_hit(uint64_t hits);
uint16_t native_checksum_add(uint16_t check, uint16_t delta);
int native_parse(void *data, uint32_t length, struct packet *packet);
int native_parse_vlan_tags(void *data, uint32_t length, const uint64_t *vlans, uint32_t *bytes);
int native_rewrite(void *data, uint32_t length, uint32_t vlan_bytes, uint32_t l4, const void *flow, const void *hop);
"""

_WRAPPERS = """
__u64 native_hash(const struct tuple *tuple, __u64 key0, __u64 key1) { return hash_tuple(tuple, key0, key1); }
__u32 native_first_place(__u64 hash, __u32 count) { return first_place(hash, count); }
__u32 native_second_place(__u64 hash, __u32 count) { return second_place(hash, count); }
__u32 native_home(__u64 hash) { return home_of(hash); }
__u64 native_tag(__u64 hash) { return tag_of(hash); }
__u64 native_lanes_equal(__u64 word, __u64 tag) { return lanes_equal(word, tag); }
__u64 native_hits(const void *bucket, __u64 tag) { return hits_of(bucket, tag); }
__u32 native_lowest_hit(__u64 hits) { return lowest_hit(hits); }
__u16 native_checksum_add(__u16 check, __u16 delta) { return checksum_add(check, delta); }
int native_parse(void *data, __u32 length, struct packet *packet)
{
	*packet = (struct packet){ 0 };
	if (is_ipv6(data, data + length))
		return parse_ipv6(data, data + length, packet);
	return parse(data, data + length, packet);
}
int native_parse_vlan_tags(void *data, __u32 length, const __u64 *vlans, __u32 *bytes)
{
	return parse_vlan_tags(data, data + length, vlans, bytes);
}
int native_rewrite(void *data, __u32 length, __u32 vlan_bytes, __u32 l4, const void *flow, const void *hop)
{
	return rewrite(data, data + vlan_bytes, data + length, l4, flow, hop);
}
"""


def structs() -> dict[str, np.dtype[Any]]:
    """Return every struct of schema.h as Python sees it, by its name in C."""
    return {name.lower(): kind for name, kind in vars(schema).items() if name.isupper() and isinstance(kind, np.dtype)}


def layout_asserts() -> str:
    """Return C that compiles only if sizes and offsets are what Python believes."""
    lines = []
    for name, kind in structs().items():
        lines.append(f'_Static_assert(sizeof(struct {name}) == {kind.itemsize}, "sizeof {name}");')
        for field, (_, offset, *_) in (kind.fields or {}).items():
            where = f"__builtin_offsetof(struct {name}, {field})"
            lines.append(f'_Static_assert({where} == {offset}, "{name}.{field}");')
    return "\n".join(lines) + "\n"


def _source() -> str:
    includes = "".join(f'#include "{header}"\n' for header in HEADERS)
    return f"#include <stdint.h>\n{_TYPES}{includes}{layout_asserts()}{_WRAPPERS}"


def build() -> Path:
    """Return the shared library of these very headers, compiled if it has not been yet."""
    source = _source()
    content = source + "".join((BPF / header).read_text() for header in HEADERS) + " ".join(_FLAGS)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turnout"
    base.mkdir(parents=True, exist_ok=True)
    library = base / f"native-{hashlib.blake2b(content.encode(), digest_size=10).hexdigest()}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=base) as folder:
            made = Path(folder) / "native.so"
            command = ["gcc", *_FLAGS, f"-I{BPF}", "-x", "c", "-", "-o", str(made)]
            done = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the headers of {BPF} do not compile:\n{done.stderr}")
            made.rename(library)
    return library


class Native:
    """The functions of the headers. Frames are writable buffers."""

    def __init__(self) -> None:
        self.ffi = cffi.FFI()
        self.ffi.cdef(_DECLARATIONS)
        self.library = self.ffi.dlopen(str(build()))

    def tuple(self, addrs: int, ports: int, protocol: int) -> Any:
        """Return a struct tuple."""
        return self.ffi.new("struct tuple *", {"addrs": addrs, "ports": ports, "protocol": protocol})

    def parse(self, frame: Any, length: int) -> tuple[int, tuple[int, ...]]:
        """Return (reason, (addrs, ports, protocol, l4, ttl, tcp_flags, datagram, quoted)) of `length` bytes."""
        packet = self.ffi.new("struct packet *")
        reason = self.library.native_parse(self.ffi.from_buffer(frame), length, packet)
        key = packet.tuple
        found = packet.l4, packet.ttl, packet.tcp_flags, packet.datagram, packet.quoted
        return reason, (key.addrs, key.ports, key.protocol, *found)

    def parse_vlan_tags(self, frame: Any, length: int, vlans: Any) -> tuple[int, int]:
        """Return (reason, bytes of VLAN tags) of `length` bytes, where `vlans` are served: a bit for each."""
        found = self.ffi.new("uint32_t *")
        served = self.ffi.from_buffer("uint64_t[]", vlans)
        return self.library.native_parse_vlan_tags(self.ffi.from_buffer(frame), length, served, found), found[0]

    def rewrite(self, frame: Any, l4: int, flow: bytes, hop: bytes, vlan_bytes: int = 0) -> int:
        """Change `frame`, which has so many bytes of VLAN tags; return 0, or -1 if it is too short."""
        data, flow_data, hop_data = (self.ffi.from_buffer(buffer) for buffer in (frame, flow, hop))
        return int(self.library.native_rewrite(data, len(frame), vlan_bytes, l4, flow_data, hop_data))


_EDGE_PAGES, _PAGE = 4, 4096


@functools.cache
def _before_the_edge() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return pages directly before one that nobody may touch."""
    ffi = cffi.FFI()
    ffi.cdef("void *mmap(void *, size_t, int, int, int, long); int mprotect(void *, size_t, int);")
    libc, size = ffi.dlopen(None), _EDGE_PAGES * _PAGE
    read_write, private_anonymous = 3, 0x22
    memory = libc.mmap(ffi.NULL, size + _PAGE, read_write, private_anonymous, -1, 0)
    assert libc.mprotect(memory + size, _PAGE, 0) == 0
    return np.frombuffer(ffi.buffer(memory, size), np.uint8)


def at_the_edge(length: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return `length` bytes of memory at the edge of what there is: reading on ends the process. One at a time."""
    pages = _before_the_edge()
    return pages[len(pages) - length :]
