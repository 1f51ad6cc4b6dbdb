"""Texts that are nested too deep, and where something stands, as people write it."""

from __future__ import annotations

import json

import pytest

from lb.documents import TextError, dotted, parse


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (("spec", "ports", 0, "port"), "spec.ports[0].port"),
        (("metadata", "annotations", "turnout.dev/weights"), "metadata.annotations[turnout.dev/weights]"),
        ((), ""),
    ],
)
def test_paths_are_written_as_people_do(path, text):
    assert dotted(path) == text


def lists(levels):
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("levels", [101, 985, 100_000])
@pytest.mark.parametrize("is_json", [True, False])
def test_what_is_nested_deeper_than_a_hundred_levels_is_refused(levels, is_json):
    with pytest.raises(TextError, match="is nested more than 100 levels deep"):
        parse(lists(levels), is_json)
    with pytest.raises(TextError, match="is nested more than 100 levels deep"):
        parse('{"a": [1, ' + lists(levels - 1) + "]}", is_json)


def test_a_hundred_levels_are_read_and_brackets_in_text_are_none():
    assert parse(lists(100), is_json=True).roots == parse("- " + lists(99)).roots
    assert parse(json.dumps(["[" * 200]), is_json=True).roots == [["[" * 200]]


def test_aliases_do_not_nest_deeper_either():
    """Each holds the one before it, some levels deeper."""
    text = "- &a0 []\n" + "".join(f"- &a{n} [[[[[[[[[[*a{n - 1}]]]]]]]]]]\n" for n in range(1, 12))
    with pytest.raises(TextError, match="is nested more than 100 levels deep") as caught:
        parse(text)
    assert caught.value.line == 11
    assert len(parse("".join(text.splitlines(keepends=True)[:10])).roots[0]) == 10
