"""Root's work on what a user owns, done by a process that has become that user: it can do what the user can, no more.

One child for each owner, all at once, with one deadline: an owner whose files or processes hold a child up is given up,
and the others are not kept waiting. The child cannot go back (all three user and group ids, no supplementary groups, no
new privileges), is not traceable by the user, has a limit of memory, and no descriptor of its parent's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from gms_launch.process import proc
from gms_launch.process.forked import fork

#: What a child may take of memory beyond what its parent had: a user may have made millions of names (bytes of address
#: space).
MEMORY = 2 << 30
#: What a child may answer (bytes).
ANSWER = 1 << 20
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


@dataclass(frozen=True)
class Owner:
    """A user as whom something is done, and the group that his processes are looked at with."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Answer:
    """What a child answered; `wrong` says why it did not."""

    text: str = ""
    wrong: str = ""


def each(owners: Iterable[Owner], work: Callable[[], str], seconds: float) -> Mapping[Owner, Answer]:
    """What `work` returns for each of them, by a child that has become that owner. Takes `seconds` at most.

    Only root can do that for others. What a child did before it was given up stays done.
    """
    waiting = list(owners)
    children: dict[int, Child] = {}
    answers: dict[Owner, Answer] = {}
    deadline = time.monotonic() + seconds
    try:
        while True:
            # Two of one user's would meet each other at the same files.
            busy = {child.owner.uid for child in children.values()}
            for owner in list(waiting):
                if owner.uid in busy:
                    continue
                waiting.remove(owner)
                busy.add(owner.uid)
                try:
                    child = _fork(owner, work)
                except OSError as exc:
                    answers[owner] = Answer(wrong=f"no process could be started for it: {exc.strerror}")
                else:
                    children[child.reader] = child
            left = deadline - time.monotonic()
            if not children or left <= 0:
                break
            for fd in select.select(list(children), [], [], left)[0]:
                child = children[fd]
                data = os.read(fd, 65536)
                child.text += data
                if not data or len(child.text) > ANSWER:
                    answers[child.owner] = _answer(child.text)
                    del children[fd]
                    child.end()
    finally:
        for child in children.values():
            child.end()
    late = Answer(wrong=f"given up after {seconds:g} s")
    return answers | dict.fromkeys([*(child.owner for child in children.values()), *waiting], late)


@dataclass
class Child:
    """A process at work for an owner, and where its answer comes from."""

    owner: Owner
    pid: int
    reader: int
    text: bytes = b""

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # ours and not yet reaped, so the number is nobody else's
        os.waitpid(self.pid, 0)
        os.close(self.reader)


def _answer(text: bytes) -> Answer:
    verdict, rest = text[:1], text[1:].decode(errors="replace")
    if verdict == b"+" and len(text) <= ANSWER:
        return Answer(rest)
    return Answer(wrong=rest[:1000] if verdict == b"-" else "the process that did it was killed, or said too much")


def _fork(owner: Owner, work: Callable[[], str]) -> Child:
    """Raises `OSError`."""
    parent = os.getpid()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pid = fork()
    except OSError:
        os.close(reader)
        os.close(writer)
        raise
    if pid == 0:
        said = b"-"
        try:
            _alone(writer)
            become(owner, parent)
            said = b"+" + work().encode(errors="replace")
        except BaseException as exc:
            said = b"-" + (str(exc) or repr(exc)).encode(errors="replace")
        finally:
            try:
                while said:
                    said = said[os.write(writer, said) :]
            finally:
                os._exit(0)
    os.close(writer)
    return Child(owner, pid, reader)


def _alone(keep: int) -> None:
    """Away from the terminal and from everything that the parent has open."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != keep:
            with contextlib.suppress(OSError):  # what the listing itself had open
                os.close(fd)
    os.chdir("/")
    os.umask(0o077)


def become(owner: Owner, parent: int) -> None:
    """Make this process `owner`'s for good; it dies with `parent`. Raises `OSError` if that fails or can be undone."""
    libc = ctypes.CDLL(None, use_errno=True)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = MEMORY + proc.address_space()
    memory = memory if hard == resource.RLIM_INFINITY else min(hard, memory)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if owner.uid != os.getuid():
        os.setgroups([])
        os.setresgid(owner.gid, owner.gid, owner.gid)
        os.setresuid(owner.uid, owner.uid, owner.uid)
        try:
            os.setresuid(0, 0, 0)
        except PermissionError:
            pass
        else:
            raise OSError(f"this process could become root again after it had become user {owner.uid}")
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_PDEATHSIG, signal.SIGKILL)):
        if libc.prctl(option, int(value), 0, 0, 0):
            raise OSError(ctypes.get_errno(), f"prctl {option}")
    if os.getppid() != parent:
        raise OSError("its parent is gone")
