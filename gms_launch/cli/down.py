"""`gms-launch down`: an orderly stop from anywhere, the rest by force; then the proof, node by node.

A living run is asked to stop: the leader's agent by a signal on its own machine, through etcd from elsewhere. What is
left then, or was left by agents that died, is cleared on every node by `down --here`, run there through Slurm or SSH.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
import uuid
from dataclasses import dataclass, replace

from gms_launch.cohort.records import CommandRecord
from gms_launch.control.errand import Errand
from gms_launch.control.keys import Keys
from gms_launch.errors import DeadlineError, LaunchError, NoContactError
from gms_launch.numbers import numbered
from gms_launch.process import lifecycle, proc, strays
from gms_launch.process.forked import fork
from gms_launch.run import contact, rundir
from gms_launch.run.nodedir import NodeDir
from gms_launch.run.rundir import NodeEnd, RunDir, RunFile
from gms_launch.spool.files import trouble
from gms_launch.spool.reading import PATIENCE
from gms_launch.transport import gms_launch, run_on, slurm
from gms_launch.transport.base import Target

POLL = 0.05


def main(run: str | None, timeout: float) -> None:
    directory, found = rundir.find(run)
    targets = known_nodes(directory, found)  # asked for while its agent lives: the home may not be of use later
    stopped = found.ended is None and stop(directory, found, timeout)
    found = directory.read() or found
    proved = [clear(directory, found, node) for node in nodes(targets, found)]
    bad = [p for p in proved if not p.clean]
    wrong = ""
    if not bad and (found.ended is None or directory.end_unrecorded):
        reason = found.reason or ("" if stopped else "its agent died")
        end = found if found.ended is not None else replace(found, ended=time.time(), reason=reason)
        if wrong := recorded(directory, end):
            wrong = f"the run directory {directory.path} is {wrong}: its end could not be recorded there"
        elif found.local:
            NodeDir.of(directory.run, str(found.settings.get("gms_socket_dir") or "")).remove()
    print(f"run {directory.run} is down: " + ("stopped in order" if stopped else "it had ended already"))
    for proof in proved:
        alive = "nothing of it is alive" if proof.by_agent else "nothing with its tag or its lock is alive"
        state = alive if proof.clean else "NOT PROVED"
        print(f"  node {proof.node_rank} {proof.host}: {state}" + (f" ({proof.detail})" if proof.detail else ""))
    job = found.slurm_job
    if job and os.environ.get("SLURM_JOB_ID") != job and slurm.still_running(job):
        print(
            f"Slurm job {job} still holds its nodes: what the run was started by (srun, a script, salloc) has not "
            f"ended, or was killed; `scancel {job}` gives them back"
        )
    print(f"logs: {directory.logs}")
    if wrong:
        print(wrong)
    if bad:
        raise LaunchError("not proved on " + ", ".join(f"{p.host}: {p.detail}" for p in bad))


def stop(directory: RunDir, found: RunFile, timeout: float) -> bool:
    """End a run in order, within `timeout` seconds; False if there was nobody to ask. Raises `DeadlineError`."""
    if found.local:
        return stop_agent(found.agent, timeout)
    command = CommandRecord(uuid.uuid4().hex, "stop", time.time())
    deadline = time.monotonic() + timeout
    try:
        with Errand(contact.door(directory, found), Keys(directory.run), command) as errand:
            while (now := directory.read()) is None or now.ended is None:
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"run {directory.run} was asked to stop and has not ended within {timeout:g} s: "
                        f"{errand.withdraw()}; run `gms-launch down` again on {found.leader_host}, or "
                        "`gms-launch status` here"
                    )
                with contextlib.suppress(NoContactError):  # etcd ends before the run does
                    errand.renew()
                time.sleep(POLL)  # the file is on the shared home: nothing announces a change there
            errand.done()
    except NoContactError:
        return False
    return True


def stop_agent(agent: proc.ProcessId, timeout: float) -> bool:
    """End an agent of this machine, in order within `timeout` seconds; False if there was none.

    Raises `DeadlineError` when it had to be killed.
    """
    try:
        fd = os.pidfd_open(agent.pid)
    except ProcessLookupError:
        return False
    try:
        # Checked after the descriptor was opened: from here on it means this process and no other.
        if not proc.alive(agent) or proc.owner(agent.pid) != os.getuid():
            return False
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        if _ended(agent, fd, timeout):
            return True
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        _ended(agent, fd, 10.0)
        raise DeadlineError(
            f"the agent (pid {agent.pid}) did not stop within {timeout:g} s and was killed; "
            "run `gms-launch down` again to clear up what is left"
        )
    finally:
        os.close(fd)


def _ended(agent: proc.ProcessId, fd: int, timeout: float) -> bool:
    """Wait for an agent's end: of the process, or of its main thread, which is all there is to it then.

    A thread that waits for a home that hangs cannot be killed, and keeps the process as it was.
    """
    deadline = time.monotonic() + timeout
    while not lifecycle.wait_gone([os.dup(fd)], POLL):
        if not proc.alive(agent):
            return True
        if time.monotonic() > deadline:
            return False
    return True


@dataclass(frozen=True)
class Node:
    """A node of the run, and how its agent ended, as far as it said."""

    node_rank: int
    target: Target
    end: NodeEnd | None


def recorded(directory: RunDir, end: RunFile) -> str:
    """Write a run's end down; returns what is wrong with the place if that cannot be done.

    In a process of its own: when the home hangs, that may be there for as long as the home does, and we are not.
    """
    reader, writer = os.pipe()
    if (child := fork()) == 0:
        wrong = ""
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):  # whoever reads what we print must not wait for this process
                os.dup2(null, stream)
            directory.write(end)
        except OSError as exc:
            wrong = trouble(exc)
        except BaseException as exc:
            wrong = repr(exc)
        finally:
            os.write(writer, (wrong or "well").encode())
            os._exit(0)
    os.close(writer)
    answered, _, _ = select.select([reader], [], [], PATIENCE)
    said = os.read(reader, 1000).decode() if answered else "slow"
    os.close(reader)
    if answered:
        os.waitpid(child, 0)
    return "" if said == "well" else said


def known_nodes(directory: RunDir, found: RunFile) -> dict[tuple[int, str], Target]:
    """Every node that the run is known to have had, by node rank and host: a spare has that of a lost node."""
    targets = {(found.leader_rank, found.leader_host): Target(found.leader_host, found.leader_address, found.slurm_job)}
    try:
        listed = json.loads(directory.text(directory.ranks_json))["nodes"]
    except (OSError, ValueError, KeyError):
        listed = []
    for row in listed:
        targets[row["node_rank"], row["host"]] = Target(row["host"], row["address"], found.slurm_job)
    return targets


def nodes(targets: dict[tuple[int, str], Target], found: RunFile) -> list[Node]:
    """The same with how their agents ended."""
    ends = {(e.node_rank, e.host): e for e in found.nodes} if found.ended is not None else {}
    return [Node(which[0], target, ends.get(which)) for which, target in sorted(targets.items())]


def clear(directory: RunDir, found: RunFile, node: Node) -> NodeEnd:
    """The proof for one node: its agent's own, or what `down --here` finds and does there."""
    if node.end is not None and node.end.clean:
        return node.end
    here = node.node_rank == found.leader_rank and found.local
    try:
        if here:
            killed = clear_here(directory.run, node.node_rank, str(found.settings.get("gms_socket_dir") or ""))
            return NodeEnd(
                node.node_rank,
                node.target.host,
                True,
                f"killed {numbered(killed, 'process', 'processes')}" if killed else "",
                by_agent=False,
            )
        argv = ["env", f"GMS_LAUNCH_HOME={rundir.home().absolute()}"]
        argv += gms_launch("down", "--run", directory.run, "--here", str(node.node_rank))
        done = run_on(node.target, argv, timeout=60.0)
    except LaunchError as exc:
        return NodeEnd(node.node_rank, node.target.host, False, str(exc))
    proof = proof_in(done.out)
    if proof is None:
        detail = done.err.strip().removeprefix("gms-launch: ") or f"{done.by} ended with code {done.code}"
        return NodeEnd(node.node_rank, node.target.host, False, detail)
    detail = f"killed {numbered(proof, 'process', 'processes')}" if proof else ""
    return NodeEnd(node.node_rank, node.target.host, True, detail, by_agent=False)


