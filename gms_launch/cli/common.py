"""What many verbs share: options, and words that can be printed."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from gms_launch.cli import complete
from gms_launch.cli.layout import LAYOUTS, layout
from gms_launch.errors import UsageError

Group = Annotated[
    Optional[str],  # noqa: UP045 - evaluated at run time
    typer.Option("--group", autocompletion=complete.groups, help="which group, in a run of several"),
]
Run = Annotated[
    Optional[str],  # noqa: UP045 - typer reads this at run time on Python 3.10 too
    typer.Option(
        "--run",
        "--run-id",
        autocompletion=complete.runs,
        help="which run (default: GMS_LAUNCH_RUN, SLURM_JOB_ID, or the only live one)",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON with a documented layout")]
Html = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--html", metavar="<file>", help="write a page for a browser, in one file"),
]
Output = Annotated[
    str,
    typer.Option(
        "-o",
        "--output",
        parser=layout,
        metavar="|".join(LAYOUTS),
        autocompletion=lambda incomplete: [name for name in LAYOUTS if name.startswith(incomplete)],
        help="wide cuts nothing off; json and yaml have a documented layout",
    ),
]


def typed_as_text(words: list[str]) -> None:
    """Raise `UsageError` for a word that is no UTF-8. What we print may hold anything, whatever the terminal takes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for k, word in enumerate(words):
        if any("\ud800" <= c <= "\udfff" for c in word):
            raise UsageError(f"word {k} of the command line is no UTF-8: {os.fsencode(word)!r}")
