"""Real processes: who dies with whom, who is found, and who must never be touched."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from gms_launch.node import fence
from gms_launch.node.gates import Gates
from gms_launch.node.guarded import Guarded
from gms_launch.process import guard, lifecycle, proc, strays, word
from gms_launch.process.deputy import Duty, Leash
from gms_launch.process.lifecycle import Command
from gms_launch.process.proc import ProcessId
from gms_launch.spool.output import Output
from tests.support import eventually, flock_holders

SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")


@pytest.fixture
def run() -> Iterator[str]:
    name = "p" + uuid.uuid4().hex[:8]
    yield name
    assert lifecycle.kill_tagged(name, 60.0) == []


def start(run: str, tmp_path: Path, argv: tuple[str, ...] = SLEEP, cohort: int = 0) -> lifecycle.Child:
    child = lifecycle.spawn("test", Command(argv, {}), f"{run}/{cohort}/1/0", Output(tmp_path / f"{cohort}.log"))
    eventually(lambda: proc.tag_of(child.pid))
    return child


def test_a_child_leads_its_own_session_and_carries_the_tag(run: str, tmp_path: Path) -> None:
    child = start(run, tmp_path)
    info = proc.stat(child.pid)
    assert info is not None
    assert info.pgid == info.session == child.pid
    assert proc.tag_of(child.pid) == f"{run}/0/1/0"
    assert fence.destroy(child.id, child.tag, [], 60.0).proved
    assert child.reap().signal == signal.SIGKILL


def test_the_environment_of_a_child_is_clean() -> None:
    base = {"GMS_LAUNCH_MODEL": "x", "GMS_LAUNCH_TAG": "old", "NATS_SERVER": "y", "PATH": "/bin"}
    env = lifecycle.child_environment(base, Command((), {"NATS_SERVER": None, "A": "1"}), "new")
    assert env == {"PATH": "/bin", "A": "1", "GMS_LAUNCH_TAG": "new", "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}


def test_the_group_is_fenced_with_its_workers(run: str, tmp_path: Path) -> None:
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    child = start(run, tmp_path, (sys.executable, "-c", code + "time.sleep(600)"))
    eventually(lambda: len(proc.group(child.pid)) == 2)
    done = fence.destroy(child.id, child.tag, [], 60.0)
    assert done.proved and done.strays == ()
    assert [i for i in proc.group(child.pid) if not i.dead] == []
    child.reap()


def test_a_process_that_left_group_and_session_is_found_and_killed(run: str, tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "time.sleep(600)"
    )
    child = start(run, tmp_path, (sys.executable, "-c", code))
    eventually(lambda: len(proc.tagged(run)) == 2)
    stray = next(i.pid for i, _ in proc.tagged(run) if i.pid != child.pid)
    eventually(lambda: proc.stat(stray).pgid != child.pgid)  # type: ignore[union-attr]
    done = fence.destroy(child.id, child.tag, [], 60.0)
    assert done.proved and len(done.strays) == 1 and done.strays[0].startswith(f"{stray} (")
    assert proc.tagged(run) == []
    child.reap()


def test_descendants_are_found_by_the_lists_of_children_too(run: str, tmp_path: Path) -> None:
    """Whatever their group, session and environment."""
    child = start(run, tmp_path, ("sh", "-c", "env -i setsid sh -c 'sleep 600 & wait' & wait"))

    def both() -> bool:
        by_lists, by_all = proc.below([child.pid]), proc.descendants([child.pid])
        return {i.identity for i in by_lists} == {i.identity for i in by_all} and len(by_lists) == 2

    eventually(both)
    assert fence.destroy(child.id, child.tag, [], 60.0).proved
    child.reap()


def test_another_process_with_the_number_is_not_touched(run: str, tmp_path: Path) -> None:
    child = start(run, tmp_path)
    impostor = ProcessId(child.pid, child.id.start - 1)
    assert not lifecycle.kill_group(impostor)
    assert lifecycle.kill_process(impostor) is None
    assert proc.alive(child.id)
    lifecycle.kill_group(child.id)
    eventually(lambda: child.ended)
    child.reap()
    assert not lifecycle.kill_group(child.id), "a reaped pid may be anybody's by now"


@pytest.mark.parametrize("pid", [0, 1, -1])
def test_group_zero_and_one_are_refused(pid: int) -> None:
    with pytest.raises(ValueError, match="refusing"):
        lifecycle.kill_group(ProcessId(pid, 0))
    with pytest.raises(ValueError, match="refusing"):
        lifecycle.kill_process(ProcessId(pid, 0))


def test_neighbouring_tags_are_not_confused(run: str, tmp_path: Path) -> None:
    one, ten = start(run, tmp_path, cohort=1), start(run, tmp_path, cohort=10)
    fence.destroy(one.id, f"{run}/1/1/0", [], 60.0)
    assert proc.alive(ten.id)
    fence.destroy(ten.id, ten.tag, [], 60.0)
    one.reap(), ten.reap()


def test_children_and_grandchildren_die_with_a_killed_agent(run: str, tmp_path: Path) -> None:
    agent_code = f"""
