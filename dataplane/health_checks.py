"""Health check node ports: a load balancer asks there whether this node has endpoints of a Service (S10).

HTTP on the addresses of node ports, whatever the path: 200 with endpoints of the Service on this node, 503 without.
They are counted in the family of the address that was asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Iterable
from http import HTTPStatus

from lb.model import HealthCheck
from xdp.addresses import IPAddress, with_port

_LONGEST_REQUEST = 8192  # bytes up to the end of its head
_SILENCE_S = 5.0  # until a client that says nothing is let go
_MOST_CLIENTS = 256

log = logging.getLogger(__name__)

Place = tuple[IPAddress, int]


class HealthChecks:
    """The servers of a node's health check ports. `is_healthy` says whether the node itself serves."""

    def __init__(self, is_healthy: Callable[[], bool]) -> None:
        self._is_healthy = is_healthy
        self._checks: dict[tuple[int, int], HealthCheck] = {}  # by family and port
        self._servers: dict[Place, asyncio.Server] = {}
        self._clients = 0

    async def apply(self, checks: Iterable[HealthCheck], addresses: Iterable[IPAddress]) -> list[str]:
        """Answer for these at these addresses, and for nothing else; return what is wrong, in words."""
        self._checks = {(check.family, check.port): check for check in checks}
        given = list(addresses)
        wanted = {(address, port) for family, port in self._checks for address in given if address.version == family}
        for stale in self._servers.keys() - wanted:
            self._servers.pop(stale).close()
        problems = []
        for address, port in sorted(wanted - self._servers.keys(), key=str):
            try:
                self._servers[address, port] = await asyncio.start_server(
                    self._serve, str(address), port, limit=_LONGEST_REQUEST
                )
            except OSError as error:
                check = self._checks[address.version, port]
                name = f"{check.namespace}/{check.name}"
                problems.append(
                    f"{with_port(address, port)} of Service {name}: cannot be listened on ({error.strerror})"
                )
        return problems

    def close(self) -> None:
        """Answer no more."""
        while self._servers:
            self._servers.popitem()[1].close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            if self._clients <= _MOST_CLIENTS:
                async with asyncio.timeout(_SILENCE_S):
                    await reader.readuntil(b"\r\n\r\n")
                    host, port = writer.get_extra_info("sockname")[:2]
                    writer.write(self.answer(6 if ":" in host else 4, port))
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # slow, silent, rude or gone
        finally:
            self._clients -= 1
            with contextlib.suppress(OSError):
                writer.close()

    def answer(self, family: int, port: int) -> bytes:
        """Return the whole HTTP answer to who asks at a port of an address of that family."""
        check = self._checks.get((family, port))
        if check is None:  # it went away in this moment
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        is_healthy = self._is_healthy()
        status = HTTPStatus.OK if check.local_endpoints and is_healthy else HTTPStatus.SERVICE_UNAVAILABLE
        said = {
            "service": {"namespace": check.namespace, "name": check.name},
            "localEndpoints": check.local_endpoints,
            "serviceProxyHealthy": is_healthy,
        }
        body = json.dumps(said).encode() + b"\n"
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            "Content-Type: application/json\r\n"
            "X-Content-Type-Options: nosniff\r\n"
            f"X-Load-Balancing-Endpoint-Weight: {check.local_endpoints}\r\n"
            f"Content-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode() + body
