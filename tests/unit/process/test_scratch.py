"""What a dead life left: what is taken for its, and what is never touched."""

from __future__ import annotations

import mmap
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_launch.process import scratch
from gms_launch.process.scratch import Litter, Segment


@pytest.fixture
def segment() -> Iterator[Path]:
    """A segment of shared memory with a name that tells nothing."""
    path = scratch.SHM / f"psm_{uuid.uuid4().hex[:8]}"
    path.write_bytes(b"x" * 4096)
    yield path
    path.unlink(missing_ok=True)


def test_a_tree_is_removed_and_no_link_is_followed(tmp_path: Path) -> None:
    other, place = tmp_path / "other", tmp_path / "life"
    other.mkdir()
    (other / "file").write_text("somebody's")
    (place / "a" / "b").mkdir(parents=True)
    (place / "a" / "file").write_text("x")
    (place / "a" / "link").symlink_to(other)
    (place / "dangling").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "s"))
        assert scratch.remove_tree(place, 10.0) == ""
    assert not place.exists() and (other / "file").read_text() == "somebody's"
    assert scratch.remove_tree(place, 10.0) == "", "gone is gone"


def test_a_link_in_the_place_of_the_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "life").symlink_to(tmp_path / "other")
    assert "no directory" in scratch.remove_tree(tmp_path / "life", 10.0)
    assert (tmp_path / "other").is_dir()


def test_removal_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "life").mkdir()
    for k in range(3):
        (tmp_path / "life" / str(k)).touch()
    assert "not removed within 0 s" in scratch.remove_tree(tmp_path / "life", 0.0)


def test_segments_that_a_process_has_mapped_are_seen(segment: Path) -> None:
    with open(segment, "r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert Segment(segment.name, segment.stat().st_ino) in scratch.mapped([os.getpid()])
        segment.unlink()
        assert segment.name not in {s.name for s in scratch.mapped([os.getpid()])}, "it has no name any more"
    assert scratch.mapped([2**22 + 1]) == frozenset()


def test_a_pid_counts_as_a_word_of_its_own() -> None:
    names = ["sem.loky-4711-0", "psm_4711ab", "x47110", "vllm_4711", "other"]
    assert scratch.named_after({4711, 1}, names) == ["sem.loky-4711-0", "vllm_4711"]
    assert scratch.named_after({0, 1}, ["a-1", "b-0"]) == []


def test_only_what_was_made_in_that_life_is_removed(segment: Path, tmp_path: Path) -> None:
    seen = Segment(segment.name, segment.stat().st_ino)
    mine = frozenset({seen})
    place, begun = tmp_path / "life", time.time() - 5
    scratch.clear(Litter(place, time.time() + 60, segments=mine))
    assert segment.exists(), "older than the life"
    scratch.clear(Litter(place, begun, segments=mine, spared=mine))
    assert segment.exists(), "another life has it"
    scratch.clear(Litter(place, begun, segments=frozenset({Segment(segment.name, seen.inode + 1)})))
    assert segment.exists(), "another file by now"
    assert scratch.clear(Litter(place, begun, segments=mine)) == ""
    assert not segment.exists()
