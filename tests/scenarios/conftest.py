"""Scenarios run against every engine: `node` is a parameter. What an engine cannot do is declared, with its reason:

@pytest.mark.engines("memory", why="only its clock can be moved")
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from perf.world import World
from tests.node import Daemon, ScenarioNode, whole_node
from tests.scenarios.site import HOSTS, Site

ENGINES = {
    "memory": (),
    "xdp": (pytest.mark.root, pytest.mark.bpf),
    "xdp-generic": (pytest.mark.root, pytest.mark.bpf),
    "afxdp": (pytest.mark.root, pytest.mark.bpf),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "engines(*names, why): the engines that a scenario is for, and why not the others"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "node" not in metafunc.fixturenames:
        return
    names = set(ENGINES)
    for mark in metafunc.definition.iter_markers("engines"):
        assert mark.kwargs.get("why"), f"{metafunc.definition.nodeid}: why not every engine?"
        names &= set(mark.args)
    chosen = [pytest.param(name, marks=marks) for name, marks in ENGINES.items() if name in names]
    metafunc.parametrize("whole", chosen, indirect=True, scope="session")


@pytest.fixture(scope="session")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScenarioNode]:
    """A node with one engine, for all scenarios."""
    engine = request.param
    with whole_node(engine, tmp_path_factory.mktemp("node"), f"ts{os.getpid() % 100_000}") as made:
        yield made


@pytest.fixture
def node(whole: ScenarioNode) -> Iterator[ScenarioNode]:
    """The node; after the scenario its accounts must add up."""
    yield whole
    whole.check_accounts()


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Real clients and servers around a daemon, by default of engine xdp."""
    engine = getattr(request, "param", "xdp")
    with World(f"tc{os.getpid() % 100_000}", HOSTS) as world, Daemon(world, engine) as daemon:
        made = Site(world, daemon)
        daemon.start()
        yield made
