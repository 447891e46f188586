"""Groups: several engines in one run, each with nodes or GPUs of its own. Pure.

`tables` reads what `[[group]]` says, `expand` works out what the groups are: one a table and count, or `--groups`
equal ones. Each gets the settings that its engine would have as a run of its own, so that every rule between settings
holds for it too. Where the groups lie is `run.placement`'s business.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gms_launch.errors import UsageError
from gms_launch.numbers import numbered
from gms_launch.settings import arguments, rules
from gms_launch.settings.declared import BY_NAME, MOST_NODES, Setting, Settings

#: Groups of a run. A name is part of paths and keys, and a count adds a number to it.
MOST_GROUPS = 1024
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,15}\Z")

#: What a table may say that is no setting of a run without groups.
OWN = (
    Setting("name", str, "", "name of the group; with a count, of each with a number behind it", "group"),
    Setting("count", int, 1, "so many groups like this", "group", minimum=1, maximum=MOST_GROUPS),
    Setting("nodes", int, 0, "whole nodes that each has to itself", "group", minimum=1, maximum=MOST_NODES),
    Setting("gpus", int, 0, "GPUs of one node that each has, beside others there", "group", minimum=1, maximum=4096),
    Setting("role", str, "agg", "what it does of a request", "group", choices=("agg", "prefill", "decode")),
    Setting("component", str, "", "Dynamo component it registers as; the engine's own when empty", "group"),
)
#: Settings that a table may say for its groups. What it does not say comes from the top.
TAKEN = ("model", "served_model_name", "engine", "engine_file", "tp", "pp", "dp", "dp_lb", "shadows")
KEYS: Mapping[str, Setting] = {s.name: s for s in (*OWN, *(BY_NAME[name] for name in TAKEN))}
#: Under which component an engine of each role registers, unless it is told another: upstream's own names.
COMPONENTS: Mapping[str, str] = {"agg": "backend", "prefill": "prefill", "decode": "backend"}
#: Upstream's own example of a way for the KV cache.
_CONNECTOR = """engine_args = ["--kv-transfer-config", '{"kv_connector":"NixlConnector","kv_role":"kv_both"}']"""


@dataclass(frozen=True)
class Group:
    """One engine: `gpus` on each of `nodes` nodes, which are its own if `whole`. `settings` as of a run by itself."""

    name: str
    nodes: int
    gpus: int
    whole: bool
    role: str
    component: str
    settings: Settings

    @property
    def model_name(self) -> str:
        """What clients ask for."""
        return self.settings.served_model_name or self.settings.model


def tables(found: Any, where: str, parse: Callable[[Setting, Any, str], Any]) -> tuple[Mapping[str, Any], ...]:
    """The `[[group]]` tables of a settings file, each with what it says. Raises `UsageError`."""
    if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
        raise UsageError(f"{where}: group is no list of tables; each begins with [[group]]")
    return tuple(_table(table, f"{where}, [[group]] {k}", parse) for k, table in enumerate(found, 1))


def _table(table: Mapping[str, Any], where: str, parse: Callable[[Setting, Any, str], Any]) -> Mapping[str, Any]:
    said: dict[str, Any] = {}
    for key, value in table.items():
        if key == "engine_args":
            if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
                raise UsageError(f'{where}: engine_args is no list of words, as in ["--max-model-len", "4096"]')
            if wrong := next(filter(None, map(rules.unprintable, value)), ""):
                raise UsageError(f"{where}: there is {wrong} in engine_args")
            said[key] = tuple(value)
        elif key in KEYS:
            said[key] = parse(KEYS[key], value, where)
        else:
            known = ", ".join([*KEYS, "engine_args"])
            raise UsageError(f"{where}: unknown key {rules.shortened(key)}; a group has {known}")
    if "name" not in said:
        raise UsageError(f"{where}: it has no name; a name is 1-16 letters, digits, dashes or underscores")
    if not NAME.match(said["name"]):
        raise UsageError(
            f"{where}: name {rules.shortened(said['name'])}: use 1-16 letters, digits, dashes or underscores, "
            "starting with a letter or digit"
        )
    if "nodes" in said and "gpus" in said:
        raise UsageError(
            f"{where}: nodes {said['nodes']} gives the group whole nodes, gpus {said['gpus']} a part of one; leave one "
            "out"
        )
    if said.get("component") and not rules.NAMESPACE.match(said["component"]):
        raise UsageError(
            f"{where}: component {rules.shortened(said['component'])}: use letters, digits, dashes and underscores"
        )
    return said


def check(s: Settings) -> None:
    """Raise `UsageError` for what is wrong with the groups whatever a node has."""
    if s.groups > 1 and s.tables:
        raise UsageError(
            f"groups {s.groups} (from {s.sources.get('groups')}) makes equal groups, and [[group]] tables say which "
            "there are; leave one out"
        )
    if (asked := sum(table.get("count", 1) for table in s.tables)) > MOST_GROUPS:
        raise UsageError(f"[[group]] tables make {asked} groups; a run has at most {MOST_GROUPS}")
    names = [name for table in s.tables for name in _names(table)]
    if twice := next((n for n, number in Counter(names).items() if number > 1), None):
        raise UsageError(f"two groups are called {twice}; give their [[group]] tables other names")
    alike: dict[str, str] = {}
    for name in names:
        if (other := alike.setdefault(name.lower(), name)) != name:
            raise UsageError(
                f"groups {other} and {name} differ in case only: one would be taken for the other; give their "
                "[[group]] tables other names"
            )
    number = len(names) or s.groups
    if s.min_groups > number:
        raise UsageError(f"min_groups {s.min_groups}: the run has {numbered(number, 'group')}")
    _check_roles(s)


def _check_roles(s: Settings) -> None:
    """Both halves of a model or neither, and nobody beside them: the frontend sends requests to all who serve it."""
    models: dict[str, dict[str, str]] = {}
    for table in s.tables:
        model = table.get("served_model_name") or s.served_model_name or table.get("model") or s.model
        models.setdefault(model, {}).setdefault(table.get("role", "agg"), table["name"])
    for model, found in models.items():
        of = f" for model {rules.shortened(model)}" if len(models) > 1 else ""
        for one, other in (("prefill", "decode"), ("decode", "prefill")):
            if one in found and other not in found:
                raise UsageError(
                    f"group {found[one]} has role {one} and none has role {other}{of}: neither answers anything alone"
                )
        if len(found) == 3:
            raise UsageError(
                f"groups {found['prefill']} and {found['decode']} are two halves, and group {found['agg']} answers by "
                "itself for the same model: requests of each would be sent to the other, which cannot answer them; "
                "give one of them another served_model_name"
            )


def _names(table: Mapping[str, Any]) -> list[str]:
    count = table.get("count", 1)
    return [table["name"]] if count == 1 else [f"{table['name']}-{k}" for k in range(count)]


def expand(s: Settings, gpus: int) -> tuple[Group, ...]:
    """The groups of a run whose nodes have `gpus` GPUs each; none without a word about groups. Raises `UsageError`."""
    if s.tables:
        return _apart([replace(_group(t, s, gpus), name=name) for t in s.tables for name in _names(t)])
    if s.groups == 1:
        return ()
    like = _group(_equal(s, gpus), s, gpus)
    return tuple(replace(like, name=f"g{k}") for k in range(s.groups))


def _apart(found: Sequence[Group]) -> tuple[Group, ...]:
    """The groups, each model of several under a component of its own: Dynamo takes one model for each.

    Those of the first model keep upstream's names. Raises `UsageError` where one component would have two models, or
    both halves.
    """
    models: dict[str, int] = {}
    named: dict[str, Group] = {}
    made = []
    for g in found:
        number = models.setdefault(g.model_name, len(models) + 1)
        if not g.component and number > 1:
            g = replace(g, component=f"{COMPONENTS[g.role]}-{number}")
        made.append(g)
        component = g.component or COMPONENTS[g.role]
        other = named.setdefault(component, g)
        if other.model_name != g.model_name:
            raise UsageError(
                f"groups {other.name} and {g.name} have component {component} and serve models {other.model_name} "
                f"and {g.model_name}: a component has one model; leave it out, or give them two"
            )
        if other.role != g.role:
            raise UsageError(
                f"groups {other.name} ({other.role}) and {g.name} ({g.role}) have component {component}: requests for "
                "one half would be sent to the other; leave it out, or give them two"
            )
    return tuple(made)


def _equal(s: Settings, gpus: int) -> Mapping[str, Any]:
    """One of --groups equal groups, as a table would say it."""
    said: dict[str, Any] = {"name": "g"}
    if own_tp(s):
        return said  # its size follows
    nodes = s.serving_nodes
    if nodes % s.groups == 0:
        return said | {"nodes": nodes // s.groups}
    on_each, left = divmod(s.groups, nodes)
    if left or gpus % on_each:
        raise UsageError(
            f"--groups {s.groups} on {numbered(nodes, 'node')} with {numbered(gpus, 'GPU')} each: neither whole "
            f"nodes ({nodes} / {s.groups}) nor the GPUs of a node ({gpus} / ({s.groups} / {nodes})) can be "
            "shared out evenly; say how large a group is with --tp and --pp"
        )
    return said | {"gpus": gpus // on_each}


def own_tp(s: Settings) -> int:
    """The tensor-parallel size that the user gave; 0 for none. Slurm's is that of all nodes as one engine."""
    return s.tp if s.sources.get("tp", "Slurm") != "Slurm" else 0


