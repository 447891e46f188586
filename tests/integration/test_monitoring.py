"""Metrics as a real Prometheus finds, scrapes and answers them, over a failover; and what must not come of serving."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import LONG, Deployment, eventually, free_port

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "docs" / "monitoring"
pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's prometheus (make packages)")


class Prometheus:
    """A real one, which finds the runs of a home as docs/monitoring/prometheus.yml says."""

    def __init__(self, directory: Path, home: Path) -> None:
        self.port = free_port()
        text = (MONITORING / "prometheus.yml").read_text().replace("HOME/.gms-launch", str(home))
        text = text.replace("scrape_interval: 10s", "scrape_interval: 250ms").replace("30s", "1s")
        (directory / "prometheus.yml").write_text(text.replace("[alerts.yml]", f"[{MONITORING}/alerts.yml]"))
        argv = ["prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
        argv += [f"--web.listen-address=127.0.0.1:{self.port}"]
        with open(directory / "prometheus.log", "wb") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)

    def get(self, path: str, **query: str) -> Any:
        url = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.loads(answer.read())["data"]
        except urllib.error.HTTPError as exc:
            if exc.code == 503:  # it is still starting, or too busy for the moment
                return None
            raise AssertionError(f"{query}: {exc.read().decode()}") from None
        except OSError:
            return None

    def ask(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """The series of an instant query, each with its value."""
        data = self.get("/api/v1/query", query=expr)
        return [(r["metric"], float(r["value"][1])) for r in data["result"]] if data else []

    def value(self, expr: str) -> float | None:
        found = self.ask(expr)
        return found[0][1] if found else None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def page(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return str(answer.read().decode())


def test_prometheus_sees_a_failover_and_the_dashboard_asks_for_what_is_there(tmp_path: Path, model: Path) -> None:
    port, home = free_port(), tmp_path / "home"
    prometheus = Prometheus(tmp_path, home)
    try:
        with Deployment(home, model, "--metrics-port", str(port)) as run:
            found = eventually(lambda: prometheus.ask("up == 1"), LONG, "scraped")
            assert found[0][0]["run"] == run.run and found[0][0]["node_rank"] == "0"
            assert eventually(lambda: prometheus.value('gms_launch_redundancy{state="full"} == 1'), LONG)
            victim = run.status()["primary"]
            os.killpg(run.cohort(victim)["ranks"][0]["pgid"], signal.SIGKILL)
            assert eventually(lambda: prometheus.value('gms_launch_failovers_total{cause="exit"} == 1'), LONG)
            assert run.cli("kill-primary").returncode in (0, 3)
            run.wait_full()
            assert eventually(lambda: prometheus.value("gms_launch_rearm_seconds_count >= 1"), LONG)
            told = json.loads(run.cli("timeline", "--json").stdout)["failovers"]
            for step in ("first_token", "dead", "fenced"):
                name = f'gms_launch_failover_duration_seconds_count{{step="{step}"}} == {len(told)}'
                eventually(lambda: prometheus.value(name), LONG, name)  # noqa: B023
            total = eventually(lambda: prometheus.value('gms_launch_failover_duration_seconds_sum{step="first_token"}'))
            assert total == pytest.approx(sum(f["steps"]["first_token"] for f in told), abs=1e-4)
            lives = sum(c["incarnation"] for c in run.status()["cohorts"])
            eventually(lambda: sum(v for _, v in prometheus.ask("gms_launch_rank_starts_total")) == lives)

            def same() -> bool:
                """Status and metrics are told at moments of their own."""
                told = {g["tag"]: g["allocated_bytes"] for g in run.status()["nodes"][0]["gms"]}
                return {m["tag"]: v for m, v in prometheus.ask("gms_launch_gms_bytes")} == told

            eventually(same, what="the memory of GMS")
            eventually(lambda: prometheus.value('gms_launch_service_up{service="frontend"} == 1'))
            eventually(lambda: 0 < (prometheus.value("gms_launch_lease_seconds") or 0) <= 6.25)
            checked = subprocess.run(
                ["promtool", "check", "metrics"], input=page(port), text=True, capture_output=True, check=False
            )
            assert checked.returncode == 0, checked.stdout + checked.stderr
            dashboard_and_rules_ask_for_what_is_served(prometheus, page(port))
            the_crowd_stops_nothing(run, port)
        # Ended in order: the target goes away and nobody is paged for it.
        assert json.loads((home / ".metrics-targets" / f"{run.run}.json").read_text()) == []
        eventually(
            lambda: (found := prometheus.get("/api/v1/targets")) is not None and not found["activeTargets"],
            *(LONG, "no target is left"),
        )
    finally:
        prometheus.close()


#: Queries that have no answer on a machine without a GPU, while all is well.
NO_ANSWER = {"GPU memory used", "Services that are not ready"}


def dashboard_and_rules_ask_for_what_is_served(prometheus: Prometheus, served: str) -> None:
    """Every query parses, names no metric that is not there, and is answered with the labels that its legend shows."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    drawn = [(t["expr"], t["legendFormat"], p["title"]) for p in dashboard["panels"] for t in p["targets"]]
    drawn += [(a["expr"], a["textFormat"], "") for a in dashboard["annotations"]["list"]]
    known_rules = eventually(lambda: prometheus.get("/api/v1/rules"))["groups"]
    rules = [(r["query"], "", "") for g in known_rules for r in g["rules"]]
    assert len(drawn) > 20 and len(rules) > 10
    known = set(re.findall(r"^# TYPE (\w+)", served, re.MULTILINE)) | set(re.findall(r"^(\w+)", served, re.MULTILINE))
    for expr, legend, title in drawn + rules:
        for name, value in {"$run": ".+", "$__rate_interval": "1h", "$__range": "1h", "[1m]": "[1h]"}.items():
            expr = expr.replace(name, value)
        assert set(re.findall(r"gms_launch_\w+|process_\w+", expr)) <= known, expr
        # A scrape that came too late on a busy machine leaves nothing to be asked for until the next.
        eventually(lambda: prometheus.get("/api/v1/query", query=expr) is not None, what=expr)  # noqa: B023
        if title not in NO_ANSWER and (expr, legend, title) not in rules:
            eventually(lambda: prometheus.ask(expr), what=f"{title}: {expr}")  # noqa: B023
        for labels, _ in prometheus.ask(expr):
            assert set(re.findall(r"{{(\w+)}}", legend)) <= {"group", *labels}, (title, legend, labels)
    eventually(lambda: prometheus.value('sum by (run) (gms_launch_redundancy{run=~".+", state="full"})') == 1)
    for variable in (v for v in dashboard["templating"]["list"] if v["type"] == "query"):
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
        assert prometheus.get(f"/api/v1/label/{label}/values", **{"match[]": metric}), variable


def the_crowd_stops_nothing(run: Deployment, port: int) -> None:
    """Five hundred connections that say nothing, and meanwhile a failover and a scrape."""
    with contextlib.ExitStack() as stack:
        for _ in range(500):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
            stack.callback(one.close)
        before = run.text()
        assert run.cli("kill-primary").returncode == 0
        assert run.text() == before
        assert "gms_launch_build_info" in page(port)
    agent = run.agent.pid
    eventually(lambda: len(os.listdir(f"/proc/{agent}/fd")) < 150, what="the agent keeps none of them")
    run.wait_full()


def test_the_rules_pass_their_tests() -> None:
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_that_is_taken_is_an_event(tmp_path: Path, model: Path, taken: int) -> None:
    with Deployment(tmp_path / "home", model, "--metrics-port", str(taken)) as run:
        assert run.text()
        (event,) = run.happened("metrics_unserved")
        assert str(taken) in event["detail"] and "in use" in event["detail"]
