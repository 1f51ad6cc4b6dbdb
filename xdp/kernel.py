"""The narrow door to bpf(2): maps, programs and pins, as data and descriptors.

Nothing here knows what a table or a program is for. Every descriptor that is returned belongs to the caller and is
closed on exec. Errors are those of xdp/syscalls.py: MissingFeatureError (no privilege, no BPF) or KernelError.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdp.declared import declared
from xdp.errors import Error, KernelError, MissingFeatureError
from xdp.mounts import is_bpffs
from xdp.syscalls import BPF, failure, libc
from xdp.writing import explained

# One struct per command of bpf(2): the members of `union bpf_attr`, uapi/linux/bpf.h.
_ffi = declared("""
struct map_create { uint32_t map_type, key_size, value_size, max_entries, map_flags, inner_map_fd, numa_node;
	char map_name[16]; };
struct map_elem { uint32_t map_fd, pad; uint64_t key, value, flags; };
struct prog_load { uint32_t prog_type, insn_cnt; uint64_t insns, license; uint32_t log_level, log_size;
	uint64_t log_buf; uint32_t kern_version, prog_flags; char prog_name[16];
	uint32_t prog_ifindex, expected_attach_type, prog_btf_fd, func_info_rec_size; uint64_t func_info;
	uint32_t func_info_cnt, line_info_rec_size; uint64_t line_info; uint32_t line_info_cnt, attach_btf_id; };
struct raw_tracepoint { uint64_t name; uint32_t prog_fd, pad; };
struct map_batch { uint64_t in_batch, out_batch, keys, values; uint32_t count, map_fd; uint64_t elem_flags, flags; };
struct obj { uint64_t pathname; uint32_t bpf_fd, file_flags; };
struct test_run { uint32_t prog_fd, retval, data_size_in, data_size_out; uint64_t data_in, data_out;
	uint32_t repeat, duration, ctx_size_in, ctx_size_out; uint64_t ctx_in, ctx_out;
	uint32_t flags, cpu, batch_size, pad; };
struct get_id { uint32_t id, next_id, open_flags; };
struct get_info { uint32_t bpf_fd, info_len; uint64_t info; };
struct link_create { uint32_t prog_fd, target_ifindex, attach_type, flags; };
struct link_create_cgroup { uint32_t prog_fd, target_fd, attach_type, flags; };
struct link_update { uint32_t link_fd, new_prog_fd, flags, old_prog_fd; };
struct link_detach { uint32_t link_fd; };

struct map_info { uint32_t type, id, key_size, value_size, max_entries, map_flags; char name[16]; };
struct program_info { uint32_t type, id; uint8_t tag[8]; uint32_t jited_prog_len, xlated_prog_len;
	uint64_t jited_prog_insns, xlated_prog_insns, load_time; uint32_t created_by_uid, nr_map_ids; uint64_t map_ids;
	char name[16]; };
struct link_info { uint32_t type, id, prog_id, pad, ifindex, pad2[16]; };
struct xdp_md { uint32_t data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex; };
""")

# enum bpf_cmd
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT_KEY = 0, 1, 2, 3, 4
_PROG_LOAD, _OBJ_PIN, _OBJ_GET = 5, 6, 7
_PROG_TEST_RUN, _PROG_FD_BY_ID, _GET_INFO, _RAW_TRACEPOINT_OPEN = 10, 13, 15, 17
_MAP_LOOKUP_BATCH = 24

# enum bpf_map_type, enum bpf_prog_type, map flags
HASH, ARRAY, PROG_ARRAY, LRU_HASH, LPM_TRIE, ARRAY_OF_MAPS, XSKMAP = 1, 2, 3, 9, 11, 12, 17
TC_PROGRAM, XDP_PROGRAM, CGROUP_PROGRAM, TRACING_PROGRAM = 3, 6, 18, 26  # CGROUP_PROGRAM: of socket addresses
NO_PREALLOC, MMAPABLE = 1 << 0, 1 << 10

# Where a cgroup's sockets meet a CGROUP_PROGRAM, by names of ours, as enum bpf_attach_type.
CGROUP_HOOKS = {
    "connect4": 10,
    "connect6": 11,
    "sendmsg4": 14,
    "sendmsg6": 15,
    "recvmsg4": 19,
    "recvmsg6": 20,
    "getpeername4": 29,
    "getpeername6": 30,
}
_ATTACH_RAW_TRACEPOINT = 23
_TEST_LIVE_FRAMES = 2


@dataclass(frozen=True)
class MapInfo:
    """What the kernel says of a map. `value_size` in bytes of one entry."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    map_flags: int
    id: int
    name: str


