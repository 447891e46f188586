"""Slurm's ways of ending things: what is stopped in order, what is not, and that nothing is ever left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import Lab
from tests.slurm.support import QUICK, LabRun
from tests.support import LONG, eventually, kill, stopped

SLURM = Path(__file__).parents[2] / "slurm"


def stopped_in_order(run: LabRun) -> None:
    """Every agent ended by itself and said that nothing was left."""
    ended = eventually(lambda: run.run_file()["ended"] and run.run_file(), LONG)
    assert ended["exit_code"] == 0, ended["reason"]
    assert [(n["node_rank"], n["clean"]) for n in ended["nodes"]] == [(k, True) for k in range(len(run.nodes))]
    run.wait_gone()
    eventually(lambda: run.left() == {})


def all_know(run: LabRun) -> None:
    """Wait until each agent has heard that redundancy is full: one that is stopped before says so, as its end."""
    eventually(lambda: run.output().count("ready: ") >= len(run.nodes), LONG)


def test_scancel_stops_in_order_within_kill_wait(lab: Lab, model: Path) -> None:
    with LabRun(lab, model) as run:
        all_know(run)
        assert lab.run(["scancel", run.job()]).returncode == 0
        run.wait_gone()
        stopped_in_order(run)  # which whatever Slurm kills when KillWait is over is not
        assert "stopping: signal SIGTERM" in run.output()
        kinds = [(e["kind"], e["cohort_id"]) for e in run.events() if e["kind"] == "dead" and e["node_rank"] == 0]
        primary = next(e["cohort_id"] for e in run.events("lock"))
        assert kinds == [("dead", 1 - primary), ("dead", primary)], "the standby first"
        assert len(run.events("lock")) == 1, "nobody was promoted on the way out"


def test_the_agent_behind_an_entry_point(lab: Lab, model: Path, tmp_path: Path) -> None:
    """As a container's entry point does it: set up, then exec."""
    entry = lab.dir / "entry.sh"
    entry.write_text('#!/bin/bash\nexport FROM_ENTRY_POINT=1\nexec "$@"\n')
    entry.chmod(0o755)
    run = LabRun(lab, model)
    run.srun(command=[str(entry), *run.up()])
    with run:
        all_know(run)
        lab.run(["scancel", run.job()])
        run.wait_gone()
        stopped_in_order(run)


def test_scancel_in_the_middle_of_a_promotion(lab: Lab, model: Path) -> None:
    with LabRun(lab, model, REFERENCE_WAKE_SECONDS="8") as run:
        primary, number = run.status()["primary"], run.job()
        run.kill_rank(primary, 1)
        eventually(lambda: [e for e in run.events("lock") if e["cohort_id"] == 1 - primary])
        lab.run(["scancel", number])
        run.wait_gone()
        assert not [e for e in run.events("first_token") if e["cohort_id"] == 1 - primary], "it was in the middle"
        stopped_in_order(run)


def test_a_stop_takes_no_longer_than_slurm_allows(lab: Lab, model: Path) -> None:
    """KillWait is read from Slurm, and what does not fit into it is refused."""
    done = lab.run(["srun", "-N1", *LabRun(lab, model, "--stop-timeout=12").up()])
    assert done.returncode == 2
    assert "more than half of kill_wait 20 s (from Slurm's KillWait)" in done.stderr


@pytest.fixture
def swept_lab() -> Iterator[Lab]:
    """Two nodes whose Slurm runs our epilog."""
    import sys

    wrapper = Path(sys.executable).parent / "gms-launch"
    with Lab(nodes=2, epilog=f"#!/bin/bash\nGMS_LAUNCH={wrapper} exec {SLURM}/epilog.sh\n") as lab:
        yield lab


def test_after_a_kill_without_notice_the_epilog_leaves_nothing(swept_lab: Lab, model: Path) -> None:
    with LabRun(swept_lab, model) as killed, LabRun(swept_lab, model) as other:
        before = other.text()
        swept_lab.run(["scancel", f"{killed.job()}.0"])
        killed.wait_gone()
        assert "stopping" not in killed.output(), "there was no notice"
        eventually(lambda: killed.left() == {}, what="the epilog has swept")
        assert other.text() == before and other.status()["redundancy"] == "full", "the other job on these nodes lives"


def test_a_kill_of_the_job_is_a_cancellation_to_slurm(lab: Lab, model: Path) -> None:
    with LabRun(lab, model) as run:
        all_know(run)
        lab.run(["scancel", "-s", "KILL", run.job()])
        run.wait_gone()
        stopped_in_order(run)
        assert "stopping: signal SIGTERM" in run.output()


def test_both_processes_of_srun_killed(lab: Lab, model: Path) -> None:
    """The step runs on unseen, and so does the service; the run can still be ended."""
    with LabRun(lab, model) as run:
        before, job_id = run.text(), run.job()
        os.killpg(run.processes[0].pid, signal.SIGKILL)
        run.processes[0].wait(60)
        assert before and run.text() == before
        down = run.cli("down")
        assert down.returncode == 0
        # The allocation stays, since nobody is there to give it back.
        assert f"Slurm job {job_id} still holds its nodes" in down.stdout and f"`scancel {job_id}`" in down.stdout
        assert run.left() == {}
        lab.run(["scancel", job_id])


