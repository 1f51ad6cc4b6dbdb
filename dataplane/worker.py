"""One worker: a thread that runs the packet loop of one queue of one interface."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dataplane import loop, rawloop
from dataplane.afxdp import Socket
from dataplane.context import Node
from dataplane.originals import Originals
from dataplane.rawsock import PacketSocket
from dataplane.rings import Pool
from xdp.clock import Clock

log = logging.getLogger(__name__)


class Thread:
    """Worker `number` of a node: a thread that runs a compiled loop.

    Its last argument is the word that stops it; it also wakes up by `bell`, an eventfd, which is closed in the end.
    """

    def __init__(self, node: Node, number: int, bell: int, loop: Callable[..., object], *arguments: object) -> None:
        self.number = number
        self.failure: BaseException | None = None
        self.node = node
        self._bell = bell
        self._loop = loop
        self._stop = np.zeros(1, np.uint64)
        self._arguments = (*arguments, self._stop)
        self._thread = threading.Thread(target=self._run, name=f"worker-{number}", daemon=True)

    def _run(self) -> None:
        try:
            self._loop(*self._arguments)
        except BaseException as error:  # noqa: BLE001  shown by whoever watches the workers: a thread has nobody to raise to
            self.failure = error
            # There is no loop: XDP need not try, nobody waits for its turn, and who has its number next begins outside.
            self.node.tables.heartbeats[self.number] = 0
            self.node.tables.turns[self.number] += self.node.tables.turns[self.number] & np.uint64(1)

    def start(self) -> None:
        """Start the loop; it beats once it runs, which takes as long as its compilation."""
        self._thread.start()

    @property
    def has_begun(self) -> bool:
        """Whether it was started."""
        return self._thread.ident is not None

    @property
    def is_beating(self) -> bool:
        """Whether the loop has begun and not ended. Raises what ended it, if it did not end by itself."""
        if self.failure is not None:
            raise self.failure
        return bool(self.node.tables.heartbeats[self.number])

    def stop(self) -> None:
        """End the loop and wait for it."""
        self._stop[0] = 1
        os.eventfd_write(self._bell, 1)  # it may be asleep
        if self._thread.is_alive():
            self._thread.join()
        os.close(self._bell)


class Worker(Thread):
    """A worker of engines `xdp` and `afxdp`, serving row `own` of `ports` through `sock`."""

    def __init__(
        self, node: Node, number: int, ports: npt.NDArray[np.void], own: int, sock: Socket, pool: Pool, clock: Clock
    ) -> None:
        bell = _new_bell()
        scratch = loop.new_scratch(sock.fd, bell, len(ports))
        super().__init__(node, number, bell, loop.run, node, number, ports, own, sock.queue, pool, scratch, clock.words)
        self.sock = sock
        self.pool = pool


class RawWorker(Thread):
    """A worker of engine `raw`, serving the packet socket `sock`."""

    def __init__(self, node: Node, originals: Originals, number: int, sock: PacketSocket, clock: Clock) -> None:
        bell = _new_bell()
        scratch = rawloop.new_scratch(sock.fd, bell)
        super().__init__(node, number, bell, rawloop.run, node, originals, number, sock.queue, scratch, clock.words)
        self.sock = sock


def _new_bell() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC)
