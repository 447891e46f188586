"""What the engine files for SGLang and TensorRT-LLM rely on, looked up in the wheels that have the snapshot path."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from gms_launch.engines import command
from tests.wheels.source import Wheel

wheel = cache(Wheel)
ENGINES = Path(__file__).parents[2] / "docs" / "engines"
LIFECYCLE = "dynamo/common/snapshot/lifecycle.py"
each_release = pytest.mark.parametrize("release", ["1.5.1", "1.6.1"])


@each_release
@pytest.mark.parametrize("name", ["sglang", "trtllm"])
def test_the_snapshot_path_is_there(release: str, name: str) -> None:
    found = wheel(release)
    user = {"sglang": "dynamo/sglang/main.py", "trtllm": "dynamo/trtllm/snapshot.py"}[name]
    assert "elect_and_wake(" in found.sources[user]
    engine = command.read(str(ENGINES / f"{name}.toml"))
    for pattern in engine.patterns.values():
        assert pattern.search(found.sources[LIFECYCLE]), pattern.pattern
    names = found.sources["dynamo/common/snapshot/constants.py"]
    for said in ('"DYN_SNAPSHOT_CONTROL_DIR"', '"restore-context.json"', '"restore-complete"'):
        assert said in names
    # A file that is there from the start counts, and variables that it does not name stay as they are.
    assert "while True:" in found.sources[LIFECYCLE] and "restore_path.exists()" in found.sources[LIFECYCLE]
    assert "for env_name, value in env_config.items():" in found.sources["dynamo/common/snapshot/restore_context.py"]


@each_release
def test_the_flags_are_there(release: str) -> None:
    found = wheel(release)
    common = found.flags("dynamo/common/configuration/")
    assert common["--endpoint"]["env_var"] == "DYN_ENDPOINT" and common["--namespace"]["env_var"] == "DYN_NAMESPACE"
    known = found.flags("dynamo/trtllm/")
    given = [w for w in command.read(str(ENGINES / "trtllm.toml")).file.command if re.match("--[a-z]", w)]
    assert given and set(given) <= known.keys()
    assert {"--free-gpu-memory-fraction", "--model-loader-extra-config"} <= known.keys()
    # SGLang's own flags are not in the wheel; that it takes this format is.
    assert 'load_format == "gms"' in found.sources["dynamo/sglang/main.py"]


def test_before_that_there_is_no_way() -> None:
    found = wheel("1.4.2")
    assert not [p for p, text in found.sources.items() if "elect_and_wake" in text and not p.startswith("dynamo/vllm/")]
