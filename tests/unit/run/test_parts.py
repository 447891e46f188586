"""What a node that has no rank of a group says of that group's model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gms_launch.run import parts, placement
from gms_launch.settings import groups
from gms_launch.settings.resolve import resolve

LONG = "/" + "x" * 300


@pytest.mark.parametrize(
    ("model", "engine", "told"),
    [
        ("here", "vllm", False),
        ("away", "vllm", True),
        (LONG, "vllm", True),
        ("any name", "command", False),
        ("./away", "command", True),
    ],
)
def test_a_model_that_is_not_seen_from_here_is_told(
    model: str, engine: str, told: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    tables = [{"name": "a", "nodes": 1}, {"name": "b", "nodes": 1, "model": model, "engine": engine}]
    found = placement.place(groups.expand(resolve({"nnodes": "2", "model": "here"}, {}, {"group": tables}), 8), 2, 8)
    monkeypatch.setattr(parts, "placed", lambda _: found)
    said = parts.unseen(cast(Any, SimpleNamespace(home=SimpleNamespace(node_rank=0))))
    assert said == ([f"group b: model {model!r} is not seen from this node"] if told else [])
