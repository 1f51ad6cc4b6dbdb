"""Frames that are lost after XDP's verdict, counted by interface and error.

XDP_REDIRECT and XDP_TX are promises: whether the other interface took the frame shows later, and then the program has
long counted it as forwarded. The kernel tells of it in four tracepoints, and in nothing else that names both
interfaces (drivers count some of it as drops of the one or the other):

    xdp_redirect_err   one frame, refused at once: interface gone (EINVAL), down (ENETDOWN), frame longer than its MTU
                       and a VLAN tag (EMSGSIZE), driver that cannot send for XDP, as a veth whose peer has neither XDP
                       nor GRO (EOPNOTSUPP); an AF_XDP socket without room (ENOBUFS) or chunks to fill (ENOMEM)
    xdp_devmap_xmit    up to 16 frames, refused by the driver at the end of a NAPI poll: a veth whose peer is down
                       (ENXIO); no error: its ring is full, or the peer's MTU is smaller
    xdp_bulk_tx        the same for XDP_TX in a veth; there ENXIO also means a peer with neither XDP nor GRO
    xdp_exception      one frame: XDP_TX refused by another driver, or a generic redirect by a stopped queue; no error

Not told by the kernel: what a driver drops of a *generic* redirect (a veth whose peer is down or has a smaller MTU:
only tx_dropped of the interface grows), and XDP_TX into a veth whose peer has GRO but no XDP: nobody wakes the peer,
and up to 256 frames wait in its ring until a redirect does.

A small program sits at each and adds to one hash map, which userspace reads in one call. It costs nothing as long as
nothing fails, except at xdp_devmap_xmit and xdp_bulk_tx: there a few instructions per burst.

Numbers of interfaces repeat between network namespaces, and a tracepoint sees them all. xdp_redirect_err tells the XDP
program, xdp_devmap_xmit does not; so an event counts if its receiving interface lies in the namespace in which
RedirectErrors was made, told by the namespace's inode. That also holds when the program is replaced.

Why BTF tracepoints, and instructions instead of C: the stable format in tracefs has no namespace in it and needs
tracefs mounted; a raw tracepoint reads through a wrong offset without complaint, and in C it needs a compiler and a
pin. Here the offsets come from the running kernel's BTF, and the verifier refuses what is no field of the argument.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

from xdp import instructions as bpf
from xdp import kernel, netns
from xdp.btf import Btf
from xdp.errors import Error, MissingFeatureError
from xdp.instructions import R0, R1, R2, R3, R4, R6, R7, R8, R10, Program

_ENTRIES = 2048  # (from, to, error): a bridge of Pods and what leads out
_KEY = struct.Struct("=III")  # as the programs store it on their stack
_FRAMES = struct.Struct("=Q")
_KEY_AT, _TO_AT, _ERROR_AT, _ZERO_AT = -16, -12, -8, -24  # places on the stack
_BPF_NOEXIST = 1
_MAP_TYPE_UNSPEC = 0
_XDP_TX = 3


class Lost(NamedTuple):
    """What was lost where. Interfaces by number, 0 if there is none; `errno` is 0 if the kernel names no error."""

    from_ifindex: int
    to_ifindex: int
    errno: int


NO_ROOM = Lost(0, 0, 0)  # lost frames for whose kind the map had no room


@dataclass(frozen=True)
class _Layout:
    """Offsets in the kernel's structs, in bytes."""

    ifindex: int  # in struct net_device
    namespace: int  # in struct net_device, a pointer to struct net
    inode: int  # in struct net


@dataclass(frozen=True)
class _Tracepoint:
    """Where a program sits. `parameters` of its handler, the first being the kernel's own.

    `describe` returns the instructions that put the number of frames into r8, the number of the interface that they
    were for into r3 and the error (negative) into r4, from the arguments at r6 and the receiving net_device in r7; they
    jump to "end" if nothing was lost. r3 may be left as it is: the receiving interface.
    """

    name: str
    parameters: int
    describe: Callable[[_Layout], Program]


def _argument(number: int) -> int:
    return 8 * number


def _redirect_err(layout: _Layout) -> Program:
    """Arguments: net_device, program, target, error, type of map, number of map, index."""
    del layout
    return [
        bpf.move_constant(R8, 1),
        bpf.load64(R4, R6, _argument(3)),
        bpf.load64(R2, R6, _argument(4)),
        bpf.load64(R3, R6, _argument(6)),  # an ifindex, unless the redirect went through a map
        bpf.jump_if_equal32(R2, _MAP_TYPE_UNSPEC, "count"),
        bpf.move_constant(R3, 0),
    ]


def _devmap_xmit(layout: _Layout) -> Program:
    """Arguments: net_device from, net_device to, sent, drops, error."""
    return [
        bpf.load64(R8, R6, _argument(3)),
        bpf.jump_if_equal32(R8, 0, "end"),
        bpf.load64(R4, R6, _argument(4)),
        bpf.load64(R3, R6, _argument(1)),
        bpf.load32(R3, R3, layout.ifindex),
    ]


def _bulk_tx(layout: _Layout) -> Program:
    """Arguments: net_device, sent, drops, error."""
    del layout
    return [
        bpf.load64(R8, R6, _argument(2)),
        bpf.jump_if_equal32(R8, 0, "end"),
        bpf.load64(R4, R6, _argument(3)),
    ]


