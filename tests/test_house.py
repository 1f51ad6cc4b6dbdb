"""The house is in order: what is tracked, how it is written, what the tools are told."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("xdp", "conntrack", "lb", "dataplane", "perf")
COMPILED = {"compiled", "inlined", "intrinsic"}

# Written in pieces, so that this file does not hold what it looks for.
REGISTRIES = ["py" + "pi.org", "python" + "hosted.org", "conda" + ".anaconda", "npm" + "js.org", "crates" + ".io"]
UNFINISHED = ["TO" + "DO", "FIX" + "ME", "X" * 3]
ELSEWHERE = [name + ".m" + "d" for name in ("DESIGN", "STYLE", "FAULTS", "PERF", "ECOSYSTEM", "BEHAVIOURS")]
MACHINE_PATHS = ["/wo" + "rk/", "/ro" + "ot/", "/ho" + r"me/\w", "/op" + r"t/\w"]


def tracked() -> list[Path]:
    """Return the files of the project: what git knows, or everything where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=False, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        left_out = re.compile(r"\.(?!ci/|gitignore)|results/|build/|.*__pycache__")
        paths = [path for path in ROOT.rglob("*") if not left_out.match(path.relative_to(ROOT).as_posix())]
    return [path for path in paths if path.is_file()]


def texts() -> dict[str, str]:
    """Return {name: text} of every tracked text file."""
    found = {}
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data:
            found[path.relative_to(ROOT).as_posix()] = data.decode(errors="replace")
    return found


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("pattern", [*map(re.escape, REGISTRIES), *MACHINE_PATHS])
def test_no_file_names_a_registry_or_a_path_of_one_machine(pattern):
    found = [
        f"{name}: {match.group()}"
        for name, text in texts().items()
        if (match := re.search(rf"(?<![\w.]){pattern}", text))
    ]
    assert not found


@pytest.mark.parametrize("document", ELSEWHERE)
def test_no_file_refers_to_a_document_that_is_not_here(document):
    found = [name for name, text in texts().items() if re.search(rf"\b{re.escape(document)}\b", text)]
    assert not found
    sections = [name for name, text in texts().items() if f"{document.partition('.')[0]}'s" in text]
    assert not sections


def test_nothing_is_left_to_do_without_a_place():
    for name, text in texts().items():
        if name.endswith((".py", ".c", ".h")):
            assert not re.search(rf"\b(?:{'|'.join(UNFINISHED)})\b", text), name


def test_c_files_say_their_licence_and_python_files_do_not():
    for name, text in texts().items():
        first = text.partition("\n")[0]
        if name.endswith((".c", ".h")):
            assert first == "/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */", name
        elif name.endswith(".py"):
            assert "SPDX" not in first, name


def decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {part.id for decorator in node.decorator_list for part in ast.walk(decorator) if isinstance(part, ast.Name)}


