"""Every way in which a manifest changes is noticed, and nothing else is."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dataplane import watch
from dataplane.watch import DEBOUNCE_MS, changes, signature


def run(
    paths: list[Path], *steps: Callable[[], object], timeout_s: float = 5.0, debounce_ms: int = DEBOUNCE_MS
) -> list[bool]:
    """Take each step, and return whether a change was reported after it within `timeout_s`."""

    async def follow() -> list[bool]:
        seen = []
        stream = changes([str(path) for path in paths], debounce_ms)
        pending = asyncio.ensure_future(anext(stream))
        for step in steps:
            await asyncio.sleep(0.05)  # the watch is set up meanwhile, or not: neither must matter
            step()
            done, _ = await asyncio.wait([pending], timeout=timeout_s)
            seen.append(bool(done))
            if done:
                pending = asyncio.ensure_future(anext(stream))
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)
        await stream.aclose()
        return seen

    return asyncio.run(follow())


@pytest.fixture
def web(tmp_path: Path) -> Path:
    path = tmp_path / "web.yaml"
    path.write_text("a")
    return path


def replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + "~")
    beside.write_text(text)
    beside.rename(path)


def test_a_file_that_is_written_in_place(web):
    assert run([web], lambda: web.write_text("b"), lambda: web.write_text("c")) == [True, True]


@pytest.mark.faults(122)
def test_a_file_that_is_renamed_over_again_and_again(web):
    assert run([web], lambda: replace(web, "b"), lambda: replace(web, "c"), lambda: replace(web, "d")) == [True] * 3


@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
def test_what_is_renamed_into_place_is_not_waited_for_and_what_is_written_there_is(web, is_folder, monkeypatch):
    looks = []

    def look(paths):
        found = signature(paths)
        looks.append(found)
        return found

    async def follow() -> list[bool]:
        stream = changes([str(web.parent if is_folder else web)], 60_000)
        seen = []
        pending = asyncio.ensure_future(anext(stream))
        while len(looks) < 2:  # noqa: ASYNC110 - of what happens before that it is not known what it was
            await asyncio.sleep(0.01)
        for step in (lambda: replace(web, "b"), lambda: replace(web, "c"), lambda: web.write_text("d")):
            step()
            done, _ = await asyncio.wait([pending], timeout=5 if not seen[1:] else 0.5)
            seen.append(bool(done))
            pending = asyncio.ensure_future(anext(stream)) if done else pending
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)
        await stream.aclose()
        return seen

    monkeypatch.setattr(watch, "signature", look)
    assert asyncio.run(follow()) == [True, True, False]


def test_a_file_that_is_being_written_while_another_is_renamed_is_waited_for(tmp_path):
    whole, part = tmp_path / "whole.yaml", tmp_path / "part.yaml"
    for path in (whole, part):
        path.write_text("a")

    def both() -> None:
        part.write_text("b")
        replace(whole, "b")

    assert run([whole, part], both, debounce_ms=60_000, timeout_s=0.5) == [False]


@pytest.mark.faults(122)
def test_a_file_that_goes_and_comes_back(web):
    assert run([web], web.unlink, lambda: web.write_text("b")) == [True, True]


def test_a_file_that_does_not_exist_yet(tmp_path):
    path = tmp_path / "later" / "web.yaml"
    path.parent.mkdir()
    assert run([path], lambda: path.write_text("a")) == [True]


def test_a_folder_that_does_not_exist_yet(tmp_path):
    folder = tmp_path / "later" / "manifests"
    assert run([folder], lambda: folder.mkdir(parents=True), lambda: (folder / "a.yaml").write_text("a")) == [
        True,
        True,
    ]


def test_files_in_a_folder_that_come_change_and_go(tmp_path):
    path = tmp_path / "web.yaml"
    steps = (lambda: path.write_text("a"), lambda: path.write_text("b"), path.unlink)
    assert run([tmp_path], *steps) == [True] * 3


@pytest.mark.faults(122)
def test_the_data_link_of_a_mounted_config_map_is_swapped(tmp_path):
    def publish(version: str) -> None:
        (tmp_path / version).mkdir()
        (tmp_path / version / "web.yaml").write_text(version)
        (tmp_path / "..data_tmp").symlink_to(version)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish("..1")
    path = tmp_path / "web.yaml"
    path.symlink_to("..data/web.yaml")
    for watched in ([path], [tmp_path]):
        start = 2 if watched == [path] else 4
        assert run(watched, lambda: publish(f"..{start}"), lambda: publish(f"..{start + 1}")) == [True, True]  # noqa: B023


def test_a_link_whose_target_is_elsewhere(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    target = tmp_path / "b" / "web.yaml"
    target.write_text("a")
    link = tmp_path / "a" / "web.yaml"
    link.symlink_to(target)
    assert run([link], lambda: target.write_text("b")) == [True]


@pytest.mark.faults(122)
def test_a_write_in_pieces_is_one_change(web):
    async def follow() -> int:
        stream = changes([str(web)])

        async def write() -> None:
            for _ in range(8):
                with web.open("a") as file:
                    file.write("more")
                await asyncio.sleep(0.02)

        writer = asyncio.create_task(write())
        await anext(stream)
        assert writer.done()
        another = asyncio.ensure_future(anext(stream))
        done, _ = await asyncio.wait([another], timeout=0.4)
        another.cancel()
        await asyncio.gather(another, return_exceptions=True)
        return len(done)

    assert asyncio.run(follow()) == 0


def test_a_neighbour_that_changes_is_none_of_our_business(web):
    assert run([web], lambda: (web.parent / "other.txt").write_text("x"), timeout_s=0.4) == [False]


def test_a_change_between_the_call_and_the_first_step_is_not_missed(web):
    async def follow() -> None:
        stream = changes([str(web)])
        web.write_text("b, before anybody waits")
        await asyncio.wait_for(anext(stream), 5)

    asyncio.run(follow())


@pytest.mark.faults(122)
def test_a_storm_of_changes_ends_in_the_last_state(web):
    async def follow() -> tuple[int, str]:
        stream = changes([str(web)])
        reports, last = 0, ""

        async def storm() -> None:
            for number in range(300):
                replace(web, str(number))
                await asyncio.sleep(0.001)

        writer = asyncio.create_task(storm())
        while last != "299":
            await asyncio.wait_for(anext(stream), 5)
            reports, last = reports + 1, web.read_text()
        await writer
        return reports, last

    reports, last = asyncio.run(follow())
    assert last == "299"
    assert reports < 10


async def _reports(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object], quiet_s: float = 1.0
) -> list[list[set[str] | None]]:
    """Take each step while the kernel watches; return what was reported until nothing had been for `quiet_s`."""
    looks = []
    monkeypatch.setattr(watch, "signature", lambda paths: looks.append(signature(paths)) or looks[-1])
    stream = changes([str(path) for path in paths])
    pending = asyncio.ensure_future(anext(stream))
    while len(looks) < 2:  # noqa: ASYNC110 - of what happens before that it is not known what it was
        await asyncio.sleep(0.01)
    seen: list[list[set[str] | None]] = []
    for step in steps:
        step()
        seen.append([])
        while (await asyncio.wait([pending], timeout=quiet_s))[0]:
            seen[-1].append(pending.result())
            pending = asyncio.ensure_future(anext(stream))
    pending.cancel()
    await asyncio.gather(pending, return_exceptions=True)
    await stream.aclose()
    return seen


def test_what_has_been_reported_is_not_found_again_when_all_is_looked_at(tmp_path, monkeypatch):
    """That would have everything read again."""
    monkeypatch.setattr(watch, "_LOOK_ANYWAY_S", 0.1)
    monkeypatch.setattr(watch, "_LOOK_SHARE", 0)
    a, b, draft = (tmp_path / name for name in ("a.yaml", "b.yaml", ".b.swp"))
    a.write_text("1")
    steps = (a.unlink, lambda: b.write_text("1"), lambda: draft.write_text("1"), draft.unlink, (tmp_path / "x").mkdir)
    assert asyncio.run(_reports([tmp_path], monkeypatch, *steps)) == [[{str(a)}], [{str(b)}], [], [], []]


@pytest.mark.faults(122)
def test_a_folder_that_is_swapped_is_watched_as_the_one_before(tmp_path, monkeypatch):
    folder, beside, before = (tmp_path / name for name in ("e", "e.new", "e.old"))
    for each in (folder, beside):
        each.mkdir()
        (each / "a.yaml").write_text(each.name)

    def swap() -> None:
        folder.rename(before)
        beside.rename(folder)

    steps = (swap, lambda: replace(folder / "a.yaml", "2"), lambda: (before / "a.yaml").write_text("of no account"))
    reports = asyncio.run(_reports([folder], monkeypatch, *steps))
    assert reports == [[None], [{str(folder / "a.yaml")}], []]


@pytest.mark.faults(122)
def test_a_folder_that_is_made_again_is_watched_as_the_one_before(tmp_path, monkeypatch):
    folder = tmp_path / "e"
    folder.mkdir()
    (folder / "a.yaml").write_text("1")

    def make_again() -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "a.yaml").write_text("2")

    reports = asyncio.run(_reports([folder], monkeypatch, make_again, lambda: replace(folder / "a.yaml", "3")))
    assert reports == [[None], [{str(folder / "a.yaml")}]]


def test_a_file_of_a_folder_is_named(tmp_path, monkeypatch):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("1")
    reports = asyncio.run(_reports([tmp_path], monkeypatch, lambda: replace(tmp_path / "b.yaml", "2")))
    assert reports == [[{str(tmp_path / "b.yaml")}]]


def test_where_a_link_leads_elsewhere_any_file_may_have_changed(tmp_path, monkeypatch):
    (tmp_path / ".real").write_text("1")
    (tmp_path / "a.yaml").symlink_to(".real")
    assert asyncio.run(_reports([tmp_path], monkeypatch, lambda: replace(tmp_path / ".real", "2"))) == [[None]]


def test_stdin_never_changes():
    assert signature(["-"]) == {}
    assert run([Path("-")], lambda: None, timeout_s=0.1) == [False]


@pytest.mark.faults(122)
def test_a_file_that_may_not_be_read_changes_when_its_mode_does(web):
    assert run([web], lambda: os.chmod(web, 0o000)) == [True]  # noqa: PTH101


@pytest.mark.faults(112)
def test_without_an_inotify_instance_changes_are_noticed_nevertheless(web, caplog):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def follow() -> None:
        stream = changes([str(web)])
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))  # what is open already stays so
        try:
            for second in range(2):
                os.utime(web, (second, second))  # opens nothing
                await asyncio.wait_for(anext(stream), 5)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        web.write_text("b")
        await asyncio.wait_for(anext(stream), 5)

    with caplog.at_level(logging.WARNING):
        asyncio.run(follow())
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "manifests are looked at once a second, because the kernel does not watch them"
    ]
    assert "Too many open files" in caplog.text
