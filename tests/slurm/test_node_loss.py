"""A node is cut off, frozen or switched off: its ranks die, the others fence without it, wait, and go on or end."""

from __future__ import annotations

import time
from pathlib import Path

from gms_launch.engines.reference import demo_model
from gms_launch.process import proc
from tests.slurm.lab import Lab, Node
from tests.slurm.support import QUICK, LabRun, since
from tests.support import LONG, eventually, kill

#: What QUICK has for node_wait.
WAIT = 15.0
#: Where the node comes back: that does not have to be quick.
BACK = ("--lease-ttl=3", "--node-wait=300")


def engines_dead(run: LabRun, *nodes: int) -> bool:
    return not any(run.engines(n) for n in nodes)


def test_a_node_that_is_cut_off_and_back_in_time(fragile_lab: Lab, model: Path) -> None:
    lost = fragile_lab.node("node2")
    with LabRun(fragile_lab, model, *BACK) as run:
        before = run.text()
        lives = [c["incarnation"] for c in run.status()["cohorts"]]
        agent = run.status()["nodes"][1]["agent_pid"]
        lost.cut()
        eventually(lambda: engines_dead(run, 1), what="the cut-off agent kills its ranks by itself")
        eventually(lambda: engines_dead(run, 0, 2), what="the others kill theirs")
        eventually(lambda: run.status()["lost_nodes"] == [1])
        eventually(lambda: {c["phase"] for c in run.status()["cohorts"]} == {"fenced"})
        eventually(lambda: run.status()["redundancy"] == "down")
        assert run.on_node(1, "gms-0"), "its GMS keeps the weights"
        lost.join()
        status = run.wait_full()
        assert status["lost_nodes"] == []
        assert [c["incarnation"] for c in status["cohorts"]] == [n + 1 for n in lives], "started again, cold"
        assert status["nodes"][1]["agent_pid"] == agent, "the agent had stayed"
        assert run.text() == before
        eventually(lambda: set(run.loads().values()) == {1})
        assert [e["detail"] for e in run.events("node_lost")] == ["node 1 (node2)"]
        assert eventually(lambda: run.events("cut_off"), LONG, "told once it was back")[0]["node_rank"] == 1
        # Failover works as before.
        assert run.cli("kill-primary").returncode == 0
        assert run.text() == before


def test_a_node_that_stays_away_ends_the_run_with_a_message(fragile_lab: Lab, model: Path) -> None:
    run = LabRun(fragile_lab, model, *QUICK)
    with run:
        fragile_lab.node("node3").cut()
        cut = time.monotonic()
        eventually(lambda: run.run_file()["ended"], LONG, "the leader gives up")
        assert since(cut) > WAIT
        ended = run.run_file()
        assert ended["exit_code"] == 4
        assert "node 2 (node3) was lost and did not come back within 15 s (node_wait)" in ended["reason"]
        waited = run.cli("wait")
        assert waited.returncode == 4 and "node 2 (node3) was lost" in waited.stderr
        eventually(lambda: not run.tagged(), LONG, "the cut-off agent gives up too, and nothing is left anywhere")
        assert "no contact with the leader" in (run.home / "logs" / "node2" / "agent.log").read_text()
        fragile_lab.node("node3").join()
        (code,) = run.exit_codes()
        assert code != 0, "and srun, once it hears from that node again, does not say that all was well"
    assert run.left() == {}


def test_a_frozen_node_is_fenced_without_and_does_no_harm_when_it_thaws(fragile_lab: Lab, model: Path) -> None:
    node = fragile_lab.node("node2")
    with LabRun(fragile_lab, model, *BACK) as run:
        before = run.text()
        old = run.engines(1)
        node.freeze()
        try:
            eventually(lambda: engines_dead(run, 0, 2))
            assert run.engines(1), "frozen processes cannot die"
            eventually(lambda: run.status()["lost_nodes"] == [1])
        finally:
            node.thaw()
        eventually(lambda: not any(proc.alive(i.identity) for i in old), what="what thawed is killed")
        run.wait_full()
        assert run.text() == before


