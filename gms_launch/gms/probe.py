"""Ask a GMS socket how it is, without taking its lock. Works on our server and on upstream's."""

from __future__ import annotations

from pathlib import Path

from gms_launch.gms import protocol as p


class ProbeError(Exception):
    """The socket did not answer as a GMS server does."""


def _ask(path: Path, request: p.Message, kind: type[p.Message], timeout: float) -> p.Message:
    try:
        channel = p.Channel(str(path), timeout)
    except OSError as exc:
        raise ProbeError(f"{path}: {exc.strerror or exc}") from None
    try:
        answer, _ = channel.ask(request)
    except (OSError, p.ProtocolError) as exc:
        raise ProbeError(f"{path}: {exc}") from None
    finally:
        channel.close()
    if not isinstance(answer, kind):
        raise ProbeError(f"{path}: answered {answer!r}")
    return answer


def runtime_state(path: Path, timeout: float = 2.0) -> p.GetRuntimeStateResponse:
    """The state of the socket. Raises `ProbeError`."""
    answer = _ask(path, p.GetRuntimeStateRequest(), p.GetRuntimeStateResponse, timeout)
    assert isinstance(answer, p.GetRuntimeStateResponse)
    return answer


def event_history(path: Path, timeout: float = 2.0) -> list[p.RuntimeEvent]:
    """The last 256 events of the socket, oldest first. Raises `ProbeError`."""
    answer = _ask(path, p.GetEventHistoryRequest(), p.GetEventHistoryResponse, timeout)
    assert isinstance(answer, p.GetEventHistoryResponse)
    return answer.events
