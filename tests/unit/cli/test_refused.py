"""What verbs refuse before they look at a run or start anything: code 2, one message."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from gms_launch.cli.main import app
from gms_launch.cli.options import seconds
from gms_launch.cohort.failover import Failover
from gms_launch.cohort.model import Phase
from gms_launch.cohort.view import Slot, View
from gms_launch.errors import LaunchError, RefusedError, UsageError
from gms_launch.observe import views, words
from gms_launch.run import model as models
from gms_launch.run.nodedir import user_root
from gms_launch.settings.resolve import resolve


@pytest.fixture(autouse=True)
def _nothing_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("GMS_LAUNCH_", "SLURM_")) or n == "ENGINE_ID"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GMS_LAUNCH_HOME", str(tmp_path / "home"))


def call(*args: str) -> tuple[int, str]:
    """The verb in this process: exit code and what was said."""
    done = CliRunner().invoke(app, args)
    if isinstance(done.exception, LaunchError):
        return done.exception.exit_code, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize("value", ["0", "-5", "nan", "inf", "1_0", "x"])
@pytest.mark.parametrize(
    "verb",
    [
        ["kill-primary", "--timeout"],
        ["switch-over", "--timeout"],
        ["switch-over", "--when-idle"],
        ["roll", "--timeout"],
        ["down", "--timeout"],
        ["wait", "--timeout"],
    ],
)
def test_a_duration_is_a_finite_number_above_0(verb: list[str], value: str) -> None:
    code, text = call(*verb, value)
    assert code == 2 and f"Invalid value for '{verb[1]}'" in text, text


def test_every_duration_of_every_verb_is_read_by_one_helper() -> None:
    found = 0
    for verb in app.registered_commands:
        for name, hint in get_type_hints(verb.callback, include_extras=True).items():
            if any(
                t is float for t in (hint, *get_args(hint), *get_args(get_args(hint)[0] if get_args(hint) else None))
            ):
                assert get_args(hint)[1].parser is seconds, f"{verb.name} {name}: use options.duration"
                found += 1
    assert found == 7


@pytest.mark.parametrize("verb", ["up", "plan", "doctor", "roll"])
def test_a_word_before_the_dashes_is_no_engine_argument(verb: str) -> None:
    code, text = call(verb, "extra")
    assert code == 2 and "'extra' stands alone: engine arguments come after --" in text
    code, text = call(verb, "extra", "--", "--max-model-len", "8")
    assert code == 2 and "engine arguments come after --" in text
    assert "stands alone" not in call(verb, "--", "--max-model-len", "8")[1]


def test_a_model_that_the_disk_does_not_hold_is_not_begun(tmp_path: Path) -> None:
    code, text = call("demo-model", str(tmp_path / "a" / "m"), "--mib", str(2**40))
    assert code == 2 and "MiB of weights, and there are" in text, text
    assert not (tmp_path / "a").exists()


def test_sweep_of_a_run_that_is_not_dead() -> None:
    code, text = call("sweep", "--run", "../x")
    assert code == 2 and "is not the name of a run" in text
    code, text = call("sweep", "--run", "nobody-knows-it")
    assert code == 5 and "nothing of a run nobody-knows-it is on this node" in text


def test_sweep_of_a_live_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from gms_launch.cli import sweep

    for whose in ("own", "everybody"):
        monkeypatch.setattr(sweep, whose, lambda *_: sweep.Report(living=["busy+2"]))
    code, text = call("sweep", "--run", "busy")
    assert code == 3 and "run busy is up on this node" in text and "gms-launch down --run busy" in text


def test_logs_of_a_node_that_the_run_does_not_have(tmp_path: Path) -> None:
    directory = tmp_path / "home" / "r1"
    (directory / "logs").mkdir(parents=True)
    ended = {"run": "r1", "version": "0", "created": 1.0, "leader_host": "a", "leader_boot_id": "", "agent_pid": 1}
    more = {"agent_start": 1, "node_dir": "/x", "etcd_endpoints": [], "ended": 2.0, "nnodes": 2}
    (directory / "run.json").write_text(json.dumps(ended | more))
    code, text = call("logs", "--run", "r1", "--node", "2")
    assert code == 2 and "--node 2: run r1 has 2 nodes, ranks count from 0" in text


def test_wait_says_what_it_waits_for() -> None:
    done = CliRunner().invoke(app, ["wait", "--run", "nosuch", "--timeout", "0.5"])
    assert isinstance(done.exception, LaunchError) and done.exception.exit_code == 4
    assert done.output.count("there is no run nosuch yet: waiting for it") == 1


def test_every_summary_fits_its_line() -> None:
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert "..." not in text.partition("Commands:")[2], text


def cut(file: Path, size: int) -> None:
    os.truncate(file, size)


def with_header(file: Path, header: bytes) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is no JSON object"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json is no JSON object"),
        (lambda d: cut(d / "model.safetensors", 5000), "is cut off: 5000 bytes, and by its header"),
        (lambda d: cut(d / "model.safetensors", 100), "is cut off: 100 bytes, and its header alone takes"),
        (lambda d: cut(d / "model.safetensors", 5), "is no safetensors file: 5 bytes"),
        (lambda d: cut(d / "model.safetensors", 0), "is no safetensors file: 0 bytes"),
        (lambda d: with_header(d / "model.safetensors", b"no json at all"), "its header cannot be read"),
        (lambda d: with_header(d / "model.safetensors", b'{"a": {"data_offsets": 7}}'), "its header cannot be read"),
        (lambda d: (d / "more.safetensors").write_bytes(b"version https://git-lfs"), "is a pointer of Git LFS"),
    ],
)
def test_a_model_that_no_engine_could_read(
    tmp_path: Path, model: Path, spoil: Callable[[Path], object], says: str
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    flags = ("--engine", "reference", "--model", str(copy))
    assert call("plan", *flags)[0] == 0
    spoil(copy)
    code, text = call("up", *flags)
    assert code == 2 and says in text and "\n" not in text, text
    with pytest.raises(UsageError) as caught:  # what `doctor` asks for its line
        models.check(resolve({"engine": "reference", "model": str(copy)}, {}))
    assert str(caught.value) == text


def test_weights_that_no_made_up_device_holds(model: Path) -> None:
    flags = ("--engine", "reference", "--model", str(model), "--virtual-gpu-mib", "1")
    code, text = call("up", *flags)
    assert code == 2 and "a made-up device has 1 MiB; raise --virtual-gpu-mib" in text, text


def test_an_interpreter_that_does_not_work(tmp_path: Path, model: Path) -> None:
    flags = ("--engine", "reference", "--model", str(model), "--python")
    code, text = call("up", *flags, str(tmp_path / "none"))
    assert code == 2 and text == f"--python {tmp_path}/none is no interpreter that works: No such file or directory"
    code, text = call("up", *flags, "/bin/false")
    assert code == 2 and text == "--python /bin/false is no interpreter that works: it ended with code 1: no message"
    code, text = call("up", *flags, "/bin/true")
    assert code == 2 and text == "--python /bin/true is no interpreter that works: it does not answer as Python does"


def test_cuda_memory_without_a_gpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gms_launch.gms import devices

    monkeypatch.setattr(devices, "real_devices", tuple)
    code, text = call("up", "--engine", "reference", "--model", str(model), "--gms-memory", "cuda")
    assert code == 2 and "GMS in cuda memory needs a GPU, and no GPU is visible: " in text, text


@pytest.mark.parametrize("engine", [["--engine", "reference"], []])
def test_a_number_of_ones_own_in_the_environment(
    model: Path, engine: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_ID", "0")
    code, text = call("up", "--model", str(model), *engine)
    assert code == 2 and "ENGINE_ID=0 is set in the environment" in text


def reference(model: Path, *more: str) -> list[str]:
    return ["up", "--engine", "reference", "--model", str(model), "--run", "refused", *more]


def test_places_that_take_no_files(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    code, text = call(*reference(model, "--gms-socket-dir", "/etc/passwd/x"))
    assert code == 2 and text == "--gms-socket-dir /etc/passwd/x: /etc/passwd is no directory"
    monkeypatch.setenv("GMS_LAUNCH_HOME", f"{tmp_path}/file")
    code, text = call(*reference(model))
    assert code == 2 and text == f"GMS_LAUNCH_HOME {tmp_path}/file: {tmp_path}/file is no directory"
    assert not (user_root() / "refused").exists()


def test_a_start_that_fails_at_its_places_leaves_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        assert (user_root() / "refused").exists(), "it was made by then"
        raise RefusedError("the run directory cannot be made")

    monkeypatch.setattr("gms_launch.run.rundir.RunDir.create", full)
    code, text = call(*reference(model))
    assert code == 3 and "cannot be made" in text
    assert not (user_root() / "refused").exists()


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.name.invalid"])
def test_a_frontend_listens_on_an_address_of_this_node(model: Path, host: str) -> None:
    code, text = call(*reference(model, "--open-frontend", "--frontend-host", host))
    assert code == 2 and f"--frontend-host {host}: this node" in text and "cannot listen there" in text


def test_a_plan_of_hosts_has_all_of_them(model: Path) -> None:
    args = ["plan", "--engine", "reference", "--model", str(model), "--hosts", "10.1.2.3,10.1.2.4"]
    code, text = call(*args, "--json")
    assert code == 0, text
    leader, other = json.loads(text)["nodes"]
    assert (leader["node_rank"], other["node_rank"], other["leader_address"]) == (0, 1, "10.1.2.3")
    code, text = call(*args, "--nnodes", "3")
    assert code == 2 and "--hosts names 2 hosts, and nnodes is 3" in text


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ("", "the leader's agent did not answer within 0 s: withdrawn; its log may tell why (`gms-launch logs agent`)"),
        (
            "g2",
            "group g2's leader's agent did not answer within 0 s: withdrawn; .* (`gms-launch logs --group g2 agent`)",
        ),
    ],
)
def test_the_log_of_an_agent_that_does_not_answer_is_that_of_who_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, says: str
) -> None:
    from gms_launch.cli import kill_primary
    from gms_launch.cohort.records import CommandRecord
    from gms_launch.control.access import Access
    from gms_launch.control.door import Door
    from gms_launch.control.errand import Errand
    from gms_launch.errors import DeadlineError
    from gms_launch.run.rundir import RunDir

    monkeypatch.setattr(Errand, "__enter__", lambda self: self)
    monkeypatch.setattr(Errand, "__exit__", lambda *_: None)
    monkeypatch.setattr(Errand, "answer", lambda self: None)
    monkeypatch.setattr(Errand, "withdraw", lambda self: "withdrawn")
    command = CommandRecord("u", "kill", 1.0)
    with pytest.raises(DeadlineError, match=says.replace("(", "[(]").replace(")", "[)]")):
        kill_primary.answered(Door(Access(("x:1",))), RunDir(tmp_path), command, 0.0, None, group)


@pytest.mark.parametrize("cause", ["kill-primary", "switch-over", "roll"])
def test_the_verb_that_was_used_is_the_cause(cause: str) -> None:
    from gms_launch.cohort import controller
    from gms_launch.cohort.actions import Kill
    from gms_launch.cohort.records import CommandRecord
    from gms_launch.node import lead

    told = CommandRecord.decode(CommandRecord("u", "kill", 1.0, cause=cause).encode())
    slots = {k: Slot(k, 1, True, False, p, 0.0) for k, p in enumerate((Phase.ACTIVE, Phase.PARKED))}
    actions, _ = controller.decide(
        View(slots=slots, confirmed=(0, 1), requests=(lead._request(told),)),
        controller.Memory(),
        controller.Policy(2, 60.0, 60.0, 1.0, 60.0, 600.0, 3),
        1.0,
    )
    assert Kill(0, 1, cause) in actions


def test_numbers_and_their_nouns_agree() -> None:
    one = words.requests(Failover(1.0, "x", (0, 1), held=1, moved=1, lost=0, steps={"first_token": 0.193}))
    assert "1 connection held, 1 move to another engine" in one and "own probes" in one and "193 ms" in one
    two = words.requests(Failover(1.0, "x", (0, 1), held=2, moved=0, lost=0))
    assert two == "requests: 2 connections held, 0 moves to another engine, lost, by the frontend: 0"
    shown = io.StringIO()
    views.console(shown).print(views.failover(Failover(1.0, "x", (0, 1), steps={"first_token": 0.193})))
    assert "clients: a token came again at first_token" in shown.getvalue()
