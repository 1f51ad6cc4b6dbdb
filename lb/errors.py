"""What can be wrong with manifests, each problem with its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from xdp.errors import ConfigError


class Problem(NamedTuple):
    """One thing that is wrong, and where. `line` counts from 1 and is 0 when the problem is not in a line."""

    file: str
    line: int
    object: str  # as in "Service shop/web"; empty when the problem is not in an object
    path: str  # as in "spec.ports[0].port"; empty for the object as a whole
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(part for part in (place, self.object, self.path, self.message) if part)


class ManifestError(ConfigError):
    """Manifests that must not be applied; `problems` holds everything that is wrong with them, in order of place."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))
