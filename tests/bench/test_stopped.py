"""A bench that is stopped leaves nothing, and a peer that does not start costs no result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gms_launch.process import proc
from tests.support import LONG, eventually

ROOT = Path(__file__).parents[2]
#: Everything that a bench starts inherits it, whatever it does with its group, session and parents.
MARK = "BENCH_TEST_MARK"


def marked(value: str) -> list[int]:
    found = []
    for pid in proc.pids():
        try:
            if f"{MARK}={value}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
        except OSError:
            continue
    return found


def places(bench: int) -> list[str]:
    """The lab's bridge, cables, network namespaces and directories: they carry the pid of who made them."""
    prefixes = (f"lab{bench % 10000}x", f"lab-{bench}-", f"bare-{bench}-")
    where = [*map(Path, ("/sys/class/net", "/run/netns", "/sys/fs/cgroup/freezer", "/tmp", "/dev/shm"))]
    return [str(f) for place in where if place.is_dir() for f in place.iterdir() if f.name.startswith(prefixes)]


def begin(mark: str, tmp: Path, *argv: str) -> subprocess.Popen[str]:
    env = os.environ | {MARK: mark, "TMPDIR": str(tmp)}
    (tmp / "out").touch()
    with open(tmp / "out", "w") as out:
        return subprocess.Popen([sys.executable, "-m", *argv], cwd=ROOT, env=env, stdout=out, stderr=out, text=True)


@pytest.mark.parametrize(
    ("kind", "sig"), [("fence", signal.SIGTERM), ("failover", signal.SIGHUP), ("requests", signal.SIGTERM)]
)
def test_a_stopped_bench_leaves_nothing(tmp_path: Path, kind: str, sig: signal.Signals) -> None:
    """Stopped while engines start: in namespaces of two nodes, and under a detached agent."""
    mark = str(tmp_path)  # whole: its name alone is also that of another worker's test
    args = ["--mib", "1"] if kind == "failover" else ["--nodes", "2"]
    if kind == "requests":
        (tmp_path / "results").mkdir()
        args += ["--only", "hold", "--out", str(tmp_path / "results" / "requests.json")]
    bench = begin(mark, tmp_path, f"bench.{kind}", "--kills", "1", *args)
    try:
        engines = "gms_launch.engines.reference"
        eventually(
            lambda: any(engines in proc.command_line(p) for p in marked(mark)) or bench.poll() is not None,
            LONG,
            (tmp_path / "out").read_text,
        )
        assert bench.poll() is None, (tmp_path / "out").read_text()
        assert places(bench.pid) or kind == "failover"
        bench.send_signal(sig)
        assert bench.wait(LONG) == 128 + sig, (tmp_path / "out").read_text()
    finally:
        bench.kill()
        bench.wait()
    # The last of it, a guard, ends after its agent.
    eventually(lambda: marked(mark) == [], what=lambda: str([proc.command_line(p) for p in marked(mark)]))
    assert places(bench.pid) == []
    assert {p.name for p in tmp_path.iterdir()} - {"results"} == {"out"}


def test_a_peer_that_does_not_start_is_a_row(tmp_path: Path) -> None:
    """Made-up tools: `torchrun` waits for ever, `ft_launcher` is not there. The script's row comes all the same."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "torchrun").write_text("#!/bin/sh\nexec sleep 1000\n")
    (tools / "torchrun").chmod(0o755)
    (tools / "python").write_text('#!/bin/sh\necho "torch=0 nvidia-resiliency-ext=0"\n')
    (tools / "python").chmod(0o755)
    out = tmp_path / "peers.json"
    args = ["--nodes", "2", "--kills", "1", "--watch", "2", "--start", "8", "--python", str(tools / "python")]
    names = ["torchrun, default", "ft_launcher, default"]
    bench = begin(tmp_path.name, tmp_path, "bench.peers", *args, "--out", str(out), "--only", *names)
    try:
        assert bench.wait(LONG) == 0, (tmp_path / "out").read_text()
    finally:
        bench.kill()
        bench.wait()
    rows = json.loads(out.read_text())["rows"]
    assert [r["config"] for r in rows] == names
    assert all(r["kills"] == 0 and "no answer within 8 s" in r["failed"] for r in rows), rows
    assert "FAILED" in (tmp_path / "out").read_text()
    eventually(lambda: marked(tmp_path.name) == [], what="nothing is left")
    assert places(bench.pid) == []


def test_what_was_measured_before_a_peer_failed_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second kill's group never comes up again: the first kill's figures are in the row, and were before."""
    import argparse

    from bench.peers import __main__ as peers

    def trials(*_: object) -> object:
        yield {"all_dead": 0.1, "group_awake": None, "first_answer": None}
        raise TimeoutError("no answer within 90 s")

    monkeypatch.setattr(peers, "trials", trials)
    written: list[dict[str, object]] = []
    row = peers.measure(
        None,  # type: ignore[arg-type]
        2,
        tmp_path,
        "torchrun, default",
        None,
        argparse.Namespace(),
        lambda r: written.append(dict(r)),
    )
    assert [w["kills"] for w in written] == [1, 1] and "failed" not in written[0]
    assert "no answer within 90 s" in row["failed"] and row["all_dead"]["n"] == 1
