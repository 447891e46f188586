"""Options that many verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Run = Annotated[
    Optional[str],  # noqa: UP045 - typer reads this at run time on Python 3.10 too
    typer.Option("--run", "--run-id", help="which run (default: GMS_LAUNCH_RUN, SLURM_JOB_ID, or the only live one)"),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON with a documented layout")]
Html = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--html", metavar="<file>", help="write a page for a browser, in one file"),
]
