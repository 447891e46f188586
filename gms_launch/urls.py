"""URLs that hold a login: taken apart where they are used, and told to people without it.

A password in a URL is seen wherever the URL is. What we start gets it by its environment or a file, and whatever is
printed, logged or recorded goes through `public`.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit, urlunsplit

#: What stands for a secret in whatever is printed.
HIDDEN = "<hidden>"
#: Scheme, what is before the last @ of the host's part, the @. A password may hold an @ of its own, or a blank.
_LOGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^/?#'\",]*)@")


def public(text: str) -> str:
    """`text` with every login in a URL left out."""
    return _LOGIN.sub(rf"\1{HIDDEN}@", text)


def login(url: str) -> tuple[str, str, str]:
    """A URL without its login, the user and the password; these are empty where it has none. Raises `ValueError`."""
    parts = urlsplit(url)
    before, _, place = parts.netloc.rpartition("@")
    user, _, password = before.partition(":")
    return urlunsplit(parts._replace(netloc=place)), unquote(user), unquote(password)
