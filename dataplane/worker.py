"""One worker: a thread that runs the packet loop of one queue of one interface."""

from __future__ import annotations

import logging
import threading

import numpy as np
import numpy.typing as npt

from dataplane import loop
from dataplane.afxdp import Socket
from dataplane.pipeline import Node
from dataplane.rings import Pool
from xdp.clock import Clock

log = logging.getLogger(__name__)


class Worker:
    """Worker `number` of a node, serving row `own` of `ports` through `sock`."""

    def __init__(
        self, node: Node, number: int, ports: npt.NDArray[np.void], own: int, sock: Socket, pool: Pool, clock: Clock
    ) -> None:
        self.number = number
        self.sock = sock
        self._node = node
        self._stop = np.zeros(1, np.uint64)
        scratch = loop.new_scratch(sock.fd, len(ports))
        arguments = (node, number, ports, own, sock.queue, pool, scratch, clock.words, self._stop)
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=arguments, name=f"worker-{number}", daemon=True)

    def _run(self, *arguments: object) -> None:
        try:
            loop.run(*arguments)
        except BaseException as error:  # noqa: BLE001  shown by whoever watches the workers: a thread has nobody to raise to
            self._failure = error

    def start(self) -> None:
        """Start the loop; it beats once it runs, which takes as long as its compilation."""
        self._thread.start()

    @property
    def is_beating(self) -> bool:
        """Whether the loop has begun and not ended. Raises what ended it, if it did not end by itself."""
        if self.failure is not None:
            raise self.failure
        return bool(self._node.tables.heartbeats[self.number])

    def stop(self) -> None:
        """End the loop and wait for it."""
        self._stop[0] = 1
        if self._thread.is_alive():
            self._thread.join()
