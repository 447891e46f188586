"""`gms-launch submit`: a run as a batch job, from a login node.

The script and the settings that were resolved here are saved beside the run's directory, so that what ran can be read
and run again; variables of this shell do not reach into the job's settings.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gms_launch.errors import DeadlineError, LaunchError, NoContactError, RefusedError, UsageError
from gms_launch.observe import look
from gms_launch.observe.snapshot import Snapshot
from gms_launch.run import contact, model, placement
from gms_launch.run.nodedir import cache_dir
from gms_launch.run.rundir import RunDir, RunFile, home, new_run_id
from gms_launch.settings import groups
from gms_launch.settings.declared import BY_NAME, SETTINGS, Settings
from gms_launch.settings.resolve import checked
from gms_launch.settings.rules import RUN_ID
from gms_launch.spool.files import trouble, write_private
from gms_launch.transport import sbatch
from gms_launch.urls import hidden

BODY = Path(sbatch.__file__).with_name("gms-launch.sbatch")
#: Settings that Slurm decides, in the job.
_SLURMS = ("node_rank", "leader_addr", "hosts", "nnodes")
#: Variables that sbatch takes options from. They would go before those of the script, so they are put into it.
_FROM_SHELL = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_TIMELIMIT": "time",
}
_SHORT = {"A": "account", "C": "constraint", "p": "partition", "q": "qos", "t": "time"}
#: No longer: a task's or a successor's number is added to it, and names end at 20 characters.
_LONGEST = 16
POLL = 1.0


def main(settings: Settings, job: sbatch.Job, dry_run: bool, wait: bool, timeout: float) -> None:
    """`job` lacks the run's name and what follows from it. Raises `LaunchError`."""
    settings = replace(settings, sources={k: v for k, v in settings.sources.items() if v != "Slurm"})
    if given := [name for name in _SLURMS if settings.was_set(name)]:
        raise UsageError(f"{given[0]} (from {settings.sources[given[0]]}): Slurm says that in the job; leave it out")
    drawn: list[str] = []
    job = replace(job, nodes=job.nodes and job.nodes + settings.spares, spares=settings.spares)
    if settings.grouped:
        job, drawn = _with_groups(settings, job)
    else:
        _check_model(settings)
        if not job.nodes:
            raise UsageError("say how many nodes the job has: -N 2")
        if settings.was_set("tp"):
            checked(replace(settings, nnodes=job.nodes))
    if wait and job.array:
        raise UsageError("--wait waits for one run, and an array is several")
    run = settings.run_id or new_run_id()
    if (len(run) > _LONGEST and (job.array or job.successor)) or not RUN_ID.match(run):
        raise UsageError(f"run {run!r}: a name of up to {_LONGEST} characters, since the number of each job is added")
    directory = RunDir.of(run)
    job = replace(job, options=(*_from_shell(job.options), *job.options))
    job = replace(job, run=run, home=home().absolute(), program=_program(), unset=_in_the_way())
    if job.pyxis or job.apptainer:
        job = replace(job, shared=_shared(settings, make=not dry_run))
    text = sbatch.script(job, settings.engine_args, BODY.read_text())
    if dry_run:
        saved = as_toml(settings, hidden)
        print(*(f"# {line}" for line in drawn), sep="\n")
        print(f"# {job.directory / 'submit.sbatch'}\n{text}\n# {job.directory / 'settings.toml'}\n{saved}", end="")
        return
    directory.refuse_live()
    _refuse_queued(run)
    try:
        home().mkdir(mode=0o700, parents=True, exist_ok=True)
        job.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(job.directory / "settings.toml", as_toml(settings))
        write_private(job.directory / "submit.sbatch", text)
    except OSError as exc:
        raise RefusedError(f"{job.directory} is {trouble(exc)} ({exc.strerror}): nothing was submitted") from None
    number = _sbatch(job.directory / "submit.sbatch")
    print(f"job {number} is run {run}{'-<task>' if job.array else ''}; script, settings and output: {job.directory}")
    print(*drawn, sep="\n", end="\n" if drawn else "")
    if wait:
        _wait_full(directory, job, number, timeout)
    else:
        print(f"when it has begun: gms-launch status --run {run}{'-<task>' if job.array else ''}")


