"""Logs stay at a size while their writer goes on."""

from __future__ import annotations

from pathlib import Path

from gms_launch.observe.follow import LogFollower
from gms_launch.observe.rotate import KEEP_LIVES, rotate


def test_a_log_above_the_limit_is_moved_and_its_writer_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "etcd.1.log"
    follower = LogFollower(log)
    with open(log, "ab", buffering=0) as writer:
        writer.write(b"x" * 2000 + b"\n")
        assert follower.lines() == ["x" * 2000]
        rotate(tmp_path, 1000)
        writer.write(b"after\nhalf")
        assert log.read_bytes() == b"after\nhalf", "no hole, since the file is open for appending"
        assert follower.lines() == ["after"]
        writer.write(b" a line\n")
        assert follower.lines() == ["half a line"]
    assert (tmp_path / "etcd.1.log.1").stat().st_size == 2001
    rotate(tmp_path, 1000)
    assert (tmp_path / "etcd.1.log.1").stat().st_size == 2001, "below the limit nothing happens"


def test_logs_of_the_oldest_lives_go(tmp_path: Path) -> None:
    for life in range(1, KEEP_LIVES + 6):
        (tmp_path / f"cohort-0.{life}.log").touch()
    (tmp_path / "cohort-1.1.log").touch()
    rotate(tmp_path, 1000)
    assert len(list(tmp_path.glob("cohort-0.*.log"))) == KEEP_LIVES
    assert not (tmp_path / "cohort-0.5.log").exists() and (tmp_path / "cohort-0.6.log").exists()
    assert (tmp_path / "cohort-1.1.log").exists()
