"""URLs that hold a login, told to people without it: messages of errors go through `public`.

A plan and run.json do not yet (docs/security.md).
"""

from __future__ import annotations

import re

#: What stands for a secret in whatever is printed.
HIDDEN = "<hidden>"
#: Scheme, what is before the last @ of the host's part, the @. A password may hold an @ of its own, or a blank.
_LOGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^/?#'\",]*)@")


def public(text: str) -> str:
    """`text` with every login in a URL left out."""
    return _LOGIN.sub(rf"\1{HIDDEN}@", text)
