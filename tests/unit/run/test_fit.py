"""What the planner says of a GPU's memory, beside what one GPU was seen to hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gms_launch.run.fit import GIB, Fit, fit
from gms_launch.settings.declared import Settings

H200 = 143_771 * 2**20
#: MiB in use by the number of parked engines: vLLM 0.23 and Dynamo 1.3.1, --gpu-memory-utilization 0.08.
SEEN = {0: 11_905, 1: 12_711, 2: 13_484}


def model(path: Path, weights: int, **config: object) -> str:
    """A model of which nothing is there but its config and the header of its weights (a file with a hole)."""
    path.mkdir()
    header = json.dumps({"w": {"dtype": "BF16", "shape": [weights // 2], "data_offsets": [0, weights]}}).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + weights)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


QWEN = {"num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
QWEN |= {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize("parked", SEEN)
def test_the_record_of_an_h200_is_met_within_five_percent(tmp_path: Path, parked: int) -> None:
    settings = Settings(
        engine="vllm",
        model=model(tmp_path / "m", 548 * 2**20, **QWEN),
        shadows=parked,
        engine_args=("--gpu-memory-utilization", "0.08"),
    )
    found = fit(settings, H200, scratch_per_layer=True)
    assert (found.serving + found.parked) / 2**20 == pytest.approx(SEEN[parked], rel=0.05)
    assert found.weights == 548 * 2**20
    assert not found.problem
    # While a shadow starts: 4.91 GiB of scratch were seen, and no more than this is said.
    assert found.starting == (8 * GIB if parked else 0)


def test_the_largest_share_that_is_named_fits_and_one_percent_more_does_not(tmp_path: Path) -> None:
    settings = Settings(engine="vllm", model=model(tmp_path / "m", 20 * GIB, **QWEN), shadows=2)
    found = fit(replace(settings, engine_args=("--gpu_memory_utilization=0.99",)), 80 * GIB, scratch_per_layer=False)
    assert found.utilization == 0.99
    assert f"--gpu-memory-utilization {found.largest:.2f}" in found.problem
    assert not replace(found, utilization=found.largest).problem
    assert replace(found, utilization=found.largest + 0.01).problem


def test_what_can_never_fit_is_told_what_to_change(tmp_path: Path) -> None:
    settings = Settings(engine="vllm", model=model(tmp_path / "m", 90 * GIB, **QWEN))
    assert "--tp" in fit(settings, 80 * GIB, scratch_per_layer=False).problem
    halves = fit(replace(settings, tp=2, nnodes=2), 80 * GIB, scratch_per_layer=False)
    assert (halves.weights, halves.problem) == (45 * GIB, "")
    small = fit(replace(settings, tp=2, engine_args=("--gpu-memory-utilization", "0.3")), 80 * GIB, False)
    assert "no room for a KV cache" in small.problem and small.kv == 0


@pytest.mark.parametrize(
    ("config", "tp", "args", "token"),
    [
        (QWEN, 1, (), 2 * 16 * 8 * 128 * 2),
        (QWEN, 2, (), 2 * 16 * 4 * 128 * 2),
        (QWEN, 16, (), 2 * 16 * 1 * 128 * 2),  # fewer heads than GPUs: each GPU keeps one
        (QWEN, 1, ("--kv-cache-dtype", "fp8"), 2 * 16 * 8 * 128),
        ({"text_config": QWEN}, 1, (), 2 * 16 * 8 * 128 * 2),
        ({**QWEN, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 8, (), 16 * 576 * 2),
        ({**QWEN, "layer_types": ["full_attention", "linear_attention"]}, 1, (), 0),
        ({"num_hidden_layers": "x"}, 1, (), 0),
        ({}, 1, (), 0),
    ],
)
def test_a_token_of_kv_cache(
    tmp_path: Path, config: dict[str, object], tp: int, args: tuple[str, ...], token: int
) -> None:
    settings = Settings(engine="vllm", model=model(tmp_path / "m", 2**20, **config), tp=tp, engine_args=args)
    found = fit(settings, 80 * GIB, scratch_per_layer=False)
    assert found.token == token
    assert found.tokens == (found.kv // token if token else 0)
    assert ("tokens" in "\n".join(found.lines())) == bool(token)


def test_the_table_adds_up() -> None:
    found = Fit(total=80 * GIB, weights=20 * GIB, utilization=0.9, parked=GIB, starting=GIB // 2, token=1000)
    data = found.to_json()
    assert data["fits"] and data["kv_bytes_at_most"] == 52 * GIB
    assert found.most == data["serving_bytes"] + data["parked_bytes"] + data["starting_bytes"]
    # The largest KV cache that leaves the shadows their room, and the flag that gives it.
    best = Fit(80 * GIB, 20 * GIB, found.largest, GIB, GIB // 2, 1000)
    assert data["largest_kv_bytes_at_most"] == best.kv > found.kv
    row = f"{best.kv / GIB:.2f} GiB  with --gpu-memory-utilization {found.largest:.2f}, {best.tokens:,} tokens"
    assert found.lines()[-2].startswith("largest KV cache") and found.lines()[-2].endswith(row)
    assert replace(found, weights=90 * GIB).to_json()["largest_kv_bytes_at_most"] == 0
    assert found.lines()[-1] == f"fits; --gpu-memory-utilization may be up to {found.largest:.2f}"


def test_the_verb_says_it_where_no_gpu_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gms_launch.cli import plan
    from gms_launch.errors import LaunchError, UsageError

    settings = Settings(engine="vllm", model=model(tmp_path / "m", 20 * GIB, **QWEN))
    plan.main(settings, 80, as_json=True)
    said = json.loads(capsys.readouterr().out)["gpu_memory"]
    assert said["fits"] and said["weights_bytes"] == 20 * GIB
    with pytest.raises(LaunchError, match="do not fit"):
        plan.main(settings, 16, as_json=False)
    assert "larger --tp" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--engine reference"):
        plan.main(replace(settings, engine="reference"), 80, as_json=False)