@dataclass(frozen=True)
class ProgramInfo:
    """What the kernel says of a program; `tag` is its digest of the instructions, in hexadecimal."""

    type: int
    id: int
    name: str
    tag: str
    map_ids: tuple[int, ...]


def bpf(command: int, kind: str, what: str, accepted: int = 0, /, **values: Any) -> tuple[int, Any]:
    """Make the system call with struct `kind` filled from `values`; return its result and the struct.

    An error says that `what` failed. Errno `accepted` is a result, too: then the first of the pair is -1.
    """
    attributes = _ffi.new(f"struct {kind} *", values)
    while True:
        result = libc.syscall(
            BPF, _ffi.cast("int", command), attributes, _ffi.cast("unsigned int", _ffi.sizeof(attributes[0]))
        )
        if result >= 0 or _ffi.errno == accepted:
            return int(result), attributes
        if _ffi.errno not in (errno.EAGAIN, errno.EINTR):  # the verifier gives way to a signal
            raise failure(what, _ffi.errno)


def info_of(kind: str, fd: int, /, **values: Any) -> Any:
    """Return what the kernel says of the map, program or link (`kind`) behind `fd`; `values` are told to it."""
    info = _ffi.new(f"struct {kind}_info *", values)
    bpf(_GET_INFO, "get_info", kind, bpf_fd=fd, info_len=_ffi.sizeof(info[0]), info=_address(info))
    return info


def _address(data: Any) -> int:
    return int(_ffi.cast("uintptr_t", data))


def map_create(
    name: str, key_size: int, value_size: int, entries: int, flags: int = 0, map_type: int = ARRAY, inner_fd: int = 0
) -> int:
    """Create a map and return its descriptor. Sizes in bytes; the kernel keeps 15 characters of `name`.

    The values of a map of maps are descriptors of maps that are like `inner_fd`.
    """
    size = f"{entries} entries of {value_size} bytes"
    try:
        return bpf(
            _MAP_CREATE,
            "map_create",
            f"map {name}",
            map_type=map_type,
            key_size=key_size,
            value_size=value_size,
            max_entries=entries,
            map_flags=flags,
            inner_map_fd=inner_fd,
            map_name=name.encode()[:15],
        )[0]
    except KernelError as error:
        if error.errno in (errno.ENOMEM, errno.E2BIG):
            raise KernelError(f"{error}: no room for {size}; a smaller --capacity needs less", error.errno) from None
        raise KernelError(f"{error} ({size})", error.errno) from None


def map_info(fd: int) -> MapInfo:
    """Return what the kernel says of the map behind `fd`."""
    info = info_of("map", fd)
    name = _ffi.string(info.name).decode()
    return MapInfo(info.type, info.key_size, info.value_size, info.max_entries, info.map_flags, info.id, name)


def map_update(fd: int, key: bytes, value: bytes) -> None:
    """Store `value` (native byte order, as the map's value) under `key`."""
    k, v = _ffi.from_buffer(key), _ffi.from_buffer(value)
    bpf(_MAP_UPDATE, "map_elem", "map update", map_fd=fd, key=_address(k), value=_address(v))


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """Return the `value_size` bytes under `key`, or None if there are none."""
    k, value = _ffi.from_buffer(key), bytearray(value_size)
    v = _ffi.from_buffer(value)
    try:
        bpf(_MAP_LOOKUP, "map_elem", "map lookup", map_fd=fd, key=_address(k), value=_address(v))
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return bytes(value)


