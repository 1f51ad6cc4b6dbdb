"""Health check node ports, asked over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest

from dataplane.health_checks import HealthChecks
from lb.model import HealthCheck

LOOPBACK, LOOPBACK6 = IPv4Address("127.0.0.1"), IPv6Address("::1")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((str(LOOPBACK), 0))
        return int(sock.getsockname()[1])


def ask(
    port: int, method: str = "GET", path: str = "/healthz", host: str = str(LOOPBACK)
) -> tuple[int, dict[str, str], Any]:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    connection.request(method, path)
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    return answer.status, dict(answer.getheaders()), body


@contextlib.asynccontextmanager
async def serving(is_healthy: Callable[[], bool] = lambda: True) -> AsyncIterator[HealthChecks]:
    checks = HealthChecks(is_healthy)
    try:
        yield checks
    finally:
        checks.close()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


@pytest.mark.parametrize(("endpoints", "is_healthy", "status"), [(2, True, 200), (0, True, 503), (2, False, 503)])
def test_S10_the_answer_says_how_many_endpoints_are_here(endpoints, is_healthy, status):
    async def scenario() -> None:
        async with serving(lambda: is_healthy) as checks:
            port = free_port()
            assert await checks.apply([HealthCheck("shop", "web", port, endpoints, 4)], [LOOPBACK]) == []
            for path in ("/", "/healthz"):
                code, headers, body = await asyncio.to_thread(ask, port, "GET", path)
                assert code == status
                assert headers["Content-Type"] == "application/json"
                assert headers["X-Load-Balancing-Endpoint-Weight"] == str(endpoints)
                assert body == {
                    "service": {"namespace": "shop", "name": "web"},
                    "localEndpoints": endpoints,
                    "serviceProxyHealthy": is_healthy,
                }

    run(scenario())


def test_S10_who_asks_over_ipv6_is_told_of_endpoints_of_ipv6():
    async def scenario() -> None:
        async with serving() as checks:
            port, alone = free_port(), free_port()
            both = [HealthCheck("shop", "web", port, 0, 4), HealthCheck("shop", "web", port, 2, 6)]
            given = [*both, HealthCheck("shop", "four", alone, 1, 4)]
            assert await checks.apply(given, [LOOPBACK, LOOPBACK6]) == []
            for host, status, endpoints in ((LOOPBACK, 503, 0), (LOOPBACK6, 200, 2)):
                code, headers, body = await asyncio.to_thread(ask, port, host=str(host))
                assert (code, body["localEndpoints"]) == (status, endpoints)
                assert headers["X-Load-Balancing-Endpoint-Weight"] == str(endpoints)
            assert (await asyncio.to_thread(ask, alone))[0] == 200
            with pytest.raises(ConnectionRefusedError):
                await asyncio.to_thread(ask, alone, host=str(LOOPBACK6))

    run(scenario())


def test_S10_a_change_is_answered_at_once_and_a_port_that_is_gone_not_at_all():
    async def scenario() -> None:
        async with serving() as checks:
            first, second = free_port(), free_port()
            await checks.apply([HealthCheck("shop", "web", first, 1, 4)], [LOOPBACK])
            await checks.apply(
                [HealthCheck("shop", "web", first, 3, 4), HealthCheck("a", "b", second, 0, 4)], [LOOPBACK]
            )
            assert (await asyncio.to_thread(ask, first))[2]["localEndpoints"] == 3
            assert (await asyncio.to_thread(ask, second))[0] == 503
            await checks.apply([HealthCheck("a", "b", second, 0, 4)], [LOOPBACK])
            with pytest.raises(ConnectionRefusedError):
                await asyncio.to_thread(ask, first)
            assert (await asyncio.to_thread(ask, second))[2]["service"]["name"] == "b"

    run(scenario())


def test_S10_a_port_that_is_taken_is_told_and_tried_again():
    async def scenario() -> None:
        async with serving() as checks:
            with socket.socket() as taken:
                taken.bind((str(LOOPBACK), 0))
                taken.listen()
                port = taken.getsockname()[1]
                (problem,) = await checks.apply([HealthCheck("shop", "web", port, 1, 4)], [LOOPBACK])
                assert problem.startswith(f"127.0.0.1:{port} of Service shop/web: cannot be listened on (")
            assert await checks.apply([HealthCheck("shop", "web", port, 1, 4)], [LOOPBACK]) == []
            assert (await asyncio.to_thread(ask, port))[0] == 200

    run(scenario())


def test_S10_clients_that_are_rude_do_not_keep_others_from_an_answer():
    async def scenario() -> None:
        async with serving() as checks:
            port = free_port()
            await checks.apply([HealthCheck("shop", "web", port, 1, 4)], [LOOPBACK])
            with contextlib.ExitStack() as stack:
                rude = [stack.enter_context(socket.create_connection((str(LOOPBACK), port))) for _ in range(3)]
                rude[0].sendall(b"x" * 100_000)
                rude[1].close()
                assert (await asyncio.to_thread(ask, port))[0] == 200

    run(scenario())
