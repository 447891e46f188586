"""The documents follow the code."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

from gms_launch.cohort.failover import Failover
from gms_launch.cohort.model import Phase
from gms_launch.cohort.records import (
    EventRecord,
    GmsStatus,
    GpuStatus,
    NodeRecord,
    RankRecord,
    ServiceStatus,
    WritingStatus,
)
from gms_launch.control.mirror import Mirror
from gms_launch.observe.metrics import Metrics
from gms_launch.observe.snapshot import CohortStatus, build
from tests import documents, man, reference

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gms_launch"
#: A route of an engine, and a file that a reader makes.
NOT_OURS = {"control/sleep", "control/wake_up", "sample_engine.py"}


def test_the_table_of_settings_is_what_is_declared() -> None:
    text = reference.PAGE.read_text()
    assert text == reference.rendered(text), "make reference"


def test_the_manual_pages_are_what_the_commands_say() -> None:
    assert {p.name: p.read_text() for p in man.PLACE.iterdir()} == man.pages(), "make reference"


def test_every_test_the_failure_policy_names_exists() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs/failure-policy.md").read_text())
    code = "".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    assert named
    assert [n for n in named if f"def {n}(" not in code] == []


def test_every_dependency_has_its_line() -> None:
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "docs/dependencies.md").read_text()
    for requirement in project["dependencies"]:
        name = requirement.split(";")[0].split(">")[0].split("=")[0].strip()
        assert name in text, name


def test_every_path_that_is_named_exists() -> None:
    """A path is from the checkout's top, or from the package's: a room and what is in it.

    A bare file is of the package, and of the room in whose row of a table it stands.
    """
    tops = {p.name for p in ROOT.iterdir() if p.is_dir()} | {p.name for p in PACKAGE.iterdir() if p.is_dir()}
    files = {p.name for p in PACKAGE.rglob("*.py")}
    seen, wrong = 0, []
    for page in documents.ALL:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            for path in re.findall(r"(?<![\w/<>.~$*-])([\w.-]+/[\w./-]+)", re.sub(r"\w+://\S+|\]\([^)]*\)", " ", line)):
                path = path.rstrip(".")
                ours = f"`{path}`" in line and path.split("/")[0] in tops
                if (ours or path.endswith((".py", ".sh", ".md"))) and path not in NOT_OURS:
                    seen += 1
                    if not ((ROOT / path).exists() or (PACKAGE / path).exists()):
                        wrong.append(f"{page.name}:{number}: {path}")
            room = re.match(r"\| `(\w+)` \|", line)
            for name in re.findall(r"`(\w+\.py)`", line):
                own = (
                    {p.name for p in (PACKAGE / room[1]).glob("*.py")}
                    if room and (PACKAGE / room[1]).is_dir()
                    else files
                )
                seen += 1
                if name not in own and name not in NOT_OURS:
                    wrong.append(f"{page.name}:{number}: {name}")
    assert seen > 100 and wrong == []


def test_every_function_the_architecture_names_exists() -> None:
    """`Class.method` and `module.function`; what is in brackets behind it is the file."""
    text = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(r"`(?:\w+\.)*?(\w+)\.(\w+)`(?:\s\(`([\w/]+\.py)`\))?", text)
    named = [n for n in named if n[1] not in ("py", "md", "simulate", "toml")]
    assert len(named) >= 15
    wrong = []
    for owner, name, file in named:
        places = [PACKAGE / file] if file else [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
        if owner[0].isupper():
            found = [p for p in places if re.search(rf"^class {owner}\b", p.read_text(), re.MULTILINE)]
        else:
            found = [p for p in places if owner in (p.stem, p.parent.name)]
        if not any(re.search(rf"^\s*(async )?(def|class) {name}\b", p.read_text(), re.MULTILINE) for p in found):
            wrong.append(f"{owner}.{name} {file}")
    assert wrong == []


def test_every_link_leads_somewhere() -> None:
    wrong = []
    for page in documents.ALL:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match(r"\w+:", target):
                continue
            file, _, anchor = target.partition("#")
            there = page.parent / file if file else page
            headings = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE) if there.is_file() else []
            if not there.exists() or (anchor and anchor not in map(slug, headings)):
                wrong.append(f"{page.name}: {target}")
    assert wrong == []


def slug(heading: str) -> str:
    """The anchor of a heading, as the usual viewers make it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_no_page_has_two_headings_of_the_same_name() -> None:
    for page in documents.ALL:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert len(headings) == len(set(headings)), page


def test_every_row_of_a_table_has_the_columns_of_its_head() -> None:
    wrong = []
    for page in documents.ALL:
        head = 0
        for number, line in enumerate(page.read_text().splitlines(), 1):
            cells = len(re.findall(r"(?<!\\)\|", re.sub(r"<!--.*?-->", "", line))) if line.startswith("|") else 0
            head = cells if not head or not cells else head
            if cells != head:
                wrong.append(f"{page.name}:{number}: {cells - 1} columns, its head has {head - 1}")
    assert wrong == []


