"""Where compiled code is cached."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xdp.jit import cache_folder


@pytest.mark.parametrize("first", ["xdp.jit", "xdp.atomic", "numba"])
def test_the_cache_belongs_to_these_sources_whatever_is_imported_first(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numba reads its configuration once, and would keep compiled code beside the sources, where it goes stale."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    program = f"import {first}, xdp.jit, numba; print(numba.config.CACHE_DIR)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(cache_folder())
