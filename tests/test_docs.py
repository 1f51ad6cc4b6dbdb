"""The documents say what the code does."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.statuses import STATUS
from xdp import errors
from xdp.compile import text_of
from xdp.schema import Reason, Verdict, verdict_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "LICENSES").glob("*.md")])
STAGES = ("parse", "flow", "service", "punt", "rewrite")
BEHAVIOURS = [f"{letter}{number}" for letter, count in zip("SETCN", (13, 8, 15, 13, 9), strict=True)
              for number in range(1, count + 1)] + ["M", "L", "H", "A"]  # fmt: skip
FAULTS = [f"F{number:03}" for number in range(1, 133)]


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


def test_every_flag_is_told_with_its_choices_and_its_default():
    from dataplane.settings import DEFAULT_NAME, OPTIONS, Settings

    text = section((DOCS / "operations.md").read_text(), "## Running")
    told = {cells[0].rpartition("--")[2].strip("`").replace("\\|", "|"): cells[1].strip("`") for cells in rows(text)}
    settings, expected = Settings(DEFAULT_NAME, (), ()), {"config FILE": ""}
    for name, option in OPTIONS.items():
        default = getattr(settings, option.field)
        expected[f"{name} {option.metavar.strip('[]')}"] = str(default) if default not in (None, ()) else ""
    assert told == expected


def test_every_annotation_is_told_with_its_state():
    from lb import annotations, model, not_yet

    text = section((DOCS / "operations.md").read_text(), "## Annotations")
    told = {cells[0].strip("`").removeprefix("turnout.dev/"): cells for cells in rows(text)}
    assert list(told) == list(annotations._NAMES)
    waiting = {
        attribute.removesuffix("_s").replace("_", "-")
        for attribute, feature in not_yet._OPTION_FEATURES.items()
        if feature in not_yet.NOT_YET
    }
    for name, (_, values, state, _) in told.items():
        assert state == ("parsed, not yet" if name in waiting else "honoured"), name
        if name in annotations._CHOICES:
            choices = re.findall(r"`([^`]+)`", values)
            assert not any(annotations._CHOICES[name](choice) for choice in choices), name
            assert all(choice in annotations._CHOICES[name]("?") for choice in choices), name
            assert choices[0] == getattr(model.DEFAULT_OPTIONS, name.replace("-", "_")), name
    _, listed = told["timeouts"][3].split(" of ", 1)
    assert re.findall(r"`([^`]+)`", listed) == list(annotations._TIMEOUTS)


def test_the_readme_and_the_help_agree_on_how_long_the_demo_takes():
    from dataplane import cli

    told = re.search(r"The demo takes ([a-z ]+),", (ROOT / "README.md").read_text())
    assert told is not None
    assert f"; {told[1]}, and nothing is left behind" in " ".join(str(cli.demo.help).split())


@pytest.mark.faults(86)
def test_every_metric_is_told_with_its_labels():
    from dataplane import metrics

    families = [*metrics.NodeCollector(lambda: STATUS).collect()]
    expected = {
        sample.name: ", ".join(sample.labels) for family in families for sample in family.samples if family.samples
    }
    text = section((DOCS / "operations.md").read_text(), "## Metrics")
    assert {cells[0].strip("`"): cells[1] for cells in rows(text)} == expected


def test_the_states_of_a_node_are_told_with_their_exit_codes():
    from dataplane.cli import _EXIT_OF_STATE

    text = section((DOCS / "operations.md").read_text(), "## Looking")
    assert {cells[0].strip("`"): int(cells[1]) for cells in rows(text)} == _EXIT_OF_STATE


def test_every_file_is_in_one_box_of_the_picture():
    listed = Counter(
        cells[0].strip("`") for cells in rows(section((DOCS / "architecture.md").read_text(), "## The files"))
    )
    assert set(listed.values()) == {1}
    there = {
        path.relative_to(ROOT).as_posix()
        for room in ("xdp", "conntrack", "lb", "dataplane")
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".c", ".h") and path.name != "__init__.py" and "shim" not in path.parts
    }
    assert set(listed) == there | {"xdp/shim/"}


def test_the_stages_have_the_same_names_in_the_same_order_everywhere():
    """The picture, the XDP program and the pipeline (where userspace admits, XDP punts)."""
    picture = section((DOCS / "architecture.md").read_text(), "## The picture")
    words = [word for word in re.findall(r"[a-z]+", picture[picture.index("parse - ") :]) if word in STAGES]
    assert tuple(dict.fromkeys(words)) == STAGES
    assert tuple(cells[0].partition(" / ")[0] for cells in rows(picture)) == STAGES

    program = text_of(ROOT / "xdp/bpf/lb.c").decode().partition("*/\n#include")[2]
    includes = re.findall(r'#include "(\w+)\.h"', program)
    assert includes.index("parse") < includes.index("rewrite")
    sections = re.findall(r"^/\* (Flow|Service|Punt|Rewrite): ", program, flags=re.MULTILINE)
    assert tuple(word.lower() for word in ("parse", *sections)) == STAGES

    modules = {name: (ROOT / f"dataplane/{name}.py").read_text() for name in ("pipeline", "admit", "forwarding")}
    for name, word in (("admit", "Admit"), ("forwarding", "Rewrite")):
        assert modules[name].startswith(f'"""{word}: '), name
    bodies = {
        name: modules[room].partition(f"\ndef {name}(")[2] for room, name in (("pipeline", "judge"), ("admit", "admit"))
    }

    # What a packet that nothing is known of comes by: the last call of each, as the guards before leave early.
    calls = {
        "lb.c, handle": (program[program.index("handle(") :], ("parse(", "handle_ipv4(", "decide(")),
        "lb.c, handle_ipv4": (
            program[program.index("handle_ipv4(") : program.index("decide(")],
            ("find_flow(", "follow("),
        ),
        "lb.c, decide": (
            program[program.index("decide(") : program.index("handle(")],
            ("find_frontend(", "reader_of(", "punt(", "hand_on("),
        ),
        "pipeline.py": (bodies["judge"], ("_parse(", "flows.find(", "services.find_frontend(", "admit(")),
    }
    for name, (text, stages) in calls.items():
        places = [text.rindex(call) for call in stages]
        assert places == sorted(places), name
    assert bodies["admit"].index("_begin(") < bodies["admit"].index("forward(")


