"""`python -m dynamo.frontend` on the leader node: command line, readiness, and a completion to check serving."""

from __future__ import annotations

import http.client
import json

from gms_launch.cohort.process import Command
from gms_launch.engines import DynamoPlane
from gms_launch.services.base import NotReadyError, Service


def service(python: str, plane: DynamoPlane, address: str, port: int, migration_limit: int, timeout: float) -> Service:
    argv = (
        *(python, "-m", "dynamo.frontend", "--http-host", address, "--http-port", str(port)),
        *("--namespace", plane.namespace, "--migration-limit", str(migration_limit)),
    )
    return Service("frontend", Command(argv, plane.environment()), lambda: probe(address, port), timeout, port=port)


def connect_address(address: str) -> str:
    """Where to reach a server that listens on `address`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)


def probe(address: str, port: int) -> None:
    """GET /health answers 200, with or without engines. Raises `NotReadyError`."""
    connection = http.client.HTTPConnection(connect_address(address), port, timeout=2.0)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise NotReadyError(f"GET /health: HTTP {answer.status}")
    except (OSError, http.client.HTTPException) as exc:
        raise NotReadyError(f"GET /health: {exc or type(exc).__name__}") from None
    finally:
        connection.close()


def one_token(address: str, port: int, model: str, timeout: float = 5.0) -> None:
    """Ask for one token of `model`. Raises `NotReadyError` unless one came."""
    connection = http.client.HTTPConnection(connect_address(address), port, timeout=timeout)
    try:
        body = json.dumps({"model": model, "prompt": "ready?", "max_tokens": 1, "temperature": 0})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise NotReadyError(f"HTTP {answer.status}: {data[:200].decode(errors='replace')}")
        if not json.loads(data)["choices"]:
            raise NotReadyError(f"no choice in {data[:200]!r}")
    except (OSError, http.client.HTTPException, ValueError, KeyError) as exc:
        raise NotReadyError(str(exc) or type(exc).__name__) from None
    finally:
        connection.close()
