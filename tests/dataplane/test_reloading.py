"""A node follows its manifests, whatever is in them, and says what came of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dataplane import news
from dataplane.news import News
from dataplane.reloading import Reloading
from lb import manifests
from tests.memory_node import MemoryNode

WEB = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.10, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.2.0.1]}]
"""
MORE = WEB.replace("[10.2.0.1]}", "[10.2.0.1]}, {addresses: [10.2.0.2]}")
AT = {"10.96.0.10:80": {"10.2.0.1"}}
AT_MORE = {"10.96.0.10:80": {"10.2.0.1", "10.2.0.2"}}


@pytest.fixture
def node(tmp_path: Path, caplog) -> MemoryNode:
    """Return a node that is to follow the folder `manifests`, with web.yaml in it."""
    caplog.set_level(logging.INFO)
    made = MemoryNode(tmp_path)
    folder = tmp_path / "manifests"
    folder.mkdir()
    (folder / "web.yaml").write_text(WEB)
    made._node.manifests = Reloading(replace(made._node.settings, files=(str(folder),)))
    return made


@pytest.fixture
def web(node: MemoryNode, tmp_path: Path) -> Path:
    return tmp_path / "manifests" / "web.yaml"


@asynccontextmanager
async def following(node: MemoryNode) -> AsyncIterator[Reloading]:
    """Have the node follow its manifests, as a daemon's jobs do."""
    made, whole = node._node.manifests, node._node
    made.watch()
    whole.in_force.apply(made.load())
    made.has_applied()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        tasks = [group.create_task(made.follow_files()), group.create_task(made.run(whole.in_force, whole.strays))]
        yield made
        for task in tasks:
            task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)


def put(path: Path, text: str) -> None:
    aside = path.with_suffix(".aside")
    aside.write_text(text)
    aside.rename(path)


@pytest.mark.faults(117, 122)
def test_a_file_that_is_emptied_before_it_is_written_takes_nothing_away(node, web, caplog):
    async def follow() -> None:
        async with following(node) as reloading:
            for text, places in ((MORE, AT_MORE), (WEB, AT)):
                before = node.programmed()
                with web.open("w") as stream:
                    await until(lambda: reloading.rejected is not None)
                    assert node.programmed() == before
                    assert f"{web}: is empty now" in "".join(node._node.answer("status", {})["why"])
                    stream.write(text)
                await until(lambda: reloading.rejected is None)
                assert node.programmed() == places
            web.unlink()
            await until(lambda: not node.programmed())

    asyncio.run(follow())
    assert f"manifests not applied, what ran before goes on:\n{web}: is empty now, and was not;" in caplog.text


@pytest.mark.parametrize("is_debug", [False, True])
def test_what_fails_for_no_reason_known_is_told_once_and_tried_again_when_files_change(
    node, web, caplog, monkeypatch, is_debug
):
    caplog.set_level(logging.DEBUG if is_debug else logging.INFO, "dataplane")
    reading = manifests.documents.parse
    reads = []

    def parse(text: str, is_json: bool) -> manifests.documents.Documents:
        reads.append(text)
        if "boom" in text:
            raise ZeroDivisionError("boom")
        return reading(text, is_json)

    monkeypatch.setattr(manifests.documents, "parse", parse)

    async def follow() -> None:
        async with following(node) as reloading:
            for turn in range(2):  # the first time alone, then with all others
                put(web, f"boom: {turn}")
                await until(lambda: f"boom: {turn}" in reads and reloading.rejected is not None)  # noqa: B023
                assert node.programmed() == AT
                (why,) = [line for line in node._node.answer("status", {})["why"] if "internal" in line]
                assert why.endswith("not valid: internal error: ZeroDivisionError: boom; please report it")
                assert not reloading._is_wanted.is_set()
            put(web, MORE)
            await until(lambda: reloading.rejected is None)
            assert node.programmed() == AT_MORE

    asyncio.run(follow())
    assert reads.count("boom: 0") == reads.count("boom: 1") == 1
    told = [record for record in caplog.records if "internal error: ZeroDivisionError" in record.getMessage()]
    assert [record.levelname for record in told] == ["ERROR"] * 2
    assert all(bool(record.exc_info) is is_debug for record in told)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the first lines of what was logged of manifests, and forget it."""
    lines = [record.getMessage().partition("\n")[0] for record in caplog.records]
    caplog.clear()
    return [line for line in lines if line.startswith("manifests")]


def test_what_was_applied_is_told_and_what_was_asked_for_and_what_is_right_again(node, web, caplog, monkeypatch):
    monkeypatch.setattr(news, "_SHORTEST_REST_S", 0.0)

    async def follow() -> None:
        async with following(node) as reloading:

            async def seen(step: Callable[[], object]) -> list[str]:
                step()
                await until(lambda: any("manifests" in record.getMessage() for record in caplog.records))
                return said(caplog)

            assert await seen(lambda: put(web, MORE)) == ["manifests applied: 1 Service, 2 endpoints (1 more)"]
            asked = "manifests read again as asked: nothing has changed"
            assert await seen(reloading.reload_as_asked) == [asked]
            refused = "manifests not applied, what ran before goes on:"
            assert await seen(lambda: put(web, "kind: [")) == [refused]
            assert await seen(reloading.reload_as_asked) == [refused]
            again = "manifests are right again, and applied"
            assert await seen(lambda: put(web, MORE)) == [again]
            assert await seen(lambda: put(web, "kind: [")) == [refused]
            applied = "manifests applied: 1 Service, 1 endpoint (1 fewer)"
            assert await seen(lambda: put(web, WEB)) == [again, applied]
            before = reloading.programmed
            put(web, f"# a remark\n{WEB}")
            await until(lambda: reloading.programmed > before)
            assert await seen(web.unlink) == ["manifests applied: 0 Services (1 fewer), 0 endpoints (1 fewer)"]

    asyncio.run(follow())


def test_while_changes_keep_coming_one_line_tells_of_many(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(news, "_LONGEST_REST_S", 4.0)
    timers: list[tuple[float, Callable[[], None]]] = []
    loop = SimpleNamespace(call_later=lambda seconds, what: timers.append((seconds, what)))
    monkeypatch.setattr(news.asyncio, "get_running_loop", lambda: loop)

    def rest() -> float:
        ((seconds, rested),) = timers
        timers.clear()
        rested()
        return seconds

    told = News(10, 100)
    told.applied(11, 100)
    rests = []
    for count in (2, 3, 4, 5):
        for number in range(count):
            told.applied(10 + count, 100 - number)
        rests.append(rest())
    assert said(caplog) == [
        "manifests applied: 11 Services (1 more), 100 endpoints",
        "manifests applied 2 times: 12 Services (1 more), 99 endpoints (1 fewer)",
        "manifests applied 3 times: 13 Services (1 more), 98 endpoints (1 fewer)",
        "manifests applied 4 times: 14 Services (1 more), 97 endpoints (1 fewer)",
        "manifests applied 5 times: 15 Services (1 more), 96 endpoints (1 fewer)",
    ]
    assert rests == [1.0, 2.0, 4.0, 4.0]
    rest()
    assert not timers
    told.applied(15, 96)
    assert said(caplog) == ["manifests applied: 15 Services, 96 endpoints"]
    assert rest() == 1.0