def states_of_behaviours() -> dict[str, str]:
    return {cells[0]: cells[2] for cells in rows((DOCS / "behaviours.md").read_text().partition("## Where")[0])}


def behaviours_under_test() -> set[str]:
    """Return the ids in the names of tests (test_C7_..., test_c7_...) and of their cases (id="N8-...")."""
    pattern = re.compile(r"""def (test_\w+)|\bid="([A-Z]\d+)-""")
    names = [found for path in (ROOT / "tests").rglob("test_*.py") for found in pattern.findall(path.read_text())]
    words = {word for test, case in names for word in (*test.split("_"), case)}
    return {word if len(word) == 1 else word.upper() for word in words} & {*BEHAVIOURS}  # "a" is no "A"


def test_every_behaviour_is_listed_once():
    listed = Counter(cells[0] for cells in rows((DOCS / "behaviours.md").read_text().partition("## Where")[0]))
    assert list(listed) == BEHAVIOURS
    assert set(listed.values()) == {1}
    assert set(states_of_behaviours().values()) == {"done", "part", "not yet"}


def test_what_is_done_is_tested_by_name():
    done = {name for name, state in states_of_behaviours().items() if state == "done"}
    assert not done - behaviours_under_test()


def test_what_is_said_not_to_be_tested_by_name_is_not():
    for name, _, _, note in rows((DOCS / "behaviours.md").read_text()):
        assert "not tested by name" not in note or name not in behaviours_under_test(), name


def test_what_is_missing_has_a_note_of_what_happens_instead():
    for name, _, state, note in rows((DOCS / "behaviours.md").read_text()):
        assert note or state == "done", name


def states_of_faults() -> dict[str, str]:
    return {cells[0]: cells[2] for cells in rows((DOCS / "faults.md").read_text())}


def faults_under_test() -> set[str]:
    """Return the ids in the names of tests (test_F032_F084_...) and in their marks (`faults(32, 84)`)."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.update(re.findall(r"(?<=_)F\d+(?=_)", node.name))
                found.update(f"F{number:03}" for mark in node.decorator_list for number in numbers_of(mark))
    return found


def numbers_of(mark: ast.expr) -> list[int]:
    """Return the numbers of a decorator that is a mark of faults."""
    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.faults":
        return [ast.literal_eval(number) for number in mark.args]
    return []


def test_every_fault_is_listed_once():
    listed = Counter(cells[0] for cells in rows((DOCS / "faults.md").read_text()))
    assert list(listed) == FAULTS
    assert set(listed.values()) == {1}
    assert set(states_of_faults().values()) == {"done", "part", "not yet", "not applicable"}


def test_a_fault_that_is_dealt_with_is_tested_by_its_number():
    states = states_of_faults()
    assert not {name for name, state in states.items() if state in ("done", "part")} - faults_under_test()
    assert not faults_under_test() - {*FAULTS}


def test_a_fault_that_is_not_dealt_with_has_a_note():
    for name, _, state, note in rows((DOCS / "faults.md").read_text()):
        assert note or state == "done", name


def test_the_numbers_of_faults_in_the_text_are_those_that_are_counted():
    text = (DOCS / "faults.md").read_text()
    counted = Counter(states_of_faults().values())
    said = {state: int(count) for count, state in re.findall(r"(\d+) (done|part|not yet|not applicable)", text)}
    assert said == counted


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
    assert "valid: 1 Service, 1 EndpointSlice, 2 endpoints" in done.stderr


def test_the_configuration_in_the_examples_is_valid_and_shows_every_setting(tmp_path):
    from dataplane import config
    from dataplane.settings import OPTIONS, merge

    text = (ROOT / "examples/turnout.yaml").read_text()
    config.load(str(ROOT / "examples/turnout.yaml"))
    whole = tmp_path / "turnout.yaml"
    whole.write_text(re.sub(r"^# (?=[a-z-]+: )", "", text, flags=re.MULTILINE))
    fields = config.load(str(whole))
    assert set(fields) == {option.field for option in OPTIONS.values()}
    defaults = merge({}, {})
    for name in ("name", "engine", "xdp_mode", "capacity", "announce", "ping", "log_format"):
        assert fields[name] == getattr(defaults, name), name


def test_the_unit_in_the_examples_runs_reloads_and_kills_as_told():
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(ROOT / "examples/turnout.service")
    service = unit["Service"]
    assert service["ExecStart"].split()[1:] == ["run", "--config", "/etc/turnout/turnout.yaml"]
    assert (service["ExecReload"], service["KillMode"]) == ("kill -HUP $MAINPID", "mixed")
    hopeless = {errors.ConfigError, errors.MissingFeatureError}  # and not an interface that comes later
    assert {int(code) for code in service["RestartPreventExitStatus"].split()} == {kind.exit_code for kind in hopeless}
    assert (service["Restart"], unit["Unit"]["StartLimitIntervalSec"]) == ("on-failure", "0")


def test_words_of_the_glossary_have_one_meaning_each():
    text = (DOCS / "glossary.md").read_text()
    words = Counter(word for cells in rows(text) for word in cells[0].split(", "))
    assert [word for word, count in words.items() if count > 1] == []