def test_a_node_that_is_switched_off_ends_the_run_and_leaves_nothing_on_the_others(
    fragile_lab: Lab, model: Path
) -> None:
    run = LabRun(fragile_lab, model, *QUICK)
    with run:
        fragile_lab.node("node2").power_off()
        eventually(lambda: engines_dead(run, 0, 2))
        eventually(lambda: run.run_file()["ended"], LONG)
        assert run.run_file()["exit_code"] == 4
        run.wait_gone()
        # srun of this Slurm would now hang for ever; SIGTERM ends it.
        run.processes[0].terminate()
        run.processes[0].wait(60)
        down = run.cli("down")
        assert down.returncode == 1 and "node2" in down.stderr, "what cannot be proved is said"


def test_a_run_that_ends_while_a_node_is_cut_off_ends_there_too(bare_lab: Lab, model: Path) -> None:
    """Its agent reads run.json; it does not keep its node for all of node_wait."""
    run = LabRun(bare_lab, model, *BACK, nodes=["node1", "node2"]).hand()
    with run:
        bare_lab.node("node2").cut()
        eventually(lambda: run.status()["lost_nodes"] == [1])
        run.cli("down")
        eventually(lambda: run.run_file()["exit_code"] == 0)
        run.wait_gone()
        assert run.exit_codes() == [0, 1], "there it was not in order"
        assert "the run has ended" in run.output()
    assert run.left() == {}


def test_a_leader_that_is_cut_off(fragile_lab: Lab, model: Path) -> None:
    run = LabRun(fragile_lab, model, *QUICK)
    with run:
        fragile_lab.node("node1").cut()
        eventually(lambda: engines_dead(run, 0, 1, 2), what="both sides kill their ranks")
        eventually(lambda: not run.tagged(), LONG, "and give up after node_wait")
        eventually(lambda: run.run_file()["ended"])
        assert run.run_file()["exit_code"] == 4
        fragile_lab.node("node1").join()
        (code,) = run.exit_codes()
        assert code != 0
    assert run.left() == {}


def test_a_killed_agent_under_slurm_breaks_the_step_and_leaves_nothing(lab: Lab, model: Path) -> None:
    run = LabRun(lab, model, *QUICK)
    with run:
        kill(run.agents()[1])
        run.wait_gone()
        (code,) = run.exit_codes()
        assert code != 0
    run.cli("down")
    # The dead agent could not remove its files; the epilog, or this, does.
    lab.node("node2").run(["gms-launch", "sweep"], check=True)
    assert run.left() == {}


def refused(run: LabRun, node: Node, tmp_path: Path) -> None:
    """Agents that do not fit come to a lost node's place: each is told why, and the run does not notice."""
    demo_model.make(tmp_path, 8, seed=7)  # as large as the run's, of the same shape
    before = run.status()
    agents = [n["agent_pid"] for n in before["nodes"]]
    for environ, says in (
        ({"GMS_LAUNCH_SHADOWS": "2"}, "shadows is 2 here and 1 there"),
        ({"GMS_LAUNCH_VIRTUAL_GPUS": "2"}, "has 2 GPUs, node 0 (node1) has 1"),
        ({}, "has another model in the same place than node 0 (node1)"),
    ):
        other_model = not environ
        if other_model:
            node.run(["mount", "--bind", str(tmp_path), str(run.model)], check=True)
        run.hand(2, **environ)
        assert run.processes.pop().wait(LONG) == 2, run.output()
        if other_model:
            node.run(["umount", str(run.model)], check=True)
        assert says in run.output()
        eventually(lambda says=says: any(says in e["detail"] for e in run.events("node_refused")))
        status = run.status()
        assert status["lost_nodes"] == [2] and [n["agent_pid"] for n in status["nodes"]] == agents
        assert status["cohorts"] == before["cohorts"], "nothing was started with it"


def test_a_node_that_comes_back_with_a_new_agent(bare_lab: Lab, model: Path, tmp_path: Path) -> None:
    """By hand there is no Slurm to break the step: the rest waits for that node, and starts cold with it."""
    run = LabRun(bare_lab, model, *BACK).hand()
    with run:
        before = run.text()
        old = {i.identity for i in run.on_node(2)}
        bare_lab.node("node3").power_off()
        run.processes.pop().wait(60)
        eventually(lambda: engines_dead(run, 0, 1))
        assert not any(proc.alive(i) for i in old)
        bare_lab.node("node3").start(daemons=False)
        refused(run, bare_lab.node("node3"), tmp_path)
        run.hand(2)
        status = run.wait_full()
        assert status["lost_nodes"] == []
        assert run.text() == before
        once = {"node1": 1, "node2": 1, "node3": 1}
        eventually(lambda: run.loads() == once, what="the new GMS was filled once; the others kept theirs")
