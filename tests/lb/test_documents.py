"""Texts that are nested too deep, and where something stands, as people write it."""

from __future__ import annotations

import json
import math

import pytest

from lb.documents import TextError, dotted, parse, undotted


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
    assert undotted(text) == path


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


def test_what_is_infinite_or_no_number_is_so_however_it_is_written():
    words = [sign + word for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")]
    assert parse("".join(f"- {word}\n" for word in words)).roots == [[float(word.replace(".", "")) for word in words]]
    assert all(math.isnan(value) for value in parse("[.nan, .NaN, .NAN]").roots[0])
    assert parse("[.iNF, -.nan, +.NaN, .inff]").roots == [[".iNF", "-.nan", "+.NaN", ".inff"]]
    assert parse("[1e3, 1E3, 1.5E-1]").roots == [[1e3, 1e3, 0.15]]
