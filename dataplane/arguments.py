"""How arguments are read: values that a file could hold as well, flags that take several values, help with examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dataplane.settings import DEFAULT_NAME, OPTIONS, Option

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_F = TypeVar("_F", bound=Callable[..., Any])


class _Value(click.ParamType):  # type: ignore[type-arg]
    """A value that is read as the configuration file reads it."""

    def __init__(self, option: Option) -> None:
        self.name = option.metavar
        self._option = option

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return what the text `value` means."""
        if not isinstance(value, str):
            return value
        try:
            return self._option.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002 - as click calls it
        """Return how the help shows a value."""
        return self._option.metavar

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002 - as click calls it
        """Return the choices that begin with `incomplete`, or leave it to the shell's files."""
        from click.shell_completion import CompletionItem

        if self._option.field == "files":
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(choice) for choice in self._option.choices if choice.startswith(incomplete)]


class Wait(click.ParamType):  # type: ignore[type-arg]
    """How long to wait at most: a number of seconds, which infinity is not, nor what is beyond the system's clocks."""

    name = "seconds"
    _longest_s = 366 * 86_400

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds that the text `value` means."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds <= self._longest_s:  # NaN is in no range
            self.fail(f"{value!r} is no time to wait; expected seconds, 0 to {self._longest_s}", param, ctx)
        return seconds


class _Ending:
    """The end of a help text: its examples and, for the whole, what exit codes mean."""

    def __init__(
        self, *args: Any, examples: str = "", exit_codes: Mapping[int, str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._examples = examples
        self._exit_codes = exit_codes or {}

    def format_epilog(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write both, as they are and without filling lines."""
        if self._examples:
            with formatter.section("Examples"):
                for line in self._examples.strip().splitlines():
                    formatter.write(f"  {line.strip()}\n")
        if self._exit_codes:
            with formatter.section("Exit codes"):
                formatter.write_dl([(str(code), meaning) for code, meaning in self._exit_codes.items()])


class Group(_Ending, click.Group):
    """A command that consists of others."""


class Command(_Ending, click.Command):
    """A command whose -f and -i take several values in a row."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the flag before each further value, then parse."""
        several = {
            flag for param in self.params if isinstance(param, click.Option) and param.multiple for flag in param.opts
        }
        return super().parse_args(ctx, _spread(args, several))


def _spread(args: Sequence[str], several: set[str]) -> list[str]:
    """Return `args` with `-f a b` as `-f a -f b`, for the flags in `several`."""
    out: list[str] = []
    current, is_first = "", False
    for index, arg in enumerate(args):
        if arg == "--":
            return [*out, *args[index:]]
        if arg.startswith("-") and arg != "-":
            flag, equals, _ = arg.partition("=")
            current = flag if flag in several else ""
            is_first = not equals
            out.append(arg)
        elif current and not is_first:
            out += [current, arg]
        else:
            is_first = False
            out.append(arg)
    return out


def flag(name: str, *flags: str, default: object = None, help_text: str = "") -> Callable[[_F], _F]:
    """Add the option `name` of settings.OPTIONS, as `--name` or `flags`; what is not given is None or ()."""
    option = OPTIONS[name]
    text = help_text or option.help
    if default is not None:
        text = f"{text}  [default: {default}]"
    return click.option(
        *(flags or (f"--{name}",)),
        option.field,
        type=_Value(option),
        multiple=option.is_list,
        help=text,
    )


def common_with(name_help: str) -> Callable[[_F], _F]:
    """Add the options that every command takes; `name_help` says what --name is to this one."""

    def add(function: _F) -> _F:
        function = click.option(
            "--debug", is_flag=True, expose_value=False, help="Show tracebacks.  [env: TURNOUT_DEBUG]"
        )(function)
        return click.option("--name", type=_Value(OPTIONS["name"]), envvar="TURNOUT_NAME", help=name_help)(function)

    return add


common = common_with(f"Which node.  [default: {DEFAULT_NAME}; env: TURNOUT_NAME]")


def output(*choices: str) -> Callable[[_F], _F]:
    """Add `-o`, with the first of `choices` as default."""
    return click.option(
        "-o", "--output", type=click.Choice(choices), default=choices[0], show_default=True, help="How to show it."
    )
