"""The errors that end a command, each with its exit code.

A message says what was tried, where, what was found and what to do about it.
"""

from __future__ import annotations


class LaunchError(Exception):
    """A command failed. `exit_code` is what the process returns."""

    exit_code = 1


class UsageError(LaunchError):
    """A setting is wrong, missing or contradicts another. Raised before anything is started."""

    exit_code = 2


class RefusedError(LaunchError):
    """The command was understood and not carried out, because it would do harm."""

    exit_code = 3


class MovedError(LaunchError):
    """This node has another rank by now, since a spare has taken its place: its agent begins again."""


class InterruptedRunError(LaunchError):
    """Somebody stopped it before it had come to what it was for: Ctrl-C, SIGTERM or SIGHUP during a start."""

    exit_code = 130


class DeadlineError(LaunchError):
    """Something did not finish in the time it was given."""

    exit_code = 4


class NoContactError(LaunchError):
    """The run cannot be found or does not answer."""

    exit_code = 5


def by_code(code: int, text: str) -> LaunchError:
    """The error whose exit code is `code`."""
    kinds = (LaunchError, UsageError, RefusedError, DeadlineError, NoContactError, InterruptedRunError)
    return next((k for k in kinds if k.exit_code == code), LaunchError)(text)
