"""The text of a file -> its documents as dicts and lists, and in which line something stands.

YAML is read as YAML 1.2's core schema says: `no`, `on` and dates are text, 1e3 is a float, `<<` is a key like any
other; `010`, which is eight to some readers and ten to others, stays text. Keys are text always, and none may come
twice. JSON goes through the standard library, which is ten times as fast. Positions cost as much as the reading
itself, so they are looked for in a second reading, when there is a problem to be placed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

Path = tuple[str | int, ...]  # from the root of a file; the first step is the number of the document

_DEEPEST = 100  # levels
_MOST_ALIASED = 100_000  # nodes that aliases may add to one file: a bomb of a few lines expands to millions
_UNSET: Any = object()
_WORDS: Mapping[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_NUMBER_STARTS = frozenset("+-.0123456789")
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,99})")
_OTHER_BASE = re.compile(r"0o[0-7]{1,99}|0x[0-9a-fA-F]{1,99}")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_TAG = "tag:yaml.org,2002:"


class TextProblem(Exception):
    """A text that cannot be read at all; `line` counts from 1, and is 0 when unknown."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


class Documents(NamedTuple):
    """What a text holds."""

    roots: list[Any]
    duplicates: list[tuple[Path, int]]  # keys that come a second time, and in which line
    lines: dict[Path, int]  # of the paths that were asked for and exist


def decode(data: bytes) -> str:
    """Return `data` as text; raise TextProblem unless it is UTF-8 without NUL bytes. A byte order mark is dropped."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TextProblem(0, "is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextProblem(line, f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        raise TextProblem(text.count("\n", 0, text.index("\0")) + 1, "a NUL byte; this is not a text file")
    return text


def parse(text: str, is_json: bool = False) -> Documents:
    """Return the documents of `text`, which is JSON if it says so or looks it, YAML otherwise.

    Raise TextProblem for what is neither.
    """
    if not is_json and not text.lstrip().startswith(("{", "[")):
        return parse_yaml(text)
    try:
        return Documents([json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)], [], {})
    except _DuplicateKeyError as error:
        return _place_duplicates(text, str(error))
    except RecursionError:
        raise TextProblem(0, f"is nested more than {_DEEPEST} levels deep") from None
    except ValueError as error:
        if not is_json:
            return parse_yaml(text)  # YAML may start with a brace, too, and several documents may follow each other
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 0
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise TextProblem(line, f"is not JSON: {message[:1].lower()}{message[1:]}") from None


def find_lines(text: str, paths: Collection[Path]) -> dict[Path, int]:
    """Return the line of each of `paths`, or of what is left of it when its end is not there."""
    wanted = {path[:length] for path in paths for length in range(1, len(path) + 1)}
    try:
        lines = parse_yaml(text, wanted).lines
    except TextProblem:
        return {}  # JSON that is not YAML, as some escapes are not: then without lines
    found = {}
    for path in paths:
        start = next((path[:length] for length in range(len(path), 0, -1) if path[:length] in lines), None)
        if start is not None:
            found[path] = lines[start]
    return found


class _DuplicateKeyError(ValueError):
    """A key comes twice in an object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for key in keys if keys.count(key) > 1))
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _place_duplicates(text: str, key: str) -> Documents:
    try:
        return parse_yaml(text)
    except TextProblem:
        raise TextProblem(0, f"key {json.dumps(key)} comes twice in one object") from None


class _Level:
    """A mapping or a sequence that is being read."""

    __slots__ = ("anchor", "container", "key", "path", "size_before")

    def __init__(self, container: Any, anchor: str | None, path: Path, size_before: int) -> None:
        self.container = container
        self.anchor = anchor
        self.path = path
        self.size_before = size_before
        self.key: Any = _UNSET


def parse_yaml(text: str, wanted: Collection[Path] | None = None) -> Documents:
    """Return the documents of a YAML text, with the lines of the paths in `wanted`; raise TextProblem."""
    from yaml import YAMLError  # here, because yaml takes 20 ms to import and --help does not want it
    from yaml.cyaml import CParser

    try:
        return _read_events(CParser(text), wanted)
    except YAMLError as error:
        raise _explained(error, text) from None


