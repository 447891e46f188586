"""Numbers from text: decimal digits of ASCII, and nothing else that Python takes for a number.

int() reads `١`, ` 7 ` and `1_0`, str.isdigit() is true of `²`, which int() refuses, and float() reads `nan`. What
a person or another process wrote goes through here; the kernel's own files need not.
"""

from __future__ import annotations

import math
import re

_WHOLE = re.compile(r"[+-]?[0-9]+")
_REAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def whole(text: str) -> int:
    """The whole number that `text` is. Raises `ValueError`."""
    if not _WHOLE.fullmatch(text) or len(text) > 400:  # Python refuses thousands of digits in words of its own
        raise ValueError(f"{text[:80]!r} is not a whole number")
    return int(text)


def real(text: str) -> float:
    """The finite number that `text` is. Raises `ValueError`."""
    if not _REAL.fullmatch(text) or not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:80]!r} is not a number")
    return value


def count(text: str) -> int | None:
    """The number that `text` is if it is digits, and no more of them than a machine counts; None for any other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def numbered(number: int, thing: str, plural: str = "") -> str:
    """`1 node`, `2 nodes`, for people."""
    return f"{number} {thing if number == 1 else plural or thing + 's'}"