def test_the_epilog_says_what_went_wrong_and_runs_root_s_program_only(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text(f"#!/bin/bash\ntouch {tmp_path}/ran\n")
    theirs.chmod(0o755)
    os.chown(theirs, 65534, 65534)
    for program, says in ("/no/such", "there is no /no/such"), (str(theirs), "is not root's"):
        say = 'logger() { echo "$*"; }; export -f logger; exec "$0"'
        env = {"GMS_LAUNCH": program, "SLURM_JOB_ID": "7", "PATH": os.environ["PATH"]}
        argv = ["bash", "-c", say, str(SLURM / "epilog.sh")]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
        assert "job 7: nothing was swept" in done.stdout and says in done.stdout
    assert not (tmp_path / "ran").exists()


def test_srun_killed(swept_lab: Lab, model: Path) -> None:
    with LabRun(swept_lab, model) as run:
        os.kill(run.processes[0].pid, signal.SIGKILL)
        run.wait_gone()
        eventually(lambda: run.left() == {}, what="the epilog has swept")


def test_slurmstepd_killed(fragile_lab: Lab, model: Path) -> None:
    """Its task is nobody's child then, and Slurm would never end it."""
    with LabRun(fragile_lab, model) as run:
        fragile_lab.node("node2").kill("slurmstepd")
        run.wait_gone()
        stopped_in_order(run)
        assert "is gone" in (run.home / "logs" / "node1" / "agent.log").read_text()
        run.processes[0].terminate()  # srun hangs for ever
        run.processes[0].wait(60)


def test_two_jobs_on_the_same_nodes(lab: Lab, model: Path) -> None:
    with LabRun(lab, model) as one, LabRun(lab, model) as two:
        before = one.text()
        assert before and two.text() == before
        assert one.run_file()["frontend_url"] != two.run_file()["frontend_url"]
        serving = {i.identity for i in two.engines()}
        one.kill_rank(one.status()["primary"], 2)
        eventually(lambda: one.text(2.0) == before)
        one.wait_full()
        assert one.cli("down").returncode == 0
        assert two.text() == before
        assert {i.identity for i in two.engines()} == serving


# -- the batch script ----------------------------------------------------------------------------------------------


def submit(run: LabRun, *flags: str) -> str:
    done = run.lab.run(
        [
            *("sbatch", "--parsable", f"-N{len(run.nodes)}", f"--output={run.log_path}"),
            *(str(SLURM / "gms-launch.sbatch"), *run.up()[2:], *flags),
        ],
        env={"GMS_LAUNCH_RUN_ID": run.run},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def job(lab: Lab, number: str) -> dict[str, str]:
    """What Slurm knows of a job. Asked again when slurmctld is too busy to answer in time."""

    def asked() -> str:
        return lab.run(["scontrol", "--oneliner", "show", "job", number]).stdout

    out = eventually(asked, what=f"Slurm tells of job {number}")
    return dict(item.split("=", 1) for item in out.split() if "=" in item)


def test_the_batch_script(lab: Lab, model: Path) -> None:
    run = LabRun(lab, model)
    number = submit(run)
    run.processes = [subprocess.Popen(["sleep", "infinity"], text=True)]  # stands for the job while we look
    try:
        before = eventually(lambda: (run.home / "run.json").exists() and run.wait_full() and run.text(), LONG)
        victim = run.kill_rank(run.status()["primary"], 1)
        eventually(lambda: run.text(2.0) == before)
        run.wait_dead(*victim)
        run.wait_full()
        assert run.job() == number
        assert run.cli("down").returncode == 0
        eventually(lambda: job(lab, number)["JobState"] == "COMPLETED")
        assert run.left() == {}
    finally:
        run.processes[0].kill()
        lab.run(["scancel", number])
        run.processes[0].wait()


def test_scancel_of_the_batch_job_stops_in_order(lab: Lab, model: Path) -> None:
    run = LabRun(lab, model)
    number = submit(run)
    try:
        all_know(run)
        lab.run(["scancel", number])
        run.wait_gone()
        stopped_in_order(run)
    finally:
        lab.run(["scancel", number])


def test_a_batch_script_of_one_node_needs_no_srun(lab: Lab, model: Path) -> None:
    run = LabRun(lab, model)
    script = lab.dir / "one.sh"
    up = " ".join(run.up("-d"))
    verbs = [f"gms-launch {verb} --run {run.run}" for verb in ("status", "kill-primary", "down")]
    # Two seconds are longer than a background agent would live on, if it minded the end of the command that began it.
    script.write_text("#!/bin/bash\nset -e\n" + "\n".join([up, "sleep 2", *verbs]) + "\n")
    number = lab.run(["sbatch", "--parsable", "-N1", f"--output={run.log_path}", str(script)]).stdout.strip()
    ended = eventually(
        lambda: (s := job(lab, number)["JobState"]) not in ("PENDING", "RUNNING", "COMPLETING") and s, LONG
    )
    assert ended == "COMPLETED", run.output()
    assert "first_token" in run.output() and "nothing of it is alive" in run.output()
    assert run.left() == {}


def test_a_batch_job_with_bad_settings_fails_and_says_why(lab: Lab, model: Path) -> None:
    run = LabRun(lab, model)
    number = submit(run, "--shadows=77")
    eventually(lambda: job(lab, number)["JobState"] == "FAILED", LONG)
    # srun reports the highest code of its tasks, and -K1 may have ended a slower one by SIGTERM.
    assert job(lab, number)["ExitCode"] in ("2:0", "1:0")
    assert "shadows (from --shadows): 77 is above 9" in run.output()


@pytest.mark.slow
def test_a_batch_job_ends_when_a_node_is_lost_although_srun_hangs(fragile_lab: Lab, model: Path) -> None:
    run = LabRun(fragile_lab, model, *QUICK)
    number = submit(run)
    eventually(lambda: [e for e in run.events("redundancy") if e["detail"] == "full"], LONG)
    fragile_lab.node("node3").power_off()
    eventually(lambda: job(fragile_lab, number)["JobState"] in ("FAILED", "NODE_FAIL"), LONG)
    assert "node 2 (node3) was lost" in run.output()
    run.wait_gone()


# -- a user's mistakes ---------------------------------------------------------------------------------------------


def test_a_step_with_two_tasks_on_a_node_is_refused(lab: Lab, model: Path) -> None:
    done = lab.run(["srun", "-N3", "--ntasks-per-node=2", *LabRun(lab, model).up()])
    assert done.returncode == 2
    assert "6 tasks on 3 nodes; one agent runs on each node" in done.stderr


def test_up_in_a_batch_shell_of_several_nodes_is_refused(lab: Lab, model: Path, tmp_path: Path) -> None:
    run = LabRun(lab, model)
    script = lab.dir / "wrong.sh"
    script.write_text("#!/bin/bash\nexec " + " ".join(run.up()) + "\n")
    done = lab.run(["sbatch", "-W", "-N3", f"--output={run.log_path}", str(script)])
    assert done.returncode == 2
    assert "srun --ntasks-per-node=1 gms-launch up" in run.output()


# -- verbs from anywhere -------------------------------------------------------------------------------------------


def test_verbs_from_a_node_from_inside_the_job_and_from_the_login_node(lab: Lab, model: Path) -> None:
    with LabRun(lab, model) as run:
        before = run.text()
        inside = ["srun", "--overlap", f"--jobid={run.job()}", "-N1", "-n1", "-w", "node2", "gms-launch"]
        found = lab.run([*inside, "status", "--run", run.run, "--json"])
        assert json.loads(found.stdout)["redundancy"] == "full", found.stderr
        assert lab.run([*inside, "kill-primary", "--run", run.run]).returncode == 0
        run.wait_full()
        assert lab.node("node3").run(["gms-launch", "kill-primary", "--run", run.run]).returncode == 0
        assert run.text() == before
        run.wait_full()
        down = lab.node("node3").run(["gms-launch", "down", "--run", run.run])
        assert down.returncode == 0 and down.stdout.count("nothing of it is alive") == 3
        assert run.left() == {}


def test_kill_primary_while_etcd_is_frozen_goes_through_slurm(lab: Lab, model: Path) -> None:
    # The agent would restart a frozen etcd sooner than a person notices.
    with LabRun(lab, model, "--service-liveness", "60", "--dynamo-lease-ttl", "200") as run:
        before = run.text()
        status = run.status()
        (etcd,) = run.on_node(0, "etcd")
        with stopped(etcd.pid):
            argv = ["gms-launch", "kill-primary", "--json", "--run", run.run]
            command = lab.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            life = status["cohorts"][status["primary"]]["incarnation"]
            eventually(lambda: not run.tagged(status["primary"], life), LONG, "dead on all nodes without etcd")
        out, err = command.communicate(timeout=LONG)
        assert command.returncode == 0, out + err
        assert "killing the recorded groups" in err
        assert json.loads(out)["victim"]["cohort_id"] == status["primary"]
        assert run.text() == before
        run.wait_full()


def test_a_recorded_group_whose_number_went_to_another_process_is_not_touched(lab: Lab, model: Path) -> None:
    bystander = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        done = lab.run(["gms-launch", "kill-group", str(bystander.pid), "12345"])
        assert done.returncode == 3 and "not touched" in done.stderr
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_sweep_clears_nodes_whose_agents_are_dead(lab: Lab, model: Path) -> None:
    with LabRun(lab, model) as run:
        agents = run.agents()
        assert len(agents) == 3
        for agent in agents:
            kill(agent)  # Slurm ends the others when one has gone
        run.wait_gone()
        assert set(run.left()) == {"node1", "node2", "node3"}, "files"
        # The step is over, and with it the job, so `down` could only come by SSH: see test_by_hand.py.
        for name in run.nodes:
            lab.node(name).run(["gms-launch", "sweep"], check=True)
        assert run.left() == {}