import asyncio, os, subprocess, sys, time
from pathlib import Path
from gms_launch.process import lifecycle
from gms_launch.process.lifecycle import Command
from gms_launch.spool.output import Output
reader, writer = os.pipe2(os.O_CLOEXEC)
env = lifecycle.child_environment(os.environ, Command((), {{}}), "{run}/guard/1/0")
guard = [sys.executable, "-m", "gms_launch.process.guard", "{run}", "0", str(reader), "/dev/null"]
subprocess.Popen(guard, pass_fds=(reader,), env=env, start_new_session=True)
os.close(reader)
code = '''
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
time.sleep(600)
'''
lifecycle.spawn("x", Command((sys.executable, "-c", code), {{}}), "{run}/0/1/0", Output(Path("x.log")))
time.sleep(600)
"""
    agent = subprocess.Popen([sys.executable, "-c", agent_code], cwd=tmp_path)
    eventually(lambda: len(proc.tagged(run)) == 3, what="child, grandchild and guard")
    agent.kill()
    agent.wait()
    eventually(lambda: proc.tagged(run) == [])


def test_a_command_that_does_not_exist_says_so(run: str, tmp_path: Path) -> None:
    child = lifecycle.spawn("x", Command(("/no/such/thing",), {}), f"{run}/0/1/0", Output(tmp_path / "x.log"))
    eventually(lambda: child.ended)
    assert child.reap().code == 1
    assert "cannot run /no/such/thing: No such file" in child.output.source.read_text()


def test_which_of_several_listens_is_seen_by_one_look_at_the_kernels_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of them may be dead."""
    looks, really = [], proc.listening
    monkeypatch.setattr(proc, "listening", lambda *asked: looks.append(asked) or really(*asked))
    dead, idle = (subprocess.Popen(["sleep", "600"]) for _ in range(2))
    dead.kill()
    try:
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            assert proc.one_listens([dead.pid, idle.pid, os.getpid()], port) and len(looks) == 1
            assert not proc.one_listens([dead.pid, idle.pid], port) and not proc.one_listens([], port)
    finally:
        for process in (dead, idle):
            process.kill()
            process.wait()


def test_who_has_a_lock_is_read_from_descriptors(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    assert proc.lock_keepers([lock]) == []
    code = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)])
    try:
        eventually(lambda: [i.pid for i in proc.lock_keepers([lock])] == [holder.pid])
    finally:
        holder.kill()
        holder.wait()
    assert proc.lock_keepers([lock]) == []


def test_a_lock_that_a_child_of_a_dead_acquirer_keeps_is_seen_by_its_descriptor(tmp_path: Path) -> None:
    lock, marker = tmp_path / "failover.lock", f"keeper-{uuid.uuid4().hex}"
    lock.touch()
    code = (
        "import fcntl, os, subprocess, sys; fd = os.open(sys.argv[1], os.O_RDWR); fcntl.flock(fd, fcntl.LOCK_EX)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[2]], pass_fds=(fd,), env={})"
    )
    subprocess.run([sys.executable, "-c", code, str(lock), marker], check=True)
    opened = open(lock)  # noqa: SIM115 - a descriptor without the lock is none of a keeper's
    (keeper,) = proc.lock_keepers([lock])
    try:
        assert marker in proc.command_line(keeper.pid)
        assert keeper.pid not in flock_holders(str(lock)), "/proc/locks names the dead, or nobody"
        assert [k.identity for k in strays.lock_keepers("r", [lock])] == [keeper.identity]
        found, left = strays.clear("no-such-run", 60.0, frozenset(), 0, [lock])
        assert list(found) == [keeper.identity] and not left and not proc.alive(keeper.identity)
    finally:
        opened.close()
        lifecycle.kill_process(keeper.identity)
    assert proc.lock_keepers([lock]) == []


