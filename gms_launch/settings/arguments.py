"""The engine's own arguments, after `--`: which of them gms-launch owns, and which would break shadow mode.

Pure. Names are vLLM's, which takes underscores for dashes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

_MINE = "gms-launch sets it itself; use {} before the --"

#: Flags that may not be passed, and why.
REFUSED: Mapping[str, str] = {
    "--model": _MINE.format("--model"),
    "--served-model-name": _MINE.format("--served-model-name"),
    "--tensor-parallel-size": _MINE.format("--tp"),
    "-tp": _MINE.format("--tp"),
    "--pipeline-parallel-size": _MINE.format("--pp"),
    "-pp": _MINE.format("--pp"),
    "--data-parallel-hybrid-lb": _MINE.format("--dp-lb hybrid"),
    "--data-parallel-external-lb": "every replica would be an engine of its own; use --groups for that",
    "--nnodes": _MINE.format("--nnodes"),
    "-n": _MINE.format("--nnodes"),
    "--node-rank": "gms-launch sets it itself: it follows from the node",
    "-r": "gms-launch sets it itself: it follows from the node",
    "--master-addr": _MINE.format("--leader-addr"),
    "--master-port": _MINE.format("--master-port"),
    "--headless": "gms-launch sets it itself: it follows from the node rank",
    "--gms-shadow-mode": "it is always on",
    "--no-gms-shadow-mode": "without shadow mode there is no failover",
    "--enable-sleep-mode": "it is always on",
    "--no-enable-sleep-mode": "a shadow parks by sleeping",
    "--namespace": _MINE.format("--namespace"),
    "--endpoint": "gms-launch watches the engines' registration; a [[group]] may say its component",
    "--event-plane": _MINE.format("--event-plane"),
    "--discovery-backend": "gms-launch runs the engines on etcd, which it watches and whose leases it revokes",
    "--request-plane": "gms-launch sets it up for TCP on the nodes' own network",
    "--realtime": "upstream refuses it in shadow mode",
    "--enable-elastic-ep": "it needs Ray, and shadow mode works with the mp executor only",
}
#: Flags that may be passed with one value only, and why no other.
FIXED: Mapping[str, tuple[str, str]] = {
    "--load-format": ("gms", "the engines share one copy of the weights, which only the gms loader maps"),
    "--data-parallel-size": ("1", _MINE.format("--dp")),
    "-dp": ("1", _MINE.format("--dp")),
    "--data-parallel-backend": ("mp", "shadow mode works with the mp executor only, not with Ray"),
    "-dpb": ("mp", "shadow mode works with the mp executor only, not with Ray"),
    "--distributed-executor-backend": ("mp", "shadow mode works with the mp executor only, not with Ray"),
    "--disaggregation-mode": (
        "agg",
        "no half answers anything alone; give a [[group]] the role prefill or decode",
    ),
    "--embedding-worker-processes": ("1", "several front processes share one engine core and its ports"),
}


def walk(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every flag with its value, empty when it has none: `--a=1`, `--a 1`; underscores in the name become dashes."""
    for k, word in enumerate(args):
        if not word.startswith("-") or word[1:2].isdigit():
            continue
        name, equals, value = word.partition("=")
        if not equals and k + 1 < len(args) and not args[k + 1].startswith("-"):
            value = args[k + 1]
        yield (name.replace("_", "-") if name.startswith("--") else name), value


def has(args: Sequence[str], flag: str) -> bool:
    """Whether a flag is among the arguments."""
    return any(name == flag for name, _ in walk(args))


def _owned_by(name: str) -> str:
    """The flag of ours that an engine's parser would take `name` for, as argparse takes the beginning of a name.

    Empty for a name that is written out, and for any other.
    """
    owned = (*REFUSED, *FIXED)
    if name in owned or len(name) < 2 or name == "--":
        return ""
    if name.startswith("--"):
        return next((o for o in owned if o.startswith(name)), "")
    # One dash: -tp may be cut short, and -n2 is -n 2.
    return next((o for o in owned if not o.startswith("--") and (o.startswith(name) or _glued(o, name))), "")


def _glued(short: str, name: str) -> bool:
    return len(short) == 2 and name.startswith(short) and name[2:].isdigit()


#: Flags whose value is a JSON object.
JSON = ("--kv-events-config", "--kv-transfer-config", "--speculative-config")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def problem(args: Sequence[str]) -> str:
    """What is wrong with the arguments, in one line; empty when nothing is."""
    if args and not args[0].startswith("-"):
        return f"engine arguments begin with a flag, and {args[0][:120]!r} is none"
    for name, value in walk(args):
        if owned := _owned_by(name):
            return f"engine argument {name} would be taken for {owned}: write it out, or give another"
        if name in REFUSED:
            return f"engine argument {name}: {REFUSED[name]}"
        if name in FIXED and value != FIXED[name][0]:
            return f"engine argument {name} {value}: only {FIXED[name][0]} works here: {FIXED[name][1]}"
        if name in JSON and not _is_object(value):
            return f"engine argument {name} {value}: expected a JSON object"
        if name.startswith(("--data-parallel-", "-dp")) and name not in FIXED:
            return f"engine argument {name}: gms-launch sets it itself: it follows from --dp and the node"
    return ""


def stagger_kv_events(args: Sequence[str], by: int) -> tuple[str, ...]:
    """Give each cohort its own port for KV events: two engines on one node cannot publish on the same one.

    The port of the `endpoint` in --kv-events-config is raised `by` so many; everything else stays.
    """
    made = list(args)
    for k, word in enumerate(args):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != "--kv-events-config":
            continue
        text = value if equals else (args[k + 1] if k + 1 < len(args) else "")
        try:
            config = json.loads(text)
            front, _, port = config["endpoint"].rpartition(":")
            config["endpoint"] = f"{front}:{int(port) + by}"
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # the engine says what is wrong with it
        shifted = json.dumps(config)
        if equals:
            made[k] = f"{name}={shifted}"
        else:
            made[k + 1] = shifted
    return tuple(made)
