"""The text of a submitted job, and what is refused before Slurm sees it."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from gms_launch.errors import UsageError
from gms_launch.transport import sbatch
from gms_launch.transport.sbatch import Job

BODY = Path(sbatch.__file__).with_name("gms-launch.sbatch").read_text()
JOB = Job(run="r", nodes=2, home=Path("/home/me/.gms-launch"), program="/opt/v env/bin/gms-launch", drain=60)


def lines(job: Job, *engine_args: str) -> list[str]:
    text = sbatch.script(job, engine_args, BODY)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    return text.splitlines()


def test_what_slurm_is_asked_for_stands_before_the_first_command() -> None:
    found = lines(replace(JOB, options=("--time=1:00:00", "--exclusive")), "--a b", "c'd")
    first = next(k for k, line in enumerate(found) if line and not line.startswith("#"))
    asked = [line for line in found if line.startswith("#SBATCH")]
    assert asked == found[2 : 2 + len(asked)] and first > len(asked)
    assert {"#SBATCH --nodes=2", "#SBATCH --time=1:00:00", "#SBATCH --exclusive", "#SBATCH --signal=B:USR1@60"} <= set(
        asked
    )
    assert "set -- --config=/home/me/.gms-launch/.jobs/r/settings.toml -- '--a b' 'c'\"'\"'d'" in found
    assert "GL_AGENT=('/opt/v env/bin/gms-launch')" in found
    # From there on it is the script that the package has.
    assert "\n".join(found).endswith(BODY[BODY.index("\nset -u\n") + 1 :].rstrip())


def test_jobs_of_an_array_and_successors_are_runs_of_their_own() -> None:
    assert 'export GMS_LAUNCH_RUN="r-$SLURM_ARRAY_TASK_ID"' in lines(replace(JOB, array="1-4%2"))
    found = lines(replace(JOB, successor=10))
    assert 'export GMS_LAUNCH_RUN="r${GL_TURN:+.$GL_TURN}"' in found
    assert "#SBATCH --signal=B:USR1@600" in found


def test_containers_get_what_nodes_share() -> None:
    mounts = "/home/me/.gms-launch:/home/me/.gms-launch,/dev/shm:/dev/shm,/cache:/cache,/models:/models:ro"
    job = replace(JOB, shared=("/models", "/cache"), mounts=("/models:/models:ro",))
    found = lines(replace(job, pyxis="nvcr.io#x/y:1"))
    own = "--no-container-remap-root"
    assert f"GL_STEP=('--container-image=nvcr.io#x/y:1' --container-mounts={mounts} {own})" in found
    assert not [line for line in found if line.startswith("GL_AGENT=")], "in the image it is on PATH"
    found = lines(replace(job, apptainer="/images/v.sif"))
    binds = " ".join(f"--bind {mount}" for mount in mounts.split(","))
    assert f"GL_AGENT=(apptainer exec --nv {binds} /images/v.sif gms-launch)" in found


def test_a_job_of_spares_or_groups_outlives_a_node_and_an_agent() -> None:
    for job in (replace(JOB, spares=1), replace(JOB, groups=2)):
        assert "#SBATCH --no-kill" in lines(job)
        assert f"GL_STEP=({' '.join(sbatch.SURVIVES)})" in lines(job)
    alone = lines(replace(JOB, groups=1))
    assert "#SBATCH --no-kill" not in alone and not [line for line in alone if line.startswith("GL_STEP=")]


def test_a_job_that_is_queued_again_adds_to_its_output() -> None:
    assert "#SBATCH --open-mode=append" in lines(replace(JOB, requeues=1))
    assert "#SBATCH --open-mode=append" not in lines(JOB)


def test_a_value_of_several_words_stays_one() -> None:
    found = lines(replace(JOB, options=("--comment=two words", "--exclusive", "-p a")))
    assert {'#SBATCH --comment="two words"', "#SBATCH --exclusive", "#SBATCH -p a"} <= set(found)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("30", 1800),
        ("30:10", 1810),
        ("4:00:00", 14400),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("1-00:00:05", 86405),
        ("UNLIMITED", 0),
        ("4h", 0),
    ],
)
def test_time_limits_as_slurm_reads_them(limit: str, expected: int) -> None:
    assert sbatch.seconds(limit) == expected


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"options": (":",)}, "heterogeneous"),
        ({"options": ("--hetjob=1",)}, "heterogeneous"),
        ({"options": ("exclusive",)}, "expected one option"),
        ({"options": ("--x\n#SBATCH --nodes=9",)}, "expected one option"),
        ({"options": ("--nodes=4",)}, "submit sets that itself"),
        ({"options": ("-N4",)}, "submit sets that itself"),
        ({"options": ("-o out",)}, "submit sets that itself"),
        ({"successor": 1, "drain": 60}, "no time before"),
        ({"options": ("--array=1-4",)}, "submit sets that itself"),
        ({"options": ("--wait",)}, "submit sets that itself"),
        ({"successor": 10, "options": ("--time=10",)}, "before the job begins"),
        ({"successor": 10, "options": ("-t 9:30",)}, "before the job begins"),
        ({"drain": 7200, "options": ("--time=5", "--time 0-2")}, "before the job begins"),
        ({"successor": 5, "requeues": 1}, "--successor goes without"),
        ({"successor": 5, "array": "1-2"}, "--successor goes without"),
        ({"array": "1-2; rm"}, "--array"),
        ({"pyxis": "a", "apptainer": "b"}, "choose one"),
        ({"mounts": ("/a:/a",)}, "needs --container-image"),
        ({"pyxis": "a", "shared": ("/models/x,/other",)}, "another mount"),
        ({"apptainer": "a", "shared": ("/models/x:/other",)}, "another mount"),
        ({"pyxis": "a", "home": Path("/h,/etc")}, "another mount"),
        ({"home": Path("/h\n#SBATCH --nodes=9")}, "can be printed"),
    ],
)
def test_refused(change: dict[str, object], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        sbatch.script(replace(JOB, **change), (), BODY)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ((), 0),
        (("--gpus-per-node=8",), 8),
        (("--gpus-per-node=a100:4",), 4),
        (("--gres=gpu:2",), 2),
        (("--gres=gpu:h200:8(S:0-1),nvme",), 8),
        (("--gres=nvme:3",), 0),
        (("--gpus-per-node=8", "--gres=gpu:2"), 2),
    ],
)
def test_how_many_gpus_are_asked_for(options: tuple[str, ...], number: int) -> None:
    assert sbatch.gpus(options) == number
