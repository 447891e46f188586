"""Certificates as files, for servers that read them from there: in the node directory, for this user alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gms_launch.control.authority import Leaf
from gms_launch.spool.files import write_private


@dataclass(frozen=True)
class PemFiles:
    """The paths of whom to trust, what to show, and its key."""

    ca: Path
    cert: Path
    key: Path

    @classmethod
    def of(cls, directory: Path, name: str) -> PemFiles:
        """Where the certificate `name` is on a node."""
        place = directory / "tls"
        return cls(place / "ca.crt", place / f"{name}.crt", place / f"{name}.key")

    def write(self, ca: str, leaf: Leaf) -> None:
        """Put them down. Raises `OSError`."""
        self.ca.parent.mkdir(mode=0o700, exist_ok=True)
        for path, text in ((self.ca, ca), (self.cert, leaf.cert), (self.key, leaf.key)):
            write_private(path, text)
