"""The keys that clients must bring: read from a file, and known by their hashes from then on.

The hashes, and never a key, go to the proxy. A key must be too long to be guessed, so they need no salt.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

from gms_launch.errors import UsageError
from gms_launch.services.base import shown

#: What may stand after "Bearer " in a request (RFC 6750).
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*\Z")
SHORTEST = 16
LONGEST = 1024
#: A file of keys is no longer than that (bytes).
MOST = 1024 * 1024


def read(path: Path) -> tuple[str, ...]:
    """The hashes of the keys in a file, as the proxy writes them: SHA-256 in capital hexadecimal digits.

    Raises `UsageError` for a file that others can read or change, or that has no keys.
    """
    where = f"--api-key-file {shown(path)}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise UsageError(f"{where} cannot be read: {exc.strerror}") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise UsageError(f"{where} is no ordinary file")
        if info.st_uid not in (os.getuid(), 0):
            raise UsageError(f"{where} belongs to user {info.st_uid}, who could change it; it must be yours")
        if info.st_mode & 0o077:
            raise UsageError(
                f"{where} has mode {stat.S_IMODE(info.st_mode):04o}, so others can read or change it: "
                f"chmod 600 {shown(path)}"
            )
        text = b""
        while len(text) <= MOST and (part := os.read(fd, MOST)):
            text += part
    except OSError as exc:
        raise UsageError(f"{where} cannot be read: {exc.strerror}") from None
    finally:
        os.close(fd)
    if len(text) > MOST:
        raise UsageError(f"{where} has more than {MOST} bytes: that is no file of keys")
    return hashes(text, where)


def hashes(text: bytes, where: str) -> tuple[str, ...]:
    """The same of what is in the file. Raises `UsageError`, which names lines and never says what is in them."""
    found: dict[str, None] = {}
    for number, line in enumerate(text.decode("latin-1").splitlines(), 1):
        word, _, rest = line.strip().partition("#")
        if not word and (rest or not line.strip()):
            continue
        key = word.strip()
        if not _TOKEN.match(key):
            raise UsageError(
                f"{where}, line {number}: a key is one word of letters, digits and . _ ~ + / - (= at its end); what "
                "follows # is a comment"
            )
        if not SHORTEST <= len(key) <= LONGEST:
            raise UsageError(
                f"{where}, line {number}: the key has {len(key)} characters; {SHORTEST} to {LONGEST} are taken "
                "(openssl rand -hex 32 makes a good one)"
            )
        found[hashlib.sha256(key.encode()).hexdigest().upper()] = None
    if not found:
        raise UsageError(f"{where} has no key in it: nobody could come in")
    return tuple(found)