def _read_events(parser: Any, wanted: Collection[Path] | None) -> Documents:
    """Build the documents from libyaml's events: a loop of our own is several times as fast as PyYAML's constructor."""
    from yaml import events

    scalar, alias = events.ScalarEvent, events.AliasEvent
    mapping_start, sequence_start = events.MappingStartEvent, events.SequenceStartEvent
    ends = (events.MappingEndEvent, events.SequenceEndEvent)
    result = Documents([], [], {})
    anchors: dict[str, tuple[Any, int]] = {}
    levels: list[_Level] = []
    level: _Level | None = None
    size = aliased = 0
    next_event = parser.get_event
    while (event := next_event()) is not None:
        kind = event.__class__
        is_open = False
        if kind is scalar:
            text = event.value
            if level is not None and level.key is _UNSET and level.container.__class__ is dict:
                if text in level.container:
                    result.duplicates.append(((*level.path, text), event.start_mark.line + 1))
                level.key = text
                if wanted is not None and (path := (*level.path, text)) in wanted:
                    result.lines.setdefault(path, event.start_mark.line + 1)
                if event.anchor:
                    anchors[event.anchor] = text, 1
                continue
            if event.style == "" and event.implicit[0]:
                value = _WORDS.get(text, _UNSET)
                if value is _UNSET:
                    value = _number(text) if text[0] in _NUMBER_STARTS else text
            else:
                value = text if event.tag is None else _tagged(event)
            size += 1
            if event.anchor:
                anchors[event.anchor] = value, 1
        elif kind is mapping_start or kind is sequence_start:
            if event.tag not in (None, "!", _TAG + "map", _TAG + "seq"):
                raise _unknown_tag(event)
            if len(levels) >= _DEEPEST:
                raise TextProblem(event.start_mark.line + 1, f"is nested more than {_DEEPEST} levels deep")
            value = {} if kind is mapping_start else []
            size += 1
            is_open = True
        elif kind in ends:
            assert level is not None
            if level.anchor:
                anchors[level.anchor] = level.container, size - level.size_before
            levels.pop()
            level = levels[-1] if levels else None
            continue
        elif kind is alias:
            if event.anchor not in anchors:
                raise TextProblem(event.start_mark.line + 1, f"alias *{event.anchor} stands for nothing before it")
            value, nodes = anchors[event.anchor]
            size += nodes
            aliased += nodes
            if aliased > _MOST_ALIASED:
                raise TextProblem(event.start_mark.line + 1, f"aliases add more than {_MOST_ALIASED} values")
        else:
            if kind is events.DocumentStartEvent:
                anchors.clear()
            continue

        # `value` goes where it belongs: a new document, an item, or what a key stands for.
        if level is None:
            path: Path = (len(result.roots),)
            result.roots.append(value)
        elif level.container.__class__ is list:
            path = (*level.path, len(level.container)) if is_open or wanted is not None else ()
            level.container.append(value)
        elif level.key is _UNSET:
            raise TextProblem(event.start_mark.line + 1, "a key must be text")
        else:
            path = (*level.path, level.key) if is_open else ()
            level.container[level.key] = value
            level.key = _UNSET
        if wanted is not None and path in wanted:
            result.lines.setdefault(path, event.start_mark.line + 1)
        if is_open:
            level = _Level(value, event.anchor, path, size - 1)
            levels.append(level)
    return result


def _number(text: str) -> Any:
    """Return the number that a plain scalar is in the core schema, or the text."""
    if _INTEGER.fullmatch(text):
        return int(text)
    if _OTHER_BASE.fullmatch(text):
        return int(text, 0)
    return float(text.replace(".inf", "inf").replace(".nan", "nan")) if _FLOAT.fullmatch(text.lower()) else text


def _tagged(event: Any) -> Any:
    """Return the value of a scalar with a tag."""
    name = event.tag.removeprefix(_TAG)
    if name in ("str", "!"):
        return event.value
    value = _WORDS.get(event.value, _UNSET)
    if value is _UNSET:
        value = _number(event.value)
    expected = {"int": int, "float": float, "bool": bool, "null": type(None)}.get(name)
    if expected is None:
        raise _unknown_tag(event)
    if type(value) is not expected:
        raise TextProblem(event.start_mark.line + 1, f"{json.dumps(event.value)} is not a !!{name}")
    return value


def _unknown_tag(event: Any) -> TextProblem:
    return TextProblem(event.start_mark.line + 1, f"unknown tag {json.dumps(event.tag.replace(_TAG, '!!'))}")


def _explained(error: Exception, text: str) -> TextProblem:
    """Return what PyYAML complains of, in one line and with a cure where the cause is plain."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        position = getattr(error, "position", None)
        line = text.encode()[:position].count(b"\n") + 1 if isinstance(position, int) else 0
        character = getattr(error, "character", None)
        what = f"character {character!r}" if character is not None else "a character"
        return TextProblem(line, f"{what} is not allowed in YAML; remove it")
    parts = [getattr(error, "context", None), getattr(error, "problem", None)]
    message = ", ".join(part for part in parts if part) or "cannot be read"
    lines: Sequence[str] = text.splitlines()
    if mark.line < len(lines) and "\t" in lines[mark.line]:
        message += "; the line has a tab: YAML is indented with spaces"
    return TextProblem(mark.line + 1, f"is not YAML: {message}")
