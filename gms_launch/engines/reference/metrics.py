"""Failover metrics under upstream's names (1.4 and later), on the system port's /metrics."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

log = logging.getLogger("reference")
PREFIX = "dynamo_component_engine_failover"
STATES = ("init", "standby", "waking", "active")


class FailoverMetrics:
    """State, transitions and promotions of one engine. Promotions survive restarts in a file beside the lock."""

    def __init__(self, engine_id: int, model: str, directory: Path, component: str = "backend") -> None:
        self.engine_id = engine_id
        self._file = directory / f"failover_metrics_engine-{engine_id}.json"
        self._registry = CollectorRegistry()
        labels = {"engine_id": str(engine_id), "model": model, "dynamo_component": component}
        names = list(labels)

        def gauge(name: str, text: str, *more: str) -> Gauge:
            return Gauge(f"{PREFIX}_{name}", text, [*names, *more], registry=self._registry)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, [*names, *more], registry=self._registry)

        self._labels = labels
        self._state = gauge("state", "1 for the state the engine is in", "state")
        self._entered = gauge("state_entered_timestamp_seconds", "Unix time of the last change of state")
        self._lasted = gauge("last_state_duration_seconds", "how long each state lasted last time", "state")
        self._transitions = counter("transitions", "changes of state", "from_state", "to_state")
        self._attempts = counter("switch_attempts", "promotions begun")
        self._successes = counter("switch_success", "promotions that ended in serving")
        self._asked = Counter(
            "reference_replica_requests", "requests by replica", [*names, "dp_rank"], registry=self._registry
        )
        try:
            saved = json.loads(self._file.read_text())
        except (OSError, ValueError):
            saved = {}
        self._counts = {"attempts": int(saved.get("attempts", 0)), "success": int(saved.get("success", 0))}
        self._attempts.labels(**labels).inc(self._counts["attempts"])
        self._successes.labels(**labels).inc(self._counts["success"])
        for state in STATES:
            self._state.labels(state=state, **labels).set(0)
        self._current: tuple[str, float] | None = None

    def enter(self, state: str) -> None:
        now = time.time()
        if self._current is not None:
            previous, since = self._current
            self._state.labels(state=previous, **self._labels).set(0)
            self._lasted.labels(state=previous, **self._labels).set(now - since)
            self._transitions.labels(from_state=previous, to_state=state, **self._labels).inc()
        self._state.labels(state=state, **self._labels).set(1)
        self._entered.labels(**self._labels).set(now)
        self._current = (state, now)
        log.info("[Shadow] failover_state engine=%d -> %s", self.engine_id, state)

    def count(self, what: str) -> None:
        """Count a promotion: `attempts` when it begins, `success` when it serves."""
        self._counts[what] += 1
        (self._attempts if what == "attempts" else self._successes).labels(**self._labels).inc()
        temporary = self._file.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(self._counts))
            temporary.replace(self._file)
        except OSError as exc:  # a count is not worth an engine
            log.warning("%s cannot be written: %s", self._file, exc)

    def asked(self, replica: int) -> None:
        """Count a request of a replica's."""
        self._asked.labels(dp_rank=str(replica), **self._labels).inc()

    def text(self) -> str:
        return str(generate_latest(self._registry).decode())
