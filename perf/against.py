"""Another commit of this project in a folder of its own, to be measured beside this one."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xdp.errors import Error, UsageError

_ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def checked_out(revision: str) -> Iterator[tuple[str, Path]]:
    """Check `revision` out for the duration of the block; yield (its short name, the folder). UsageError: none such."""
    try:
        name = _git("rev-parse", "--short=10", "--verify", f"{revision}^{{commit}}")
    except Error as error:
        raise UsageError(f"--against {revision}: no such commit ({error})") from None
    _git("worktree", "prune")  # what a killed run left registered
    with tempfile.TemporaryDirectory(prefix="turnout-against-") as folder:
        checkout = Path(folder, name)
        _git("worktree", "add", "--quiet", "--detach", str(checkout), name)
        try:
            yield name, checkout
        finally:
            _git("worktree", "remove", "--force", str(checkout))


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Error("git: not found") from None
    if done.returncode:
        raise Error(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip()
