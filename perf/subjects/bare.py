"""The bars: an XDP program and an AF_XDP loop that forward and do nothing else."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack

from perf.bed import Testbed
from perf.traffic import load_program, mac_word
from xdp import links


class BareRedirect:
    """The bar for XDP: a program that writes two MACs and redirects."""

    name = "bare-xdp"
    translates = False
    leads_back = True

    @contextlib.contextmanager
    def running(self, bed: Testbed) -> Iterator[None]:
        """Attach the program to both interfaces."""
        node = bed.world.node
        ends = ((bed.inside, bed.outside, bed.world["server"]), (bed.outside, bed.inside, bed.world["client"]))
        with ExitStack() as stack, node.entered():
            for entrance, way_out, beyond in ends:
                macs = {"DST_MAC": mac_word(beyond.mac), "SRC_MAC": mac_word(way_out.mac)}
                packets = {"FAMILY": bed.shape.family, "VLAN": bed.shape.vlan}
                there = {**macs, **packets, "IFINDEX": socket.if_nametoindex(way_out.name)}
                program = load_program(bed.pins, "redirect.c", "redirect", there)
                stack.callback(os.close, program)
                link = links.create_xdp(program, socket.if_nametoindex(entrance.name), "native")
                stack.callback(os.close, link)
            mine = stack.pop_all()
        with mine:
            yield


class BareAfXdp:
    """The bar for AF_XDP: a compiled loop that receives from one socket and sends to another, frames untouched."""

    name = "bare-afxdp"
    translates = False
    leads_back = False

    @contextlib.contextmanager
    def running(self, bed: Testbed) -> Iterator[None]:
        """Run the loop in a thread of ours."""
        from dataplane.afxdp import Umem  # compiles
        from perf import echo

        with ExitStack() as stack:
            with bed.world.node.entered(), bed.cpus.pinned(bed.cpus.others):
                umem = stack.enter_context(Umem())
                inward, outward = umem.open(bed.inside.name), umem.open(bed.outside.name)
                stack.enter_context(echo.fed(inward))
                stack.enter_context(echo.Loop(inward, outward, echo.Act.SEND))
            yield
