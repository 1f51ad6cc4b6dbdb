"""Where something stands, as people write it."""

from __future__ import annotations

import pytest

from lb.documents import dotted


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