def map_items(fd: int) -> dict[bytes, bytes]:
    """Return what is in a hash map, in one call. An entry that comes or goes meanwhile may be missing."""
    info = map_info(fd)
    keys, values = bytearray(info.max_entries * info.key_size), bytearray(info.max_entries * info.value_size)
    position = bytearray(max(4, info.key_size))
    _, attributes = bpf(
        _MAP_LOOKUP_BATCH,
        "map_batch",
        f"map {info.name}",
        errno.ENOENT,  # the end was reached
        map_fd=fd,
        count=info.max_entries,
        out_batch=_address(_ffi.from_buffer(position)),
        keys=_address(_ffi.from_buffer(keys)),
        values=_address(_ffi.from_buffer(values)),
    )
    return dict(
        zip(
            _cut(keys, info.key_size, attributes.count),
            _cut(values, info.value_size, attributes.count),
            strict=True,
        )
    )


def _cut(data: bytearray, size: int, count: int) -> Iterator[bytes]:
    """Yield the first `count` pieces of `size` bytes."""
    whole = bytes(memoryview(data)[: size * count])
    return (whole[at : at + size] for at in range(0, size * count, size))


def map_delete(fd: int, key: bytes) -> bool:
    """Remove `key`; return whether it was there."""
    k = _ffi.from_buffer(key)
    try:
        bpf(_MAP_DELETE, "map_elem", "map delete", map_fd=fd, key=_address(k))
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def map_keys(fd: int, key_size: int) -> list[bytes]:
    """Return the keys of a hash map (BPF_MAP_GET_NEXT_KEY), for a map that nobody else changes meanwhile."""
    keys: list[bytes] = []
    following = bytearray(key_size)
    while True:
        last = _ffi.from_buffer(keys[-1]) if keys else None
        values = {"key": _address(last) if last is not None else 0, "value": _address(_ffi.from_buffer(following))}
        try:
            bpf(_MAP_NEXT_KEY, "map_elem", "map keys", map_fd=fd, **values)
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return keys
            raise
        keys.append(bytes(following))


def pin(fd: int, path: Path) -> None:
    """Pin the map, program or link behind `fd` at `path`, which lies in a bpffs and must be free."""
    name = _ffi.new("char[]", os.fsencode(path))
    try:
        bpf(_OBJ_PIN, "obj", f"pin {path}", pathname=_address(name), bpf_fd=fd)
    except MissingFeatureError:
        if not is_bpffs(path.parent):
            raise MissingFeatureError(f"pin {path}: {path.parent} is not a bpffs; mount one there") from None
        raise


def replace_pin(fd: int, path: Path) -> None:
    """Pin `fd` at `path` in one step, in place of what may be pinned there."""
    beside = path.with_name(f"{path.name}+{os.getpid()}")  # bpffs reserves names with a dot
    beside.unlink(missing_ok=True)
    pin(fd, beside)
    with explained(path, "cannot be replaced"):
        beside.rename(path)


def open_pinned(path: Path) -> int:
    """Return a descriptor of what is pinned at `path`. Nothing there: KernelError with ENOENT."""
    name = _ffi.new("char[]", os.fsencode(path))
    return bpf(_OBJ_GET, "obj", f"pin {path}", pathname=_address(name))[0]


def kind_of(fd: int) -> str:
    """Return what a descriptor of bpf(2) is: "map", "prog" or "link"."""
    name = str(Path(f"/proc/self/fd/{fd}").readlink())
    return name.removeprefix("anon_inode:").replace("_", "-").removeprefix("bpf-")


