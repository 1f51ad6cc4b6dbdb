"""Drains with a deadline, on a clock that stands still until it is moved. Ids are those of docs/behaviours.md."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.memory_node import MemoryNode
from tests.packets import Address, ack, data, fin, reset_to, syn, syn_ack, udp
from tests.services import Service, split
from xdp.errors import Error, UsageError
from xdp.schema import Reason

WEB, DNS, OTHER = Service("web", "10.96.0.1:80"), Service("dns", "10.96.0.10:53", protocol="UDP"), 8081
DEADLINE_S = 600


@pytest.fixture(params=[4, 6])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryNode:
    return MemoryNode(tmp_path, family=request.param)


@pytest.fixture
def served(node: MemoryNode) -> tuple[Service, Service]:
    """A Service of TCP and one of UDP, each with web-1 and web-2."""
    web = node.of_family(WEB).with_endpoints(node.endpoint("web-1"), node.endpoint("web-2"))
    dns = node.of_family(DNS).with_endpoints(node.endpoint("web-1", OTHER), node.endpoint("web-2", OTHER))
    node.apply(web, dns)
    return web, dns


def say(node: MemoryNode, state: str, host: str, **more: int) -> list[dict[str, object]]:
    """Say it of all endpoints on a host."""
    address, _ = split(node.endpoint(host))
    return node.answer("administer", endpoints=[address], state=state, **more)  # type: ignore[no-any-return]


def opened(node: MemoryNode, service: Service, host: str) -> Address:
    """Open a TCP connection to a host; return its client."""
    while True:
        client = node.client()
        if node.send(syn(client, service.at)).only[0] == host:
            break
    endpoint = node.at(host, 8080)
    node.send(syn_ack(endpoint, client), host)
    node.send(ack(client, service.at))
    return client


def is_reset(node: MemoryNode, frame: bytes, host: str = "client") -> bool:
    """Send a frame; return whether a RST answers it."""
    sent = node.send(frame, host)
    return sent.reason == Reason.ENDPOINT_REMOVED and sent.only == (host, reset_to(node.on_the_wire(frame, host)))


def goes_on(node: MemoryNode, service: Service, client: Address, host: str) -> bool:
    return node.send(data(client, service.at)).only[0] == host


def test_L_who_takes_the_last_endpoint_out_is_told_of_the_service_that_refuses_new_clients(node, served):
    keys = sorted(service.key for service in served)
    assert node.status()["without_endpoint"] == {"count": 0, "ports": []}
    assert not any(row["without_endpoint"] for row in say(node, "drain", "web-1"))
    told = say(node, "maint", "web-2")
    assert sorted(key for row in told for key in row["without_endpoint"]) == keys
    assert node.status()["without_endpoint"] == {"count": 2, "ports": keys}
    say(node, "ready", "web-1")
    assert node.status()["without_endpoint"] == {"count": 0, "ports": []}


@pytest.mark.faults(87)
def test_L_a_client_that_keeps_its_connection_alive_is_reset_at_the_deadline_and_no_other(node, served, caplog):
    caplog.set_level(logging.INFO)
    web, _ = served
    held, other = opened(node, web, "web-1"), opened(node, web, "web-2")
    told = say(node, "drain", "web-1", deadline_s=DEADLINE_S)
    assert {(row["state"], row["deadline_s"]) for row in told} == {("drain", DEADLINE_S)}
    for _ in range(DEADLINE_S // 60 - 1):
        node.advance(60)
        node.sweep()
        node.end_overdue()
        assert goes_on(node, web, held, "web-1")
    assert node.status()["taken_out"] == {"drain": 2, "maint": 0, "next_deadline_s": 60.0, "ended": 0}
    assert {row["deadline_s"] for row in node.answer("endpoints") if "deadline_s" in row} == {60.0}
    node.advance(60)
    node.end_overdue()
    assert is_reset(node, data(held, web.at))
    assert is_reset(node, data(node.at("web-1", 8080), held), "web-1")
    assert goes_on(node, web, other, "web-2")
    assert node.status()["taken_out"] == {"drain": 0, "maint": 2, "next_deadline_s": None, "ended": 1}
    assert "the deadline of the drain has passed" in caplog.text
    assert "1 connection ended: their endpoint is in maintenance" in caplog.text
    assert {node.send(syn(node.client(), web.at)).only[0] for _ in range(20)} == {"web-2"}


@pytest.mark.faults(129)
def test_L_idle_and_half_closed_connections_end_and_datagrams_move(node, served):
    web, dns = served
    half, idle = opened(node, web, "web-1"), opened(node, web, "web-1")
    node.send(fin(half, web.at))
    while node.send(udp(asking := node.client(), dns.at)).only[0] != "web-1":
        pass
    say(node, "drain", "web-1", deadline_s=20)  # nothing is forgotten before for being idle
    node.advance(19)
    node.end_overdue()
    assert goes_on(node, web, half, "web-1")
    assert node.send(udp(asking, dns.at)).only[0] == "web-1"
    node.advance(1)
    node.end_overdue()
    assert [is_reset(node, data(client, web.at)) for client in (half, idle)] == [True, True]
    assert node.send(udp(asking, dns.at)).only[0] == "web-2"


@pytest.mark.faults(129)
@pytest.mark.parametrize("word", ["ready", "drain"])
def test_L_another_word_takes_a_deadline_back(node, served, word):
    web, _ = served
    held = opened(node, web, "web-1")
    say(node, "drain", "web-1", deadline_s=DEADLINE_S)
    assert {row["deadline_s"] for row in say(node, word, "web-1")} == {None}
    node.advance(2 * DEADLINE_S)
    node.end_overdue()
    assert goes_on(node, web, held, "web-1")
    given = {node.send(syn(node.client(), web.at)).only[0] for _ in range(20)}
    assert given == ({"web-1", "web-2"} if word == "ready" else {"web-2"})


def test_L_another_deadline_takes_the_place_of_the_one_before(node, served):
    web, _ = served
    held = opened(node, web, "web-1")
    say(node, "drain", "web-1", deadline_s=2 * DEADLINE_S)
    say(node, "drain", "web-1", deadline_s=60)
    node.advance(60)
    node.end_overdue()
    assert is_reset(node, data(held, web.at))


def test_L_each_drain_has_a_deadline_of_its_own(node, served):
    web, _ = served
    first, second = opened(node, web, "web-1"), opened(node, web, "web-2")
    say(node, "drain", "web-1", deadline_s=60)
    say(node, "drain", "web-2", deadline_s=DEADLINE_S)
    node.advance(60)
    node.end_overdue()
    assert is_reset(node, data(first, web.at))
    assert goes_on(node, web, second, "web-2")
    assert node.status()["taken_out"]["next_deadline_s"] == DEADLINE_S - 60


def test_L_a_deadline_that_passes_while_no_daemon_is_there_is_held_by_the_next(tmp_path: Path):
    first = MemoryNode(tmp_path)
    first.apply(WEB.with_endpoints(first.endpoint("web-1"), first.endpoint("web-2")))
    say(first, "drain", "web-1", deadline_s=DEADLINE_S)
    successor = MemoryNode(tmp_path)
    successor.apply(WEB.with_endpoints(first.endpoint("web-1"), first.endpoint("web-2")))
    assert successor.status()["taken_out"]["next_deadline_s"] == DEADLINE_S
    successor.advance(DEADLINE_S)
    successor.end_overdue()
    assert successor.status()["taken_out"]["maint"] == 1
    assert MemoryNode(tmp_path).status()["taken_out"]["maint"] == 1


def test_a_deadline_that_cannot_be_changes_nothing(node, served):
    before = node.answer("endpoints")
    for more in ({"state": "drain", "deadline_s": 0}, {"state": "maint", "deadline_s": 60}):
        with pytest.raises(UsageError, match="deadline"):
            node.answer("administer", endpoints=[node.endpoint("web-1")], **more)
    assert node.answer("endpoints") == before


def test_L_a_deadline_that_cannot_be_kept_is_told_and_holds(node, served, monkeypatch):
    def full(path: Path, said: object) -> None:
        raise Error("no space")

    monkeypatch.setattr("dataplane.administered.keep", full)
    with pytest.raises(Error, match="it is so, but a restart will forget it: no space"):
        say(node, "drain", "web-1", deadline_s=60)
    monkeypatch.undo()
    node.advance(60)
    node.end_overdue()
    assert node.status()["taken_out"]["maint"] == 2