def test_the_documented_fields_of_status_and_timeline_are_those_that_are_printed() -> None:
    """Both ways: every field has its row, and every row its field."""
    rank = RankRecord(0, 0, 1, Phase.ACTIVE)
    cohort = CohortStatus(0, 1, Phase.ACTIVE, 0.0, "primary", "", False, (rank,))
    node = NodeRecord(0, "", "", "", 1, 1)
    shot = replace(build(Mirror("r")), cohorts=(cohort,), nodes=(node,), groups=(build(Mirror("r", "g")),)).to_json()
    shown = [*shot, *shot["cohorts"][0], *shot["cohorts"][0]["ranks"][0], *shot["nodes"][0], *shot["groups"][0]]
    page = reference.PAGE.read_text()
    part = page.split("### `status --json`")[1].split("### ")[0]
    assert set(_rows(part)) == set(shown) - {"schema"}
    part = page.split("### `timeline --json`")[1].split("### ")[0]
    assert set(_rows(part)) == set(Failover(0.0, "", (0, 1)).to_json())
    part = page.split("### `timeline --events --json`")[1].split("### ")[0]
    assert set(_rows(part)) == {f.name for f in fields(EventRecord)}


def _rows(part: str) -> list[str]:
    return [name for row in re.findall(r"^\| (`.+?) \|", part, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]


def test_every_command_line_is_run_or_says_why_not() -> None:
    """What is run is run by tests/slurm/test_documents.py: every block of `sh`, and every span of these two."""
    tests = "".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    wrong = []
    for text in [*documents.blocks(), *documents.spans()]:
        if text.language not in (*documents.LANGUAGES, "span"):
            wrong.append(f"{text.where}: say which language the block is in: {', '.join(documents.LANGUAGES)}")
        if text.language == "text" and any(documents.TOOL.match(line) for line in text.text.splitlines()):
            wrong.append(f"{text.where}: a command line in a block that is not sh")
        if text.mark == "run by" and any(f"def {name}(" not in tests for name in text.reason.split(", ")):
            wrong.append(f"{text.where}: there is no {text.reason}")
        span = text.language == "span" and not text.mark and text.page not in documents.SCRIPTS
        if span and text.tool not in (*documents.RUN, *documents.LOOKED_UP):
            wrong.append(f"{text.where}: {text.text}: no test runs it and no mark says why")
    assert wrong == []


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    said = [(t.where, t.text.split()[1]) for t in documents.spans() if t.tool == "make"]
    for block in documents.blocks():
        said += [
            (block.where, c.split()[1]) for c in block.commands if block.language == "sh" and c.startswith("make ")
        ]
    assert said and [s for s in said if s[1] not in targets] == []


def test_every_bench_takes_the_flags_that_are_given() -> None:
    lines = {c for b in documents.blocks() if b.language == "sh" for c in b.commands}
    lines |= {t.text for t in documents.spans()}
    lines = {re.sub(r"^(\w+=\S+ )+", "", line) for line in lines}
    for line in sorted(c for c in lines if re.match(r"python3? (-m (bench|tests)\.|bench/)", c)):
        words = line.split()
        module = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert [w for w in words if w.startswith("--") and w not in done.stdout] == [], line


def test_the_table_of_metrics_is_what_is_served() -> None:
    """Both ways: every metric has its row with its labels, and every row its metric."""
    node = NodeRecord(
        0,
        "",
        "",
        "",
        1,
        1,
        services=(ServiceStatus("etcd", "ready"),),
        gms=(GmsStatus(0, "GPU-0", "weights", "READY", allocated_bytes=1),),
        gpu_memory=(GpuStatus("GPU-0", "", 2, 1),),
        writing=(WritingStatus("run directory", "/r"),),
    )
    metrics = Metrics(0, 1, "vllm", lease_left=lambda: 5.0)
    metrics.look(replace(build(Mirror("r")), nodes=(node,)))
    served = {}
    for family in metrics.registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {key for sample in family.samples for key in sample.labels} - {"le"}
        served[name] = labels
    text = (ROOT / "docs/monitoring.md").read_text()
    rows = re.findall(r"`(gms_launch_\w+)(?:\{([\w,]+)\})?`", "".join(re.findall(r"^\| `.*$", text, re.MULTILINE)))
    told = {name: set(labels.split(",")) - {""} for name, labels in rows}
    own = {name: labels for name, labels in served.items() if name.startswith("gms_launch_")}
    assert set(told) == set(own)
    # Of a counter that has not counted nothing is served, and its labels are not seen.
    assert {name: told[name] for name, labels in own.items() if labels} == {n: ls for n, ls in own.items() if ls}