def functions(path: Path) -> list[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Return (function, whether it is compiled: by decorator, or inside of one that is) for all of a module."""
    found = []

    def walk(node: ast.AST, is_compiled: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = is_compiled
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inside = is_compiled or bool(decorators(child) & COMPILED)
                found.append((child, inside))
            walk(child, inside)

    walk(ast.parse(path.read_text()), False)
    return found


@pytest.mark.parametrize("path", modules(), ids=place)
def test_only_compiled_functions_go_without_annotations(path):
    for function, is_compiled in functions(path):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        bare = [argument.arg for argument in arguments if argument.annotation is None]
        if not is_compiled and not any(decorator in decorators(function) for decorator in ("overload", "lower")):
            assert set(bare) <= {"self", "cls"}, f"{place(path)}:{function.lineno} {function.name}"
            assert function.returns is not None, f"{place(path)}:{function.lineno} {function.name}"


def test_mypy_knows_which_modules_hold_functions_without_annotations():
    (override,) = [entry for entry in settings()["tool"]["mypy"]["overrides"] if "check_untyped_defs" in entry]
    holding = {
        place(path).removesuffix(".py").replace("/", ".")
        for path in modules()
        if any(function.returns is None for function, _ in functions(path))
    }
    assert set(override["module"]) == holding


@pytest.mark.parametrize("path", modules(), ids=place)
def test_every_module_and_public_function_says_what_it_is_for(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, place(path)

    def look(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                is_protocol = any(getattr(base, "id", "") == "Protocol" for base in child.bases)
                assert child.name.startswith("_") or ast.get_docstring(child), (
                    f"{place(path)}:{child.lineno} {child.name}"
                )
                if not is_protocol and not child.name.startswith("_"):
                    look(child)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
                assert ast.get_docstring(child), f"{place(path)}:{child.lineno} {child.name}"

    look(tree)


def test_the_lock_pins_everything_and_names_no_place():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert not re.search(r"^-", text, flags=re.MULTILINE), "an option of pip, which is the machine's business"
    blocks = [block for block in re.split(r"\n(?=\S)", text) if not block.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+(?: \\\n {4}--hash=sha256:[0-9a-f]{64})+\n?", block) for block in blocks)
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, flags=re.MULTILINE))
    project = settings()["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[^A-Za-z0-9._-]", name)[0].lower().replace("_", "-") for name in wanted}
    assert names <= set(pinned)
    (build,) = settings()["build-system"]["requires"]
    assert build == f"hatchling=={pinned['hatchling']}"


def test_the_changelog_has_a_place_for_what_comes_next():
    assert re.search(r"^## Unreleased$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)


def decisions() -> list[Path]:
    return sorted((ROOT / "docs/adr").glob("[0-9]*.md"))


@pytest.mark.parametrize("path", decisions(), ids=lambda path: path.stem)
def test_every_decision_has_its_three_parts(path):
    text = path.read_text()
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == ["Context", "Decision", "Consequences"]
    assert re.match(rf"# {int(path.name[:4])}\. \S", text)
    assert len(text.splitlines()) <= 60, "a page"


def test_decisions_have_a_number_each_and_are_listed():
    numbers = [int(path.name[:4]) for path in decisions()]
    assert len(set(numbers)) == len(numbers)
    index = (ROOT / "docs/adr/README.md").read_text()
    for path in decisions():
        title = path.read_text().partition("\n")[0].partition(". ")[2]
        assert f"({path.name}) | {title} |" in index, path.name


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    listed = re.findall(r"^ +make ([a-z-]+) ", shown, flags=re.MULTILINE)
    steps = {"packages", "bpffs", "as-root"}  # of set-up
    phony = re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    assert phony is not None
    assert sorted(listed) == sorted(set(phony.group(1).split()) - steps)
    wanted = ["help", "setup", "demo", "test", "test-unit", "lint", "type", "perf", "clean"]
    assert set(wanted) <= set(listed)


def test_what_make_install_puts_there_is_whole_and_goes_again(tmp_path):
    def make(target: str) -> None:
        command = ["make", "--no-print-directory", "-s", target, f"DESTDIR={tmp_path}", "PREFIX=/usr"]
        subprocess.run(command, cwd=ROOT, check=True)

    make("install")
    link, folder = tmp_path / "usr/bin/turnout", tmp_path / "etc/turnout"
    shown = subprocess.run([link, "--version"], check=True, capture_output=True, text=True).stdout
    assert shown.startswith("turnout ")
    unit = (tmp_path / "etc/systemd/system/turnout.service").read_text()
    assert "ExecStart=/usr/bin/turnout run --config /etc/turnout/turnout.yaml\n" in unit
    assert (folder / "services").is_dir()
    (folder / "turnout.yaml").write_text("interface: [eth7]\n")
    make("install")
    make("uninstall")
    left = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*")) if not path.is_dir()]
    assert left == ["etc/turnout/turnout.yaml"]
    assert (folder / "turnout.yaml").read_text() == "interface: [eth7]\n", "what an operator has written stays"
