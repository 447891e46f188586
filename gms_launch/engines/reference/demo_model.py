"""Make a small model directory: safetensors weights of any size, a tokenizer, and the JSON files a frontend reads.

The weights are random numbers from a fixed seed: the same size and seed give the same model and so the same text.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

VOCABULARY = 4096
HIDDEN = 1024
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(directory: Path, mib: int, seed: int = 1) -> int:
    """Write the model; returns the bytes of its weights (about `mib` MiB, at least 1). Replaces what is there."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = make_tokenizer(directory, seed)
    size = _weights(directory, max(1, mib) * 1024 * 1024, seed)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    return size


def _weights(directory: Path, size: int, seed: int) -> int:
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    row = HIDDEN * 4
    rows = max(2, size // row)
    layers = max(1, min(16, rows // 1024))
    tensors = {}
    for layer in range(layers):
        share = rows * (layer + 1) // layers - rows * layer // layers
        tensors[f"model.layers.{layer}.weight"] = rng.standard_normal((share, HIDDEN), dtype=np.float32)
    save_file(tensors, directory / "model.safetensors")
    return int(sum(t.nbytes for t in tensors.values()))


def make_tokenizer(directory: Path, seed: int) -> int:
    """A byte-level BPE over made-up words of two-letter syllables; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfghklmnprstvz" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(6000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((" ".join(rng.choices(words, k=40)) for _ in range(3000)), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "model_max_length": 4096,
        "chat_template": _TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return int(tokenizer.get_vocab_size())
