"""Whose a place is: nothing is read, written, executed or removed where another user could have put something.

A place is safe when every directory and link on the way to it is root's or this user's, and no other user may write
there; in a sticky directory (/tmp, /dev/shm) others may write, and what is opened in it must be this user's. Root is
no exception: what a user owns, that user may exchange, so root does not follow it. Makes and changes nothing.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from pathlib import Path

from gms_launch.errors import RefusedError

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
#: As many links on the way as the kernel follows.
_LINKS = 40


def check(path: Path, what: str, private: bool = False) -> None:
    """Raise `RefusedError` when another user could decide what `path` is; `what` names it for people.

    `private`: nobody else may put anything into it either, not even where it is sticky.
    """
    try:
        why = flaw(path, private)
    except OSError as exc:
        why = f"{exc.filename or path} cannot be looked at: {exc.strerror}"
    if why:
        raise RefusedError(f"{what} {path}: {why}")


def flaw(path: Path, private: bool = False) -> str:
    """Who else than root and this user could decide what `path` is, and what to do about it; empty when nobody.

    What is not there yet is judged by where it would be made. Raises `OSError` when it cannot be looked at.
    """
    trusted = _trusted()
    here, links = Path("/"), 0
    last = here.lstat()
    todo = list(reversed(path.absolute().parts[1:]))
    while todo:
        name = todo.pop()
        if name == "..":
            here = here.parent
            last = here.lstat()
            continue
        there = here / name
        try:
            info = there.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return ""
        if info.st_uid not in trusted:
            return f"{there} belongs to {user(info.st_uid)}, who could exchange what is there; {_instead(info.st_uid)}"
        if stat.S_ISLNK(info.st_mode):
            links += 1
            if links > _LINKS:
                return f"{there} is a link that leads in a circle"
            target = Path(os.readlink(there))
            if target.is_absolute():
                here = Path("/")
            todo.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
            continue
        if who := _writers(there, info, sticky=False):
            return f"{there} can be written by {who}, who could exchange what is there; `chmod go-w {there}`"
        here, last = there, info
    if private and (who := _writers(here, last, sticky=True)):
        return f"{here} can be written by {who}; name a directory of this user alone, for example one in it"
    return ""


def user(uid: int) -> str:
    """A user for people: name and number."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def own_directory(path: Path, uid: int | None = None) -> bool:
    """True when `path` itself, not what a link there leads to, is a directory of a user (this one)."""
    try:
        info = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == (os.getuid() if uid is None else uid)


def read_own(path: Path) -> str:
    """The text of a regular file of this user. Raises `OSError`; never waits for a pipe, follows no link at its end."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd) as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid():
            raise PermissionError(1, "is no file of this user", str(path))
        return file.read()


def _writers(path: Path, info: os.stat_result, sticky: bool) -> str:
    """Who may write into a directory besides its owner and root; where it is sticky, nobody unless asked for."""
    if not stat.S_ISDIR(info.st_mode) or not info.st_mode & _OTHERS or (info.st_mode & stat.S_ISVTX and not sticky):
        return ""
    if info.st_mode & stat.S_IWOTH:
        return "everybody"
    return "" if _group_of_one(info.st_gid) and not _has_list(path) else f"group {_group(info.st_gid)}"


def _group_of_one(gid: int) -> bool:
    """Root's group, or this user's own in the way of many distributions, where each user has a group of that name."""
    if gid == 0:
        return True
    with contextlib.suppress(KeyError):
        mine, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
        return mine.pw_gid == gid and group.gr_name == mine.pw_name and set(group.gr_mem) <= {mine.pw_name}
    return False


def _has_list(path: Path) -> bool:
    """True when an access list may let in others than the group, whose bits then are those of all in the list."""
    with contextlib.suppress(OSError):
        return bool(os.getxattr(path, "system.posix_acl_access"))
    return False


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _instead(owner: int) -> str:
    if os.getuid() == 0:
        return f"root follows nothing that a user chose: run this as that user (`sudo -u '#{owner}' -H gms-launch ...`)"
    return "name a directory of your own"


def unmapped() -> int | None:
    """The user id that stands for all without a number here; None where all have one, as outside of containers."""
    with contextlib.suppress(OSError, ValueError):
        maps = [[int(n) for n in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
        if maps != [[0, 0, 2**32 - 1]]:
            return int(Path("/proc/sys/kernel/overflowuid").read_text())
    return None


def _trusted() -> frozenset[int | None]:
    """The owners of what we believe: root, this user, and in a container of few users those that have no number here,
    which is how the machine's root looks from there."""
    return frozenset({0, os.getuid(), unmapped()})
