"""Wrong and hostile settings, several hundred: each ends with exit code 2, 3 or 5 and one message, and leaves nothing.

In this process, through `main`, with the agent taken out: a setting that is wrong and taken fails the test.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from gms_launch.cli import main as command_line
from gms_launch.run import nodedir
from gms_launch.settings.declared import SETTINGS

LONG = "x" * 70_000
NUMBERS = [s for s in SETTINGS if s.kind in (int, float)]
TEXTS = [s for s in SETTINGS if s.kind is str]


def case(
    *args: str, toml: str = "", engine: str = "", **environ: str
) -> tuple[tuple[str, ...], str, str, dict[str, str]]:
    return args, toml, engine, environ


def ups() -> Iterator[tuple[tuple[str, ...], str, str, dict[str, str]]]:
    """More for `up --engine reference --model MODEL`: flags, a settings file, an engine file, the environment."""
    for s in NUMBERS:
        yield case(f"{s.flag}=1e308")
        yield case(toml=f"{s.name} = inf")
        yield case(**{s.env: "٣"})
    for s in TEXTS:
        yield case(f"{s.flag}=a\nb")
        yield case(f"{s.flag}={LONG}")
        yield case(toml=f'{s.name} = "a\\u0000b"')
        yield case(**{s.env: "\x1b[31m"})
    for word in (
        "tp = 1.5",
        "tp = true",
        "tp = [1]",
        "tp = {a = 1}",
        "tp = 1979-05-27",
        "model = 5",
        "nats = 1.0",
        "x = 1",
    ):
        yield case(toml=word)
    for word in (
        f"tp = {'9' * 5000}",
        "a = " + "[" * 3000,
        "tp = ",
        "\x00",
        "tp = 1\ntp = 2",
        "# " + "x" * 2**20,
        "[gms-launch]\ntp = 0",
    ):
        yield case(toml=word)
    for host in (
        "a" * 64,
        ".".join(["a" * 63] * 5),
        "ä" * 60,
        "xn--" + "a" * 70,
        "a..b",
        "-a",
        "a b",
        "a/b",
        "a:b",
        "",
        ".",
    ):
        yield case(f"--leader-addr={host}")
        if host:
            yield case(f"--frontend-host={host}")
            yield case(f"--hosts={host},b")
    for host in (
        "0",
        "0.0.0.0",
        "::",
        "::1",
        "fe80::1%lo",
        "224.0.0.1",
        "255.255.255.255",
        "256.1.1.1",
        "127.1",
        "0x7f000001",
    ):
        yield case(f"--leader-addr={host}")
    for host in "256.1.1.1", "0x7f000001", "1", "203.0.113.9", "224.0.0.1", "*", "[::1", "localhost:80", "http://a":
        yield case(f"--frontend-host={host}")
    for hosts in (
        "a[1-99999999]",
        "a[1-9999]b[1-9999]",
        "a[1-99999999999999999999]",
        "a[1-",
        "a]1[",
        "a[]",
        "a[1-x]",
        "a[2-1]",
        "@all",
    ):
        yield case(f"--hosts={hosts}")
    for hosts in (
        "a,,b",
        ",",
        " ",
        "a,a",
        "a!b",
        "a&b",
        "a*",
        "a[1-3]^b",
        "a:0",
        "a:99999",
        "a:" + "9" * 5000,
        "u@@a",
        "a[0001-9999]",
    ):
        yield case(f"--hosts={hosts}")
    for url in (
        "http://[::1",
        "http://",
        "http://a:-1",
        "http://a:0",
        "http://a:99999",
        "http://a:x",
        "a",
        "ftp://a",
        "http://a b",
    ):
        yield case(f"--etcd-endpoints={url}")
        yield case(f"--nats-server={url}")
    for url in "http://a,http://[::1", ",", "http://" + "a" * 300, "http://[v1.x]", "http://ä", "http://u:p@[::1":
        yield case(f"--etcd-endpoints={url}")
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_TASKS": "1"}
    for name in "SLURM_STEP_NUM_TASKS", "SLURM_NODEID":
        for junk in "x", "-1", "²", "1.5", "9" * 5000, "٣":
            yield case(**{**step, name: junk})
    for junk in "a[1-99999999]", "a[", "a[1-x]", "a b", "@x", "a\nb", LONG:
        yield case(**{**step, "SLURM_STEP_NODELIST": junk})
    for junk in "../../x", "x/y", "..", "a b", LONG:
        yield case(SLURM_JOB_ID=junk, SLURMD_NODENAME="a")
    yield case(**{**step, "SLURM_STEP_TASKS_PER_NODE": "9" * 5000})
    yield case(**{**step, "SLURM_GPUS_ON_NODE": "9" * 18})
    yield case(SLURM_JOB_ID="7", SLURMD_NODENAME="a", SLURM_JOB_NUM_NODES="²")
    for place in "\n", "a\nb", "/" + "x" * 300, "/x" * 1500, "/dev/null", "/dev/null/x", "/proc/x":
        if place != "/proc/x":  # which root may write, as far as anybody says before it is tried
            yield case(f"--gms-socket-dir={place}")
        yield case(GMS_LAUNCH_HOME=place)
    yield case("--gms-socket-dir=LOOP")
    yield case(GMS_LAUNCH_HOME="LOOP")
    for place in "LOOP", "/" + "x" * 300, "/dev/null/x", "/dev/null", ".", "Qwen/Qwen3-0.6B":
        yield case(f"--model={place}")
    for name in "etcd-bin", "nats-bin", "python":
        yield from (case(f"--{name}={place}") for place in ("/no", "/", "/dev/null", "LOOP", "/" + "x" * 300))
    yield from (
        case(f"--config={place}")
        for place in ("/no", "/", "LOOP", "/dev/zero", "/" + "x" * 300, "a\nb", "/proc/self/mem")
    )
    for flag in (
        "--mod",
        "--engin",
        "--t",
        "--tensor-parallel-size",
        "--shadow",
        "--no-canar",
        "--nnode=1",
        "-t",
        "-x",
        "--json",
        "---",
    ):
        yield case(flag, "1")
    yield from (
        case(*words)
        for words in (["extra"], ["extra", "--", "--x"], ["up"], ["--", "extra"], ["--tp"], ["--tp", "--pp"])
    )
    for word in (
        "--tensor-parallel-siz",
        "--tens",
        "--mod=x",
        "--m",
        "-t",
        "-n2",
        "-r0",
        "--data_parallel_siz=2",
        "--headles",
        "--no-en",
    ):
        yield case("--", word)
    yield from (case(f"--run={run}") for run in ("..", "a/b", "a b", "é", "-a", "a" * 21, "a+1", ".x", "a\n"))
    yield from (case(f"--namespace={name}") for name in ("a.b", "a/b", "", "é", "a b", "-a", " "))
    yield from (case(f"--interface={name}") for name in ("no-such", "lo x", "x" * 300, "../lo"))
    yield from (case("--notify-fd", fd) for fd in ("99", "-1", "x", "9" * 30, "1e3", "٣"))
    yield case("--tp=3")
    yield case("--node-rank=1")
    yield case("--nnodes=2")
    yield case("--frontend-port=9000", "--etcd-port=9000")
    yield case(ENGINE_ID="1")
    yield case(GMS_LAUNCH_MODLE="x")
    yield case(**{"GMS_LAUNCH_" + "X" * 5000: "x"})
    yield case(**{"GMS_LAUNCH_A\nB": "x"})
    yield from (case(engine=text) for text in engine_files())
    yield from of_groups()


def of_groups() -> Iterator[tuple[tuple[str, ...], str, str, dict[str, str]]]:
    def made(*tables: str) -> tuple[tuple[str, ...], str, str, dict[str, str]]:
        return case("--virtual-gpus=4", toml="\n".join(f"[[group]]\n{table}\n" for table in tables))

    for name in (
        "../x",
        "/x",
        "a/b",
        "..",
        ".",
        "a.b",
        "a b",
        "",
        "a\\u0000",
        "\\u001b[31m",
        "é",
        "\u0430",
        "g\u202e1",
        "-a",
    ):
        yield made(f'name = "{name}"\ngpus = 1')
    yield made(f'name = "{"x" * 17}"\ngpus = 1')
    yield made('name = "a"\ngpus = 1', 'name = "a"\ngpus = 1')
    yield made('name = "a"\ngpus = 1', 'name = "A"\ngpus = 1')
    yield made('name = "a"\ngpus = 1\ncount = 2', 'name = "A-1"\ngpus = 1')
    for key in "count", "nodes", "gpus", "tp", "pp", "dp":
        size = "" if key in ("nodes", "gpus") else "gpus = 1"
        for value in "0", "-1", "1025", "9223372036854775807", "inf", "1e999", "true", '"x"', "[1]", "1.5":
            yield made(f'name = "a"\n{size}\n{key} = {value}')
    for component in "..", "a.b", "a/b", "é", " ", "-a", "a*":
        yield made(f'name = "a"\ngpus = 1\ncomponent = "{component}"')
    for line in "engine_args = [1]", 'engine_args = "x"', 'engine_args = ["a\\u0000"]', 'role = "x"', 'run_id = "x"':
        yield made(f'name = "a"\ngpus = 1\n{line}')
    yield made(*(f'name = "a{k}"\ngpus = 1\ncount = 1024' for k in range(200)))
    yield made(*(f'name = "a{k}"' for k in range(20_000)))
    for toml in 'group = "x"', "group = [1]", '[group]\nname = "a"':
        yield case("--virtual-gpus=4", toml=toml)
    yield case(toml='[gms-launch]\nshadows = 1\n[[group]]\nname = "a"\ngpus = 1')
    yield case(toml="shadows = 2\n[gms-launch]\ntp = 1")
    for tables in (
        "[",
        "x",
        "1",
        "{}",
        "[1]",
        "[" * 100_000,
        "9" * 5000,
        '[{"name": "../x", "gpus": 1}]',
        '[{"name": []}]',
    ):
        yield case("--virtual-gpus=4", GMS_LAUNCH_GROUP_TABLES=tables)
    yield from (case("--virtual-gpus=4", f"--groups={number}") for number in ("0", "-1", "3", "1025", "x", "٣"))
    yield case("--virtual-gpus=4", "--groups=2", "--min-groups=3")
    yield from (case(f"--etcd-members={number}") for number in ("0", "2", "3", "7", "AUTO", "1,3", "٣"))
    yield from (case(f"--frontends={number}") for number in ("0", "-1", "3", "x", "99999999999", "٣"))
    yield from (case(f"--spares={number}") for number in ("-1", "1", "99999", "x", "٣"))


def engine_files() -> Iterator[str]:
    good = ('command = ["true", "{model}"]', "[phase]\nparked = 'x'")
    for shape in (
        "{tp:%s}",
        "{model!z}",
        "{tp:{bogus}}",
        "{model:>999999999999}",
        "{model!r}",
        "{}",
        "{0}",
        "{tp.real}",
        "{tp[0]}",
        "{",
        "}",
    ):
        yield f'command = ["true", "{shape}"]\n{good[1]}'
        yield f'{good[0]}\n{good[1]}\n[environment]\nA = "{shape}"'
    yield f'command = ["true", "a\\u0000"]\n{good[1]}'
    for name in "a=b", "", "a b", "ä", "a\\u0000", "1a", "a.b", "a-b":
        yield f'{good[0]}\n{good[1]}\n[environment]\n"{name}" = "x"'
        yield f'{good[0]}\nunset = ["{name}"]\n{good[1]}'
        yield f'{good[0]}\n{good[1]}\n[ports]\n"{name}" = 9000'
    for port in "-1", "0", "65536", "65535", "1.5", '"9"', "true", "9" * 30:
        yield f"{good[0]}\n{good[1]}\n[ports]\nx = {port}"
    for pattern in "(", "*", "(a{99999999999})", "(" * 2000:
        yield f"{good[0]}\n[phase]\nparked = '{pattern}'"
        yield f"{good[0]}\nvital = '{pattern}'\n{good[1]}"
    for line in (
        'command = "true"',
        "command = []",
        "command = [1]",
        'x = ["y"]',
        'needs = ["a b"]',
        'needs = ["../x"]',
        'command = ["/no"]',
    ):
        yield line if line.startswith("command") else f"{good[0]}\n{line}\n{good[1]}"
    yield good[0]


def verbs() -> Iterator[tuple[str, ...]]:
    for verb in "status", "down", "wait", "kill-primary", "switch-over", "roll", "logs", "timeline", "sweep":
        yield (verb, "--run", "../x")
        yield (verb, "--run", "no-such-run" if verb != "wait" else "b/c")
        yield (verb, "--ru", "r1")
        yield (verb, "--run", "a\nb")
        yield (verb, "extra", "words", "here")
    for seconds in "inf", "nan", "1e999", "1e308", "-1", "0", "٣", "x", "":
        yield from ((verb, f"--timeout={seconds}") for verb in ("down", "wait", "kill-primary", "switch-over", "roll"))
    for group in (
        ("0", "1"),
        ("1", "1"),
        ("-1", "1"),
        ("x", "1"),
        ("9" * 30, "1"),
        ("0", "0"),
        ("99999999", "1"),
        ("1e3", "1"),
    ):
        yield ("kill-group", *group)
    for place in "/no/page.html", "/", "/dev/null/x", "LOOP", "/" + "x" * 300, "a\0b", "/proc/x", "":
        yield ("timeline", "--run", "r1", "--html", place)
    for words in ["-n", "-1"], ["-n", "x"], ["--node", "9" * 30], ["--node", "7"], ["no-such"], ["../run"], ["a\nb"]:
        yield ("logs", "--run", "r1", *words)
    for scope in "rank:", "rank:-1", "rank:" + "9" * 5000, "rank:7", "rank:٣", "all", "":
        yield ("kill-primary", "--run", "r1", "--scope", scope)
    yield from (("switch-over", "--run", "r1", f"--to={to}") for to in ("x", "-1", "9" * 5000, "²", "7"))
    for words in (
        ["/dev/null"],
        ["/dev/null/x"],
        ["LOOP"],
        ["/" + "x" * 300],
        ["M", "--mib", "9" * 12],
        ["M", "--mib", "0"],
    ):
        yield ("demo-model", *words)
    yield from (("demo-model", "M", f"--seed={seed}") for seed in ("-1", "x", "9" * 30, "1.5"))
    yield from (("down", "--run", "r1", "--here", here) for here in ("x", "-1", "9" * 5000))
    yield from (
        (),
        ("no-such-verb",),
        ("--no-such",),
        ("UP",),
        ("u",),
        ("kill",),
        ("--versio",),
        ("\udcff",),
        ("status", "\udcff"),
    )


@pytest.fixture
def world(tmp_path: Path, fast_dir: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with a link that leads to itself, a recorded run, and nobody who would start an agent.

    The node-local directory has a short path, as in life: a long one is refused itself, whatever else is wrong.
    """
    home = tmp_path / "home"
    for name in os.environ:
        if name.startswith(("GMS_LAUNCH_", "SLURM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GMS_LAUNCH_HOME", str(home))
    monkeypatch.setattr(nodedir, "LOCAL_ROOT", fast_dir)
    monkeypatch.chdir(tmp_path)
    Path("LOOP").symlink_to("LOOP")

    def taken(*_: object) -> None:
        raise SystemExit("it was taken")

    monkeypatch.setattr(command_line, "app", get_command(command_line.app))  # built once, and not for each
    monkeypatch.setattr("gms_launch.cli.up.run_agent", taken)
    monkeypatch.setattr("gms_launch.cli.background.start", taken)
    monkeypatch.setattr("gms_launch.cli.up_hosts.Hosts", taken)
    return tmp_path


def recorded(home: Path) -> None:
    (home / "r1" / "logs").mkdir(parents=True)
    ended = {"run": "r1", "version": "0", "created": 1.0, "leader_host": "a", "leader_boot_id": "", "agent_pid": 1}
    (home / "r1" / "run.json").write_text(
        json.dumps(ended | {"agent_start": 1, "node_dir": "/x", "etcd_endpoints": [], "ended": 2.0, "exit_code": 5})
    )


def run(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    sys.argv = ["gms-launch", *args]
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    out, err = capsys.readouterr()
    return caught.value.code, out + err


def complaint(code: object, text: str) -> str:
    """What is wrong with how a command ended; empty when it is as it should be."""
    if code not in (2, 3, 5):
        return f"exit code {code}: {text[:300]}"
    if "Traceback" in text or "that it does not know" in text:
        return text[:2000]
    lines = [line for line in text.splitlines() if line.startswith(("gms-launch: ", "Error: "))]
    return "" if len(lines) == 1 and len(text) < 4000 else f"{len(lines)} messages: {text[:600]}"


def test_every_wrong_setting_is_refused_with_one_message(
    world: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = []
    cases = list(ups())
    for args, toml, engine, environ in cases:
        (world / "engine.toml").write_text(engine)
        (world / "settings.toml").write_text(toml)
        kind = ["--engine=command", f"--engine-file={world}/engine.toml"] if engine else ["--engine=reference"]
        config = [f"--config={world}/settings.toml"] if toml else []
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            code, text = run(("up", *kind, f"--model={model}", *config, *args), capsys)
        if wrong := complaint(code, text):
            bad.append(f"{[a[:80] for a in args]} {toml[:80]!r} {engine[:120]!r} {str(environ)[:120]}: {wrong}")
        assert not (world / "home").exists(), (args, environ)
    assert len(cases) > 400
    assert not bad, f"{len(bad)} of {len(cases)}:\n" + "\n".join(bad)
    left = [p for p in nodedir.user_root().glob("*") if p.name != "ports"]
    left += nodedir.user_root().glob("ports/*")
    assert not left


def test_every_wrong_word_of_a_verb_is_refused_with_one_message(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(world / "home")
    bad = []
    for args in verbs():
        code, text = run(args, capsys)
        if args and (wrong := complaint(code, text)):
            bad.append(f"{[a[:80] for a in args]}: {wrong}")
    assert not bad, f"{len(bad)}:\n" + "\n".join(bad)
