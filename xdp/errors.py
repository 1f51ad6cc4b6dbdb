"""The root of turnout's exceptions.

    Error                      anything that a user can be told in one line; exit code 1
      UsageError               an argument that cannot be, such as an unknown interface; exit code 2
      NotRunningError          no daemon of that name; exit code 3
      ConfigError              a manifest or configuration is invalid; exit code 4 (lb/errors.py adds the places)
      TimedOutError            a wait ended without its event; exit code 6
      MissingFeatureError      the machine lacks a privilege or a feature; exit code 77
      AttachError              a program cannot be attached to an interface
        NoZeroCopyError        an AF_XDP socket would have to be zero-copy, and its driver cannot (dataplane/afxdp.py)
      LayoutError              pinned tables have another layout or capacity
      TableFullError           a table has no room for the configuration
      KernelError              the kernel refused; it keeps the errno

A message names the thing, what was expected, and the likely cure.
"""

from __future__ import annotations


class Error(Exception):
    """Something that a user can be told in one line; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(Error):
    """An argument that cannot be."""

    exit_code = 2


class NotRunningError(Error):
    """No daemon of that name answers."""

    exit_code = 3


class ConfigError(Error):
    """A manifest or a configuration is invalid."""

    exit_code = 4


class TimedOutError(Error):
    """A wait ended without its event."""

    exit_code = 6


class MissingFeatureError(Error):
    """The machine lacks a privilege or a feature."""

    exit_code = 77


class AttachError(Error):
    """A program cannot be attached to an interface."""


class LayoutError(Error):
    """Pinned tables have another layout or capacity than asked for."""


class TableFullError(Error):
    """A table has no room for the configuration."""


class KernelError(Error):
    """The kernel refused; `errno` says why."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.errno = number
