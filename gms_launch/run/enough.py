"""Whether a node has what an engine needs of it: the model, and GPUs enough. Looks, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sized

from gms_launch.engines.base import Engine
from gms_launch.errors import UsageError
from gms_launch.gms import gpus
from gms_launch.numbers import numbered
from gms_launch.run import model
from gms_launch.settings.declared import Settings


def check(settings: Settings, engine: Engine, devices: Callable[[], Sized], in_host_memory: bool) -> None:
    """Raise `UsageError` for what would stop the engine of a run without groups on a node that has these `devices`."""
    model.check(settings)
    if settings.warm_slots and not engine.imports:
        raise UsageError(f"--warm-slots: --engine {settings.engine} does not say what can be imported for it")
    for problem in engine.problems(settings):
        raise UsageError(problem)
    nodes = settings.serving_nodes
    local = settings.world // nodes
    found = len(devices())
    if not found:
        raise UsageError(f"GMS in cuda memory needs a GPU, and {gpus.none_visible()}")
    if local > found:
        raise UsageError(
            f"{_size(settings)} over {numbered(nodes, 'node')} is {numbered(local, 'GPU')} on each; "
            f"this node has {found}" + ("; see --virtual-gpus" if in_host_memory else "")
        )
    if in_host_memory:
        model.check_memory(settings)


def _size(settings: Settings) -> str:
    """The wanted GPUs by the settings that say how many."""
    names = [n for n in ("tp", "pp", "dp") if getattr(settings, n) > 1 or n == "tp"]
    said = [f"{n} {getattr(settings, n)} (from {settings.sources.get(n, 'nnodes')})" for n in names]
    return " times ".join(said)
