"""What is going on, on stderr: steps with their times and a live picture on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.spinner import Spinner
from rich.text import Text

_REFRESH_PER_S = 8
_LINE_S = 10.0  # between two lines about the same step where nothing moves on the screen


@dataclass
class _Step:
    title: str
    started: float
    seconds: float | None = None  # None: it goes on


class Display:
    """A context manager: `with display.step("..."): display.show(picture, "in words")`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps: list[_Step] = []
        self._picture: RenderableType = ""
        self._next_line = 0.0
        self._spinner = Spinner("dots")
        self._live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=_REFRESH_PER_S,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._picture = ""
        self._live.stop()

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Show that something is under way for as long as the block lasts, and how long it took."""
        step = _Step(title, time.monotonic())
        self._steps.append(step)
        self._next_line = step.started + _LINE_S
        self._line(title)
        yield
        step.seconds = time.monotonic() - step.started
        self._picture = ""
        self._line(f"  done in {step.seconds:.1f} s")

    def show(self, picture: RenderableType, words: str) -> None:
        """Put `picture` below the step under way; where there is no terminal, say `words` now and then."""
        self._picture = picture
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_S
            self._line(f"  {words}")

    def say(self, words: str) -> None:
        """Say something that stays."""
        self._console.print(Text(words, style="yellow"), soft_wrap=True)

    def _line(self, words: str) -> None:
        if not self._console.is_terminal:
            self._console.print(Text(words), soft_wrap=True)

    def _render(self) -> RenderableType:
        lines: list[RenderableType] = []
        for step in self._steps:
            if step.seconds is not None:
                lines.append(Text.assemble(("done ", "green"), step.title, (f"  {step.seconds:.1f} s", "dim")))
            else:
                self._spinner.update(text=Text(f"{step.title}  {time.monotonic() - step.started:.0f} s"))
                lines.append(self._spinner)
        return Group(*lines, Padding(self._picture, (0, 0, 0, 5)))
