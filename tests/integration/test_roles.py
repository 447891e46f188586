"""A prefill and a decode engine behind the real frontend: each half fails over by itself, and is judged by itself."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.test_groups import Grouped
from tests.load import Load
from tests.support import LONG, Deployment, eventually

HALVES = """\
[[group]]
name = "p"
gpus = 1
role = "prefill"
[[group]]
name = "d"
gpus = 1
role = "decode"
"""
#: Their places among the run's groups.
PLACE = {"p": 0, "d": 1}
OTHER = {"p": "d", "d": "p"}


class Halves(Grouped):
    """`tables` are its groups."""

    def __init__(self, home: Path, model: Path, *extra: str, tables: str = HALVES) -> None:
        file = home / "settings.toml"
        file.write_text(tables)
        super().__init__(home, model, "--config", str(file), "--virtual-gpus", "3", *extra)


@pytest.fixture
def halves(tmp_path: Path, model: Path) -> Iterator[Callable[..., Halves]]:
    made: list[Halves] = []

    def start(*extra: str, tables: str = HALVES) -> Halves:
        run = Halves(tmp_path, model, *extra, tables=tables)
        run.__enter__()
        made.append(run)
        return run

    yield start
    for run in made:
        run.__exit__()


def test_each_half_fails_over_by_itself_and_the_text_is_that_of_one_engine(
    halves: Callable[..., Halves], tmp_path: Path, model: Path
) -> None:
    (tmp_path / "one").mkdir()
    with Deployment(tmp_path / "one", model, "--no-canary") as one:
        text = one.text("what comes next", 40)
    run = halves("--no-canary")
    run.full("p", "d")
    assert text and run.text("what comes next", 40) == text
    for half in ("d", "p"):
        before, untouched = run.full("p", "d")[half]["primary"], run.lives(OTHER[half])
        with Load(run.run_file["frontend_url"], streams=4, unary=2, tokens=30) as load:
            load.wait_busy(1.0)
            os.killpg(run.primary_ranks(half)[0], signal.SIGKILL)
            eventually(lambda half=half: len(run.of(half, "first_token")) == 2, LONG, "promoted")  # type: ignore[misc]
            after = run.full(half)[half]
        assert after["primary"] != before and after["cohorts"][before]["incarnation"] == 2
        assert load.lost == [] and load.wrong == [], load.said()
        assert run.lives(OTHER[half]) == untouched, "the other half was not touched"
    assert run.text("what comes next", 40) == text
    assert {e["group"] for e in run.events("exit")} == {"p", "d"}


@pytest.mark.parametrize("half", ["p", pytest.param("d", marks=pytest.mark.slow)])
def test_of_two_halves_the_one_that_hangs_is_killed(halves: Callable[..., Halves], half: str) -> None:
    """No token comes through the frontend then, whichever it is: only the engines' own counters tell."""
    run = halves("--canary-interval", "1", "--canary-timeout", "8")
    before, untouched = run.full("p", "d")[half]["primary"], run.lives(OTHER[half])
    (run.node_dir / f"g{PLACE[half]}" / f"wedge-{10 * PLACE[half] + before}-1").touch()
    assert run.text(timeout=3.0) is None, "it hangs"
    eventually(lambda: len(run.of(half, "first_token")) == 2, LONG, "the shadow serves")
    assert run.full(half)[half]["primary"] != before
    assert any("no token for 8 s (canary_timeout)" in e["detail"] for e in run.of(half, "kill"))
    assert run.text() and run.lives(OTHER[half]) == untouched and run.of(OTHER[half], "kill") == []


def test_a_half_waits_for_the_other_and_is_not_killed_for_that(halves: Callable[..., Halves]) -> None:
    run = halves("--no-canary", "--promotion-timeout", "5", "--health-timeout", "120")
    found = run.full("p", "d")
    prefill = [r["pgid"] for c in found["p"]["cohorts"] for r in c["ranks"]]
    for pgid in prefill:
        os.killpg(pgid, signal.SIGSTOP)  # nobody serves, and for as long as health_timeout nobody is dead
    os.killpg(run.primary_ranks("d")[0], signal.SIGKILL)
    started = len(run.of("d", "started"))
    eventually(lambda: len(run.of("d", "registered")) == 2, LONG, "the shadow serves, and nobody can ask it")
    eventually(lambda: len(run.of("d", "started")) > started, LONG, "promotion_timeout is over")
    assert len(run.of("d", "first_token")) == 1
    for pgid in prefill:
        os.killpg(pgid, signal.SIGCONT)
    eventually(lambda: len(run.of("d", "first_token")) == 2, LONG, "confirmed")
    assert run.of("d", "kill") == [] and run.of("p", "kill") == [] and run.text()


def test_a_component_of_its_own_is_registered_and_found(halves: Callable[..., Halves]) -> None:
    tables = HALVES + 'component = "late"\n' + HALVES[: HALVES.index("[[group]]", 1)].replace('"p"', '"q"')
    run = halves("--no-canary", tables=tables)
    run.full("p", "q", "d")
    assert run.text()
    logs = list((run.home / run.run / "logs" / "node0").glob("d.cohort-*.log"))
    texts = re.compile(r"late/generate|dynamo\.late\.generate")
    eventually(lambda: any(texts.search(log.read_text()) for log in logs))
