"""The configuration file: the flags of `run` by their names, in YAML or JSON, all problems told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dataplane.settings import OPTIONS, Option
from lb import documents
from lb.fields import did_you_mean, shown
from xdp.errors import ConfigError

_LARGEST_FILE = 1 << 20  # bytes


def load(path: str) -> dict[str, Any]:
    """Return the fields of Settings that the file at `path` sets. Relative paths of files start at the file's folder.

    ConfigError lists everything that is wrong with the file, each problem with its line.
    """
    text = _text(path)
    try:
        parsed = documents.parse(text, path.endswith(".json"))
    except documents.TextError as problem:
        raise ConfigError(_line(path, problem.line, problem.message)) from None
    problems: list[tuple[documents.Path, str]] = []
    fields: dict[str, Any] = {}
    roots = [(number, root) for number, root in enumerate(parsed.roots) if root is not None]
    if len(roots) > 1:
        problems.append(((roots[1][0],), "a second document; expected one"))
    for number, root in roots[:1]:
        if isinstance(root, dict):
            fields = _read(root, number, problems)
        else:
            problems.append(((number,), f"{shown(root)} is not a mapping; expected lines like `capacity: 1000000`"))
    lines = documents.find_lines(text, [place for place, _ in problems]) if problems else {}
    found = [(lines.get(place, 0), place, message) for place, message in problems]
    found += [(line, place, "comes twice; remove one") for place, line in parsed.duplicates]
    if found:
        found.sort(key=lambda problem: problem[0])
        raise ConfigError("\n".join(_line(path, line, _said(place, message)) for line, place, message in found))
    folder = Path(path).parent
    if "seed_file" in fields:
        fields["seed_file"] = folder / fields["seed_file"]
    if "files" in fields:
        fields["files"] = tuple(name if name == "-" else str(folder / name) for name in fields["files"])
    return fields


def _text(path: str) -> str:
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path given with --config") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _LARGEST_FILE:
        raise ConfigError(f"{path}: is larger than {_LARGEST_FILE >> 20} MiB; a configuration is a few lines")
    try:
        return documents.decode(data)
    except documents.TextError as problem:
        raise ConfigError(_line(path, problem.line, problem.message)) from None


def _line(path: str, line: int, message: str) -> str:
    place = path if path.isprintable() else shown(path)
    return f"{place}:{line}: {message}" if line else f"{place}: {message}"


def _said(place: documents.Path, message: str) -> str:
    key = ".".join(str(step) for step in place[1:2])
    return f"{key if key.isprintable() else shown(key)}: {message}" if key else message


def _read(root: dict[str, Any], number: int, problems: list[tuple[documents.Path, str]]) -> dict[str, Any]:
    """Return the fields that `root` sets; add what is wrong to `problems`, by its place in the file."""
    fields: dict[str, Any] = {}
    for key, value in root.items():
        option = OPTIONS.get(key)
        if option is None:
            problems.append(((number, key), "unknown setting" + _cure(key)))
            continue
        items = value if option.is_list and isinstance(value, list) else [value]
        read: list[Any] = []
        for index, item in enumerate(items):
            place = (number, key, index) if items is value else (number, key)
            try:
                read.append(_read_item(option, item))
            except ValueError as error:
                problems.append((place, str(error)))
        if read:
            fields[option.field] = tuple(read) if option.is_list else read[0]
    return fields


def _cure(key: str) -> str:
    """Return the end of the message about an unknown key, all known ones if none is similar."""
    return did_you_mean(key, OPTIONS) or f"; known are {', '.join(OPTIONS)}"


def _read_item(option: Option, item: Any) -> Any:
    if isinstance(item, bool) or not isinstance(item, str | int):
        raise ValueError(  # noqa: TRY004 - one kind of error for all
            f"{shown(item)} is no value; expected {option.metavar.removesuffix('...')}"
        )
    return option.read(str(item))
