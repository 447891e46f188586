"""What is written for people: whole while the disk takes it, bounded and counted while it does not."""

from __future__ import annotations

import ast
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_launch.process.follow import READ_MAX, LogFollower
from gms_launch.spool import output as outputs
from gms_launch.spool import writer as writers
from gms_launch.spool.output import Output
from gms_launch.spool.writer import KEEP_LIVES, LogHandler, Place, Writer
from tests.support import eventually

PACKAGE = Path(__file__).parents[3] / "gms_launch"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    return tmp_path / "run"


@pytest.fixture
def writer(run_dir: Path, tmp_path: Path) -> Iterator[Writer]:
    made = Writer(run_dir, run_dir / "logs", tmp_path, 1000)
    yield made
    made.close(5.0)


def say(output: Output, *lines: str) -> None:
    """Print as a child does."""
    subprocess.run([sys.executable, "-c", f"print({chr(10).join(lines)!r})"], stdout=output.fd, check=True)


def flood(output: Output, *lines: str) -> None:
    """The same of much."""
    os.write(output.fd, "".join(f"{line}\n" for line in lines).encode())


def state(writer: Writer) -> str:
    return next((p.state for p in writer.places() if p.name == "run directory"), "")


def test_what_is_said_is_there_when_the_writer_is_closed(writer: Writer, run_dir: Path) -> None:
    log = logging.getLogger("test.spool")
    log.addHandler(LogHandler(writer.append, run_dir / "logs" / "agent.log"))
    for number in range(100):
        writer.append(run_dir / "events.jsonl", b"%d\n" % number)
        writer.replace(run_dir / "run.json", str(number))
    log.error("a word")
    cohort = writer.output(run_dir / "logs" / "cohort-0.1.log")
    say(cohort, "one", "two")
    writer.output(run_dir / "logs" / "silent.1.log")
    assert writer.close(60.0) == "", "a process that says nothing is no trouble"
    assert (run_dir / "events.jsonl").read_text().split() == [str(n) for n in range(100)]
    assert (run_dir / "run.json").read_text() == "99"
    assert (run_dir / "logs" / "agent.log").read_text() == "a word\n"
    assert (run_dir / "logs" / "cohort-0.1.log").read_text() == "one\ntwo\n"
    assert writer.places() == () and writer.unwritten == 0


def test_a_directory_that_goes_is_told_and_when_it_is_back_nothing_is_missing(writer: Writer, run_dir: Path) -> None:
    say(cohort := writer.output(run_dir / "logs" / "cohort-0.1.log"), "before")
    writer.append(run_dir / "events.jsonl", b"before\n")
    eventually((run_dir / "events.jsonl").exists)
    run_dir.rename(run_dir.with_name("elsewhere"))
    writer.append(run_dir / "events.jsonl", b"meanwhile\n")
    say(cohort, "meanwhile")
    eventually(lambda: state(writer) == "gone")
    assert writer.places() == (Place("run directory", str(run_dir), "gone"),)
    run_dir.with_name("elsewhere").rename(run_dir)
    eventually(lambda: state(writer) == "")
    assert writer.close(60.0) == ""
    assert (run_dir / "events.jsonl").read_text() == "before\nmeanwhile\n"
    assert (run_dir / "logs" / "cohort-0.1.log").read_text() == "before\nmeanwhile\n"


def test_what_waits_is_bounded_and_the_oldest_goes_first(
    writer: Writer, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "BACKLOG", 100)
    monkeypatch.setattr(writers, "LOG_BACKLOG", 8192)
    monkeypatch.setattr(outputs, "TAIL", 0)
    cohort = writer.output(run_dir / "logs" / "cohort-0.1.log")
    shutil.rmtree(run_dir)
    for number in range(100):
        writer.append(run_dir / "events.jsonl", b"%09d\n" % number)
    say(cohort, "x" * 20000, "the end")
    eventually(lambda: state(writer) == "gone")
    writer.tick()
    assert cohort.waiting == 8192 and os.fstat(cohort.fd).st_blocks * 512 <= 3 * 4096
    eventually(lambda: writer.places()[0].dropped == 90)
    assert writer.places()[0].dropped_bytes == 20009 - 8192
    assert (cohort.kept() or "").endswith("x\nthe end\n")
    (run_dir / "logs").mkdir(parents=True)
    eventually(lambda: state(writer) == "")
    assert (run_dir / "events.jsonl").read_text().split() == [f"{n:09d}" for n in range(90, 100)]
    text = (run_dir / "logs" / "cohort-0.1.log.1").read_text()  # above the limit of this writer
    assert text.startswith(f"\n[gms-launch: {20009 - 8192} bytes could not be written here]\nxxx")
    assert text.endswith("x\nthe end\n")


