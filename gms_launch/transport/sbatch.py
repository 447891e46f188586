"""The batch script of a run: what Slurm is asked for, then the script of this package as it stands.

Pure: text in, text out. What a job does with it stands in `gms-launch.sbatch` beside this file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gms_launch.errors import UsageError

#: Set here, so they may not be among the options that are passed on as they are.
_OURS = (
    *("nodes", "N", "ntasks", "n", "ntasks-per-node", "signal", "requeue", "no-requeue", "output", "o", "wrap"),
    *("array", "a", "wait", "W", "test-only"),
)
#: Options of srun with which a step outlives a node and an agent of it.
SURVIVES = ("--no-kill", "--kill-on-bad-exit=0")
_HETEROGENEOUS = (
    "a heterogeneous job has several node lists, and a run has one: a node of it would not know which of them it is in"
)


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm. `options` are sbatch's own, as on its command line.

    Of the `nodes` so many are `spares`; `groups` of the run, 0 without.

    `drain` (seconds) and `successor` (minutes) are times before the limit. `pyxis` and `apptainer` are images that the
    agents run in, `mounts` SRC:DST[:FLAGS], and `shared` what is to be there under the name that it has out here.
    """

    run: str
    nodes: int
    home: Path
    program: str
    unset: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    array: str = ""
    drain: int = 0
    requeues: int = 0
    successor: int = 0
    pyxis: str = ""
    apptainer: str = ""
    shared: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    spares: int = 0
    groups: int = 0

    @property
    def outlives(self) -> bool:
        """Whether a node, or an agent, that is lost is not the run's end."""
        return bool(self.spares) or self.groups > 1

    def check(self) -> None:
        """Raise `UsageError` for what Slurm could not do, or what nobody could have meant."""
        for option in self.options:
            if option == ":" or "hetjob" in option:
                raise UsageError(_HETEROGENEOUS)
            name = named(option)[0]
            if not option.startswith("-") or "\n" in option or not name:
                raise UsageError(f"--sbatch {option!r}: expected one option of sbatch, such as --sbatch=--exclusive")
            if name in _OURS:
                raise UsageError(f"--sbatch {option}: submit sets that itself")
        if self.array and not re.fullmatch(r"[0-9,:%-]+", self.array):
            raise UsageError(f"--array {self.array!r}: expected numbers as sbatch takes them, such as 1-4 or 1,3")
        limits = [value for name, value in map(named, self.options) if name in ("time", "t")]
        limit = seconds(limits[-1]) if limits else 0
        if 0 < limit <= self.before_the_end:
            what = (
                f"--successor {self.successor} min" if self.successor * 60 >= self.drain else f"--drain {self.drain} s"
            )
            raise UsageError(f"{what} before the end of --time {limits[-1]} is before the job begins")
        if self.successor * 60 and self.successor * 60 <= self.drain:
            raise UsageError(
                f"--successor {self.successor} min leaves the next job no time before --drain {self.drain} s"
            )
        if self.successor and (self.requeues or self.array):
            raise UsageError("--successor goes without --requeue and --array: the next job is a job of its own")
        if self.pyxis and self.apptainer:
            raise UsageError("--container-image is for pyxis and --apptainer for apptainer: choose one")
        if self.mounts and not (self.pyxis or self.apptainer):
            raise UsageError("--container-mounts needs --container-image or --apptainer")
        for place in (str(self.home), str(self.directory), self.program):
            if not place.isprintable():
                raise UsageError(f"{place!r}: a batch script can only name a place whose name can be printed")
        for place in (str(self.home), *self.shared) if self.pyxis or self.apptainer else ():
            if re.search(r"[,:]", place) or not place.isprintable():
                raise UsageError(
                    f"{place!r} cannot be mounted in a container: a comma or a colon in its name would be read as "
                    "another mount"
                )

    @property
    def directory(self) -> Path:
        """Where script, settings and output are: not in the run's own directory, which each start makes anew."""
        return self.home / ".jobs" / self.run

    @property
    def before_the_end(self) -> int:
        """Seconds before the time limit at which the job is told."""
        return max(self.drain, self.successor * 60)


def named(option: str) -> tuple[str, str]:
    """The name of an option of sbatch without its dashes, and its value."""
    if option.startswith("--"):
        name, _, value = option[2:].partition("=")
        if not re.search(r"\s", name):
            return name, value
        name, value = re.split(r"\s+", option[2:], maxsplit=1)
        return name, value
    return option[1:2], option[2:].strip()


