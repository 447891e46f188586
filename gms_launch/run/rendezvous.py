"""How the other nodes find the leader: its run.json in the shared run directory, checked against its etcd.

A run.json may be that of an earlier run, so it counts only once the etcd that it names knows the same attempt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gms_launch import __version__
from gms_launch.cohort import arrival, seats
from gms_launch.cohort.records import RecordError, RunRecord, RunState, SeatRecord
from gms_launch.control.keys import Keys
from gms_launch.errors import DeadlineError, LaunchError, NoContactError, RefusedError, UsageError, by_code
from gms_launch.process.proc import alive
from gms_launch.run import contact
from gms_launch.run.agreement import settings_differences
from gms_launch.run.rundir import RunDir, RunFile
from gms_launch.run.topology import Topology
from gms_launch.settings.declared import Settings

POLL = 0.1


@dataclass(frozen=True)
class Found:
    """The leader's run, and how this node differs: settings by name, and the clock (seconds ahead, 0 if not surely).

    `seats` say whose node ranks are others' by now, where the run has spares.
    """

    run: RunFile
    differences: tuple[str, ...]
    clock_skew: float
    seats: Mapping[int, SeatRecord] = field(default_factory=dict)

    def seat_of(self, origin: int) -> tuple[int, SeatRecord | None]:
        """The node rank of the agent that was started with rank `origin`, and the record that gives it that."""
        rank = seats.seat_of(self.seats, origin)
        return rank, self.seats.get(rank)


def find_leader(directory: RunDir, settings: Settings, place: Topology, progress: Callable[[str], None]) -> Found:
    """Wait until the leader of this run answers, for at most node_wait seconds; of a large run not all ask at once.

    Raises `UsageError` when the leader has another version, what the run failed with if it ended meanwhile, and
    `DeadlineError`.
    """
    begun = time.time()
    deadline = time.monotonic() + settings.node_wait
    told, pause = "", arrival.pause(place.node_rank, place.nnodes)
    while True:
        reason = "there is no run.json yet; is the run directory on a file system that the nodes share?"
        try:
            if (run := directory.read()) is not None:
                if run.ended is not None and run.ended >= begun:
                    raise by_code(
                        run.exit_code or 1, f"the run ended before this node was in it: {run.reason or 'stopped'}"
                    )
                reason = "run.json is of a run that has ended"
                if run.ended is None:
                    time.sleep(pause)
                    pause = 0.0
                    if (found := _ask(directory, run, settings)) is not None:
                        return found
                    reason = "its etcd does not know this run yet"
        except NoContactError as exc:
            reason = str(exc)
        if reason != told and time.monotonic() > deadline - settings.node_wait + 1.0:
            told = reason
            progress(f"waiting for the leader: {directory.run_json}: {reason}")
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"the leader was not found within {settings.node_wait:g} s (node_wait): {directory.run_json}: {reason}"
            )
        time.sleep(POLL)  # the file may be on another node's file system: nothing announces it


def goes_on(directory: RunDir) -> bool:
    """Whether the run of that name goes on without its first node, which is to follow it then."""
    try:
        run = directory.read()
        if run is None or run.ended is not None or len(run.etcd_endpoints) < 2:
            return False
        if run.local and alive(run.agent):
            return False
        door = contact.door(directory, run, timeout=2.0)
        try:
            keys = Keys(directory.run)
            value = door.get_prefix(keys.run).get(keys.run)
        finally:
            door.close()
        record = RunRecord.decode(value) if value is not None else None
    except (NoContactError, RefusedError, RecordError):
        return False
    return record is not None and record.attempt == run.attempt and record.state is RunState.ADMITTED


def _ask(directory: RunDir, run: RunFile, settings: Settings) -> Found | None:
    door = contact.door(directory, run, timeout=2.0)
    try:
        keys = Keys(directory.run)
        value = door.get_prefix(keys.run).get(keys.run)
        if value is None:
            return None
        record = RunRecord.decode(value)
        taken = door.get_prefix(keys.seats) if settings.spares else {}
        found = {seat.node_rank: seat for seat in map(SeatRecord.decode, taken.values())}
    except RecordError as exc:
        raise NoContactError(f"the leader's record cannot be read: {exc}") from None
    finally:
        door.close()
    if record.attempt != run.attempt:
        return None
    if record.version != __version__:
        text = f"this node has gms-launch {__version__}, the leader {run.leader_host} has {record.version}"
        refuse(directory, run, text)
        raise UsageError(text)
    if record.failed:
        raise by_code(record.exit_code, record.failed)
    if record.state is RunState.STOPPING:
        raise LaunchError("the run is being stopped")
    return Found(run, tuple(settings_differences(settings, run.settings)), door.clock_skew(), found)


def refuse(directory: RunDir, run: RunFile, text: str) -> None:
    """Tell the leader that this node may not take its place, and why; what runs already is not disturbed by it."""
    from gms_launch.process.proc import boot_id

    door = contact.door(directory, run, timeout=2.0)
    try:
        door.put(Keys(directory.run).refusal(f"{boot_id()}-{time.time_ns()}"), text.encode())
    except (NoContactError, RefusedError):
        pass  # the leader will notice that a node is missing
    finally:
        door.close()