def test_a_disk_that_hangs_holds_nobody_up(writer: Writer, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO that nobody reads: to open it waits, as a write to a dead server does."""
    monkeypatch.setattr(writers, "SLOW", 0.2)
    os.mkfifo(run_dir / "events.jsonl")
    writer.append(run_dir / "events.jsonl", b"one\n")
    say(cohort := writer.output(run_dir / "logs" / "cohort-0.1.log"), "alive")
    eventually(lambda: state(writer) == "slow")
    writer.append(run_dir / "events.jsonl", b"two\n")
    assert writer.close(0.1) == "slow"
    assert writer.unwritten == 2, "the one that hangs and the one behind it"
    assert LogFollower(cohort.source).lines() == ["alive"]
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((run_dir / "events.jsonl").read_text()))
    reader.start()
    eventually(lambda: state(writer) == "")
    reader.join(60.0)
    assert got[0].startswith("one\n")


def test_a_log_above_the_limit_is_put_aside_and_its_writer_goes_on(writer: Writer, run_dir: Path) -> None:
    log = run_dir / "logs" / "etcd.1.log"
    output = writer.output(log)
    follower = LogFollower(output.source)
    say(output, "x" * 2000)
    assert follower.lines() == ["x" * 2000]
    eventually(log.with_suffix(".log.1").exists)
    say(output, "after")
    assert follower.lines() == ["after"]
    writer.hasten()
    eventually(lambda: log.exists() and log.read_text() == "after\n")
    assert log.with_suffix(".log.1").stat().st_size == 2001


def test_logs_of_the_oldest_lives_go(run_dir: Path) -> None:
    logs = run_dir / "logs"
    for life in range(1, KEEP_LIVES + 6):
        (logs / f"cohort-0.{life}.log").touch()
    (logs / "cohort-1.1.log").touch()
    writer = Writer(run_dir, logs, run_dir, 1000)
    eventually(lambda: len(list(logs.glob("cohort-0.*.log"))) == KEEP_LIVES)
    writer.close(5.0)
    assert not (logs / "cohort-0.5.log").exists() and (logs / "cohort-0.6.log").exists()
    assert (logs / "cohort-1.1.log").exists()


def test_outputs_of_ended_processes_are_given_back(writer: Writer, run_dir: Path) -> None:
    output = writer.output(run_dir / "logs" / "cohort-0.1.log")
    say(output, "last words")
    output.ended = True
    writer.hasten()
    eventually(lambda: output.source == output.path)
    assert output.path.read_text() == "last words\n"


def test_a_file_of_the_node_directory_is_written_at_once_or_as_soon_as_it_can_be(
    writer: Writer, tmp_path: Path
) -> None:
    place = tmp_path / "later" / "engine-0.pgid"
    writer.here(place, "17\n")
    assert writer.places() == (Place("node directory", str(tmp_path), "gone"),)
    place.parent.mkdir()
    writer.tick()
    assert place.read_text() == "17\n" and writer.places() == ()
    writer.not_here(place)
    assert not place.exists()


#: Writes that do not go through the writer, and why each may.
ALLOWED = {
    "process/once.py": "a memfd for a command's stdin: memory, on no disk",
    "spool/files.py": "the door itself",
    "spool/output.py": "gives memory back; the copy goes through spool/files",
    "spool/writer.py": "rotation, in the writer's thread",
    "observe/starts.py": "what starts took: in a thread of its own, that nobody waits for",
    "process/scratch.py": "removes what dead lives left, in a thread of its own that nobody waits for",
    "run/rundir.py": "a start's directory, before anything runs; `down`, which tells its errors",
    "run/nodedir.py": "a start's directory in memory; its removal at the end",
    "node/gates.py": "locks, made before anything runs",
    "services/pem.py": "a server's certificates, in the node directory, before it is started",
    "services/nats.py": "NATS's settings, without which it cannot be started",
    "services/proxy.py": "the proxy's settings, in the node directory, which is in memory",
    "services/etcd_proxy.py": "the same",
    "cli/sweep.py": "removes what dead runs left",
    "cli/doctor.py": "a command of its own, and its business",
    "cli/unforeseen.py": "a command that is at its end anyway; of an agent, its last words",
    "cli/timeline.py": "a page that was asked for, in a command of its own",
    "cli/submit.py": "script and settings of a job, before it is one",
    "cli/up.py": "the directory of this node's logs, before anything runs",
    "engines/reference/": "an engine, not the agent",
    "gms/": "sockets and memory of a GMS server, in the node directory",
}
WRITES = {"write_text", "write_bytes", "replace", "rename", "mkdir", "makedirs", "unlink", "rmtree", "copyfile", "copy"}
WRITES |= {"truncate", "ftruncate", "touch", "write_private", "symlink", "link", "remove"}


def writing(tree: ast.AST) -> list[tuple[int, str]]:
    """The calls in a module that change a file."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        of = node.func.value if isinstance(node.func, ast.Attribute) else None
        if name == "open":
            modes = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
            flags = ast.dump(node)
            if any(isinstance(m, str) and set(m) & set("wax+") and len(m) <= 3 for m in modes) or "O_CREAT" in flags:
                found.append((node.lineno, name))
        elif name in WRITES and not (name in ("replace", "remove", "copy") and not _is_path(of, node)):
            found.append((node.lineno, name))
    return found


def _is_path(of: ast.AST | None, call: ast.Call) -> bool:
    """`replace` is of texts, records and the writer too; of files it is os.replace or has one argument of a Path."""
    if isinstance(of, ast.Name) and of.id in ("os", "shutil"):
        return True
    on = of.attr if isinstance(of, ast.Attribute) else getattr(of, "id", "")
    return (
        isinstance(call.func, ast.Attribute) and call.func.attr == "replace" and len(call.args) == 1 and on != "mirror"
    )


def test_nothing_is_written_to_a_disk_beside_the_door() -> None:
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        calls = writing(ast.parse(file.read_text()))
        if calls and not any(name == a or (a.endswith("/") and name.startswith(a)) for a in ALLOWED):
            found[name] = calls
    assert found == {}, "goes through spool.Writer, or onto the list with its reason"


def test_no_logging_handler_writes_to_a_file() -> None:
    text = "".join(p.read_text() for p in PACKAGE.rglob("*.py"))
    assert "FileHandler" not in text and "basicConfig(\n        filename" not in text


def test_a_log_that_grows_fast_is_read_piece_by_piece_and_without_what_was_given_back(tmp_path: Path) -> None:
    """Others can have an engine print as fast as it can, and whoever reads that is the agent's loop."""
    output = Output(tmp_path / "cohort-0.1.log")
    follower = LogFollower(output.source)
    lines = [f"{k:0100d}" for k in range(5000)]
    flood(output, *lines)
    first = follower.lines()
    assert first == lines[: len(first)] and len(first) < READ_MAX / 100 and follower.behind
    seen = list(first)
    while follower.behind:
        seen += follower.lines()
    assert seen == lines
    flood(output, *lines)
    output.bound(10 * 101)
    flood(output, "last")
    begun = follower.lines()
    while follower.behind:
        begun += follower.lines()
    assert begun[-1] == "last" and begun[-11:-1] == lines[-10:] and len(begun) < 100, "a page of it at most was kept"
    assert all(line.strip("\0") == line for line in begun[1:])
    output.close()


def test_who_prints_faster_than_the_disk_writes_keeps_nobody_from_his_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(tmp_path / "cohort-0.1.log")
    written: list[int] = []

    def append(path: Path, data: bytes) -> int:
        flood(output, "y" * (len(data) - 1))
        written.append(len(data))
        assert len(written) < 10, "it would go on for ever"
        return len(data)

    monkeypatch.setattr("gms_launch.spool.files.append", append)
    flood(output, "x" * 1000)
    assert output.copy() and sum(written) == 1001 and output.waiting == 1001
    output.close()
