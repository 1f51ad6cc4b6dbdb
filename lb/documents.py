"""The text of a file -> its documents as dicts and lists, and in which line something stands.

YAML is read as YAML 1.2's core schema says: `no`, `on` and dates are text, 1e3 is a float, `<<` is a key like any
other; `010`, which is eight to some readers and ten to others, stays text. Keys are text always, and none may come
twice. JSON goes through the standard library, which is ten times as fast. Positions cost as much as the reading
itself, so they are looked for in a second reading, when there is a problem to be placed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Path = tuple[str | int, ...]  # from the root of a file; the first step is the number of the document

_DEEPEST = 100  # levels
_MOST_ALIASED = 100_000  # nodes that aliases may add to one file: a bomb of a few lines expands to millions
_CONTAINERS: Collection[Any] = frozenset((dict, list))
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
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_]{1,63}")
_LONGEST_KEY = 100
_STEP = re.compile(r"\[([^\]]*)\]|([^.\[]+)")
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset((None, "!", _TAG + "map", _TAG + "seq"))


def dotted(path: Iterable[str | int]) -> str:
    """Return a path as people write it: spec.ports[0].port, metadata.annotations[turnout.dev/weights].

    Keys come from files: what a terminal would act on is escaped, what is endless is cut.
    """
    text = ""
    for step in path:
        if isinstance(step, str) and _PLAIN_KEY.fullmatch(step):
            text += f".{step}" if text else step
        else:
            key = str(step)[:_LONGEST_KEY]
            text += f"[{key if key.isprintable() else ascii(key)[1:-1]}]"
    return text


def undotted(text: str) -> Path:
    """Return the path that `dotted` has written: none of its keys has a bracket, and one of digits is an index."""
    steps = [index or key for index, key in _STEP.findall(text)]
    return tuple([int(step) if step.isdigit() else step for step in steps])


class TextError(Exception):
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
    """Return `data` as text; raise TextError unless it is UTF-8 without NUL bytes. A byte order mark is dropped."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TextError(0, "is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextError(line, f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        raise TextError(text.count("\n", 0, text.index("\0")) + 1, "a NUL byte; this is not a text file")
    return text


def parse(text: str, is_json: bool = False) -> Documents:
    """Return the documents of `text`, which is JSON if it says so or looks it, YAML otherwise.

    Raise TextError for what is neither.
    """
    if not is_json and not text.lstrip().startswith(("{", "[")):
        return parse_yaml(text)
    try:
        root = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except _DuplicateKeyError as error:
        return _place_duplicates(text, str(error))
    except RecursionError:
        raise TextError(0, f"is nested more than {_DEEPEST} levels deep") from None
    except ValueError as error:
        if not is_json:
            return parse_yaml(text)  # YAML may start with a brace, too, and several documents may follow each other
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 0
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise TextError(line, f"is not JSON: {message[:1].lower()}{message[1:]}") from None
    # Most files need no look: it takes a third of the time that json does.
    if text.count("{") + text.count("[") > _DEEPEST and _is_deeper(root, _DEEPEST):
        raise TextError(0, f"is nested more than {_DEEPEST} levels deep")
    return Documents([root], [], {})


def _is_deeper(value: Any, levels: int) -> bool:
    """Tell whether mappings and lists in `value` are nested more than `levels` deep, itself included.

    What is may be too deep for every function that calls itself for what is inside.
    """
    level: list[Any] = [value] if value.__class__ in _CONTAINERS else []
    for _ in range(levels):
        if not level:
            return False
        level = [
            inside
            for each in level
            for inside in (each.values() if each.__class__ is dict else each)
            if inside.__class__ in _CONTAINERS
        ]
    return bool(level)


def find_lines(text: str, paths: Collection[Path]) -> dict[Path, int]:
    """Return the line of each of `paths`, or of what is left of it when its end is not there."""
    wanted = {path[:length] for path in paths for length in range(1, len(path) + 1)}
    try:
        lines = parse_yaml(text, wanted).lines
    except TextError:
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
    except TextError:
        raise TextError(0, f"key {json.dumps(key)} comes twice in one object") from None


class _Level:
    """A mapping or a sequence that is being read."""

    __slots__ = ("anchor", "container", "is_mapping", "key", "path", "size_before")

    def __init__(self, container: Any, anchor: str | None, path: Path, size_before: int) -> None:
        self.container = container
        self.is_mapping = container.__class__ is dict
        self.anchor = anchor
        self.path = path
        self.size_before = size_before
        self.key: Any = _UNSET


def parse_yaml(text: str, wanted: Collection[Path] | None = None) -> Documents:
    """Return the documents of a YAML text, with the lines of the paths in `wanted`; raise TextError."""
    from yaml import YAMLError  # here, because yaml takes 20 ms to import and --help does not want it
    from yaml.cyaml import CParser  # type: ignore[attr-defined]

    try:
        return _Reader(wanted).read(CParser(text).get_event)
    except YAMLError as error:
        raise _explained(error, text) from None


class _Reader:
    """Builds documents from libyaml's events, in half the time that PyYAML's own constructor takes."""

    def __init__(self, wanted: Collection[Path] | None) -> None:
        self.result = Documents([], [], {})
        self._wanted = wanted
        self._anchors: dict[str, tuple[Any, int]] = {}  # what they stand for, and how many values that is
        self._levels: list[_Level] = []
        self._level: _Level | None = None
        self._size = 0  # values so far, those that aliases repeat included
        self._aliased = 0

    def read(self, next_event: Callable[[], Any]) -> Documents:
        """Take every event; return what they make."""
        from yaml import events

        takers = {
            events.ScalarEvent: self._take_scalar,
            events.MappingStartEvent: self._open,
            events.SequenceStartEvent: self._open,
            events.MappingEndEvent: self._close,
            events.SequenceEndEvent: self._close,
            events.AliasEvent: self._take_alias,
            events.DocumentStartEvent: self._start_document,
        }
        while (event := next_event()) is not None:
            if taker := takers.get(event.__class__):
                taker(event)
        return self.result

    def _start_document(self, _event: Any) -> None:
        self._anchors.clear()

    def _take_scalar(self, event: Any) -> None:
        text = event.value
        level = self._level
        if level is not None and level.key is _UNSET and level.is_mapping:
            self._take_key(level, text, event)
            return
        if event.style == "" and event.implicit[0]:
            value = _WORDS.get(text, _UNSET)
            if value is _UNSET:
                value = _number(text) if text[0] in _NUMBER_STARTS else text
        else:
            value = text if event.tag is None else _tagged(event)
        self._size += 1
        if event.anchor:
            self._anchors[event.anchor] = value, 1
        self._place(value, event)

    def _take_key(self, level: _Level, text: str, event: Any) -> None:
        """Remember the key of the value to come."""
        if text in level.container:
            self.result.duplicates.append(((*level.path, text), event.start_mark.line + 1))
        level.key = text
        if event.anchor:
            self._anchors[event.anchor] = text, 1
        if self._wanted is not None:
            self._note_line((*level.path, text), event)

    def _take_alias(self, event: Any) -> None:
        if event.anchor not in self._anchors:
            raise TextError(event.start_mark.line + 1, f"alias *{event.anchor} stands for nothing before it")
        value, size = self._anchors[event.anchor]
        self._size += size
        self._aliased += size
        if self._aliased > _MOST_ALIASED:
            raise TextError(event.start_mark.line + 1, f"aliases add more than {_MOST_ALIASED} values")
        if _is_deeper(value, _DEEPEST - len(self._levels)):
            raise TextError(event.start_mark.line + 1, f"is nested more than {_DEEPEST} levels deep")
        self._place(value, event)

    def _open(self, event: Any) -> None:
        """Begin a mapping or a sequence."""
        from yaml.events import MappingStartEvent

        if event.tag not in _PLAIN_TAGS:
            raise _unknown_tag(event)
        if len(self._levels) >= _DEEPEST:
            raise TextError(event.start_mark.line + 1, f"is nested more than {_DEEPEST} levels deep")
        value: Any = {} if event.__class__ is MappingStartEvent else []
        path = self._next_path()
        self._place(value, event)
        self._level = _Level(value, event.anchor, path, self._size)
        self._levels.append(self._level)
        self._size += 1

    def _close(self, _event: Any) -> None:
        level = self._levels.pop()
        self._level = self._levels[-1] if self._levels else None
        if level.anchor:  # not before: what holds itself would have no end
            self._anchors[level.anchor] = level.container, self._size - level.size_before

    def _next_path(self) -> Path:
        """Return the path of the value to come."""
        level = self._level
        if level is None:
            return (len(self.result.roots),)
        return (*level.path, level.key if level.is_mapping else len(level.container))

    def _place(self, value: Any, event: Any) -> None:
        """Put a value where it belongs: a new document, an item, or what a key stands for."""
        if self._wanted is not None:
            self._note_line(self._next_path(), event)
        level = self._level
        if level is None:
            self.result.roots.append(value)
        elif not level.is_mapping:
            level.container.append(value)
        elif level.key is _UNSET:
            raise TextError(event.start_mark.line + 1, "a key must be text")
        else:
            level.container[level.key] = value
            level.key = _UNSET

    def _note_line(self, path: Path, event: Any) -> None:
        if path in self._wanted:  # type: ignore[operator]
            self.result.lines.setdefault(path, event.start_mark.line + 1)


def _number(text: str) -> Any:
    """Return the number that a plain scalar is in the core schema, or the text."""
    if _INTEGER.fullmatch(text):
        return int(text)
    if _OTHER_BASE.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


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
        raise TextError(event.start_mark.line + 1, f"{json.dumps(event.value)} is not a !!{name}")
    return value


def _unknown_tag(event: Any) -> TextError:
    return TextError(event.start_mark.line + 1, f"unknown tag {json.dumps(event.tag.replace(_TAG, '!!'))}")


def _explained(error: Exception, text: str) -> TextError:
    """Return what PyYAML complains of, in one line and with a cure where the cause is plain."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        position = getattr(error, "position", None)
        line = text.encode()[:position].count(b"\n") + 1 if isinstance(position, int) else 0
        character = getattr(error, "character", None)
        what = f"character {character!r}" if character is not None else "a character"
        return TextError(line, f"{what} is not allowed in YAML; remove it")
    parts = [getattr(error, "context", None), getattr(error, "problem", None)]
    message = ", ".join(part for part in parts if part) or "cannot be read"
    lines: Sequence[str] = text.splitlines()
    if mark.line < len(lines) and "\t" in lines[mark.line]:
        message += "; the line has a tab: YAML is indented with spaces"
    return TextError(mark.line + 1, f"is not YAML: {message}")
