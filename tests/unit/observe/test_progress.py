"""How a start goes, in words; what earlier starts took; and what is said of those who are waited for."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from gms_launch import engines
from gms_launch.cohort import controller, membership
from gms_launch.cohort.model import Phase
from gms_launch.cohort.records import DesiredCohort, GmsStatus, ModelStamp, NodeRecord, RankRecord, RunRecord, Wanted
from gms_launch.cohort.steps import Step, by_memory, later
from gms_launch.cohort.view import Memory, Policy
from gms_launch.control.mirror import Mirror
from gms_launch.observe import progress, snapshot, starts, views, words
from gms_launch.observe.progress import Narrator, Teller
from gms_launch.run import contents

GIB = 1 << 30
NODE = NodeRecord(0, "h", "127.0.0.1", "b", 1, 1, model=ModelStamp(1, 1, "d", weights=4 * GIB))


def shot(
    phases: dict[int, Phase],
    steps: dict[int, Step] | None = None,
    *,
    allocated: int | None = 0,
    allocations: int = 0,
    committed: bool = False,
    announced: str = "",
    last: float = 0.0,
    nnodes: int = 1,
    over: tuple[tuple[str, float], ...] = (),
) -> snapshot.Snapshot:
    mirror = Mirror("r")
    keys = mirror.keys
    gms = GmsStatus(0, "u", "weights", "RW", committed, allocations=allocations, allocated_bytes=allocated)
    records = {
        keys.run: RunRecord("r", "d", "h", "0", 1.0, nnodes=nnodes, shadows=1, redundancy=announced).encode(),
        keys.node(0): replace(NODE, gms=(gms,)).encode(),
    }
    for cohort_id, phase in phases.items():
        step = (steps or {}).get(cohort_id, Step.IMPORTS) if phase is Phase.STARTING else None
        told = {"step": step.value, "step_since": 100.0, "step_last": last} if step else {}
        told["steps"] = over
        records[keys.cohort(cohort_id)] = DesiredCohort(cohort_id, 1, Wanted.RUNNING, 1).encode()
        records[keys.rank(cohort_id, 0)] = RankRecord(cohort_id, 0, 1, phase, pid=7, since=90.0, **told).encode()
    mirror.replace(records)
    return snapshot.build(mirror)


def shown(found: snapshot.Snapshot, now: float = 105.0) -> str:
    console = Console(record=True, width=220, file=io.StringIO())
    console.print(views.status(found, now))
    return console.export_text()


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("[GMS] Failover enabled: will use scratch KV for initialization until engine is primary", None),
        ("Connected with rw_or_ro lock (granted=rw), committed=False", Step.WEIGHTS),
        ("[GMS] gms_read_only=True, forcing RO mode", Step.WEIGHTS),
        ("INFO gpu_model_runner.py:3129] Starting to load model /m...", Step.WEIGHTS),
        ("INFO gpu_model_runner.py:3338] Model loading took 0.55 GiB memory and 3.1 seconds", Step.WARM_UP),
        ("[GMS] Committed 0.55 GiB, switched to read mode with 26 mappings", Step.WARM_UP),
        ("[GMS] Read mode: imported 0.55 GiB", Step.WARM_UP),
        ("[Shadow] Engine sleeping, startup probe now passing, waiting for lock", None),
    ],
)
def test_steps_are_read_from_the_lines_of_both_engines(line: str, step: Step | None) -> None:
    for name in ("vllm", "reference"):
        assert engines.get(name).step_of(f"2026-11-25 (Worker_TP0 pid=1) {line}") is step


def test_a_step_is_never_taken_back() -> None:
    assert later(Step.IMPORTS, Step.WARM_UP) and later(Step.WEIGHTS, Step.WARM_UP)
    assert not later(Step.WARM_UP, Step.WEIGHTS) and not later(Step.WEIGHTS, Step.WEIGHTS)


def test_the_memory_service_tells_of_a_writer_whose_log_is_silent() -> None:
    assert by_memory(0, False) is Step.IMPORTS
    assert by_memory(3, False) is Step.WEIGHTS
    assert by_memory(26, True) is Step.WARM_UP


def test_every_step_of_a_first_start_is_a_line() -> None:
    narrator, starting = Narrator(), Phase.STARTING
    said: list[str] = []

    def see(now: float, found: snapshot.Snapshot, confirmed: tuple[tuple[int, int], ...] = ()) -> None:
        said.extend(narrator.see(found, confirmed, now))

    see(10.0, shot({0: starting}, last=19.0))
    see(11.0, shot({0: starting}, last=19.0))
    see(12.5, shot({0: starting}, {0: Step.WEIGHTS}, allocated=GIB, allocations=2, last=3.0))
    see(16.5, shot({0: starting}, {0: Step.WARM_UP}, allocated=4 * GIB, allocations=9, committed=True))
    see(20.0, shot({0: Phase.PARKED}))
    see(20.1, shot({0: Phase.WAKING}))
    see(20.3, shot({0: Phase.ACTIVE}))
    see(20.4, shot({0: Phase.ACTIVE}), ((0, 1),))
    see(21.0, shot({0: Phase.ACTIVE}), ((0, 1),))
    assert said == [
        "cohort 0: imports (last time 19 s)",
        "cohort 0: imports took 2.5 s (last time 19 s); weights (last time 3 s)",
        "cohort 0: weights took 4.0 s (last time 3 s), 4.00 of 4.00 GiB are mapped; warm-up",
        "cohort 0: warm-up took 3.5 s; parked 10.0 s after its start",
        "cohort 0: has the lock, waking",
        "cohort 0: registered in discovery 0.20 s later",
        "cohort 0: first token 10.4 s after its start",
    ]
    assert narrator.took() == {0: pytest.approx({"imports": 2.5, "weights": 4.0, "warm-up": 3.5})}


def test_a_step_that_was_not_seen_is_left_out() -> None:
    narrator = Narrator()
    narrator.see(shot({0: Phase.STARTING}), (), 1.0)
    assert narrator.see(shot({0: Phase.PARKED}), (), 4.0) == [
        "cohort 0: imports took 3.0 s; parked 3.0 s after its start"
    ]
    narrator = Narrator()
    narrator.see(shot({0: Phase.STARTING}), (), 1.0)
    assert narrator.see(shot({0: Phase.WAKING}), (), 4.0) == [
        "cohort 0: imports took 3.0 s; parked 3.0 s after its start; has the lock, waking"
    ]


def test_a_step_between_two_looks_is_told_with_the_time_that_its_rank_took_down() -> None:
    narrator = Narrator()
    over = (("imports", 2.5), ("weights", 0.2))
    first = narrator.see(shot({0: Phase.STARTING}, last=3.0), (), 1.0)
    both = narrator.see(shot({0: Phase.STARTING}, {0: Step.WARM_UP}, over=over), (), 4.0)
    last = narrator.see(shot({0: Phase.PARKED}, over=(*over, ("warm-up", 1.0))), (), 5.0)
    assert first + both + last == [
        "cohort 0: imports (last time 3 s)",
        "cohort 0: imports took 2.5 s (last time 3 s); weights",
        "cohort 0: weights took 0.2 s; warm-up",
        "cohort 0: warm-up took 1.0 s; parked 4.0 s after its start",
    ]
    assert narrator.took() == {0: {"imports": 2.5, "weights": 0.2, "warm-up": 1.0}}
    late = Narrator().see(shot({0: Phase.PARKED}, over=over), (), 9.0)
    assert late[:2] == ["cohort 0: imports", "cohort 0: imports took 2.5 s; weights"]


def test_status_shows_what_a_starting_cohort_is_at() -> None:
    steps = {0: Step.WEIGHTS, 1: Step.WEIGHTS}
    loading = shot({0: Phase.STARTING, 1: Phase.STARTING}, steps, allocated=GIB, allocations=2, last=19.0)
    text = shown(loading)
    assert "weights (1.00 of 4.00 GiB) for 5 s (last time 19 s)" in text
    assert "weights (cohort 0 writes them: 1.00 of 4.00 GiB) for 5 s" in text
    upstream = shot({0: Phase.STARTING}, steps, allocated=None, allocations=26)
    assert "weights (26 allocations) for 5 s" in shown(upstream)
    rank = loading.to_json()["cohorts"][0]["ranks"][0]
    assert (rank["step"], rank["step_since"], rank["step_last_seconds"]) == ("weights", 100.0, 19.0)


def test_a_first_start_is_starting_and_not_down() -> None:
    first = shot({0: Phase.STARTING})
    assert "redundancy starting" in shown(first) and first.to_json()["starting"]
    assert first.to_json()["redundancy"] == "down", "what it amounts to"
    again = shot({0: Phase.STARTING}, announced="down")
    assert "redundancy down" in shown(again) and not again.to_json()["starting"]


def test_a_node_without_a_record_is_shown() -> None:
    found = shot({}, nnodes=2)
    assert found.to_json()["missing_nodes"] == [1] and "has not come yet" in shown(found)
    served = shot({}, nnodes=2, announced="full")
    assert "silent" in shown(served) and "stopped (SIGSTOP), cut off or gone" in shown(served)


def test_who_is_waited_for_and_how_long_still() -> None:
    assert membership.waiting([1, 3], 4, 240.4) == (
        "2 of 4 nodes are here, waiting for node ranks 1, 3: 240 s of node_wait left"
    )
    assert "waiting for node rank 1: 0 s" in membership.waiting([1], 2, -1.0)


def test_starts_that_fail_are_told_with_the_next_try() -> None:
    policy = Policy(2, 60.0, 60.0, 1.0, 60.0, 600.0, 3)
    memory = Memory(failures={1: (10.0, 15.0)}, failed_as={1: "exit code 1"}, not_before={1: 24.0})
    found = controller.tries(1, memory, policy, 20.0)
    assert (found.failed, found.limit, found.last_exit, found.not_before) == (2, 3, "exit code 1", 24.0)
    assert controller.tries(0, memory, policy, 20.0).failed == 0
    assert controller.tries(1, memory, policy, 700.0).failed == 0, "outside the window"
    crashing = replace(
        shot({1: Phase.FENCED}).cohorts[0], failed_starts=2, start_limit=3, last_exit="exit code 1", next_start=24.0
    )
    assert words.tries(crashing, 20.0) == "2 of 3 starts failed, exit code 1, next try in 4 s"
    assert words.tries(crashing, 30.0) == "2 of 3 starts failed, exit code 1"
    assert words.tries(replace(crashing, phase=Phase.PARKED), 30.0) == "", "a start has gone well since"


def test_what_starts_took_is_kept_by_kind_and_never_needed(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "starts.json"
    assert starts.read(path, "a") == {}
    starts.write(path, "a", {"writer": {"imports": 19.0}})
    starts.write(path, "b", {"reader": {"imports": 1.0}})
    assert starts.read(path, "a") == {"writer": {"imports": 19.0}}
    for k in range(starts.KEPT + 5):
        starts.write(path, f"k{k}", {})
    assert len(json.loads(path.read_text())) == starts.KEPT
    for garbage in ("", "[1]", '{"a": 1, "b": {"writer": "x"}, "c": {"writer": {"imports": "x"}}}', "\0"):
        path.write_text(garbage)
        assert not any(starts.read(path, "a")) and not starts.read(path, "c").get("writer")
    assert [starts.role(0, 1), starts.role(0, 2), starts.role(1, 1)] == ["writer", "reader", "reader"]


def test_the_teller_keeps_what_it_counted_and_then_is_silent(tmp_path: Path) -> None:
    kept: list[object] = []

    class Known(starts.Starts):
        def save(self, took: object) -> None:
            kept.append(took)

    said: list[str] = []
    teller = Teller(Known(tmp_path / "s", "k"), said.append)
    teller.look(shot({0: Phase.STARTING}), None, 1.0)
    teller.look(shot({0: Phase.PARKED}), None, 3.0)
    teller.look(shot({0: Phase.ACTIVE, 1: Phase.PARKED}, announced="full"), (0, 1), 4.0)
    assert kept == [{0: {"imports": 2.0}, 1: {}}]
    told = len(said)
    teller.look(shot({0: Phase.FAILING, 1: Phase.ACTIVE}, announced="none"), (1, 1), 9.0)
    assert len(said) == told


def test_the_bytes_of_a_model_are_those_of_its_tensors(model: Path, tmp_path: Path) -> None:
    stamp = contents.stamp(str(model))
    files = list(model.glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in files)
    assert stamp.weights == sum(f.stat().st_size for f in files) - headers > 0
    assert progress.Memory(5, 1, 4, False).text == "0.00 of 0.00 GiB", "no more than there is to load"
