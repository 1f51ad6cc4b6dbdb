"""The documents say what the code does."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from xdp import errors
from xdp.schema import Reason, Verdict, verdict_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "LICENSES").glob("*.md")])
STAGES = ("parse", "flow", "service", "punt", "rewrite")
BEHAVIOURS = [f"{letter}{number}" for letter, count in zip("SETCN", (13, 8, 15, 13, 9), strict=True)
              for number in range(1, count + 1)] + ["M", "L", "H", "A"]  # fmt: skip


def section(text: str, heading: str) -> str:
    """Return what stands below `heading` (a whole line or its beginning) up to the next of its rank."""
    rank = heading.partition(" ")[0]
    after = re.split(rf"^{re.escape(heading)}.*$", text, maxsplit=1, flags=re.MULTILINE)[1]
    return re.split(rf"^#{{1,{len(rank)}}} ", after, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Return the cells of every row of the tables in `text`, heads and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {place - 1 for place, line in enumerate(lines) if re.fullmatch(r"[|\- ]+", line)}
    kept = [line for place, line in enumerate(lines) if place not in heads and place - 1 not in heads]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in kept]


@pytest.mark.parametrize("verdict", Verdict, ids=lambda verdict: verdict.name)
def test_every_reason_is_explained_under_its_verdict(verdict):
    text = section((DOCS / "operations.md").read_text(), f"### {verdict.name.capitalize()}")
    explained = [cells[0] for cells in rows(text)]
    assert explained == [reason.name for reason in sorted(Reason) if verdict_of(reason) == verdict]


def test_every_exit_code_is_explained():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Error)]
    text = section((DOCS / "operations.md").read_text(), "## Exit codes")
    degraded = 5  # an answer, not an error
    assert {int(cells[0]) for cells in rows(text)} == {0, degraded, *(kind.exit_code for kind in kinds)}


def test_every_flag_of_run_is_explained():
    from dataplane.settings import OPTIONS

    text = section((DOCS / "operations.md").read_text(), "## Running")
    explained = [flag for cells in rows(text) for flag in re.findall(r"--([a-z-]+)", cells[0])]
    assert sorted(explained) == sorted([*OPTIONS, "config"])


def test_the_stages_have_the_same_names_everywhere():
    """The picture, the XDP program and the pipeline, in the same order (where userspace admits, XDP punts)."""
    picture = section((DOCS / "architecture.md").read_text(), "## The picture")
    places = {
        "architecture.md": picture[picture.index("parse - ") :],
        "lb.c": (ROOT / "xdp/bpf/lb.c").read_text()[:600],
        "pipeline.py": (ROOT / "dataplane/pipeline.py").read_text()[:400].replace("admit", "punt"),
    }
    for name, text in places.items():
        words = [word for word in re.findall(r"[a-z]+", text) if word in STAGES]
        assert tuple(dict.fromkeys(words)) == STAGES, name
    stages = [cells[0].partition(" / ")[0] for cells in rows(picture)]
    assert tuple(stages) == STAGES


def states_of_behaviours() -> dict[str, str]:
    return {cells[0]: cells[2] for cells in rows((DOCS / "behaviours.md").read_text())}


def behaviours_under_test() -> set[str]:
    names = [
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    ]
    return {word for name in names for word in name.split("_") if re.fullmatch(r"[A-Z]\d+", word)}


def test_every_behaviour_is_listed_once():
    listed = Counter(cells[0] for cells in rows((DOCS / "behaviours.md").read_text()))
    assert list(listed) == BEHAVIOURS
    assert set(listed.values()) == {1}
    assert set(states_of_behaviours().values()) == {"done", "part", "not yet"}


def test_what_is_done_is_tested_by_name():
    done = {name for name, state in states_of_behaviours().items() if state == "done"}
    assert not done - behaviours_under_test()


def test_what_is_missing_has_a_note_of_what_happens_instead():
    for name, _, state, note in rows((DOCS / "behaviours.md").read_text()):
        assert note or state == "done", name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_are_named_are_there(path):
    rooms = "xdp|conntrack|lb|dataplane|perf|tests|docs"
    for name in re.findall(rf"(?<![\w/.])((?:{rooms})/[\w./-]+\.(?:py|c|h|md))\b", path.read_text()):
        assert (ROOT / name).exists() or (path.parent / name).exists(), f"{path.relative_to(ROOT)}: {name}"


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for path in DOCUMENTS:
        for name in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", path.read_text(), flags=re.MULTILINE):
            assert name in targets, f"{path.relative_to(ROOT)}: make {name}"


def test_the_manifest_in_the_readme_is_valid(tmp_path):
    text = section((ROOT / "README.md").read_text(), "## Use it")
    lines = text.split("$ cat web.yaml\n", 1)[1].split("\n\n", 1)[0].splitlines()
    manifest = tmp_path / "web.yaml"
    manifest.write_text("\n".join(line.removeprefix("    ") for line in lines))
    turnout = ROOT / ".venv/bin/turnout"
    done = subprocess.run([turnout, "validate", "-f", manifest], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 Services, 1 EndpointSlices, 2 endpoints" in done.stderr


def test_words_of_the_glossary_have_one_meaning_each():
    text = (DOCS / "glossary.md").read_text()
    words = Counter(word for cells in rows(text) for word in cells[0].split(", "))
    assert [word for word, count in words.items() if count > 1] == []
