"""Many interleavings by their seeds, over the processors of this machine.

    python -m tests.simulation.interleavings 1000000 [--first 0] [--processes 16] [--groups | --roles]

Needs Python and this checkout and nothing else, so it can be run where nothing can be installed; several machines
share the work by `--first`. Ends with exit code 1 and the case, to be replayed, when an invariant does not hold.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tests.simulation import groups, roles
from tests.simulation.world import Broken, explore

STEPS, FAULTS = 30, 2
#: Interleavings that a process takes at a time: a second or two.
SHARE = 2500


def one(seed: int, steps: int = STEPS, faults: int = FAULTS) -> bool:
    """One interleaving; True when the run ended with a word. Raises `Broken`."""
    rng = random.Random(seed)
    nnodes, cohorts = rng.choice((1, 2, 2, 3)), rng.choice((2, 2, 3))
    return bool(explore(nnodes, cohorts, rng.randrange, steps, faults, rng.random() < 0.3).aborted)


def two_groups(seed: int, steps: int = 2 * STEPS) -> bool:
    """One interleaving of a run of two groups; True when one of them ended with a word. Raises `Broken`."""
    run = groups.explore(random.Random(seed).randrange, steps)
    return any(group.aborted for group in run.groups)


def with_roles(seed: int, steps: int = STEPS, faults: int = FAULTS + 1) -> bool:
    """One interleaving of a run whose roles move, and whose nodes are followed by spares; True when it ended with a
    word. Raises `Broken`.
    """
    return bool(roles.explore(random.Random(seed).randrange, steps, faults).aborted)


def many(seeds: range, what: Callable[[int], bool] = one) -> tuple[int, int]:
    """How many there were, and how many of them ended with a word."""
    return len(seeds), sum(map(what, seeds))


def spread(seeds: range, processes: int = 0, what: Callable[[int], bool] = one) -> Iterator[tuple[int, int]]:
    """`many` of all seeds, share by share, in processes; 0 for as many as there are processors for us."""
    shares = [seeds[k : k + SHARE] for k in range(0, len(seeds), SHARE)]
    with ProcessPoolExecutor(processes or len(os.sched_getaffinity(0))) as pool:
        try:
            yield from pool.map(partial(many, what=what), shares)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the first that breaks is enough
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=0, help="default: the processors of this machine")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--groups", action="store_true", help="each of a run of two groups")
    kind.add_argument("--roles", action="store_true", help="each of a run whose leader roles move, with spares")
    options = parser.parse_args()
    what = two_groups if options.groups else with_roles if options.roles else one
    begun, done, ended = time.monotonic(), 0, 0
    try:
        for count, words in spread(range(options.first, options.first + options.count), options.processes, what):
            done, ended = done + count, ended + words
            if sys.stderr.isatty():
                print(f"\r{done} of {options.count}", end="", file=sys.stderr, flush=True)
    except Broken as exc:
        raise SystemExit(f"{exc}\nBROKEN, after {done} that held") from None
    seconds = time.monotonic() - begun
    of_what = " of two groups" * options.groups + " with roles that move" * options.roles
    print(f"{done} interleavings{of_what} from seed {options.first} held, {ended} ended with a word; {seconds:.0f} s")


if __name__ == "__main__":
    main()
