"""Whose a place is: by every directory and link on the way to it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from gms_launch.errors import RefusedError
from gms_launch.process import places
from gms_launch.run import dead, nodedir

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="giving files away needs root")
OTHER = 31999


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "a" / "b").mkdir(parents=True)
    return tmp_path


def test_what_is_ours_and_what_is_not_there_yet(home: Path) -> None:
    for place in (home, home / "a", home / "a/b/c/d", home / "a/../a", Path("/tmp"), Path("/dev/shm/none"), Path("/")):
        assert places.flaw(place) == "", place
    (home / "link").symlink_to("a/b")
    (home / "far").symlink_to(home / "link")
    assert places.flaw(home / "far" / "x", private=True) == ""
    (home / "loop").symlink_to("loop")
    assert "leads in a circle" in places.flaw(home / "loop")


def test_what_somebody_else_could_exchange(home: Path) -> None:
    (home / "link").symlink_to(home / "a" / "b")
    os.chown(home / "link", OTHER, 0, follow_symlinks=False)
    assert f"{home}/link belongs to uid {OTHER}" in places.flaw(home / "link" / "x")
    os.chown(home / "a", OTHER, 0)
    for place in (home / "a", home / "a" / "b", home / "a/b/../../a/b/none"):
        assert f"{home}/a belongs to uid {OTHER}" in places.flaw(place), place
    with pytest.raises(RefusedError, match=f"^--cache-dir {home}/a/b: .*root follows nothing that a user chose"):
        places.check(home / "a" / "b", "--cache-dir")


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o775])
def test_where_somebody_else_may_write(home: Path, mode: int) -> None:
    os.chown(home / "a", 0, OTHER)
    (home / "a").chmod(mode)
    who = "everybody" if mode & 0o002 else f"group {OTHER}"
    assert f"{home}/a can be written by {who}" in places.flaw(home / "a" / "b")
    (home / "a").chmod(mode | 0o1000)
    assert places.flaw(home / "a" / "b", private=True) == "", "what lies above may be sticky"
    assert places.flaw(home / "a") == ""
    assert f"can be written by {who}" in places.flaw(home / "a", private=True)


def test_a_group_of_ones_own_and_what_an_access_list_hides_behind_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "a").chmod(0o775)
    assert places.flaw(home / "a" / "b") == "", "root's group"
    monkeypatch.setattr(os, "getxattr", lambda *_: b"x")
    assert "can be written by group" in places.flaw(home / "a" / "b")


def test_files_are_read_if_they_are_ours(home: Path) -> None:
    file = home / "file"
    file.write_text("mine")
    assert places.read_own(file) == "mine"
    (home / "link").symlink_to(file)
    os.mkfifo(home / "pipe")
    for path in (home / "link", home / "pipe", home, home / "none"):
        with pytest.raises(OSError):  # noqa: PT011 - whichever the kernel has for it
            places.read_own(path)
    os.chown(file, OTHER, OTHER)
    with pytest.raises(PermissionError):
        places.read_own(file)


def test_a_directory_for_runs_where_the_name_is_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodedir, "LOCAL_ROOT", home)
    plain = home / "gms-launch-0"
    plain.mkdir()
    os.chown(plain, OTHER, OTHER)
    (home / "gms-launch-0.aaaa").mkdir()
    os.chown(home / "gms-launch-0.aaaa", OTHER, OTHER)
    made = nodedir.user_root()
    assert made.name.startswith("gms-launch-0.") and made.name != "gms-launch-0.aaaa"
    assert nodedir.user_root() == made and nodedir.roots(0) == [made]
    assert [p.name for p in nodedir.roots(OTHER)] == []
    plain.rmdir()
    assert nodedir.user_root() == made, "runs are where they were"


def test_names_of_runs_and_of_nothing_else() -> None:
    assert [n for n in ("r", "r+2", "a.b-c_d", "7") if not dead.run_name(n)] == []
    for name in ("..", ".", "", "r+", "r+²", "r+x", "x+²", "r/1", "r\n", "+1", "r+1234567", "a" * 21, "-r"):
        assert not dead.run_name(name), name
    assert dead.tagged_name("r/0/1/2") == "r+2" and dead.tagged_name("r/guard/1/0") == "r"
    for tag in ("../c/1/0", "r", "r/0/1", "r/0/1/2/3", "r/0/1/²", "r/0/1/-1", f"r/0/1/{'9' * 5000}", "/0/1/0", ""):
        assert dead.tagged_name(tag) is None, tag


def test_what_went_wrong_in_a_sweep_goes_to_syslog(monkeypatch: pytest.MonkeyPatch) -> None:
    from gms_launch.cli import sweep
    from gms_launch.errors import LaunchError

    said: list[str] = []
    monkeypatch.setattr("syslog.openlog", lambda *_: None)
    monkeypatch.setattr("syslog.syslog", lambda _, text: said.append(text))
    monkeypatch.setattr(sweep, "everybody", lambda *_: sweep.Report(wrong=["uid 7: bad\n\x1b[31mname"]))
    with pytest.raises(LaunchError, match="not everything could be swept: uid 7: bad") as caught:
        sweep.main(None, False)
    assert caught.value.exit_code == 1 and said == ["sweep: uid 7: bad??[31mname"]


def test_a_process_of_two_users_is_nobodys() -> None:
    from gms_launch.process import proc

    assert proc.owner(os.getpid()) == os.getuid()
    drop = "import os; os.setresuid(31999, 31999, 0); print(flush=True); input()"
    child = subprocess.Popen(["python3", "-c", drop], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline()
    assert proc.owner(child.pid) is None
    child.communicate(b"\n", 10)
    assert proc.owner(child.pid) is None
