"""The figures of requests in flight: parts that were run one by one, and what the document says of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench import requests


def row(nodes: int, config: str, **more: Any) -> dict[str, Any]:
    times = {"p50_ms": 500.0, "p99_ms": 1250.0}
    load = {"streams": 50, "unary": 20, "rate": 10.0}
    about = {"command": f"bench {config}", "machine": "2 cores", "load": load}
    counts = {"kills": 6, "answers": 1211, "lost": 0, "wrong_text": 1, "wrong_usage": 2, "outage": times}
    return {"nodes": nodes, "config": config} | about | counts | more


def test_a_part_takes_the_place_of_the_same_part() -> None:
    rows: list[dict[str, Any]] = []
    for new in (row(3, "hold"), row(1, "torchrun"), row(1, "no hold"), row(3, "hold", lost=7)):
        rows = requests.merged(rows, new)
    assert [(r["nodes"], r["config"], r["lost"]) for r in rows] == [
        (1, "no hold", 0),
        (1, "torchrun", 0),
        (3, "hold", 7),
    ]


def test_figures_say_what_was_measured_and_what_was_not() -> None:
    pause = {"p50_ms": 640.0, "p99_ms": 990.0}
    text = requests.figures(
        {"rows": [row(3, "hold", longest_pause_of_a_stream=pause), row(3, "no hold", unfinished="x")]}
    )
    assert (
        "| 3, hold | 6 | 50 streams, 20 unary, 10 new a second | 1,211 | 0 | 3 | 0.64 / 0.99 s | - | 0.50 / 1.25 s |"
        in text
    )
    assert "3 nodes, no hold: stopped before its end (x)." in text
    assert "Not run: 1 nodes, hold; 1 nodes, no hold; 1 nodes, torchrun; 3 nodes, torchrun; the cost." in text
    latency = {"tokens_per_s": {"median": 900.5}, "latency": pause}
    cost = {
        "command": "c",
        "machine": "m",
        "hold": latency,
        "not armed": latency,
        "no hold": latency,
        "ratio_tokens": 1.0,
        "ratio_p99": 0.98,
    }
    text = requests.figures({"rows": [], "cost_when_all_is_well": cost})
    assert "| hold | 900.5 | 0.64 / 0.99 s |" in text and "tokens 1, p99 0.98" in text and "By `c` on m." in text


def test_only_the_block_is_made_anew() -> None:
    text = requests.with_figures(f"before\n{requests.FIRST}stale\n{requests.LAST}\nafter\n", {"rows": []})
    assert text.startswith("before\n") and text.endswith(f"{requests.LAST}\nafter\n") and "stale" not in text
    with pytest.raises(ValueError, match="no block"):
        requests.with_figures("nothing", {"rows": []})


def test_the_document_has_the_figures_of_the_file() -> None:
    text = requests.DOCS.read_text()
    assert requests.with_figures(text, json.loads(requests.OUT.read_text())) == text
