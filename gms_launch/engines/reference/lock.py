"""The failover lock, as upstream's engines take it (failover_lock/flock/lock.py).

One flock on one file of the leader node, tried every 0.1 s; the winner writes `engine-<id>` and keeps the descriptor
until the process dies. The content says who took it last, also after that one is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
import subprocess
import sys


async def acquire(path: str, engine_id: int, poll_seconds: float) -> tuple[int, bool]:
    """Wait for the lock; returns its descriptor, to be kept open, and whether somebody else held it first."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    contended = False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            contended = True
            await asyncio.sleep(poll_seconds)  # upstream polls; a blocking flock would be faster than the real thing
    os.ftruncate(fd, 0)
    with contextlib.suppress(OSError):  # /dev/shm may be full; who holds the lock is the kernel's word
        os.pwrite(fd, f"engine-{engine_id}".encode(), 0)
    return fd, contended


#: The file that is mapped again and again: one page table of 128 KiB each time, and no more memory.
WINDOW = 64 << 20


def burden(gib: int) -> list[mmap.mmap]:
    """For tests: `gib` of address space, which the kernel takes apart when this process dies."""
    window = os.memfd_create("burden")
    os.ftruncate(window, WINDOW)
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    found = [mmap.mmap(window, WINDOW, flags, mmap.PROT_READ) for _ in range(gib * (1 << 30) // WINDOW)]
    os.close(window)
    return found


def hand_to_child(fd: int) -> subprocess.Popen[bytes]:
    """For tests, with a burden: when this process's group is killed, the lock is free at once, and we are gone later.

    The kernel frees a dying process's memory before it closes its files, and both before anybody can see that it is
    dead; with GPU memory, which is a file, it is the other way round. So the open lock moves to a child in the same
    group, which has nothing to free. It ends with us, at the end of its standard input.
    """
    child = subprocess.Popen(["cat"], pass_fds=(fd,), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    os.close(fd)
    return child


#: Kinds of strays: one that inherits tag and lock; one in another session by a double fork, without any environment,
#: with the lock; the same without the lock.
STRAYS = ("", "1", "hard", "unlocked")


def leave_a_stray(kind: str, fd: int, tag: str) -> None:
    """For tests: a child in a session of its own, as a helper forked at the wrong time would be. `tag` is on its
    command line, for the test to find it.
    """
    sleep = "import os, time; time.sleep(3600)"
    if kind == "1":
        subprocess.Popen(
            [sys.executable, "-I", "-c", sleep], pass_fds=(fd,), start_new_session=True, stdin=subprocess.DEVNULL
        )
        return
    hide = "import os; os.fork() and os._exit(0); os.setsid(); " + sleep
    subprocess.run(
        [sys.executable, "-I", "-c", hide, f"stray-of-{tag}"],
        pass_fds=(fd,) if kind == "hard" else (),
        env={},
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        check=True,
    )
