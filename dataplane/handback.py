"""Frames back to the kernel: a packet socket whose frames turn round where they would leave (xdp/bpf/egress.c).

AF_XDP cannot give a frame back. But what is sent with TO_KERNEL_MARK meets our program at the interface's egress, which
redirects it to the same interface's ingress: the kernel takes it as received there, as after XDP_PASS, and connection
tracking, policies and routing see what they see of every other packet.
"""

from __future__ import annotations

import socket

from xdp.schema import Limit


def open_handback(interface: str) -> socket.socket:
    """Return a socket that hands frames to the kernel, as received on `interface`. OSError: there is none."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # 0: it receives nothing
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, int(Limit.TO_KERNEL_MARK))
        sock.bind((interface, 0))
    except OSError:
        sock.close()
        raise
    return sock
