"""Does it fit? What the weights, the KV cache and the parked engines take of each GPU, before anything runs.

By arithmetic: headers of the weights, the model's config, the engine's arguments, and what one H200 with vLLM 0.23 and
Dynamo 1.3.1 was seen to take (docs/gpu.md). What an engine needs while it works (activations, CUDA graphs) is not known
before it has run, so the KV cache told here is the most it can be. Nothing is loaded, and no GPU is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gms_launch.numbers import real
from gms_launch.run import contents
from gms_launch.settings import arguments
from gms_launch.settings.declared import Settings

GIB = 2**30
#: What a serving engine takes beyond its share: its CUDA context and what the driver keeps for it. Seen: 0.39 GiB.
CONTEXT = round(0.39 * GIB)
#: A parked engine, its context and what it keeps between sleep and wake. Seen: 0.79 and 0.76 GiB.
PARKED = round(0.77 * GIB)
#: One piece of scratch KV, which an engine starts on while another owns the cache: one in all from Dynamo 1.4, one a
#: layer before.
SCRATCH = 512 * 2**20
#: vLLM's own share of the GPU when --gpu-memory-utilization does not say.
UTILIZATION = 0.9
_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


@dataclass(frozen=True)
class Fit:
    """Bytes on one GPU of `total`. `kv` is the most that the KV cache can have, `token` what one token of it takes
    (0 when the model's config does not tell). `utilization` is the engine's share of the GPU, 0 to 1.
    """

    total: int
    weights: int
    utilization: float
    parked: int
    starting: int
    token: int

    @property
    def serving(self) -> int:
        """The engine that serves: its share, with weights and KV cache in it, and its context."""
        return math.ceil(self.utilization * self.total) + CONTEXT

    @property
    def kv(self) -> int:
        return max(0, math.floor(self.utilization * self.total) - self.weights)

    @property
    def tokens(self) -> int:
        """How many tokens the KV cache can hold at most; 0 when that is not known."""
        return self.kv // self.token if self.token else 0

    @property
    def most(self) -> int:
        """While a shadow starts beside the engine that serves and all the others are parked."""
        return self.serving + self.parked + self.starting

    @property
    def largest(self) -> float:
        """The largest --gpu-memory-utilization that leaves room for the shadows, in hundredths; 0 when none does."""
        room = self.total - CONTEXT - self.parked - self.starting
        found = math.floor(100 * room / self.total) / 100
        return found if found * self.total > self.weights else 0.0

    @property
    def largest_kv(self) -> int:
        """The most that the KV cache can have with that."""
        return max(0, math.floor(self.largest * self.total) - self.weights)

    @property
    def problem(self) -> str:
        """Why it does not fit, and what would; empty when it does."""
        if self.most <= self.total and self.kv:
            return ""
        if not self.largest:
            return (
                f"{self.weights / GIB:.1f} GiB of weights, an engine's context and the shadows take more than this GPU "
                f"has: a larger --tp or --pp, or fewer --shadows"
            )
        if self.utilization > self.largest:
            return f"the shadows find no room: --gpu-memory-utilization {self.largest:.2f} or less leaves it"
        return (
            f"the weights leave no room for a KV cache: --gpu-memory-utilization up to {self.largest:.2f}, "
            f"or a larger --tp"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu_bytes": self.total,
            "weights_bytes": self.weights,
            "gpu_memory_utilization": self.utilization,
            "kv_bytes_at_most": self.kv,
            "kv_tokens_at_most": self.tokens or None,
            "serving_bytes": self.serving,
            "parked_bytes": self.parked,
            "starting_bytes": self.starting,
            "largest_gpu_memory_utilization": self.largest,
            "largest_kv_bytes_at_most": self.largest_kv,
            "fits": not self.problem,
            "problem": self.problem,
        }

    def lines(self) -> list[str]:
        """The table, for people."""

        def holds(kv: int) -> str:
            return f", {kv // self.token:,} tokens" if self.token else ""

        rows = [
            ("the engine that serves, with", self.serving, f"--gpu-memory-utilization {self.utilization:g}"),
            ("  weights", self.weights, "one copy for all engines"),
            ("  KV cache, at most", self.kv, f"less what the engine works in{holds(self.kv)}"),
            ("parked engines", self.parked, ""),
            ("a shadow while it starts", self.starting, "scratch KV"),
            ("together", self.most, f"of {self.total / GIB:.1f} GiB"),
        ]
        if self.largest:
            with_flag = f"with --gpu-memory-utilization {self.largest:.2f}{holds(self.largest_kv)}"
            rows.append(("largest KV cache beside shadows", self.largest_kv, with_flag))
        said = [f"{name:<32}{size / GIB:>8.2f} GiB  {more}".rstrip() for name, size, more in rows]
        return [*said, self.problem or f"fits; --gpu-memory-utilization may be up to {self.largest:.2f}"]


def fit(settings: Settings, total: int, scratch_per_layer: bool) -> Fit:
    """Of a vLLM engine with these settings on GPUs of `total` bytes each. Reads the model's directory."""
    config = _config(Path(settings.model))
    given = dict(arguments.walk(settings.engine_args))
    weights = math.ceil(contents.weights(Path(settings.model)) / (settings.tp * settings.pp))
    layers = _whole(config, "num_hidden_layers")
    return Fit(
        total=total,
        weights=weights,
        utilization=_share(given.get("--gpu-memory-utilization", "")),
        parked=settings.shadows * PARKED,
        starting=(SCRATCH * max(1, math.ceil(layers / settings.pp) if scratch_per_layer else 1))
        * min(1, settings.shadows),
        token=_token(config, settings, given.get("--kv-cache-dtype", "auto")),
    )


def _share(text: str) -> float:
    try:
        share = real(text) if text else UTILIZATION
    except ValueError:
        return UTILIZATION  # the engine says what is wrong with it
    return share if 0 < share <= 1 else UTILIZATION


def _config(model: Path) -> Mapping[str, Any]:
    """The config of the language model in a directory; empty when there is none that can be read."""
    try:
        config = msgspec.json.decode((model / "config.json").read_bytes())
    except (OSError, msgspec.MsgspecError):
        return {}
    if not isinstance(config, dict):
        return {}
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def _whole(config: Mapping[str, Any], *names: str) -> int:
    """The first of these that is a positive whole number; 0 when none is."""
    found: Sequence[Any] = [config.get(name) for name in names]
    return next((v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 0), 0)


def _token(config: Mapping[str, Any], settings: Settings, kind: str) -> int:
    """Bytes that one token takes of one GPU's KV cache; 0 when the config does not tell."""
    layers = math.ceil(_whole(config, "num_hidden_layers") / settings.pp)
    own = config.get("torch_dtype") or config.get("dtype")
    width = 1 if kind.startswith("fp8") else _BYTES.get(str(own if kind == "auto" else kind), 0)
    if latent := _whole(config, "kv_lora_rank"):  # one latent vector for all heads, on every GPU
        return layers * width * (latent + _whole(config, "qk_rope_head_dim"))
    if config.get("layer_types") or config.get("layers_block_type"):
        return 0  # layers of several kinds, of which not all keep every token
    heads = _whole(config, "num_attention_heads")
    size = _whole(config, "head_dim") or (_whole(config, "hidden_size") // heads if heads else 0)
    kept = math.ceil((_whole(config, "num_key_value_heads") or heads) / settings.tp)
    return 2 * layers * kept * size * width
