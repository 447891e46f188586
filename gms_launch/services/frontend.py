"""`python -m dynamo.frontend` on the leader node: command line, readiness, and a completion to check serving."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from gms_launch.engines import installed
from gms_launch.engines.base import DynamoPlane
from gms_launch.process.lifecycle import Command
from gms_launch.services.base import NotReadyError, Service, connect, http_get

#: For requests that move to another engine: a dead one is not avoided for 5 s, which would be all there are (1.4 and
#: later); and comments in open streams keep clients and proxies from giving up in the gap (1.5 and later).
MOVING: dict[str, str | None] = {
    "DYN_RUNTIME_INHIBITED_DURATION_SECS": "0",
    "DYN_HTTP_SSE_KEEP_ALIVE_INTERVAL_MS": "5000",
}
#: By how much its lease is longer than an engine's (seconds). When etcd has been away, Dynamo's client makes one new
#: connection at a time, with growing pauses, and the frontend's watches may come before its lease: some 10 s pass then
#: until that is renewed (1.4), and half of a lease may be all that is left of it. Nothing is registered under it, so
#: nobody waits for its end.
AFTER_WATCHES = 40.0
#: How often the frontend's counters are looked at while a request of our own is under way, and the pause (seconds).
LOOKS, LOOK_PAUSE = 10, 0.02

#: Settings of Dynamo's that would change how the frontend is reached behind our back.
OWNED = ("DYN_TLS_CERT_PATH", "DYN_TLS_KEY_PATH", "DYN_TLS_CLIENT_CA_CERT_PATH")


@dataclass(frozen=True)
class Where:
    """Where the agent's own requests to the frontend go: always on the frontend's own machine."""

    address: str
    port: int
    tls: bool = False

    @property
    def context(self) -> ssl.SSLContext | None:
        return unverified() if self.tls else None


@cache
def unverified() -> ssl.SSLContext:
    """For requests of ours to a listener of ours on this machine.

    The certificate is made out to the name by which clients come, and may run out while the run goes on: neither says
    that the frontend hangs. What is asked there is no secret, and the listener is known by its pid.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@dataclass(frozen=True)
class Frontend:
    """A run's frontend: where it listens, how it finds the engines, how often it moves a request, its certificate."""

    address: str
    port: int
    plane: DynamoPlane
    migration_limit: int
    tls_cert: str = ""
    tls_key: str = ""

    @property
    def where(self) -> Where:
        return Where(connect_address(self.address), self.port, bool(self.tls_cert))


def service(front: Frontend, python: str, timeout: float, liveness: float = 0.0) -> Service:
    """The frontend, ready within `timeout` seconds and restarted when it is silent for `liveness` (0: never)."""
    argv = (
        *installed.module(python, "dynamo.frontend", "--http-host", front.address, "--http-port", str(front.port)),
        *("--namespace", front.plane.namespace, "--migration-limit", str(front.migration_limit)),
    )
    environment = replace(front.plane, lease_ttl=front.plane.lease_ttl + AFTER_WATCHES).environment()
    environment |= MOVING if front.migration_limit else {}
    if front.tls_cert:
        environment |= {"DYN_TLS_CERT_PATH": front.tls_cert, "DYN_TLS_KEY_PATH": front.tls_key}
    command = Command(argv, environment)
    return Service("frontend", command, lambda: probe(front.where), timeout, port=front.port, liveness=liveness)


def connect_address(address: str) -> str:
    """Where to reach a server that listens on `address`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)


def probe(where: Where) -> None:
    """GET /health answers 200, with or without engines. Raises `NotReadyError`."""
    _get(where, "/health")


def _get(where: Where, path: str) -> str:
    return http_get(where.address, where.port, path, context=where.context)


def listed(where: Where, model: str) -> bool:
    """True when the frontend has an engine for `model`. Costs the engines nothing. Raises `NotReadyError`."""
    try:
        return any(m["id"] == model for m in json.loads(_get(where, "/v1/models"))["data"])
    except (ValueError, KeyError, TypeError) as exc:
        raise NotReadyError(f"GET /v1/models: {exc!r}") from None


def traffic(where: Where) -> tuple[float, float] | None:
    """Tokens that the frontend has passed on, and requests in flight; None when its metrics do not tell.

    Names as in Dynamo 1.1 to 1.6. Raises `NotReadyError`.
    """
    found: dict[str, float] = {}
    for line in _get(where, "/metrics").splitlines():
        name, _, rest = line.partition("{")
        if name in _TRAFFIC:
            found[name] = found.get(name, 0.0) + float(rest.rpartition("}")[2])
    return (found.get(_TRAFFIC[0], 0.0), found.get(_TRAFFIC[1], 0.0)) if found else None


class _CountedError(NotReadyError):
    """The frontend answered with an error, and counts it."""


class _Own:
    """This process's own requests for tokens, by frontend: how many are being answered, and ended with an error.

    The frontend counts such errors with those of users, and nobody has lost anything by them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open, self._failed = Counter[Where](), Counter[Where]()

    @contextlib.contextmanager
    def one(self, where: Where) -> Iterator[None]:
        """While one is under way."""
        failed = 0
        with self._lock:
            self._open[where] += 1
        try:
            yield
        except _CountedError:
            failed = 1
            raise
        finally:
            with self._lock:
                self._open[where] -= 1
                self._failed[where] += failed

    def standing(self, where: Where) -> tuple[int, int]:
        with self._lock:
            return self._open[where], self._failed[where]


