"""Removing tables: pinned maps, or files. What opens them brings numpy with it, which takes longer than this."""

from __future__ import annotations

import shutil
from pathlib import Path

from xdp import kernel

LAYOUT_NAME = "layout"  # of what says that a folder has all its tables
TABLES_NAME = "tables"  # of the one file that has them


def maps(folder: Path) -> None:
    """Unpin the maps in `folder`, and the folder too if nothing else is pinned there. They live on while in use."""
    if not folder.is_dir():
        return
    # The layout first: an interrupted removal leaves what an interrupted creation leaves.
    for name in (LAYOUT_NAME, *kernel.pinned_maps(folder)):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def files(folder: Path) -> bool:
    """Remove the tables in `folder`, and it; return whether there was anything."""
    if not folder.exists():
        return False
    for name in (LAYOUT_NAME, TABLES_NAME):  # by their names, as it takes a descriptor to look for others
        (folder / name).unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
    return True
