"""Scenarios run against every engine and over both families: `node` is a parameter. What is not is declared, with why:

@pytest.mark.engines("memory", why="only its clock can be moved")
@pytest.mark.families(4, why="IPv6 has no such field")
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from perf.world import World
from tests.daemon import Daemon
from tests.node import ScenarioNode
from tests.scenarios.site import HOSTS, Site
from tests.whole_node import whole_node

ENGINES = {
    "memory": (),
    "xdp": (pytest.mark.root, pytest.mark.bpf),
    "xdp-generic": (pytest.mark.root, pytest.mark.bpf),
    "afxdp": (pytest.mark.root, pytest.mark.bpf),
    "raw": (pytest.mark.root,),
}
# Generic mode is the same program elsewhere in the kernel, and AF_XDP's rings know no families: IPv4 shows what is new,
# and memory and raw what userspace does to IPv6. Real clients come over IPv6 with afxdp, too (tests/scenarios/site.py).
_SHOWN_BY_OTHERS = (("xdp-generic", 6), ("afxdp", 6))
# What most flags change is the control plane and userspace, which are no others with the program elsewhere.
_NOT_IN_GENERIC_MODE = {"masquerade", "cluster_cidr", "snat_ports", "snat_addresses"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "engines(*names, why): the engines that a scenario is for, and why not the others"
    )
    config.addinivalue_line(
        "markers",
        "families(*families, why): the families that a scenario is for, and why not others",
    )
    config.addinivalue_line("markers", "flags(**values): flags of the node, by their names with _ for -")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out scenarios over a family that they are not for."""
    left_out = [item for item in items if not _is_for_its_family(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _is_for_its_family(item: pytest.Item) -> bool:
    params = getattr(item, "callspec", None) and item.callspec.params  # type: ignore[attr-defined]
    marks = list(item.iter_markers("families"))
    assert all(mark.kwargs.get("why") for mark in marks), f"{item.nodeid}: why not both families?"
    family = 6 if str((params or {}).get("site")).endswith("-6") else 4
    if params and "whole" in params:
        _, family, _ = params["whole"]
    return all(family in mark.args for mark in marks)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "node" not in metafunc.fixturenames:
        return
    names = set(ENGINES)
    for mark in metafunc.definition.iter_markers("engines"):
        assert mark.kwargs.get("why"), f"{metafunc.definition.nodeid}: why not every engine?"
        names &= set(mark.args)
    flags: dict[str, str] = {}
    for mark in metafunc.definition.iter_markers("flags"):
        flags |= mark.kwargs
    if flags.keys() & _NOT_IN_GENERIC_MODE:
        names.discard("xdp-generic")
    chosen = [
        pytest.param((name, family, tuple(flags.items())), marks=marks, id=name if family == 4 else f"{name}-{family}")
        for name, marks in ENGINES.items()
        if name in names
        for family in (4, 6)
        if (name, family) not in _SHOWN_BY_OTHERS
    ]
    metafunc.parametrize("whole", chosen, indirect=True, scope="session")


@pytest.fixture(scope="session")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScenarioNode]:
    """A node with one engine and of one family, for all scenarios."""
    engine, family, flags = request.param
    folder, prefix = tmp_path_factory.mktemp("node"), f"ts{os.getpid() % 100_000}"
    with whole_node(engine, folder, prefix, dict(flags), family) as made:
        yield made


@pytest.fixture
def node(whole: ScenarioNode) -> Iterator[ScenarioNode]:
    """The node; after the scenario its accounts must add up."""
    yield whole
    whole.check_accounts()


@pytest.fixture(scope="session", params=["xdp"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Real clients and servers around a daemon, by default of engine xdp; "xdp-6" is the same over IPv6."""
    engine, is_ipv6 = request.param.removesuffix("-6"), request.param.endswith("-6")
    with World(f"tc{os.getpid() % 100_000}", HOSTS, ipv6=is_ipv6) as world, Daemon(world, engine) as daemon:
        made = Site(world, daemon, 6 if is_ipv6 else 4)
        daemon.start()
        yield made