_own = _Own()


def moves(where: Where) -> tuple[float, float] | None:
    """How often requests have moved to another engine, and how many have failed for no fault of whoever asked; those of
    this process's own (`one_token`) do not count.

    None when nobody answers. Names as in Dynamo 1.2 to 1.6.
    """
    for _ in range(LOOKS):
        before = _own.standing(where)
        try:
            text = _get(where, "/metrics")
        except NotReadyError:
            return None
        if before == _own.standing(where) and not before[0]:
            break  # else one may have ended there that we have not read yet
        time.sleep(LOOK_PAUSE)
    moved, failed = 0.0, -float(before[1])
    for line in text.splitlines():
        if line.startswith("dynamo_frontend_model_migration_total{"):
            moved += float(line.rpartition("}")[2])
        elif line.startswith("dynamo_frontend_requests_total{") and 'status="error"' in line:
            failed += 0.0 if any(f'error_type="{kind}"' in line for kind in _ASKERS) else float(line.rpartition("}")[2])
    return moved, failed


def has_given(where: Where, instance: int) -> bool:
    """Whether a token of that engine has come through the frontend; an answer without one does not count.

    False where its metrics do not tell; the name is known of Dynamo 1.4 to 1.6. Raises `NotReadyError`.
    """
    wanted = f'worker_id="{instance}"'
    return any(line.startswith(_FIRST) and wanted in line for line in _get(where, "/metrics").splitlines())


#: Kinds of errors that are the asker's own doing, and the HTTP codes of these.
_ASKERS = ("validation", "cancelled", "not_implemented")
_ASKERS_HTTP = (400, 422, 499, 501)
_FIRST = "dynamo_frontend_worker_last_time_to_first_token_seconds{"
_TRAFFIC = ("dynamo_frontend_output_tokens_total", "dynamo_frontend_inflight_requests")


def one_token(
    where: Where, model: str, timeout: float = 5.0, name: str = "gms-launch-confirm", instance: int = 0
) -> bool:
    """Ask for one token of `model`, under a request id that shows whose it is; of one engine, if its `instance` (the
    lease that it is registered under) is given. Raises `NotReadyError`, also when another engine answered: a frontend
    that does not know that instance asks another one in its place (Dynamo 1.4). Returns whether the answer says whose
    it is.
    """
    with _own.one(where):
        return _one_token(where, model, timeout, name, instance)


def _one_token(where: Where, model: str, timeout: float, name: str, instance: int) -> bool:
    connection = connect(where.address, where.port, timeout, where.context)
    try:
        asked = {"model": model, "prompt": "ready?", "max_tokens": 1, "temperature": 0}
        if instance:
            asked["nvext"] = {"backend_instance_id": instance, "extra_fields": ["worker_id"]}
        headers = {"content-type": "application/json", "x-request-id": name}
        connection.request("POST", "/v1/completions", json.dumps(asked), headers)
        answer = connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            error = NotReadyError if answer.status in _ASKERS_HTTP else _CountedError
            raise error(f"HTTP {answer.status}: {data[:200].decode(errors='replace')}")
        said = json.loads(data)
        if not said["choices"]:
            raise NotReadyError(f"no choice in {data[:200]!r}")
        by = ((said.get("nvext") or {}).get("worker_id") or {}).values()
        if instance and by and instance not in by:
            raise NotReadyError("another engine answered in its place: the frontend does not know it")
        return bool(by)
    except (OSError, http.client.HTTPException, ValueError, KeyError, AttributeError) as exc:
        raise NotReadyError(str(exc) or type(exc).__name__) from None
    finally:
        connection.close()
