"""URLs and what is in them. Logins are told to nobody: messages of errors and lines of logs go through `public`."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple
from urllib.parse import unquote

#: What stands for a secret in whatever is printed.
HIDDEN = "<hidden>"
#: Scheme, what is before the last @ of the host's part, the @. A password may hold an @ of its own, or a blank.
_LOGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^/?#'\",]*)@")


def public(text: str) -> str:
    """`text` with every login in a URL left out."""
    return _LOGIN.sub(rf"\1{HIDDEN}@", text)


class Login(NamedTuple):
    """A URL without its login, and that: of a user, or of nobody but who has the token; empty where there is none."""

    url: str
    user: str = ""
    password: str = ""
    token: str = ""


def split_login(url: str) -> Login:
    """`nats://user:password@host:4222` or `nats://token@host:4222`, taken apart. What is %-encoded is decoded."""
    before, at, host = url.rpartition("@")
    scheme, slashes, said = before.rpartition("://")
    if not at:
        return Login(url)
    user, colon, password = said.partition(":")
    if not colon:
        return Login(scheme + slashes + host, token=unquote(user))
    return Login(scheme + slashes + host, unquote(user), unquote(password))


def hidden(url: str) -> str:
    """A URL, or what was given for one, without anything that could be part of a login."""
    before, at, host = url.rpartition("@")
    scheme, slashes, _ = before.partition("://")
    place = re.sub(r"[?#].*", f"?{HIDDEN}", host, flags=re.DOTALL)  # a token may be there too
    if not at:
        return place
    return f"{scheme}{slashes}{HIDDEN}@{place}" if slashes else f"{HIDDEN}@{place}"


def is_loopback(host: str) -> bool:
    """True for an address, or the name, that only this machine's own processes reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
