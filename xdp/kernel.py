"""The narrow door to the kernel: everything privileged that BPF needs, as data and descriptors.

bpf(2), membarrier(2), mount(2) and one rtnetlink question, through libc by cffi's ABI mode (no compiler at run time).
Nothing here knows what a table or a program is for. Every descriptor that is returned belongs to the caller and is
closed on exec. Errors are MissingFeatureError (no privilege, no BPF), AttachError (an interface that is taken or whose
driver refuses) or KernelError, which keeps the errno.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import platform
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xdp.declared import declared
from xdp.errors import AttachError, Error, MissingFeatureError
from xdp.writing import explained

Mode = Literal["native", "generic"]

# One struct per command of bpf(2): the members of `union bpf_attr`, uapi/linux/bpf.h.
_ffi = declared("""
long syscall(long number, ...);
int statfs(const char *path, void *buffer);
int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data);

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
struct prog_info { uint32_t type, id; uint8_t tag[8]; uint32_t jited_prog_len, xlated_prog_len;
	uint64_t jited_prog_insns, xlated_prog_insns, load_time; uint32_t created_by_uid, nr_map_ids; uint64_t map_ids;
	char name[16]; };
struct link_info { uint32_t type, id, prog_id, pad, ifindex, pad2[16]; };
struct xdp_md { uint32_t data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex; };
""")
_libc = _ffi.dlopen(None)

_SYSCALLS = {"x86_64": (321, 324), "aarch64": (280, 283)}
_BPF_SYSCALL, _MEMBARRIER_SYSCALL = _SYSCALLS.get(platform.machine(), (-1, -1))
_MEMBARRIER_QUERY, _MEMBARRIER_GLOBAL = 0, 1

# enum bpf_cmd
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT_KEY = 0, 1, 2, 3, 4
_PROG_LOAD, _OBJ_PIN, _OBJ_GET = 5, 6, 7
_PROG_TEST_RUN, _PROG_FD_BY_ID, _GET_INFO, _RAW_TRACEPOINT_OPEN = 10, 13, 15, 17
_MAP_LOOKUP_BATCH = 24
_LINK_CREATE, _LINK_UPDATE, _LINK_FD_BY_ID, _LINK_NEXT_ID, _LINK_DETACH = 28, 29, 30, 31, 34

# enum bpf_map_type, enum bpf_prog_type, map flags
HASH, ARRAY, PROG_ARRAY, LRU_HASH, LPM_TRIE, ARRAY_OF_MAPS, XSKMAP = 1, 2, 3, 9, 11, 12, 17
TC_PROGRAM, XDP_PROGRAM, CGROUP_PROGRAM, TRACING_PROGRAM = 3, 6, 18, 26  # CGROUP_PROGRAM: of socket addresses
NO_PREALLOC, MMAPABLE = 1 << 0, 1 << 10

_LINK_TYPE_CGROUP, _LINK_TYPE_XDP, _LINK_TYPE_TCX = 3, 6, 11
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
_ATTACH_RAW_TRACEPOINT, _ATTACH_XDP, _ATTACH_TCX_EGRESS = 23, 37, 47
_MODE_FLAGS: dict[Mode, int] = {"generic": 2, "native": 4}
_REPLACE = 4  # BPF_F_REPLACE: only if the link still runs old_prog_fd
_TEST_LIVE_FRAMES = 2
_SK_BUFF_BYTES, _SK_BUFF_MARK_AT = 192, 8  # struct __sk_buff
_BPFFS_MAGIC, _CGROUP2_MAGIC = 0xCAFE4A11, 0x63677270


class KernelError(Error):
    """The kernel refused; `errno` says why."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.errno = number


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


@dataclass(frozen=True)
class LinkInfo:
    """What the kernel says of a link. `ifindex` is 0 when its interface is gone: the link is defunct.

    So is `cgroup_id`, which is a cgroup's inode number, when the cgroup is; of a link to the other kind, either is 0.
    """

    type: int
    id: int
    program_id: int
    ifindex: int
    cgroup_id: int = 0