def pinned_maps(folder: Path) -> dict[str, MapInfo]:
    """Return the maps pinned in `folder` by name, whatever else is pinned there left out."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            fd = open_pinned(path)
            try:
                if kind_of(fd) == "map":
                    found[path.name] = map_info(fd)
            finally:
                os.close(fd)
    return found


def prog_load(name: str, instructions: bytes, program_type: int = XDP_PROGRAM, tracepoint_type: int = 0) -> int:
    """Load ready-made `instructions` (8 bytes each) and return the descriptor; the error ends in the verifier's log.

    It is asked for only when the program is refused: writing it takes the verifier several times as long.

    A TRACING_PROGRAM is for the tracepoint whose typedef, btf_trace_NAME, has number `tracepoint_type` in the kernel's
    BTF, a CGROUP_PROGRAM for the hook that it is called after.
    """
    attach_type = _ATTACH_RAW_TRACEPOINT if tracepoint_type else 0
    if program_type == CGROUP_PROGRAM:
        attach_type = CGROUP_HOOKS[name]
    code, text, log = _ffi.from_buffer(instructions), _ffi.new("char[]", b"Dual BSD/GPL"), _ffi.new("char[]", 1 << 16)

    def load(**more: int) -> int:
        return bpf(
            _PROG_LOAD,
            "prog_load",
            f"program {name}",
            prog_type=program_type,
            insn_cnt=len(instructions) // 8,
            insns=_address(code),
            license=_address(text),
            prog_name=name.encode()[:15],
            expected_attach_type=attach_type,
            attach_btf_id=tracepoint_type,
            **more,
        )[0]

    with contextlib.suppress(Error):
        return load()
    try:
        return load(log_level=1, log_size=len(log), log_buf=_address(log))
    except Error as error:
        lines = _ffi.string(log).decode(errors="replace").strip()
        if not lines:
            raise
        raise KernelError(f"program {name}: refused by the verifier\n{lines}", errno.EACCES) from error


def prog_info(fd: int) -> ProgramInfo:
    """Return what the kernel says of the program behind `fd`, the maps that it uses included."""
    most = 64
    ids = _ffi.new("uint32_t[]", most)
    info = info_of("program", fd, nr_map_ids=most, map_ids=_address(ids))
    used = tuple(ids[0 : min(most, info.nr_map_ids)])
    return ProgramInfo(info.type, info.id, _ffi.string(info.name).decode(), bytes(info.tag).hex(), used)


def prog_fd_by_id(program_id: int) -> int:
    """Return a descriptor of the program with this id."""
    return bpf(_PROG_FD_BY_ID, "get_id", f"program {program_id}", id=program_id)[0]


def prog_test_run(
    program: int, frame: bytes, *, repeat: int = 1, context: bytes = b"", out_size: int = 4096
) -> tuple[int, bytes, int]:
    """Run a program on `frame` `repeat` times; return (verdict, the frame afterwards, mean duration in ns).

    `frame` starts with the Ethernet header (at least 14 bytes). It appears to come from queue 0 of the loopback, unless
    `context`, a struct xdp_md or __sk_buff, says otherwise. Map contents change as with a real frame; redirects are not
    carried out.
    """
    data, out = _ffi.from_buffer(frame), bytearray(out_size)
    _, attributes = bpf(
        _PROG_TEST_RUN,
        "test_run",
        f"test run of {len(frame)} bytes",
        prog_fd=program,
        data_size_in=len(frame),
        data_in=_address(data),
        data_size_out=out_size,
        data_out=_address(_ffi.from_buffer(out)),
        repeat=repeat,
        ctx_in=_address(_ffi.from_buffer(context)) if context else 0,
        ctx_size_in=len(context),
    )
    return attributes.retval, bytes(out[: attributes.data_size_out]), attributes.duration


def prog_test_run_live(program: int, frame: bytes, repeat: int, batch_size: int = 64, ingress_ifindex: int = 1) -> int:
    """Send `frame` through an XDP program `repeat` times, verdicts carried out; return the mean duration in ns.

    XDP_PASS hands the frame to the kernel as if received by `ingress_ifindex`, XDP_TX and redirects transmit it.
    `batch_size` frames (1 to 256) go to the kernel at a time.
    """
    data = _ffi.from_buffer(frame)
    context = _ffi.new("struct xdp_md *", {"data_end": len(frame), "ingress_ifindex": ingress_ifindex})
    _, attributes = bpf(
        _PROG_TEST_RUN,
        "test_run",
        f"live test run of {len(frame)} bytes",
        prog_fd=program,
        data_size_in=len(frame),
        data_in=_address(data),
        repeat=repeat,
        flags=_TEST_LIVE_FRAMES,
        batch_size=batch_size,
        ctx_in=_address(context),
        ctx_size_in=_ffi.sizeof(context[0]),
    )
    return int(attributes.duration)


def tracepoint_open(program: int) -> int:
    """Run a TRACING_PROGRAM at its tracepoint until the descriptor that is returned is closed."""
    return bpf(_RAW_TRACEPOINT_OPEN, "raw_tracepoint", "tracepoint", prog_fd=program)[0]
