"""The reference engine from outside: system port, metrics, routes and streaming are dynamo.vllm's."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import Deployment, eventually


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("home"), model) as deployment:
        yield deployment


def system(run: Deployment, cohort_id: int) -> str:
    """The system server of a cohort's leader rank, as its environment has it."""
    pid = run.cohort(cohort_id)["ranks"][0]["pid"]
    environ = dict(e.split("=", 1) for e in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in e)
    return f"http://{environ['DYN_SYSTEM_HOST']}:{environ['DYN_SYSTEM_PORT']}"


def get(url: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read().decode()


def test_health_is_the_same_parked_and_active_and_metrics_tell_them_apart(run: Deployment) -> None:
    primary = run.status()["primary"]
    for cohort_id, state in ((primary, "active"), (1 - primary, "standby")):
        code, text = get(system(run, cohort_id) + "/health")
        assert code == 200 and json.loads(text)["status"] == "ready"
        _, metrics = get(system(run, cohort_id) + "/metrics")
        line = next(
            m
            for m in metrics.splitlines()
            if m.startswith("dynamo_component_engine_failover_state{") and f'state="{state}"' in m
        )
        assert line.endswith(" 1.0") and f'engine_id="{cohort_id}"' in line


def test_tokens_are_streamed(run: Deployment) -> None:
    url = run.run_file["frontend_url"] + "/v1/completions"
    _, text = get(url, {"model": "tiny", "prompt": "hello", "max_tokens": 8, "temperature": 0, "stream": True})
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    pieces = [c["choices"][0]["text"] for c in chunks if c.get("choices")]
    assert len([p for p in pieces if p]) > 4
    assert "".join(pieces) == run.text()


def test_lock_file_and_counters_after_a_failover(run: Deployment) -> None:
    victim = run.status()["primary"]
    assert (run.node_dir / "failover.lock").read_text() == f"engine-{victim}"
    assert run.cli("kill-primary").returncode == 0
    assert (run.node_dir / "failover.lock").read_text() == f"engine-{1 - victim}"

    def counts(name: str) -> bool:
        _, metrics = get(system(run, 1 - victim) + "/metrics")
        line = next(m for m in metrics.splitlines() if m.startswith(f"dynamo_component_engine_failover_{name}" + "{"))
        return line.endswith(" 1.0")

    for name in ("switch_attempts_total", "switch_success_total"):
        eventually(lambda name=name: counts(name), what="a contended win counts, the first start does not")
    run.wait_full()


def test_log_lines_come_in_the_order_of_the_real_engine(run: Deployment) -> None:
    order = [
        "[GMS] Failover enabled: will use scratch KV for initialization until engine is primary",
        "Sleep freed",
        "startup probe now passing, waiting for lock",
        "Failover lock acquired: engine-",
        "[Shadow] Lock acquired, waking engine",
        "Connected with ro lock (granted=ro), committed=True",
        "Connected with rw lock (granted=rw)",
        "seconds to wake up tags {'weights', 'kv_cache'}",
        "[Shadow] Engine awake, registering with discovery",
        "failover_state",
    ]
    for cohort_id in (0, 1):
        log = run.home / run.run / "logs" / "node0" / f"cohort-{cohort_id}.1.log"
        eventually(lambda log=log: order[-2] in log.read_text(), what="it is written down")
        text, at = log.read_text(), 0
        for line in order:
            found = text.find(line, at)
            assert found >= 0, f"{line!r} is missing in the log of cohort {cohort_id} after what comes before it"
            at = found + len(line)