def _group(said: Mapping[str, Any], s: Settings, gpus: int) -> Group:
    tp, pp, nodes, gpus_here, whole = _size(said, s, gpus)
    name = said["name"]
    own = {key: said[key] for key in (*TAKEN, "engine_args") if key in said} | {
        "tp": tp,
        "pp": pp,
        "nnodes": nodes,
        "spares": 0,
    }
    sources = {k: v for k, v in s.sources.items() if k not in ("groups", "node_rank")}
    mine = replace(s, **own, groups=1, tables=(), node_rank=0, hosts="", sources=sources | dict.fromkeys(own, "group"))
    role = said.get("role", "agg")
    if role != "agg" and mine.engine == "vllm" and not arguments.has(mine.engine_args, "--kv-transfer-config"):
        raise UsageError(
            f"group {name}: role {role} needs engine_args with --kv-transfer-config, which says how the KV cache goes "
            f"from one half to the other, as in {_CONNECTOR}"
        )
    try:
        rules.check(mine)
    except UsageError as exc:
        raise UsageError(f"group {name}: {exc}") from None
    return Group(name, nodes, gpus_here, whole, role, said.get("component", ""), mine)


def _size(said: Mapping[str, Any], s: Settings, gpus: int) -> tuple[int, int, int, int, bool]:
    """tp, pp, nodes, GPUs on each of them, and whether they are its own. Raises `UsageError` with the arithmetic."""
    name, tp, pp = said["name"], said.get("tp") or own_tp(s), said.get("pp") or s.pp
    dp, nodes, part = said.get("dp") or s.dp, said.get("nodes", 0), said.get("gpus", 0)
    each = f"a node has {numbered(gpus, 'GPU')}"
    if not nodes and not part:
        if not tp:
            raise UsageError(f"group {name} says neither nodes, nor gpus, nor tp: nothing tells how large it is")
        wanted = tp * pp * dp
        part, nodes = (wanted, 0) if wanted <= gpus else (0, _nodes_for(tp * pp, dp, gpus))
    times = f" times dp {dp}" if dp > 1 else ""
    if not tp:
        tp, left = divmod(part or nodes * gpus, pp * dp)
        if left or not tp:
            size = f"gpus {part}" if part else f"nodes {nodes} times {gpus} GPUs"
            raise UsageError(f"group {name}: {size} cannot be divided by pp {pp}{times}")
    total = tp * pp * dp
    world = f"tp {tp} times pp {pp}{times} is {numbered(total, 'GPU')}"
    if total > MOST_NODES * gpus:
        raise UsageError(f"group {name}: {world}, more than {MOST_NODES} nodes have")
    if part:
        if part != total:
            raise UsageError(f"group {name}: {world}, and gpus gives it {part}")
        if part > gpus:
            raise UsageError(f"group {name}: gpus {part}, and {each}; say nodes for a group of several")
        return tp, pp, 1, part, False
    local, left = divmod(total, nodes)
    if left or not local:
        raise UsageError(f"group {name}: {world}, which cannot be spread evenly over {numbered(nodes, 'node')}")
    if local > gpus:
        raise UsageError(f"group {name}: {world}, {local} on each of {numbered(nodes, 'node')}, and {each}")
    return tp, pp, nodes, local, True


def _nodes_for(size: int, replicas: int, gpus: int) -> int:
    """The fewest nodes over which `replicas` of `size` GPUs are spread evenly; one of several is on one node."""
    world, spread = size * replicas, replicas if replicas > 1 else size
    return next((n for n in range(-(-world // gpus), min(spread, MOST_NODES) + 1) if spread % n == 0), spread)
