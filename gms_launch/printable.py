"""What others have said, made fit to be shown: it is text for people, and tells their terminal nothing.

Logs, names and reasons may hold what a client sent, or another user of the machine. Control sequences move the cursor,
rename windows and reset terminals; some have words put into what is typed next.
"""

from __future__ import annotations

import re

#: Sequences (CSI; OSC, DCS and their like up to their end; the short ones), else single characters: controls but tab
#: and newline, what a document may not hold, and those that turn the direction of writing.
_CONTROL = re.compile(
    "\x1b(?:\\[[0-?]*[ -/]*[@-~]|[\\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\\\)|[ -/]*[0-Z\\\\`-~])"
    "|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)
_COLOUR = re.compile("\x1b\\[[0-9;:]*m")


def plain(text: str) -> str:
    """Without control sequences, and without the characters that begin one; a carriage return begins a line."""
    return _CONTROL.sub("", _lines(text))


def coloured(text: str) -> str:
    """The same, and colours stay: engines print them, and they do no harm."""
    return _CONTROL.sub(lambda found: found[0] if _COLOUR.fullmatch(found[0]) else "", _lines(text))


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
