"""Every command line in README.md, docs/ and slurm/, as it stands, typed by a reader into a shell.

The reader sits at a node of a small cluster, or at its login node where the page says so. Two things of the reader's
are not on the pages: GMS_LAUNCH_ENGINE says that the engine is the reference engine, since no GPU is here, and the
model DIR is a small one. A command that stays in the foreground is left running in the background; one that asks a run
before it is there is typed again.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import documents
from tests.documents import ROOT, Text
from tests.slurm.lab import Lab
from tests.support import LONG, eventually, how_it_stands

#: What the documented forms must get from Slurm: the size of the engine over all nodes.
SIZES = {"--gpus-per-node=2": 4, "--gpus-per-node=1": 2, "--gres=gpu:1": 2}
#: The order in which the spans are typed at one run: what ends it comes last.
ORDER = [
    "--version",
    "--install-completion",
    "demo-model",
    "doctor",
    "plan",
    "status",
    "logs",
    "timeline",
    "events",
    "web",
    "sweep",
    "wait",
    "kill",
]
ORDER += ["switch-over", "kill-primary", "down"]
FULL = 'gms-launch status --json | grep -q \'"redundancy": "full"\''
#: Exit codes that say: not yet.
NOT_YET = (3, 5)


class Shell:
    """A shell of the reader's, at a node or at the login node."""

    def __init__(self, lab: Lab, place: str, home: Path, **environ: str) -> None:
        env = {"HOME": str(home), "GMS_LAUNCH_ENGINE": "reference", "no_proxy": "*", **environ}
        env |= {"PATH": lab.env["PATH"], "SLURM_CONF": lab.env["SLURM_CONF"]}
        own = ["env", "-u", "GMS_LAUNCH_HOME", "bash", "--norc"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        if place == "login":
            self._bash = subprocess.Popen(own, env=env, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
        else:
            self._bash = lab.node(place).popen(own, env=env, **pipes)
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._bash.stdout:
            self._said.append(line)

    def type(self, command: str, background: bool = False, timeout: float = 2 * LONG) -> tuple[int, str]:
        """Its exit code and what it said; of one in the background what it has said so far."""
        begun = len(self._said)
        rest = " &" if background else ""
        self._bash.stdin.write(f"{{ {command}\n}} </dev/null{rest}\nprintf '\\n@@%s\\n' $?\n")
        self._bash.stdin.flush()
        done = eventually(lambda: [s for s in self._said[begun:] if s.startswith("@@")], timeout, command)
        return int(done[0][2:]), "".join(s for s in self._said[begun:] if not s.startswith("@@"))

    def said(self) -> str:
        return "".join(self._said)

    def close(self) -> None:
        self._bash.stdin.close()
        self._bash.wait(60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Lab]:
    with Lab(nodes=2, kill_wait=30) as lab:  # as Slurm has it
        for node in lab.nodes.values():  # a cluster's network has one
            node.run(["ip", "route", "add", "default", "via", f"{lab.net}.254"], check=True)
        yield lab


@pytest.fixture(scope="module")
def home(cluster: Lab) -> Path:
    """The reader's home on the shared file system, with SSH to the nodes, and DIR where each page's reader is."""
    from gms_launch.engines.reference.demo_model import make

    home = cluster.dir / "reader"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    key = (cluster.dir / "etc" / "ssh_host_ed25519_key.pub").read_text()
    (home / ".ssh" / "known_hosts").write_text("".join(f"{n.address} {key}" for n in cluster.nodes.values()))
    hosts = "".join(f"Host {n.name}\n  HostName {n.address}\n" for n in cluster.nodes.values())
    identity = f"Host *\n  User root\n  IdentityFile {cluster.dir}/etc/id_ed25519\n"
    (home / ".ssh" / "config").write_text(hosts + identity)
    for name in ("", "docs", "slurm"):
        place = home / "checkout" / name
        place.mkdir(parents=True, exist_ok=True)
        make(place / "DIR", 8)
    for script in (ROOT / "slurm").iterdir():
        shutil.copy(script, home / "checkout" / "slurm")
    return home


@contextlib.contextmanager
def shown(home: Path) -> Iterator[None]:
    """When it fails: how the reader's runs stand, those that are over too."""
    try:
        yield
    except BaseException:
        for record in home.glob(".gms-launch/*/run.json"):
            print(how_it_stands(record.parent.name, record.parent, record.read_text))
        raise


def stays(command: str) -> bool:
    """A run in the foreground."""
    return bool(re.search(r"gms-launch up\b", command)) and not re.search(r" (-d|--detach)\b|sbatch", command)


def ended(lab: Lab, home: Path) -> None:
    """Wait until Slurm has its nodes back, and nobody is told of a run any more."""
    eventually(lab.all_idle, LONG, "the nodes are idle")


def follow(lab: Lab, shell: Shell, command: str) -> None:
    """Type one line of a block, and see that it does what a reader expects."""
    if stays(command):
        before = shell.said().count("ready: http")
        shell.type(command, background=True)
        eventually(lambda: shell.said().count("ready: http") > before, LONG, lambda: f"{command}\n{shell.said()}")
        return
    code, said = -1, ""

    def done() -> bool:
        nonlocal code, said
        code, said = shell.type(command)
        asks = re.match(r"gms-launch (status|kill-primary|timeline|logs)", command)
        return not (asks and code in NOT_YET)

    eventually(done, LONG, command)
    assert code == 0, f"{command}: exit code {code}\n{said}"


def run_of_job(shell: Shell, command: str, job: str) -> None:
    """A job that was submitted as the page says comes up in the size that was asked for, and ends when cancelled."""
    up = f'gms-launch status --json --run {job} | grep -q \'"redundancy": "full"\''
    eventually(
        lambda: shell.type(up)[0] == 0,
        LONG,
        lambda: f"{command}: {shell.type(f'cat gms-launch-{job}.out')[1]}",
    )
    _, settings = shell.type(f"cat ~/.gms-launch/{job}/run.json")
    size = next(n for option, n in SIZES.items() if option in command)
    assert re.search(rf'"tp": {size}\b', settings), f"{command}: {settings}"
    assert shell.type(f"scancel {job}")[0] == 0


def the_demo_is_up_and_goes(shell: Shell) -> None:
    """What `make demo` and `make demo-down` run, but for the installation before."""
    code, said = shell.type(f"TMPDIR=~ {ROOT / 'tests' / 'demo.sh'}")
    assert code == 0 and "The deployment is running" in said, said
    recipe = re.search(r"^demo-down:.*\n\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    assert shell.type(recipe.group(1))[0] == 0


PAGES = sorted({t.page for t in documents.blocks() if t.language == "sh" and t.mark not in ("not run here", "run by")})


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_the_blocks_of_a_page(cluster: Lab, home: Path, page: Path) -> None:
    blocks = [
        t
        for t in documents.blocks()
        if t.page == page and t.language == "sh" and t.mark not in ("not run here", "run by")
    ]
    scripts = [t for t in documents.spans() if t.page in documents.SCRIPTS] if page.parent.name == "slurm" else []
    for block in [*blocks, *scripts]:
        place = "login" if block.reason == "login" or block.language == "span" else "node1"
        shell = Shell(cluster, place, home)
        with contextlib.ExitStack() as after:
            after.callback(shell.close)
            after.callback(shell.type, "gms-launch down")
            after.enter_context(shown(home))
            shell.type(f"cd ~/checkout/{page.parent.relative_to(ROOT)}")
            for file in (t for t in documents.blocks() if t.page == page and t.mark == "file"):
                (home / "checkout" / page.parent.relative_to(ROOT) / file.reason).write_text(file.text + "\n")
            for command in block.commands:
                if command == "make demo-down":
                    the_demo_is_up_and_goes(shell)
                elif command == "scancel $job":
                    # Not in the middle of its start: -K1 would kill the leader's agent before it writes down the end.
                    up = FULL.replace("--json", "--json --run $job")
                    eventually(lambda: shell.type(up)[0] == 0, LONG, "full before the job is cancelled")  # noqa: B023
                    follow(cluster, shell, command)
                    ended(cluster, home)
                elif command.startswith("sbatch"):
                    code, said = shell.type(command)
                    assert code == 0, f"{command}: {said}"
                    run_of_job(shell, command, said.split()[-1])
                    ended(cluster, home)
                else:
                    follow(cluster, shell, command)
            ended(cluster, home)


def verb(text: Text) -> str:
    return text.text.split()[1] if text.tool == "gms-launch" else text.tool


@pytest.mark.timeout(900)
def test_the_spans_of_all_pages(cluster: Lab, home: Path) -> None:
    """At one run, called RUN, which `gms-launch up` has brought up with what the environment says."""
    spans = {t.text: t for t in documents.spans() if t.tool in documents.RUN and not t.mark}
    texts = [t for t in spans.values() if verb(t) != "up" and t.page not in documents.SCRIPTS]
    texts.sort(key=lambda t: ORDER.index(verb(t)))
    first = Shell(cluster, "node1", home, MODEL="DIR", GMS_LAUNCH_RUN="RUN")
    second = Shell(cluster, "node1", home, MODEL="DIR", GMS_LAUNCH_RUN="RUN")
    with contextlib.ExitStack() as after:
        for shell in (first, second):
            after.callback(shell.close)
        after.callback(second.type, "gms-launch down")
        after.enter_context(shown(home))
        for shell in (first, second):
            shell.type("cd ~/checkout")
        assert "gms-launch up" in spans
        follow(cluster, first, "gms-launch up")
        waiting: list[str] = []
        for text in texts:
            if verb(text) == "wait":
                first.type(text.text, background=True)
                waiting.append(text.text)
            elif verb(text) == "web" or " -f" in text.text:
                says = r"http://127\.0\.0\.1:" if verb(text) == "web" else r"\S"
                for seconds in (2, 10, 50):  # a busy machine may need longer to say the first word
                    code, said = second.type(f"timeout --signal=INT {seconds} {text.text}")
                    assert code == 124, f"{text.where}: {text.text}: {code} {said}"
                    if re.search(says, said):
                        break
                assert re.search(says, said), f"{text.where}: {text.text} says {said!r}"
            elif verb(text) == "down" and texts.index(text) > 0 and verb(texts[texts.index(text) - 1]) == "down":
                code, said = second.type(text.text)  # a second time: there is nothing left
                assert code == 0, f"{text.where}: {text.text}: {code} {said}"
            else:
                if text.tool == "kill" or verb(text) in ("switch-over", "kill-primary"):
                    eventually(lambda: second.type(FULL)[0] == 0, LONG, "full before the next failover")
                follow(cluster, second, text.text)
        if waiting:
            eventually(lambda: "run RUN has ended" in first.said(), what="the end is told to who waits")