def test_the_guard_after_one_that_was_killed_knows_what_that_one_knew(run: str, tmp_path: Path) -> None:
    told = subprocess.Popen(SLEEP, start_new_session=True)
    identity = proc.identity(told.pid)
    assert identity is not None
    log = SimpleNamespace(logs=tmp_path)
    layout = SimpleNamespace(
        run=run, topology=SimpleNamespace(node_rank=0), run_dir=log, node_dir=SimpleNamespace(gms="")
    )
    herald = SimpleNamespace(open=lambda: (-1, -1), attach=lambda _: None, close=lambda: None)
    heard: list[str] = []

    async def agent() -> None:
        guarded = Guarded(layout, [Gates({})], herald, lambda kind, _: heard.append(kind))  # type: ignore[arg-type]
        guarded.start(asyncio.get_running_loop())
        guarded.tell([identity])
        first = guarded.pid
        os.kill(first, signal.SIGKILL)
        for _ in range(6000):
            await asyncio.sleep(0.01)
            if guarded.status.starts == 2:
                break
        assert guarded.pid != first and guarded.status.state == "ready" and proc.stat(first) is None
        await guarded.dismiss()

    try:
        asyncio.run(agent())
        assert heard == ["guard_exited", "guard_started"]
        assert told.wait(60) == -signal.SIGKILL, "by the second, which was told of it"
    finally:
        told.kill(), told.wait()


def test_a_guard_kills_what_its_agent_has_told_it_of(run: str, tmp_path: Path) -> None:
    told = subprocess.Popen(SLEEP, start_new_session=True)
    other = subprocess.Popen(SLEEP, start_new_session=True)
    try:
        _, writer = guard.start(run, 0, tmp_path / "guard.log")
        identity, reused = proc.identity(told.pid), proc.identity(other.pid)
        assert identity is not None and reused is not None
        guard.tell(
            writer, [identity, ProcessId(reused.pid, reused.start - 1), *[ProcessId(999999, k) for k in range(500)]]
        )
        os.close(writer)
        assert told.wait(60) == -signal.SIGKILL
        eventually(lambda: proc.tagged(f"{run}/guard") == [])
        assert other.poll() is None, "a number that came to mean another process"
    finally:
        other.kill(), other.wait()
        told.kill(), told.wait()


def test_a_guard_goes_when_it_has_said_that_its_agent_is_dead(run: str, tmp_path: Path) -> None:
    """Also where what says so comes late: on a busy machine all else was done before."""
    key = word.secret("password", "attempt")
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    rank = subprocess.Popen(SLEEP, start_new_session=True)
    with word.listen("127.0.0.1", 0) as line, word.listen("127.0.0.1", 0) as leader, ours:
        try:
            with theirs:
                _, writer = guard.start(run, 3, tmp_path / "guard.log", deputy=(theirs.fileno(), line.fileno()))
            identity = proc.identity(rank.pid)
            assert identity is not None
            leash = Leash(ours)
            leash.tell(Duty({(0, 1): identity}, (), key, 0.0, (leader.getsockname(),), 77))
            guard.tell(writer, [identity])
            os.close(writer)
            assert rank.wait(60) == -signal.SIGKILL, "it is at its work"
            time.sleep(0.3)  # and done with it, before the agent's end is seen
            leash.close()
            heard: list[word.Word] = []
            eventually(lambda: heard.extend(word.hear(leader, key)) or heard, what="the word")  # type: ignore[func-returns-value]
            assert heard == [word.Word(word.AGENT, 77, 3)]
            eventually(lambda: not proc.tagged(f"{run}/guard"), what="and it is gone")
        finally:
            rank.kill(), rank.wait()
