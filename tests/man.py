"""The manual pages in docs/man, from the commands themselves: `make reference` writes them, and a test compares.

They are in the repository, so that a wheel has them without its build importing what it packs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer.main

from gms_launch import __version__
from gms_launch.cli.main import app

PLACE = Path(__file__).parents[1] / "docs/man"
CODES = (
    ("0", "Done."),
    ("1", "Failed; the message says how."),
    ("2", "Wrong settings; nothing was started."),
    ("3", "Refused, because it would do harm."),
    ("4", "Not finished in time."),
    ("5", "No contact with the run."),
    ("130", "Interrupted."),
)


def roff(text: str) -> str:
    """Text as the manual's formatter takes it: what is in backticks in bold."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = re.sub(r"`([^`]*)`", r"\\fB\1\\fR", text)
    return "\n".join("\\&" + line if line[:1] in (".", "'") else line for line in text.splitlines())


def page(name: str, command: Any, others: list[str]) -> str:
    """One manual page. `others` are the verbs that it refers to."""
    words = name.replace("gms-launch-", "gms-launch ", 1)
    first, _, rest = (command.help or "").partition("\n")
    lines = [
        f'.TH {roff(name.upper())} 1 "" "gms\\-launch {__version__}" "gms\\-launch"',
        ".SH NAME",
        f"{roff(name)} \\- {roff(first.strip().rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {roff(words)}",
        roff(" ".join(["[OPTIONS]", *(_metavar(p) for p in command.params if p.param_type_name == "argument")])),
    ]
    if hasattr(command, "commands"):
        lines += ["COMMAND ...", ".SH COMMANDS"]
        for verb, found in command.commands.items():
            if not found.hidden:
                about = (found.help or "").partition("\n")[0]
                lines += [".TP", f"\\fB{roff(verb)}\\fR", roff(about)]
    if rest.strip():
        lines += [".SH DESCRIPTION", *(roff(line.strip()) for line in rest.strip().splitlines() if line.strip())]
    if options := [p for p in command.params if not getattr(p, "hidden", False)]:
        lines += [".SH OPTIONS"]
        for option in options:
            if option.param_type_name == "argument":
                names = f"\\fI{roff(_metavar(option))}\\fR"
            else:
                names = ", ".join(f"\\fB{roff(n)}\\fR" for n in [*option.opts, *option.secondary_opts])
                names += "" if option.is_flag else f" \\fI{roff(_metavar(option))}\\fR"
            lines += [".TP", names, roff(getattr(option, "help", None) or "As above.")]
    lines += [".SH EXIT STATUS"]
    for code, meaning in CODES:
        lines += [".TP", code, roff(meaning)]
    if others:
        lines += [".SH SEE ALSO", ",\n".join(f".BR {roff(o)} (1)" for o in others).replace(" (1),\n", " (1),\n")]
    return "\n".join(lines) + "\n"


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper()).strip("<>")


def pages() -> dict[str, str]:
    """Every page by the name of its file."""
    top: Any = typer.main.get_command(app)
    verbs = {f"gms-launch-{verb}": found for verb, found in top.commands.items() if not found.hidden}
    found = {"gms-launch.1": page("gms-launch", top, list(verbs))}
    return found | {f"{name}.1": page(name, command, ["gms-launch"]) for name, command in verbs.items()}


def main() -> None:
    PLACE.mkdir(exist_ok=True)
    made = pages()
    for old in PLACE.glob("*.1"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (PLACE / name).write_text(text)


if __name__ == "__main__":
    main()