@dataclass(frozen=True)
class XdpState:
    """The XDP program of an interface, whoever attached it."""

    mode: str  # "native", "generic", "offloaded" or "several"
    program_id: int


def _name(number: int) -> str:
    # Linux gives ENOTSUP and EOPNOTSUPP one number; its manuals speak of the latter.
    return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, str(number))


def _fail(what: str, number: int) -> Error:
    """Return the exception for errno `number` of doing `what`."""
    if number == errno.ENOSYS:
        return MissingFeatureError(f"{what}: this kernel has no bpf(2) (ENOSYS); it needs CONFIG_BPF_SYSCALL")
    if number in (errno.EPERM, errno.EACCES):
        return MissingFeatureError(
            f"{what}: not permitted ({_name(number)}); run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN"
        )
    return KernelError(f"{what}: {os.strerror(number)} ({_name(number)})", number)


def _bpf(command: int, kind: str, what: str, accepted: int = 0, /, **values: Any) -> tuple[int, Any]:
    """Call bpf(2) with struct `kind` filled from `values`; return its result and the struct. Raise as `what` failed.

    Errno `accepted` is a result, too: then the first of the pair is -1.
    """
    attributes = _ffi.new(f"struct {kind} *", values)
    while True:
        result = _libc.syscall(
            _BPF_SYSCALL, _ffi.cast("int", command), attributes, _ffi.cast("unsigned int", _ffi.sizeof(attributes[0]))
        )
        if result >= 0 or _ffi.errno == accepted:
            return int(result), attributes
        if _ffi.errno not in (errno.EAGAIN, errno.EINTR):  # the verifier gives way to a signal
            raise _fail(what, _ffi.errno)


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
        return _bpf(
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
    info = _ffi.new("struct map_info *")
    _bpf(_GET_INFO, "get_info", "map", bpf_fd=fd, info_len=_ffi.sizeof(info[0]), info=_address(info))
    name = _ffi.string(info.name).decode()
    return MapInfo(info.type, info.key_size, info.value_size, info.max_entries, info.map_flags, info.id, name)


def map_update(fd: int, key: bytes, value: bytes) -> None:
    """Store `value` (native byte order, as the map's value) under `key`."""
    k, v = _ffi.from_buffer(key), _ffi.from_buffer(value)
    _bpf(_MAP_UPDATE, "map_elem", "map update", map_fd=fd, key=_address(k), value=_address(v))


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """Return the `value_size` bytes under `key`, or None if there are none."""
    k, value = _ffi.from_buffer(key), bytearray(value_size)
    v = _ffi.from_buffer(value)
    try:
        _bpf(_MAP_LOOKUP, "map_elem", "map lookup", map_fd=fd, key=_address(k), value=_address(v))
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
    _, attributes = _bpf(
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
        _bpf(_MAP_DELETE, "map_elem", "map delete", map_fd=fd, key=_address(k))
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
            _bpf(_MAP_NEXT_KEY, "map_elem", "map keys", map_fd=fd, **values)
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return keys
            raise
        keys.append(bytes(following))


def pin(fd: int, path: Path) -> None:
    """Pin the map, program or link behind `fd` at `path`, which lies in a bpffs and must be free."""
    name = _ffi.new("char[]", os.fsencode(path))
    try:
        _bpf(_OBJ_PIN, "obj", f"pin {path}", pathname=_address(name), bpf_fd=fd)
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
    return _bpf(_OBJ_GET, "obj", f"pin {path}", pathname=_address(name))[0]


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
        return _bpf(
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
    info = _ffi.new("struct prog_info *", {"nr_map_ids": most, "map_ids": _address(ids)})
    _bpf(_GET_INFO, "get_info", "program", bpf_fd=fd, info_len=_ffi.sizeof(info[0]), info=_address(info))
    used = tuple(ids[0 : min(most, info.nr_map_ids)])
    return ProgramInfo(info.type, info.id, _ffi.string(info.name).decode(), bytes(info.tag).hex(), used)


def prog_fd_by_id(program_id: int) -> int:
    """Return a descriptor of the program with this id."""
    return _bpf(_PROG_FD_BY_ID, "get_id", f"program {program_id}", id=program_id)[0]


def prog_test_run(
    program: int, frame: bytes, *, repeat: int = 1, ingress_ifindex: int | None = None, out_size: int = 4096
) -> tuple[int, bytes, int]:
    """Run an XDP program on `frame` `repeat` times; return (verdict, the frame afterwards, mean duration in ns).

    `frame` starts with the Ethernet header (at least 14 bytes). It appears to come from queue 0 of `ingress_ifindex`
    or of the loopback. Map contents change as with a real frame; redirects are not carried out.
    """
    context = _ffi.new("struct xdp_md *", {"data_end": len(frame), "ingress_ifindex": ingress_ifindex or 0})
    with_context = ingress_ifindex is not None
    return _test_run(
        program,
        frame,
        out_size,
        repeat=repeat,
        ctx_in=_address(context) if with_context else 0,
        ctx_size_in=_ffi.sizeof(context[0]) if with_context else 0,
    )


def tc_test_run(program: int, frame: bytes, *, mark: int = 0, out_size: int = 4096) -> tuple[int, bytes]:
    """Run a TC_PROGRAM on `frame`, as it leaves by the loopback; return (verdict, the frame afterwards)."""
    context = bytearray(_SK_BUFF_BYTES)
    struct.pack_into("=I", context, _SK_BUFF_MARK_AT, mark)
    ctx_in = _address(_ffi.from_buffer(context))
    verdict, after, _ = _test_run(program, frame, out_size, ctx_in=ctx_in, ctx_size_in=len(context))
    return verdict, after


def _test_run(program: int, frame: bytes, out_size: int, **more: int) -> tuple[int, bytes, int]:
    """Run a program on `frame`; return (verdict, the frame afterwards, mean duration in ns)."""
    data, out = _ffi.from_buffer(frame), bytearray(out_size)
    _, attributes = _bpf(
        _PROG_TEST_RUN,
        "test_run",
        f"test run of {len(frame)} bytes",
        prog_fd=program,
        data_size_in=len(frame),
        data_in=_address(data),
        data_size_out=out_size,
        data_out=_address(_ffi.from_buffer(out)),
        **more,
    )
    return attributes.retval, bytes(out[: attributes.data_size_out]), attributes.duration


def prog_test_run_live(program: int, frame: bytes, repeat: int, batch_size: int = 64, ingress_ifindex: int = 1) -> int:
    """Send `frame` through an XDP program `repeat` times, verdicts carried out; return the mean duration in ns.

    XDP_PASS hands the frame to the kernel as if received by `ingress_ifindex`, XDP_TX and redirects transmit it.
    `batch_size` frames (1 to 256) go to the kernel at a time.
    """
    data = _ffi.from_buffer(frame)
    context = _ffi.new("struct xdp_md *", {"data_end": len(frame), "ingress_ifindex": ingress_ifindex})
    _, attributes = _bpf(
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


def link_create_xdp(program: int, ifindex: int, mode: Mode) -> int:
    """Attach an XDP program to interface `ifindex` of this network namespace; return the descriptor of the link.

    The link ends with its last descriptor or pin. AttachError: the interface has an XDP program, or its driver refuses.
    """
    try:
        return _bpf(
            _LINK_CREATE,
            "link_create",
            f"{_interface(ifindex)}: {mode} XDP",
            prog_fd=program,
            target_ifindex=ifindex,
            attach_type=_ATTACH_XDP,
            flags=_MODE_FLAGS[mode],
        )[0]
    except KernelError as error:
        raise _attach_error(program, ifindex, mode, error.errno) from None


def link_create_egress(program: int, ifindex: int) -> int:
    """Attach a TC_PROGRAM where frames leave by interface `ifindex` of this network namespace, behind those there are.

    Return the descriptor of the link, which ends with its last descriptor or pin. MissingFeatureError: this kernel has
    no tcx (Linux 6.6).
    """
    try:
        return _bpf(
            _LINK_CREATE,
            "link_create",
            f"{_interface(ifindex)}: tcx",
            prog_fd=program,
            target_ifindex=ifindex,
            attach_type=_ATTACH_TCX_EGRESS,
        )[0]
    except KernelError as error:
        if error.errno == errno.ENODEV or not _exists(ifindex):
            raise AttachError(f"{_interface(ifindex)}: no such interface in this network namespace") from None
        if error.errno == errno.EINVAL:
            raise MissingFeatureError("this kernel has no tcx; it came with Linux 6.6") from None
        raise


def link_create_cgroup(program: int, cgroup: Path, hook: str) -> int:
    """Attach a CGROUP_PROGRAM at a hook of a cgroup and all below it, beside others there may be.

    Return the descriptor of the link, which ends with its last descriptor or pin. AttachError: the folder is not a
    cgroup (v2), or has a program at this hook that stands no others.
    """
    try:
        folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise AttachError(f"{cgroup}: {error.strerror}; expected the folder of a cgroup v2") from None
    what = f"{cgroup}: hook {hook}"
    try:
        return _bpf(
            _LINK_CREATE,
            "link_create_cgroup",
            what,
            prog_fd=program,
            target_fd=folder,
            attach_type=CGROUP_HOOKS[hook],
        )[0]
    except MissingFeatureError as error:
        raise AttachError(
            f"{error}; or another program has the hook for itself: `bpftool cgroup tree` shows it"
        ) from None
    except KernelError as error:
        if error.errno == errno.EBADF:
            raise AttachError(f"{cgroup}: is not the folder of a cgroup v2") from None
        raise
    finally:
        os.close(folder)


def _interface(ifindex: int) -> str:
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return f"interface {ifindex}"


def _attach_error(program: int, ifindex: int, mode: Mode, number: int) -> AttachError:
    name = _interface(ifindex)
    if number in (errno.EBUSY, errno.EEXIST):
        state = xdp_state(ifindex)
        which = f"another XDP program ({state.mode}, id {state.program_id})" if state else "another XDP program"
        return AttachError(
            f"{name}: {which} is attached; remove it (`ip link set dev {name} xdp off`, or end its owner) first"
        )
    if number in (errno.ENODEV, errno.EINVAL) and not _exists(ifindex):
        return AttachError(f"{name}: no such interface in this network namespace")
    told = _why_refused(program, ifindex, mode)
    why = f"{_name(number)}: {told}" if told else _name(number)
    cure = "--xdp-mode generic" if mode == "native" else "--engine raw"
    return AttachError(f"{name}: {mode} XDP refused ({why}); try {cure}")


def _why_refused(program: int, ifindex: int, mode: Mode) -> str:
    """Return the kernel's own words for why it does not attach an XDP program to an interface; empty if it has none.

    BPF_LINK_CREATE has only a number for us. Netlink, asked for the same, answers with a text (NLMSGERR_ATTR_MSG).
    """
    sol_netlink, cap_ack, ext_ack, xdp_fd, xdp_flags, message = 270, 10, 11, 1, 3, 1
    setlink, request_ack, if_none, nested_xdp, error_header = 19, 0x5, 1, 0x8000 | 43, 36

    def ask(fd: int, flags: int) -> tuple[int, str]:
        nested = struct.pack("=HHiHHI", 8, xdp_fd, fd, 8, xdp_flags, flags)
        body = struct.pack("=BxHiIIHH", socket.AF_UNSPEC, 0, ifindex, 0, 0, 4 + len(nested), nested_xdp) + nested
        netlink.send(struct.pack("=IHHII", 16 + len(body), setlink, request_ack, 0, 0) + body)
        reply = netlink.recv(1 << 16)
        text = dict(_attributes(reply[error_header:])).get(message, b"").rstrip(b"\0").decode(errors="replace")
        return -int(struct.unpack_from("=i", reply, 16)[0]), text

    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        for option in (cap_ack, ext_ack):
            netlink.setsockopt(sol_netlink, option, 1)
        code, text = ask(program, _MODE_FLAGS[mode] | if_none)
        if code == 0:  # what was in the way has gone this very moment: the caller is to try again
            ask(-1, _MODE_FLAGS[mode])
    return text


def _exists(ifindex: int) -> bool:
    return any(index == ifindex for index, _ in socket.if_nameindex())


def tracepoint_open(program: int) -> int:
    """Run a TRACING_PROGRAM at its tracepoint until the descriptor that is returned is closed."""
    return _bpf(_RAW_TRACEPOINT_OPEN, "raw_tracepoint", "tracepoint", prog_fd=program)[0]


def link_update(link: int, new_program: int, old_program: int | None = None) -> None:
    """Replace the program of `link` between two packets; with `old_program`, only if the link still runs that one."""
    flags, old = (0, 0) if old_program is None else (_REPLACE, old_program)
    try:
        _bpf(
            _LINK_UPDATE,
            "link_update",
            "link update",
            link_fd=link,
            new_prog_fd=new_program,
            flags=flags,
            old_prog_fd=old,
        )
    except MissingFeatureError:
        if old_program is None or link_info(link).program_id == prog_info(old_program).id:
            raise
        raise KernelError("link update: it runs another program by now", errno.EPERM) from None


def link_info(fd: int) -> LinkInfo:
    """Return what the kernel says of the link behind `fd`."""
    info = _ffi.new("struct link_info *")
    _bpf(_GET_INFO, "get_info", "link", bpf_fd=fd, info_len=_ffi.sizeof(info[0]), info=_address(info))
    has_interface = info.type in (_LINK_TYPE_XDP, _LINK_TYPE_TCX)
    cgroup_id = info.ifindex | info.pad2[0] << 32 if info.type == _LINK_TYPE_CGROUP else 0
    return LinkInfo(info.type, info.id, info.prog_id, info.ifindex if has_interface else 0, cgroup_id)


def link_detach(fd: int) -> None:
    """Take the program off; the link stays as an empty, defunct object until its last reference goes."""
    try:
        _bpf(_LINK_DETACH, "link_detach", "link detach", link_fd=fd)
    except KernelError as error:
        if error.errno != errno.ENOLINK:  # defunct already: its interface is gone
            raise


def links() -> Iterator[LinkInfo]:
    """Yield every link of this machine. Each holds an ifindex of its own network namespace, which is not named."""
    link_id = 0
    while True:
        try:
            link_id = _bpf(_LINK_NEXT_ID, "get_id", "links", id=link_id)[1].next_id
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        try:
            fd = _bpf(_LINK_FD_BY_ID, "get_id", f"link {link_id}", id=link_id)[0]
        except KernelError:  # it went away between the two calls
            continue
        try:
            yield link_info(fd)
        finally:
            os.close(fd)


def xdp_state(ifindex: int) -> XdpState | None:
    """Return the XDP program of an interface of this network namespace, or None if it has none (or does not exist)."""
    get_link, message_error, nested_xdp, attached, program_id = 18, 2, 43, 2, 4
    request = struct.pack("=IHHII BxHiII", 32, get_link, 1, 0, 0, socket.AF_UNSPEC, 0, ifindex, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.send(request)
        reply = netlink.recv(1 << 16)
    if struct.unpack_from("=H", reply, 4)[0] == message_error:
        return None
    xdp = dict(_attributes(dict(_attributes(reply[32:])).get(nested_xdp, b"")))
    mode = {1: "native", 2: "generic", 3: "offloaded", 4: "several"}.get(xdp.get(attached, b"\0")[0])
    return XdpState(mode, struct.unpack("=I", xdp[program_id])[0]) if mode and program_id in xdp else None


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, value) of the netlink attributes in `data`."""
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            return
        yield kind & 0x3FFF, data[at + 4 : at + length]
        at += (length + 3) & ~3


def membarrier_global() -> None:
    """Return when every CPU has been through a quiescent state: no XDP run that was in flight still is. About 14 ms.

    A kernel with nohz_full CPUs, or built without membarrier(2), has no MEMBARRIER_CMD_GLOBAL. It waits just as long
    before an update of a map inside a map returns, for the sake of whoever reads the old one: so this updates one.
    """
    _grace_period()()


@functools.cache
def _grace_period() -> Callable[[], None]:
    """Return what waits for a grace period of RCU on this kernel."""
    offered = _membarrier(_MEMBARRIER_QUERY)
    if offered > 0 and offered & _MEMBARRIER_GLOBAL:
        return _membarrier_grace
    return map_of_maps_grace()


def _membarrier(command: int) -> int:
    return int(_libc.syscall(_MEMBARRIER_SYSCALL, _ffi.cast("int", command), _ffi.cast("unsigned int", 0)))


def _membarrier_grace() -> None:
    if _membarrier(_MEMBARRIER_GLOBAL) < 0:
        raise _fail("membarrier", _ffi.errno)


def map_of_maps_grace() -> Callable[[], None]:
    """Return a function that waits for a grace period of RCU by replacing the one map inside a map of its own."""
    key, inner = struct.pack("=I", 0), map_create("inner", 4, 4, 1)
    outer = map_create("grace", 4, 4, 1, map_type=ARRAY_OF_MAPS, inner_fd=inner)
    return functools.partial(map_update, outer, key, struct.pack("=I", inner))


def is_bpffs(folder: Path) -> bool:
    """Return whether `folder` lies in a mounted bpffs."""
    return _file_system(folder) == _BPFFS_MAGIC


def is_cgroup(folder: Path) -> bool:
    """Return whether `folder` is a cgroup, of the hierarchy of cgroups v2."""
    return folder.is_dir() and _file_system(folder) == _CGROUP2_MAGIC


def _file_system(folder: Path) -> int:
    """Return the magic number of the file system that `folder` lies in; 0: there is no such folder."""
    buffer = _ffi.new("long[]", 64)  # struct statfs is 120 bytes and starts with the type
    return int(buffer[0]) if _libc.statfs(os.fsencode(folder), buffer) == 0 else 0


def mount_bpffs(folder: Path, init_namespace: Path = Path("/proc/1/ns/mnt")) -> None:
    """Make `folder` a bpffs, unless it lies in one already.

    In a mount namespace of our own (`ip netns exec` makes one) a mount would end with this process and take the pins
    with it. So it is made in the namespace of process 1, from where it comes to us; only where it does not (mounts that
    are private) the pins last no longer than this process.
    """
    if is_bpffs(folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _fail(f"folder {folder}", error.errno or errno.EIO) from None
    if not _is_our_namespace(init_namespace):
        mount = ["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(folder)]
        with contextlib.suppress(OSError):
            subprocess.run(["nsenter", f"--mount={init_namespace}", "--", *mount], capture_output=True, check=False)
        if is_bpffs(folder):
            return
    if _libc.mount(b"bpf", os.fsencode(folder), b"bpf", 0, _ffi.new("char[]", b"mode=0700")) < 0:
        number = _ffi.errno
        if number == errno.ENODEV:
            raise MissingFeatureError(f"{folder}: this kernel has no bpffs; it needs CONFIG_BPF_SYSCALL")
        raise _fail(f"mount of a bpffs at {folder}", number)


def _is_our_namespace(namespace: Path) -> bool:
    try:
        return namespace.stat().st_ino == Path("/proc/self/ns/mnt").stat().st_ino
    except OSError:  # not ours to look into: then not ours to mount into
        return True


def read_sysctl(name: str) -> str:
    """Return a kernel parameter of this network namespace, e.g. `net/ipv4/ip_forward`. KernelError: it cannot be."""
    return str(_sysctl(name, Path.read_text)).strip()


def write_sysctl(name: str, value: str) -> None:
    """Set a kernel parameter of this network namespace. KernelError: it cannot be."""
    _sysctl(name, lambda path: path.write_text(value + "\n"))  # an empty write would be none at all


def _sysctl(name: str, access: Callable[[Path], Any]) -> Any:
    try:
        return access(Path("/proc/sys", name))
    except OSError as error:
        message = f"{name.replace('/', '.')}: {error.strerror}; set it by hand, or run as root"
        raise KernelError(message, error.errno or 0) from error
