"""A command of somebody who waits: in etcd for as long as that lasts, and withdrawn when it is over.

The key is on a lease that only the waiting process renews: when that is killed, or cut off, the command lapses within
`TTL` seconds. An agent takes it before it carries it out (see `claims`), so what is withdrawn is surely not done.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

from gms_launch.cohort.records import CommandRecord, CommandResult
from gms_launch.control.door import Door
from gms_launch.control.keys import Keys
from gms_launch.errors import LaunchError, NoContactError

#: How long a command outlives whoever asked for it (seconds).
TTL = 3


class Errand:
    """`with Errand(...) as errand:` while the command stands; SIGTERM ends it like Ctrl-C, both withdraw.

    `outcome` says, once it was withdrawn, what is true of it: for people.
    """

    def __init__(self, door: Door, keys: Keys, command: CommandRecord) -> None:
        self._door = door
        self._key, self._result = keys.command(command.uuid), keys.result(command.uuid)
        self._command = command
        self._lease = 0
        self._renewed = 0.0
        self._answered = False
        self._withdrawn = ""

    def __enter__(self) -> Errand:
        """Raises `NoContactError`."""
        self._handler = signal.signal(signal.SIGTERM, _terminated)
        try:
            self._lease, self._renewed = self._door.grant(TTL), time.monotonic()
            self._door.put(self._key, self._command.encode(), self._lease)
        except BaseException as exc:
            self.__exit__(type(exc), exc, None)
            raise
        return self

    def renew(self) -> None:
        """Keep the command standing; to be called more often than every second. Raises `NoContactError`."""
        if time.monotonic() - self._renewed > TTL / 3:
            self._door.renew(self._lease)
            self._renewed = time.monotonic()

    def answer(self) -> CommandResult | None:
        """The result, if there is one yet. Raises `NoContactError`."""
        self.renew()
        found = self._door.get_prefix(self._result).get(self._result)
        if found is None:
            return None
        self._answered = True
        return CommandResult.decode(found)

    def done(self) -> None:
        """What was asked for has happened: there is nothing to withdraw."""
        self._answered = True

    def withdraw(self) -> str:
        """Take the command back; says whether that was in time."""
        if not self._withdrawn:
            try:
                in_time = self._door.delete_first_version(self._key)
                self._withdrawn = "the request was withdrawn, and nothing was done" if in_time else self._taken()
            except NoContactError as exc:
                self._withdrawn = (
                    f"the request could not be withdrawn ({exc}); unless an agent has taken it, it lapses in {TTL} s"
                )
        return self._withdrawn

    def _taken(self) -> str:
        """What is known of a command that came to an agent before it was withdrawn. Raises `NoContactError`."""
        found = self._door.get_prefix(self._result).get(self._result)
        if found is None:
            return "an agent had taken the request by then and carries it out; see `gms-launch status`"
        result = CommandResult.decode(found)
        if not result.ok:
            return f"the request was refused by then, and nothing was done: {result.detail}"
        return f"the request was granted by then ({result.detail}) and is carried out; see `gms-launch status`"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if self._lease and not self._answered:
                told = self.withdraw()
                if error is not None and not isinstance(error, LaunchError):
                    print(f"gms-launch: {told}", file=sys.stderr)
            with contextlib.suppress(NoContactError):  # the lease ends by itself
                self._door.delete(self._result)
                if self._lease:
                    self._door.revoke(self._lease)
        finally:
            signal.signal(signal.SIGTERM, self._handler)


class Known:
    """What is to be said when whoever follows something is interrupted; nothing while `text` is empty."""

    def __init__(self) -> None:
        self.text = ""


@contextlib.contextmanager
def followed() -> Iterator[Known]:
    """While what was asked for is followed: Ctrl-C and SIGTERM end only the following, and say what is known by then.

    An `Errand` that still stands says by itself what became of it.
    """
    known = Known()
    handler = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield known
    except (KeyboardInterrupt, SystemExit):
        if known.text:
            print(f"gms-launch: {known.text}", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def _terminated(_: int, __: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)
