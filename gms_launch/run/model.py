"""Can the model be served from here? Judged from its directory, by names, headers and sizes; nothing is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gms_launch.errors import UsageError
from gms_launch.run import contents
from gms_launch.settings.declared import Settings
from gms_launch.settings.rules import shortened

#: Files that a model's weights may be in.
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
#: What huggingface.co calls a model: never two slashes, no dot in front.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def check(settings: Settings) -> None:
    """Raise `UsageError` unless the model is a directory with a config and weights that can be read."""
    if not settings.model:
        raise UsageError("no model was given: --model DIRECTORY (or MODEL); `gms-launch demo-model` makes a small one")
    try:
        _check(settings, Path(settings.model))
    except OSError as exc:  # a name too long, a place that may not be entered
        raise UsageError(f"model {shortened(settings.model)} cannot be looked at: {exc.strerror}") from None


def is_directory(settings: Settings) -> bool:
    """Whether `model` has to be a directory: a command of the user's may call it as it likes."""
    return settings.engine != "command" or settings.model.startswith(("/", ".", "~"))


def _check(settings: Settings, path: Path) -> None:
    if HUB_NAME.fullmatch(settings.model) and not path.exists() and settings.engine != "command":
        raise UsageError(
            f"model {settings.model!r}: names of the hub are not taken, since every engine would look for it by "
            f"itself; `hf download {settings.model} --local-dir DIR` to where all nodes see it, and --model DIR"
        )
    if is_directory(settings):
        if not (path / "config.json").is_file():
            raise UsageError(
                f"model {settings.model!r}: {path.absolute()} is not a model directory (no config.json in it)"
            )
        if not any(any(path.glob(pattern)) for pattern in WEIGHTS):
            raise UsageError(f"model {settings.model!r}: {path.absolute()} has no weights ({', '.join(WEIGHTS)})")
        if why := contents.problem(path):
            raise UsageError(f"model {settings.model!r}: {why}")
        if settings.engine == "reference" and not (path / "tokenizer.json").is_file():
            raise UsageError(f"model {settings.model!r}: {path.absolute()} has no tokenizer.json")


def named(names: Iterable[str]) -> str:
    """The models that a run serves, by the names that clients ask for."""
    found = list(dict.fromkeys(names))
    return f"model{'s' if len(found) > 1 else ''} {', '.join(found)}"


def check_memory(s: Settings) -> None:
    """Raise `UsageError` when a rank's part of the weights is more than a made-up device holds."""
    part = contents.weights(Path(s.model)) / s.tp if s.engine == "reference" else 0.0
    if part > s.virtual_gpu_mib * 2**20:
        raise UsageError(
            f"model {s.model!r}: {part / 2**20:.0f} MiB of weights on each GPU with tp {s.tp}, and a made-up device "
            f"has {s.virtual_gpu_mib} MiB; raise --virtual-gpu-mib"
        )
