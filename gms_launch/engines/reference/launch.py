"""How the launcher starts the reference engine and reads its signs: as it does with dynamo.vllm."""

from __future__ import annotations

from dataclasses import dataclass

from gms_launch.engines import dynamo, installed
from gms_launch.engines.base import RankSpec
from gms_launch.process.lifecycle import Command
from gms_launch.settings.declared import Settings

MODULES = ("dynamo.llm", "numpy", "safetensors")


@dataclass(frozen=True)
class ReferenceEngine(dynamo.Spoken):
    """The module behind --engine reference."""

    name: str = "reference"

    @property
    def imports(self) -> tuple[str, ...]:
        front = "gms_launch.engines.reference"
        return (f"{front}.burden", f"{front}.leader", "uvloop", "dynamo.llm", "dynamo.common.utils.runtime")

    def problems(self, settings: Settings) -> list[str]:
        found = []
        if missing := installed.look(settings.python, MODULES).missing:
            who = settings.python or "this Python"
            found.append(
                f"--engine reference needs {' and '.join(missing)}, which {who} cannot import; "
                "pip install 'gms-launch[reference,dynamo]'"
            )
        if settings.pp > 1:
            found.append("--engine reference has no pipeline parallelism; use --tp")
        return found

    def describe(self, settings: Settings) -> str:
        return "the reference engine can start"

    def command(self, spec: RankSpec) -> Command:
        made = dynamo.command(spec, "gms_launch.engines.reference", always_master_port=True)
        return Command(made.argv, {**made.env, "REFERENCE_DEVICE": "cuda" if spec.gms_memory == "cuda" else None})

    def is_vital(self, command_line: str) -> bool:
        return "gms_launch.engines.reference.worker" in command_line


ENGINE = ReferenceEngine()