def proof_in(output: str) -> int | None:
    """How many processes `down --here` had to kill, by its own words; None when it did not come to say.

    Its words and not the exit code: srun's is not zero when the job ends a moment later, as it does after a run's end.
    """
    for line in output.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("killed"), int):
            return int(found["killed"])
    return None


def main_here(run: str, node_rank: int, timeout: float) -> None:
    """`down --here N`: this node's part, as the command elsewhere asks for it."""
    directory, found = rundir.find(run)
    place = NodeDir.of(directory.run, "", node_rank)
    if (agent := place.agent()) is not None:
        stop_agent(agent, timeout)
    killed = clear_here(directory.run, node_rank, str(found.settings.get("gms_socket_dir") or ""))
    print(json.dumps({"killed": killed}), flush=True)


def clear_here(run: str, node_rank: int, gms_dir: str) -> int:
    """Kill what is left of a node of a run without an agent, and remove its node-local files.

    Returns how many processes had to be killed. Raises `LaunchError` when one would not die.
    """
    own = frozenset({os.getpid()})
    guard = [i.identity for i, _ in proc.tagged(f"{run}/guard", node_rank=node_rank)]
    deadline = time.monotonic() + 5.0
    while any(proc.alive(g) for g in guard) and time.monotonic() < deadline:
        time.sleep(0.01)  # the guard ends by itself once it has done the same
    place = NodeDir.of(run, gms_dir, node_rank)
    found, left = strays.clear(run, 30.0, own, node_rank, place.locks)
    if left:
        raise LaunchError(f"processes {', '.join(left.values())} of run {run} could not be killed")
    place.remove()
    return len(found)