def _check_model(settings: Settings, group: str = "") -> None:
    """Raise `UsageError` for a model that a job would miss."""
    whose = f"group {group}: " if group else ""
    if not Path(settings.model or "/").exists():
        raise UsageError(f"{whose}model {settings.model!r} is not seen from here; a job would find out too late")
    try:
        model.check(settings)
    except UsageError as exc:
        raise UsageError(f"{whose}{exc}") from None


def _with_groups(settings: Settings, job: sbatch.Job) -> tuple[sbatch.Job, list[str]]:
    """The job with as many nodes, and GPUs on each, as the groups take, and who will lie where. Raises `UsageError`."""
    said = settings.virtual_gpus if settings.was_set("virtual_gpus") else sbatch.gpus(job.options)
    nodes, gpus = placement.wanted(settings, job.nodes, said)
    own = checked(replace(settings, nnodes=nodes))
    placed = placement.place(groups.expand(own, gpus), own.serving_nodes, gpus)
    for p in placed:
        _check_model(p.group.settings, p.group.name)
    options = job.options if said else (*job.options, f"--gpus-per-node={gpus}")
    drawn = placement.drawing(placed, nodes, gpus, own.spares)
    job = replace(job, nodes=nodes, options=options, groups=len(placed))
    return job, [placement.summary(placed, nodes, gpus), *drawn, placement.around(own)]


def as_toml(settings: Settings, secret: Callable[[str], str] = str) -> str:
    """What was said of each setting, wherever it was said: a settings file that says the same.

    `secret` is what is made of those that others may not see.
    """
    named = [s for s in SETTINGS if settings.was_set(s.name) and s.name != "run_id"]
    values = [(s.name, getattr(settings, s.name)) for s in named]
    said = [(name, secret(value) if BY_NAME[name].secret else value) for name, value in values]
    # A JSON string, number or boolean is one of TOML too, as long as it keeps its letters.
    tables = [table.items() for table in settings.tables]
    return _lines(said) + "".join(f"\n[[group]]\n{_lines(table)}" for table in tables)


def _lines(said: Iterable[tuple[str, Any]]) -> str:
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in said)


def _shared(settings: Settings, make: bool) -> tuple[str, ...]:
    """What a run reads and keeps beside its directory: each of these is mounted, so it must be there."""
    cache = cache_dir(settings.cache_dir)
    if make:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = [settings.api_key_file, settings.tls_cert, settings.tls_key]
    engines = [(settings.model, settings.engine_file)] if not settings.tables else []
    for table in settings.tables:
        engines.append((table.get("model", settings.model), table.get("engine_file", settings.engine_file)))
    files += [engine_file for _, engine_file in engines]
    places = [*(Path(path) for path, _ in engines), cache, *(Path(f).expanduser() for f in files if f)]
    return tuple(dict.fromkeys(str(path.absolute()) for path in places))


def _program() -> str:
    """This command, by a path that holds in a job too."""
    beside = Path(sys.executable).with_name("gms-launch")
    return str(beside) if beside.exists() else "gms-launch"


def _in_the_way() -> tuple[str, ...]:
    """Variables of this shell that would override the saved settings in the job."""
    names = {"GMS_LAUNCH_CONFIG", "GMS_LAUNCH_RUN_ID"}
    for s in SETTINGS:
        names |= {s.env, *(env for _, env in s.old)} | ({s.recipe} if s.recipe else set())
    return tuple(sorted(name for name in names if name in os.environ))


