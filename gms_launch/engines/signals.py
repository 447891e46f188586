"""The phase of a leader rank from what shows it, the strongest sign first. `phase` is pure; `ask` is the asking.

Log lines come at once, and not at all when the engine's log level hides them; these signs are asked for, and make up
for that. Strongest first: registered in discovery, failover metrics (Dynamo 1.4 and later), the lock's holder as the
kernel names it, health. Health alone cannot tell parked from active: it is 200 in both.
"""

from __future__ import annotations

import http.client
import re
from dataclasses import dataclass

from gms_launch.cohort.model import Phase

#: States of the failover metrics, upstream's words (failover_metrics.py, 1.4 and later).
STATES = {"init": Phase.STARTING, "standby": Phase.PARKED, "waking": Phase.WAKING, "active": Phase.ACTIVE}
_STATE = re.compile(r'^dynamo_component_engine_failover_state\{[^}]*\bstate="(\w+)"[^}]*\} (\S+)', re.MULTILINE)
_WORK = re.compile(
    r'^dynamo_component_(requests_total|response_bytes_total)\{[^}]*\bdynamo_endpoint="generate"[^}]*\} (\S+)',
    re.MULTILINE,
)


@dataclass(frozen=True)
class Health:
    """What the system port said. `healthy` is None when nobody answered, `state` empty without failover metrics.

    `asked` is False when /health was left alone, and nothing is known of whether the engine would have answered.
    """

    healthy: bool | None = None
    state: str = ""
    asked: bool = True


@dataclass(frozen=True)
class Signals:
    """What is known of a leader rank besides its log."""

    health: Health = Health()
    holds_lock: bool = False
    registered: bool = False


@dataclass(frozen=True)
class Work:
    """What an engine has done in its life, by its own count: requests that reached it, and bytes that it answered."""

    asked: float
    answered: float


def phase(signals: Signals) -> Phase | None:
    """The phase that the strongest sign shows; None when none of them tells."""
    if signals.registered:
        return Phase.ACTIVE
    if signals.health.state in STATES:
        return STATES[signals.health.state]
    if signals.holds_lock:
        return Phase.WAKING
    return Phase.PARKED if signals.health.healthy else None


def mapped(signals: Signals, kv_session: bool) -> bool:
    """True when the engine is awake: it has the lock, and a writer is at the KV memory. `kv_session`: GMS's word."""
    return signals.holds_lock and kv_session


def ask_metrics(address: str, port: int, timeout: float) -> Health:
    """GET /metrics alone: of an engine that starts, whose /health is a 503 that it logs as an error each time."""
    connection = http.client.HTTPConnection(address, port, timeout=timeout)
    try:
        return Health(state=_state(connection), asked=False)
    finally:
        connection.close()


def ask(address: str, port: int, timeout: float, metrics: bool = True) -> Health:
    """GET /health of an engine's system port, and /metrics if wanted: an engine computes those when it is asked.

    Any answer to /health shows that the engine lives.
    """
    connection = http.client.HTTPConnection(address, port, timeout=timeout)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        return Health()
    else:
        return Health(answer.status == 200, _state(connection) if metrics else "")
    finally:
        connection.close()


def _state(connection: http.client.HTTPConnection) -> str:
    try:
        connection.request("GET", "/metrics")
        return failover_state(connection.getresponse().read().decode(errors="replace"))
    except (OSError, http.client.HTTPException):
        return ""


def work(address: str, port: int, timeout: float) -> Work | None:
    """What the engine counts of its endpoint `generate`, under names as in Dynamo 1.1 to 1.6; None: no answer."""
    connection = http.client.HTTPConnection(address, port, timeout=timeout)
    try:
        connection.request("GET", "/metrics")
        return counted(connection.getresponse().read().decode(errors="replace"))
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def counted(metrics: str) -> Work:
    """The same from Prometheus text."""
    found = dict.fromkeys(("requests_total", "response_bytes_total"), 0.0)
    for name, value in _WORK.findall(metrics):
        found[name] += float(value)
    return Work(found["requests_total"], found["response_bytes_total"])


def failover_state(metrics: str) -> str:
    """The state whose gauge is 1 in Prometheus text; empty when there is none (one-hot, label `state`)."""
    return next((name for name, value in _STATE.findall(metrics) if float(value) == 1.0), "")
