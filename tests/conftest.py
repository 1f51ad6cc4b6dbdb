"""Which tests run: those that need root only as root; and with REQUIRE_ROOT=1 nothing may be skipped.

Where several workers share the tests, each takes all those of a file, or of a node or site that files share.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

_IS_ROOT = os.geteuid() == 0
_SKIP_IS_FAILURE = os.environ.get("REQUIRE_ROOT") == "1"


# Each compiles something else, which others wait for: they begin, a worker each.
_COMPILING = ("xdp", "raw", "('memory', 4, ())", "tests/dataplane/test_originals.py")


def _group_of(item: pytest.Item) -> str:
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return str(params.get("whole", params.get("site", item.nodeid.partition("::")[0])))


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.xdist_group(_group_of(item)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Then the longest: short ones fill the end.
    items.sort(key=lambda item: (_group_of(item) not in _COMPILING, "scenarios" not in item.path.parts))
    if not _IS_ROOT:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root"))


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if _SKIP_IS_FAILURE and report.skipped and not hasattr(report, "wasxfail"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{why}; with REQUIRE_ROOT=1 a skip is a failure"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report