def _from_shell(options: Sequence[str]) -> list[str]:
    """What this shell's variables say to sbatch and the command line does not."""
    given = {_SHORT.get(name, name) for name, _ in map(sbatch.named, options)}
    said = {option: os.environ.get(env, "") for env, option in _FROM_SHELL.items()}
    return [f"--{option}={value}" for option, value in said.items() if value and option not in given]


def _refuse_queued(run: str) -> None:
    """Raise `RefusedError` when this user's queue has a job of that run: both would read the settings saved last."""
    command = ["squeue", "-h", "--me", "-n", run, "-o", "%A %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return  # sbatch has the word then
    number, _, state = done.stdout.partition("\n")[0].partition(" ")
    if done.returncode == 0 and number:
        raise RefusedError(
            f"run {run} is job {number} already, which is {state.lower()}; `scancel {number}` first, or choose "
            "another --run. Nothing was submitted"
        )


def _sbatch(script: Path) -> str:
    """The number of the job. Raises `LaunchError` with what sbatch said."""
    # Inside a job its variables would be options of this one; what this shell says is in the script.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_")) or k == "SLURM_CONF"}
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False, timeout=60, env=env
        )
    except FileNotFoundError:
        raise LaunchError("there is no sbatch here; `submit` is for a login node of a Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise NoContactError("sbatch did not answer within 60 s; `squeue --me` says whether it took the job") from None
    if done.returncode:
        raise RefusedError(f"sbatch refused: {done.stderr.strip()}; the script: {script}")
    return done.stdout.strip().partition(";")[0]


def _wait_full(directory: RunDir, job: sbatch.Job, number: str, timeout: float) -> None:
    """Return when redundancy is full. Raises `DeadlineError`, and `LaunchError` when the job has ended."""
    deadline = time.monotonic() + timeout
    told = ""
    while True:
        state = _state(number)
        if state and state != told:
            told = state
            print(f"[{time.strftime('%H:%M:%S')}] job {number}: {state}", flush=True)
        found = directory.read()
        if found is not None and found.slurm_job == number:
            if not found.live:
                raise LaunchError(f"run {directory.run} has ended: {found.reason}; its output: {job.directory}")
            shot = _look(directory, found)
            if shot is not None and shot.redundancy == "full":
                served = model.named(g.model_name for g in shot.groups or (shot,))
                print(f"ready: {', '.join(shot.frontend_urls)}, {served}")
                print(f"from your own machine: {tunnel(found.frontend_url, found.leader_host)}")
                return
        if not state:
            raise LaunchError(
                f"job {number} has ended before its run was up; its output: {job.directory}/slurm-{number}.out"
            )
        if time.monotonic() > deadline:
            raise DeadlineError(f"run {directory.run} is not full after {timeout:g} s; job {number} goes on")
        time.sleep(POLL)  # Slurm announces nothing to those who are not in the job


def _look(directory: RunDir, found: RunFile) -> Snapshot | None:
    """The run now; None while nobody answers."""
    try:
        with contextlib.closing(contact.door(directory, found)) as door:
            return look.now(directory, found, door)
    except NoContactError:
        return None


def tunnel(url: str, leader: str) -> str:
    """How somebody who is not on the cluster reaches the frontend, at the same port of their own loopback."""
    parts = urlsplit(url)
    login, port = socket.getfqdn(), parts.port
    if parts.hostname in ("127.0.0.1", "::1", "localhost"):
        return f"ssh -J {login} -L {port}:127.0.0.1:{port} {leader}"
    return f"ssh -L {port}:{parts.hostname}:{port} {login}"


def _state(job: str) -> str:
    """What squeue says of a job, and why it waits; empty when it has ended. Raises `NoContactError`."""
    try:
        done = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%T %r"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise NoContactError(f"squeue does not answer: {exc}") from None
    state, _, why = done.stdout.strip().partition(" ")
    return f"{state.lower()} ({why})" if why not in ("", "None") else state.lower()
