"""Enter an image: mount and pid namespaces of one's own, with what is mounted, and nothing else of this machine."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

CLONE_NEWNS, CLONE_NEWPID = 0x20000, 0x20000000
MS_REC, MS_BIND, MS_PRIVATE = 0x4000, 0x1000, 0x40000
#: The new root, in a mount namespace of our own.
ROOT = Path("/mnt")
_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *words: object) -> None:
    if getattr(_libc, name)(*words):
        sys.exit(f"{name}{words}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, place: Path, kind: str = "", flags: int = 0) -> None:
    call("mount", source.encode(), str(place).encode(), kind.encode(), flags, None)


def bind(source: str, place: Path) -> None:
    if os.path.islink(source) and not place.exists():
        place.symlink_to(os.readlink(source))
        return
    if not os.path.exists(source):
        sys.exit(f"no such file or directory: {source}, which is to be mounted")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir(exist_ok=True) if os.path.isdir(source) else place.touch()
    mount(source, place, flags=MS_BIND | MS_REC)


def become(image: str, mounts: Sequence[str], command: Sequence[str], own_proc: bool = False) -> NoReturn:
    """Be `command` inside of the image, from this process on."""
    directory = os.getcwd()
    call("unshare", CLONE_NEWNS)
    mount("none", Path("/"), flags=MS_REC | MS_PRIVATE)
    mount("tmpfs", ROOT, "tmpfs")
    for line in Path(image).read_text().splitlines():
        bind(line, ROOT / line.lstrip("/"))
    for name in ("tmp", "proc"):
        (ROOT / name).mkdir(mode=0o1777, exist_ok=True)  # a checkout may be below /tmp
    bind("/sys", ROOT / "sys")
    bind("/dev", ROOT / "dev")
    mount("tmpfs", ROOT / "dev" / "shm", "tmpfs")
    if own_proc:
        mount("proc", ROOT / "proc", "proc")
        boot = "/proc/sys/kernel/random/boot_id"  # of a node of the lab: the kernel's own is this machine's
        mount(boot, ROOT / boot.lstrip("/"), flags=MS_BIND)
    else:
        bind("/proc", ROOT / "proc")
    for word in mounts:
        source, _, rest = word.partition(":")
        bind(source, ROOT / (rest.partition(":")[0] or source).lstrip("/"))
    os.chroot(ROOT)
    os.chdir(directory if os.path.isdir(directory) else "/")
    os.execvp(command[0], command)


def become_first(image: str, mounts: Sequence[str], command: Sequence[str]) -> NoReturn:
    """Have `command` run as the first process of a pid namespace; pass signals on, and end as it does."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    call("unshare", CLONE_NEWPID)
    child = os.fork()
    if child == 0:
        become(image, mounts, command, own_proc=True)
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(sig, lambda number, _: os.kill(child, number))
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) % 256)
