"""Imports point down only, and each dependency has one door."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Package -> what it may import of ours.
BELOW = {
    "xdp": {"xdp"},
    "conntrack": {"conntrack", "xdp"},
    "lb": {"lb", "xdp"},
    "dataplane": {"dataplane", "conntrack", "lb", "xdp"},
    "perf": {"perf", "dataplane", "conntrack", "lb", "xdp"},
    "tests": {"tests", "perf", "dataplane", "conntrack", "lb", "xdp"},
}
# The roof shows what perf/ builds: `turnout demo`.
ROOF = ("dataplane/cli.py", "perf")

# What is imported when something is to be compiled; numba's words for instructions are had from xdp/intrinsics.py.
COMPILING = ["xdp/roots.py", "xdp/bundling.py", "xdp/intrinsics.py"]

# Dependency -> the only files that import it. A folder's name stands for all that is in it. Tests may look at what the
# product uses, but for these two: bcc in their process would spoil it, and netlink has its own words for everything.
NOT_IN_TESTS = {"bcc", "pyroute2"}
DOORS = {
    "bcc": ["xdp/compile.py"],
    "cffi": ["xdp/declared.py", "perf"],
    "_cffi_backend": ["xdp/declared.py"],
    "pyroute2": ["dataplane/netdev.py"],
    "scapy": ["tests", "perf"],
    "matplotlib": ["perf"],
    "yaml": ["lb/documents.py"],
    "click": ["dataplane/cli.py", "dataplane/arguments.py"],
    "asyncinotify": ["dataplane/watch.py"],
    "prometheus_client": ["dataplane/metrics.py"],
    "llvmlite": ["xdp/calls.py", *COMPILING],
    "numba": COMPILING,
    "hypothesis": ["tests"],
    "pytest": ["tests"],
}


def sources() -> list[Path]:
    return sorted(path for package in BELOW for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Yield (first name of the module, line, whether it is imported with the file) of every import."""
    tree = ast.parse(path.read_text())
    at_once = {id(inner) for node in tree.body for inner in _without_functions(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; the whole name says which floor it is on"
            names = [node.module or ""]
        else:
            continue
        for name in names:
            yield name.partition(".")[0], node.lineno, id(node) in at_once


def _without_functions(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in ast.iter_child_nodes(node):
            yield from _without_functions(child)


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sources(), ids=place)
def test_imports_point_down(path):
    package = place(path).partition("/")[0]
    for name, line, at_once in imports(path):
        if name in BELOW and name not in BELOW[package]:
            assert (place(path), name) == ROOF, f"{place(path)}:{line} imports {name}, which is above it"
            assert not at_once, f"{place(path)}:{line} imports {name} at once; it must wait until it is wanted"


@pytest.mark.parametrize("path", sources(), ids=place)
def test_every_dependency_has_its_door(path):
    for name, line, _ in imports(path):
        if name in DOORS:
            doors = DOORS[name]
            package = place(path).partition("/")[0]
            is_door = place(path) in doors or package in doors or (package == "tests" and name not in NOT_IN_TESTS)
            assert is_door, f"{place(path)}:{line} imports {name}; its door is {', '.join(doors)}"


def test_every_door_is_there():
    for doors in DOORS.values():
        for door in doors:
            assert (ROOT / door).exists(), f"{door} is listed as a door"


def run_python(program: str) -> str:
    """Return what `program` prints, run without privileges and without a home that can be written."""
    without = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
    environment = {"PATH": os.environ["PATH"], "HOME": "/proc"}
    command = [*without, sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_model_and_the_flow_table_need_no_root_no_bcc_and_no_home():
    program = "import sys, conntrack.table, lb.manifests, lb.table; print(*sys.modules)"
    modules = set(run_python(program).split())
    assert not modules & {"bcc", "pyroute2", "scapy", "dataplane", "perf"}


def test_numba_is_imported_when_something_is_to_be_compiled():
    modules = set(run_python("import sys, dataplane.node; print(*sys.modules)").split())
    assert not modules & {"numba", "llvmlite"}


def test_the_command_line_is_there_before_numba():
    modules = set(run_python("import sys, dataplane.cli; print(*sys.modules)").split())
    assert not modules & {"numba", "numpy", "llvmlite", "pyroute2", "yaml", "cffi", "perf", "prometheus_client"}
