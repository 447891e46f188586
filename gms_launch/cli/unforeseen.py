"""What a command says of an error that nobody has foreseen: one line, and the traceback in a file of the user's own."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Sequence

from gms_launch.urls import public

#: Of the error's own words (characters).
LONGEST = 300


def report(error: Exception, verb: Sequence[str] = ()) -> str:
    """The message for people. The traceback is written to a new file, readable by this user alone."""
    words = " ".join(str(error).split())[:LONGEST]
    what = f"{' '.join(['gms-launch', *verb])} met an error that it does not know: {type(error).__name__}: {words}"
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        fd, path = tempfile.mkstemp(prefix="gms-launch-", suffix=".traceback")
        with open(fd, "w", errors="backslashreplace") as file:
            file.write(public(text))
    except OSError as exc:
        return public(f"{what}; its traceback could not be written to a file: {exc.strerror}")
    return public(f"{what}; its traceback is in {os.path.abspath(path)}; please report both")
