"""What every kind of chaos has in common: its command line, its file, and what is said when it is over."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bench.machine import machine
from tests.support import Told

Row = dict[str, Any]
Keep = Callable[[Row], None]
T = TypeVar("T")


def command(
    doc: str,
    count: int,
    kinds: Sequence[Callable[..., Any]],
    go: Callable[[argparse.Namespace, random.Random, Keep], list[Row]],
    figures: Mapping[str, str],
) -> None:
    """Read the command line, `go`, and sum up by kind the `figures`: what a column is called in words (seconds).

    `go` is given the flags (`rounds`, `seed`, `only`, `out`), what chooses, and what keeps a row, which has its `kind`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=count)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", metavar="KIND", choices=[k.__name__ for k in kinds])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    words = [Path(sys.executable).name, "-m", f"tests.chaos.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    keep = keeper(options.out, {"command": " ".join(words), "machine": machine(), "seed": options.seed})
    rows = go(options, random.Random(options.seed), keep)
    print(f"\n{len(rows)} rounds, seed {options.seed}: every invariant held")
    for kind in sorted({r["kind"] for r in rows}):
        of_kind = [r for r in rows if r["kind"] == kind]
        said = [f"{kind:30s} {len(of_kind):3d} rounds"]
        for column, name in figures.items():
            took = [r[column] for r in of_kind]
            said.append(f"{name} p50 {statistics.median(took):6.3f} max {max(took):6.3f} s")
        print(", ".join(said))


def often(kinds: Sequence[T], count: int, only: Sequence[str] | None) -> list[T]:
    """Every kind, or every one named in `only`, equally often."""
    chosen = [k for k in kinds if not only or getattr(k, "__name__", "") in only]
    return [chosen[k % len(chosen)] for k in range(count)]


def shuffled(kinds: Sequence[T], count: int, rng: random.Random, only: Sequence[str] | None = None) -> list[T]:
    """The same in an order that `rng` chooses."""
    many = often(kinds, count, only)
    rng.shuffle(many)
    return many


@contextlib.contextmanager
def telling(run: Told, seed: int) -> Iterator[None]:
    """Should a round break something, say how the run stands."""
    try:
        yield
    except BaseException:
        print(run.told()[-20000:], file=sys.stderr)
        print(f"seed {seed}", file=sys.stderr)
        raise


def keeper(out: Path | None, head: Mapping[str, Any]) -> Keep:
    """What takes a row and writes all of them to a file, under `head`: a run that is cut off is not lost."""
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        if out is not None:
            new = out.with_name(f"{out.name}.new")
            new.write_text(json.dumps({**head, "rounds": rows}, indent=1) + "\n")
            new.replace(out)

    return keep


def nowhere(_row: Row) -> None:
    """Keep nothing."""
