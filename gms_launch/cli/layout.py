"""How a verb prints what it found (`-o`): as a table, as a wider one, as JSON or as YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import typer

LAYOUTS = ("wide", "json", "yaml")


def layout(value: str) -> str:
    """What a person typed for `-o`."""
    if value and value not in LAYOUTS:  # empty is the default, and none of anybody's typing
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(LAYOUTS)}")
    return value


def chosen(output: str, as_json: bool) -> str:
    """The layout that was asked for; empty for the usual table. `--json` is the older word for `-o json`."""
    if as_json and output not in ("", "json"):
        raise typer.BadParameter(f"--json and -o {output} are two layouts; give one of them")
    return "json" if as_json else output


def document(data: Any, form: str) -> str:
    """`data` as JSON or YAML, without a line end behind it."""
    return json.dumps(data, indent=1) if form == "json" else "\n".join(_yaml(data, ""))


def _yaml(data: Any, indent: str) -> Iterator[str]:
    """The block style of YAML; scalars and keys are written as JSON has them, which YAML 1.2 takes as they are."""
    if isinstance(data, dict) and data:
        for key, value in data.items():
            if _nested(value):
                yield f"{indent}{json.dumps(str(key))}:"
                yield from _yaml(value, indent + "  ")
            else:
                yield f"{indent}{json.dumps(str(key))}: {_scalar(value)}"
    elif isinstance(data, (list, tuple)) and data:
        for value in data:
            if _nested(value):
                first, *rest = _yaml(value, indent + "  ")
                yield f"{indent}- {first.lstrip()}"
                yield from rest
            else:
                yield f"{indent}- {_scalar(value)}"
    else:
        yield f"{indent}{_scalar(data)}"


def _scalar(value: Any) -> str:
    """As JSON has it, but for a number such as 5e-05: without a point YAML 1.1 takes it for a text."""
    text = json.dumps(value)
    return re.sub(r"^(-?\d+)e", r"\1.0e", text) if isinstance(value, float) else text


def _nested(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple)) and bool(value)
