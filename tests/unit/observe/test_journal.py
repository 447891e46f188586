"""A journal that is followed, and the moments that people name."""

from __future__ import annotations

from pathlib import Path

import pytest

from gms_launch.cohort.records import EventRecord
from gms_launch.observe.journal import Follower
from gms_launch.observe.stamp import moment


def line(kind: str) -> bytes:
    return EventRecord(1.0, 0, kind, -1, 0, "", {}).encode() + b"\n"


def test_a_journal_is_followed_over_half_lines_and_another_file_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    journal = Follower(path)
    assert journal.new() == []
    path.parent.mkdir()
    path.write_bytes(line("a") + line("b")[:10])
    assert [e.kind for e in journal.new()] == ["a"]
    with open(path, "ab") as file:
        file.write(line("b")[10:])
    assert [e.kind for e in journal.new()] == ["b"]
    # Put aside, written to once more, and another there: all of both, and no half line carried over.
    with open(path, "ab") as file:
        path.parent.rename(tmp_path / "run.old")
        file.write(line("c") + b"{half")
    path.parent.mkdir()
    path.write_bytes(line("d"))
    assert [e.kind for e in journal.new()] == ["c", "d"]
    path.write_bytes(b"")
    journal.new()
    path.write_bytes(line("e"))
    assert [e.kind for e in journal.new()] == ["e"]
    path.unlink()
    assert journal.new() == []


def test_moments_that_people_name() -> None:
    assert moment("10m", 1000.0) == 400.0 and moment("1d", 86400.0) == 0.0
    assert moment("1970-01-01T00:01:00Z", 0.0) == moment("1970-01-01 00:01:00", 0.0) == 60.0
    assert moment("1970-01-02", 0.0) == 86400.0 and moment("1970-01-01T02:00:00+01:00", 0.0) == 3600.0
    for wrong in ("", "yesterday", "-5m", "5", "5 m", "2026-13-01", "9" * 30 + "d"):
        with pytest.raises(ValueError, match="ago"):
            moment(wrong, 0.0)
