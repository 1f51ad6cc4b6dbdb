"""Links: programs where the kernel runs them, at interfaces and cgroups.

A link's descriptor belongs to the caller, and is closed on exec. Errors are those of xdp/kernel.py, and AttachError: an
interface or a cgroup that is taken, or a driver that refuses.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xdp import kernel
from xdp.errors import AttachError, KernelError, MissingFeatureError
from xdp.netlink import BUFFER_BYTES, GETLINK, IFINFOMSG, NetlinkSocket, attribute, attributes, messages
from xdp.syscalls import errno_name

Mode = Literal["native", "generic"]

# enum bpf_cmd, enum bpf_link_type, enum bpf_attach_type
_LINK_CREATE, _LINK_UPDATE, _LINK_FD_BY_ID, _LINK_NEXT_ID, _LINK_DETACH = 28, 29, 30, 31, 34
_LINK_TYPE_CGROUP, _LINK_TYPE_XDP, _LINK_TYPE_TCX = 3, 6, 11
_ATTACH_XDP, _ATTACH_TCX_EGRESS = 37, 47
_MODE_FLAGS: dict[Mode, int] = {"generic": 2, "native": 4}
_IFLA_XDP, _NESTED = 43, 0x8000  # NLA_F_NESTED
_REPLACE = 4  # BPF_F_REPLACE: only if the link still runs old_prog_fd


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


def create_xdp(program: int, ifindex: int, mode: Mode) -> int:
    """Attach an XDP program to interface `ifindex` of this network namespace; return the descriptor of the link.

    The link ends with its last descriptor or pin. AttachError: the interface has an XDP program, or its driver refuses.
    """
    try:
        return kernel.bpf(
            _LINK_CREATE,
            "link_create",
            f"{interface_name(ifindex)}: {mode} XDP",
            prog_fd=program,
            target_ifindex=ifindex,
            attach_type=_ATTACH_XDP,
            flags=_MODE_FLAGS[mode],
        )[0]
    except KernelError as error:
        raise _attach_error(program, ifindex, mode, error.errno) from None


def create_egress(program: int, ifindex: int) -> int:
    """Attach a TC_PROGRAM where frames leave by interface `ifindex` of this network namespace, behind those there are.

    Return the descriptor of the link, which ends with its last descriptor or pin. MissingFeatureError: this kernel has
    no tcx (Linux 6.6).
    """
    try:
        return kernel.bpf(
            _LINK_CREATE,
            "link_create",
            f"{interface_name(ifindex)}: tcx",
            prog_fd=program,
            target_ifindex=ifindex,
            attach_type=_ATTACH_TCX_EGRESS,
        )[0]
    except KernelError as error:
        if error.errno == errno.ENODEV or not _exists(ifindex):
            raise AttachError(f"{interface_name(ifindex)}: no such interface in this network namespace") from None
        if error.errno == errno.EINVAL:
            raise MissingFeatureError("this kernel has no tcx; it came with Linux 6.6") from None
        raise


def create_cgroup(program: int, cgroup: Path, hook: str) -> int:
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
        return kernel.bpf(
            _LINK_CREATE,
            "link_create_cgroup",
            what,
            prog_fd=program,
            target_fd=folder,
            attach_type=kernel.CGROUP_HOOKS[hook],
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


def interface_name(ifindex: int) -> str:
    """Return what an interface of this network namespace is called, its number if it has gone."""
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return f"interface {ifindex}"


def taken(ifindex: int) -> str:
    """Return whose XDP program an interface of this network namespace has, and how to end that, in words."""
    name, state = interface_name(ifindex), xdp_state(ifindex)
    if state is None:
        return f"{name}: had another XDP program a moment ago; try again"
    which = f"{name}: another XDP program ({state.mode}, id {state.program_id}) is attached"
    for link in every():
        if (link.type, link.ifindex, link.program_id) == (_LINK_TYPE_XDP, ifindex, state.program_id):
            return f"{which}; end its owner, of whom `bpftool link show id {link.id}` tells, or give another interface"
    return f"{which}; remove it (`ip link set dev {name} xdp off`), or give another interface"


def _attach_error(program: int, ifindex: int, mode: Mode, number: int) -> AttachError:
    name = interface_name(ifindex)
    if number in (errno.EBUSY, errno.EEXIST):
        return AttachError(taken(ifindex))
    if number in (errno.ENODEV, errno.EINVAL) and not _exists(ifindex):
        return AttachError(f"{name}: no such interface in this network namespace")
    told = _why_refused(program, ifindex, mode)
    why = f"{errno_name(number)}: {told}" if told else errno_name(number)
    cure = "--xdp-mode generic" if mode == "native" else "--engine raw"
    return AttachError(f"{name}: {mode} XDP refused ({why}); try {cure}")


def _why_refused(program: int, ifindex: int, mode: Mode) -> str:
    """Return the kernel's own words for why it does not attach an XDP program to an interface; empty if it has none.

    BPF_LINK_CREATE has only a number for us. Netlink, asked for the same, answers with a text (NLMSGERR_ATTR_MSG).
    """
    sol_netlink, cap_ack, ext_ack, xdp_fd, xdp_flags, message = 270, 10, 11, 1, 3, 1
    set_link, want_ack, if_none, behind_header = 19, 0x4, 1, 20

    def ask(fd: int, flags: int) -> tuple[int, str]:
        nested = attribute(xdp_fd, struct.pack("=i", fd)) + attribute(xdp_flags, struct.pack("=I", flags))
        body = IFINFOMSG.pack(socket.AF_UNSPEC, 0, ifindex, 0, 0) + attribute(_NESTED | _IFLA_XDP, nested)
        netlink.raw.send(netlink.message(set_link, want_ack, body))
        ((*_, told),) = messages(netlink.raw.recv(BUFFER_BYTES))
        text = bytes(dict(attributes(told[behind_header:])).get(message, b""))
        return -int(struct.unpack_from("=i", told)[0]), text.rstrip(b"\0").decode(errors="replace")

    with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
        for option in (cap_ack, ext_ack):
            netlink.raw.setsockopt(sol_netlink, option, 1)
        code, text = ask(program, _MODE_FLAGS[mode] | if_none)
        if code == 0:  # what was in the way has gone this very moment: the caller is to try again
            ask(-1, _MODE_FLAGS[mode])
    return text


def _exists(ifindex: int) -> bool:
    return any(index == ifindex for index, _ in socket.if_nameindex())


def update(link: int, new_program: int, old_program: int | None = None) -> None:
    """Replace the program of `link` between two packets; with `old_program`, only if the link still runs that one."""
    flags, old = (0, 0) if old_program is None else (_REPLACE, old_program)
    try:
        kernel.bpf(
            _LINK_UPDATE,
            "link_update",
            "link update",
            link_fd=link,
            new_prog_fd=new_program,
            flags=flags,
            old_prog_fd=old,
        )
    except MissingFeatureError:
        if old_program is None or info(link).program_id == kernel.prog_info(old_program).id:
            raise
        raise KernelError("link update: it runs another program by now", errno.EPERM) from None


def info(fd: int) -> LinkInfo:
    """Return what the kernel says of the link behind `fd`."""
    told = kernel.info_of("link", fd)
    ifindex = told.ifindex if told.type in (_LINK_TYPE_XDP, _LINK_TYPE_TCX) else 0
    cgroup_id = told.ifindex | told.pad2[0] << 32 if told.type == _LINK_TYPE_CGROUP else 0
    return LinkInfo(told.type, told.id, told.prog_id, ifindex, cgroup_id)


def detach(fd: int) -> None:
    """Take the program off; the link stays as an empty, defunct object until its last reference goes."""
    try:
        kernel.bpf(_LINK_DETACH, "link_detach", "link detach", link_fd=fd)
    except KernelError as error:
        if error.errno != errno.ENOLINK:  # defunct already: its interface is gone
            raise


def every() -> Iterator[LinkInfo]:
    """Yield every link of this machine. Each holds an ifindex of its own network namespace, which is not named."""
    link_id = 0
    while True:
        try:
            link_id = kernel.bpf(_LINK_NEXT_ID, "get_id", "links", id=link_id)[1].next_id
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        try:
            fd = kernel.bpf(_LINK_FD_BY_ID, "get_id", f"link {link_id}", id=link_id)[0]
        except KernelError:  # it went away between the two calls
            continue
        try:
            yield info(fd)
        finally:
            os.close(fd)


def xdp_state(ifindex: int) -> XdpState | None:
    """Return the XDP program of an interface of this network namespace, or None if it has none (or does not exist)."""
    attached, program_id = 2, 4
    with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
        try:
            ((_, link),) = netlink.get(GETLINK, IFINFOMSG.pack(socket.AF_UNSPEC, 0, ifindex, 0, 0))
        except OSError:
            return None
    xdp = dict(attributes(dict(attributes(link[IFINFOMSG.size :])).get(_IFLA_XDP, b"")))
    mode = {1: "native", 2: "generic", 3: "offloaded", 4: "several"}.get(xdp.get(attached, b"\0")[0])
    return XdpState(mode, struct.unpack("=I", xdp[program_id])[0]) if mode and program_id in xdp else None