def gpus(options: Sequence[str]) -> int:
    """The GPUs of each node that options of sbatch ask for, the last that says so; 0 when none does."""
    found = 0
    for name, value in map(named, options):
        kind = r"(?:.*,)?gpu(?::[\w.-]+)?:(\d{1,4})(?:\(.*\))?(?:,.*)?" if name == "gres" else r"(?:[\w.-]+:)?(\d{1,4})"
        if name in ("gres", "gpus-per-node") and (said := re.fullmatch(kind, value)):
            found = int(said[1])
    return found


def seconds(limit: str) -> int:
    """A time limit as sbatch takes it; 0 for none, and for what sbatch will refuse."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if found is None:
        return 0
    days, *rest = found.groups()
    one, two, three = (int(x or 0) for x in rest)
    if days is None and rest[2] is None:  # MINUTES[:SECONDS]
        return one * 60 + two
    return (int(days or 0) * 24 + one) * 3600 + two * 60 + three  # [DAYS-]HOURS[:MINUTES[:SECONDS]]


def script(job: Job, engine_args: Sequence[str], body: str) -> str:
    """The whole script; `body` is the one of this package. Raises `UsageError`."""
    job.check()
    settings = job.directory / "settings.toml"
    out = "slurm-%A_%a.out" if job.array else "slurm-%j.out"
    lines = [f"#SBATCH --job-name={job.run}", f"#SBATCH --nodes={job.nodes}", "#SBATCH --ntasks-per-node=1"]
    lines += [f"#SBATCH --output={job.directory / out}", f"#SBATCH --{'' if job.requeues else 'no-'}requeue"]
    if job.requeues:
        lines.append("#SBATCH --open-mode=append")  # what the life before has said stays
    if job.outlives:
        lines.append("#SBATCH --no-kill")  # a node that is lost does not end the job
    if job.array:
        lines.append(f"#SBATCH --array={job.array}")
    if job.before_the_end:
        lines.append(f"#SBATCH --signal=B:USR1@{job.before_the_end}")
    lines += [f"#SBATCH {_quoted(option)}" for option in job.options]
    name = f"{job.run}-$SLURM_ARRAY_TASK_ID" if job.array else job.run
    if job.successor:
        name = f"{job.run}${{GL_TURN:+.$GL_TURN}}"
    mine = [f"export GMS_LAUNCH_HOME={shlex.quote(str(job.home))}", f'export GMS_LAUNCH_RUN="{name}"']
    mine += [f"GL_VERB={shlex.quote(job.program)}"]
    mine += [f"GL_DRAIN={job.drain} GL_REQUEUES={job.requeues} GL_SUCCESSOR={job.successor}"]
    mine += [f"GL_SCRIPT={shlex.quote(str(job.directory / 'submit.sbatch'))}"]
    mine += _container(job)
    mine.append(shlex.join(["set", "--", f"--config={settings}", *(["--", *engine_args] if engine_args else [])]))
    unset = [f"unset {' '.join(job.unset)}  # the settings are those of the file"] if job.unset else []
    text = ["#!/bin/bash", f"# Run {job.run}, by `gms-launch submit`. Its settings: {settings}.", *lines, ""]
    return "\n".join([*text, *unset, *mine, "", _without_header(body)])


def _quoted(option: str) -> str:
    """An option as sbatch reads it from a script, where blanks part words."""
    name, equals, value = option.partition("=")
    blank = option.startswith("--") and equals and re.search(r"\s", value) and not re.search(r"[\s'\"\\]", name)
    return f'{name}="{value}"' if blank and '"' not in value else option


def _container(job: Job) -> list[str]:
    """What srun starts on each node, and with which options of its own."""
    # What all nodes share, and what engines and agents of a node share with each other.
    named = {mount.split(":")[1] if ":" in mount else mount for mount in job.mounts}
    mounts = [f"{place}:{place}" for place in (str(job.home), "/dev/shm", *job.shared) if place not in named]
    mounts += job.mounts
    step = list(SURVIVES) if job.outlives else []
    if job.pyxis:
        options = [*step, f"--container-image={job.pyxis}", f"--container-mounts={','.join(mounts)}"]
        options.append("--no-container-remap-root")  # another user's number in there would make it another user's run
        return [f"GL_STEP=({shlex.join(options)})"]
    found = [f"GL_STEP=({shlex.join(step)})"] if step else []
    if job.apptainer:
        binds = [word for mount in mounts for word in ("--bind", mount)]
        return [*found, f"GL_AGENT=({shlex.join(['apptainer', 'exec', '--nv', *binds, job.apptainer, 'gms-launch'])})"]
    return [*found, f"GL_AGENT=({shlex.quote(job.program)})"]


def _without_header(body: str) -> str:
    """The script of this package from its first command on."""
    return body[body.index("\nset -u\n") + 1 :]
