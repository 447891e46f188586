"""The house: which room may import which, no ring between files, and nobody reaches into another's private names."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "gms_launch"

#: Every room, from the lowest to the highest, and the rooms that it may import. Those for all come first.
ROOMS: Mapping[str, str] = {
    "errors": "",
    "interpreter": "",
    "numbers": "",
    "printable": "",
    "urls": "",
    "spool": "",  # one writer for all that is written for people, so it lies below whoever writes
    "process": "spool",
    "gms": "",  # usable alone
    "cohort": "",  # pure: decisions and the records that they are about
    "settings": "",
    "transport": "",
    "control": "cohort",
    "engines": "cohort control gms process settings",  # what to show an etcd
    "services": "cohort control engines gms process spool",  # etcd's readiness is a read through our own door
    "run": "cohort control engines gms process services settings spool transport",  # Slurm is asked of a lost node
    "observe": "cohort control process run spool",  # is an agent of this very machine
    "node": "cohort control engines gms observe process run services settings spool",
    "cli": "cohort control engines gms node observe process run services settings spool transport",
}
#: What the command line may know of decisions: what they are about, and not how they are made.
COHORT_FOR_CLI = {"failover", "model", "records"}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def trees() -> Mapping[str, ast.Module]:
    return {module_of(p): ast.parse(p.read_text()) for p in PACKAGE.rglob("*.py")}


@cache
def imports() -> Mapping[str, frozenset[str]]:
    """module -> modules of ours that it imports, wherever in the file, type checking included."""
    known = set(trees())
    found: dict[str, set[str]] = defaultdict(set)
    for module, tree in trees().items():
        for name in _names(tree):
            target = name if name in known else name.rpartition(".")[0]
            if target in known and target != module:
                found[module].add(target)
    return {m: frozenset(t) for m, t in found.items()}


def _names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{a.name}" for a in node.names)


def room_of(module: str) -> str:
    """The room that a module is in; empty for the package itself, which holds the version."""
    return module.partition(".")[2].partition(".")[0]


def arrows() -> Mapping[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, targets in imports().items():
        for target in targets:
            pair = room_of(module), room_of(target)
            if pair[0] != pair[1] and all(pair) and pair[0] != "__main__":
                found[pair].append(f"{module} imports {target}")
    return found


def rings() -> list[list[str]]:
    """Sets of files that import each other, directly or around a corner."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in imports().get(module, ()):
            if target not in index:
                visit(target)
            if target in stack:
                low[module] = min(low[module], low[target])
        if low[module] == index[module]:
            ring = [stack.pop()]
            while ring[-1] != module:
                ring.append(stack.pop())
            if len(ring) > 1:
                found.append(sorted(ring))

    for module in trees():
        if module not in index:
            visit(module)
    return found


def test_every_file_is_in_a_room() -> None:
    rooms = {room_of(m) for m in trees()} - {"", "__main__"}
    assert rooms == set(ROOMS)


def test_no_room_imports_a_higher_one() -> None:
    order = list(ROOMS)
    for room, below in ROOMS.items():
        for other in below.split():
            assert order.index(other) < order.index(room), f"the table itself: {room} lies below {other}"
    for_all = ["errors", "interpreter", "numbers", "printable", "urls"]
    allowed = {(room, other) for room, below in ROOMS.items() for other in [*below.split(), *for_all]}
    wrong = [line for pair, lines in arrows().items() if pair not in allowed for line in lines]
    assert wrong == []


def test_the_table_allows_no_more_than_is_used() -> None:
    used = set(arrows())
    assert [(r, o) for r, below in ROOMS.items() for o in below.split() if (r, o) not in used] == []


def test_no_two_files_import_each_other() -> None:
    assert rings() == []


def test_the_command_line_knows_nothing_of_how_decisions_are_made() -> None:
    seen = {t.split(".")[2] for m, ts in imports().items() if room_of(m) == "cli" for t in ts if room_of(t) == "cohort"}
    assert seen <= COHORT_FOR_CLI


def test_decisions_do_no_io_and_look_at_no_clock() -> None:
    forbidden = {"asyncio", "os", "socket", "subprocess", "threading", "time", "pathlib", "logging"}
    for module, tree in trees().items():
        if room_of(module) == "cohort":
            names = {name.split(".")[0] for name in _names(tree)}
            assert not names & forbidden, module


def test_nobody_touches_anothers_private_names() -> None:
    """`x._y` is for x = self, cls or an object of the same class: one that the module itself defines."""
    wrong = []
    for module, tree in trees().items():
        own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}
        own |= {t.attr for n in ast.walk(tree) for t in ast.walk(n) if isinstance(t, ast.Attribute) and _is_self(t)}
        for node in ast.walk(tree):
            private = isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            if private and not _is_self(node) and node.attr not in own and node.attr not in FOREIGN:
                wrong.append(f"{module}:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []


#: Names with an underscore that are public where they come from, or of which there is no other before Python 3.13.
FOREIGN = {"_exit", "_asdict", "_replace", "_fields", "_sslobj"}


def _is_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


@pytest.mark.parametrize("module", ["gms_launch.gms", "gms_launch.cohort.controller"])
def test_what_is_usable_alone_needs_nothing_else(module: str) -> None:
    """The memory service, and the decisions, load without the rooms above them."""
    code = f"import sys, {module}; print('\\n'.join(m for m in sys.modules if m.startswith('gms_launch.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {line.split(".")[1] for line in done.stdout.split()}
    assert not loaded & {"node", "cli", "run", "services", "engines", "control"}


def test_what_belongs_together_is_handed_over_together() -> None:
    """Nobody can check by reading in which order nine things come."""
    wrong = []
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
                if len(names) > 8:
                    wrong.append(f"{module}.{node.name}")
    assert wrong == []


def test_modules_stay_readable() -> None:
    """A module that passes 400 lines is asking to be split."""
    assert [p.name for p in PACKAGE.rglob("*.py") if len(p.read_text().splitlines()) > 400] == []