def _exception(layout: _Layout) -> Program:
    """Arguments: net_device, program, verdict. Other verdicts than XDP_TX are told elsewhere, or are no promises."""
    del layout
    return [
        bpf.load64(R2, R6, _argument(2)),
        bpf.jump_if_not_equal32(R2, _XDP_TX, "end"),
        bpf.move_constant(R8, 1),
        bpf.move_constant(R4, 0),
    ]


_TRACEPOINTS = (
    _Tracepoint("xdp_redirect_err", 8, _redirect_err),
    _Tracepoint("xdp_devmap_xmit", 6, _devmap_xmit),
    _Tracepoint("xdp_bulk_tx", 5, _bulk_tx),
    _Tracepoint("xdp_exception", 4, _exception),
)


def _program(counts: int, inode: int, layout: _Layout, describe: Callable[[_Layout], Program]) -> bytes:
    """Return the machine code that counts the events of one tracepoint in map `counts`, if in namespace `inode`."""
    return bpf.assemble(
        [
            bpf.move_register(R6, R1),
            bpf.load64(R7, R6, _argument(0)),
            bpf.load64(R2, R7, layout.namespace),
            bpf.load32(R2, R2, layout.inode),
            bpf.jump_if_not_equal32(R2, inode, "end"),
            bpf.load32(R3, R7, layout.ifindex),
            bpf.store32(R10, _KEY_AT, R3),
            *describe(layout),
            "count",
            bpf.truncate32(R8),
            bpf.negate32(R4),
            bpf.store32(R10, _TO_AT, R3),
            bpf.store32(R10, _ERROR_AT, R4),
            *_look_up(counts),
            bpf.jump_unless_null(R0, "add"),
            bpf.move_constant(R1, 0),
            bpf.store64(R10, _ZERO_AT, R1),
            *bpf.load_map(R1, counts),
            *_stack_address(R2, _KEY_AT),
            *_stack_address(R3, _ZERO_AT),
            bpf.move_constant(R4, _BPF_NOEXIST),  # another CPU may have been faster
            bpf.call(bpf.MAP_UPDATE),
            *_look_up(counts),
            bpf.jump_unless_null(R0, "add"),
            bpf.move_constant(R1, 0),  # full: NO_ROOM was put in beforehand
            bpf.store32(R10, _KEY_AT, R1),
            bpf.store32(R10, _TO_AT, R1),
            bpf.store32(R10, _ERROR_AT, R1),
            *_look_up(counts),
            bpf.jump_if_null(R0, "end"),
            "add",
            bpf.atomic_add64(R0, 0, R8),
            "end",
            bpf.move_constant(R0, 0),
            bpf.leave(),
        ]
    )


def _stack_address(register: int, offset: int) -> Program:
    return [bpf.move_register(register, R10), bpf.add_constant(register, offset)]


def _look_up(counts: int) -> Program:
    """Put the address of the count of the key on the stack into r0, null if there is none."""
    return [*bpf.load_map(R1, counts), *_stack_address(R2, _KEY_AT), bpf.call(bpf.MAP_LOOKUP)]


class RedirectErrors:
    """Counts from now on what is lost after the verdict in this network namespace, until it is closed.

    MissingFeatureError: this kernel does not tell, or no privilege (CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN). Making one
    takes 0.2 s. It belongs to the network namespace of the thread that makes it.
    """

    def __init__(self) -> None:
        self._descriptors: list[int] = []
        try:
            self._open()
        except BaseException as error:
            self.close()
            if isinstance(error, Error):
                why = str(error).partition("\n")[0]  # what follows is the verifier's log
                raise MissingFeatureError(f"failed redirects are not counted: {why}") from error
            raise

    def _open(self) -> None:
        btf = Btf()
        layout = _Layout(
            ifindex=btf.offset("net_device", "ifindex"),
            namespace=btf.offset("net_device", "nd_net.net"),
            inode=btf.offset("net", "ns.inum"),
        )
        inode = netns.here()
        self._counts = kernel.map_create("redirect_errors", _KEY.size, _FRAMES.size, _ENTRIES, map_type=kernel.HASH)
        self._descriptors.append(self._counts)
        kernel.map_update(self._counts, _KEY.pack(*NO_ROOM), _FRAMES.pack(0))
        for tracepoint in _TRACEPOINTS:
            number = btf.typedef(f"btf_trace_{tracepoint.name}")
            if btf.parameters(number) != tracepoint.parameters:
                raise MissingFeatureError(
                    f"tracepoint {tracepoint.name} has other arguments than in Linux 5.13 to 6.18"
                )
            code = _program(self._counts, inode, layout, tracepoint.describe)
            program = kernel.prog_load(tracepoint.name, code, kernel.TRACING_PROGRAM, number)
            try:
                self._descriptors.append(kernel.tracepoint_open(program))
            finally:
                os.close(program)  # the tracepoint's descriptor keeps it
        self.counts()  # Linux before 5.6 cannot read a map in one call: better told now than every second

    def counts(self) -> dict[Lost, int]:
        """Return the frames lost so far, by interface and error; kinds of which there were none are left out.

        `to_ifindex` 0 is an AF_XDP socket (XDP_STATISTICS of the socket counts the same frames). It equals
        `from_ifindex` for XDP_TX, and where a stopped queue did not take a generic redirect. NO_ROOM: more kinds than
        the map holds. About 0.13 ms.
        """
        counts = {}
        for key, value in kernel.map_items(self._counts).items():
            (frames,) = _FRAMES.unpack(value)
            if frames:
                counts[Lost(*_KEY.unpack(key))] = frames
        return counts

    def close(self) -> None:
        """Stop counting."""
        while self._descriptors:
            with contextlib.suppress(OSError):
                os.close(self._descriptors.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
