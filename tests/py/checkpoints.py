# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints made by transformers, each with its model as the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "initializer_range": 0.15,
}
MOE: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}


def qwen3_5(**changes: Any) -> nn.Module:
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**SMALL | changes))


def qwen3_5_moe(**changes: Any) -> nn.Module:
    return transformers.Qwen3_5MoeForCausalLM(transformers.Qwen3_5MoeTextConfig(**SMALL | MOE | changes))


def qwen3_next(**changes: Any) -> nn.Module:
    return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**SMALL | MOE | changes))


def qwen3_5_wrapper(**changes: Any) -> nn.Module:
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3_5Config(text_config=SMALL | changes, vision_config=vision)
    return transformers.Qwen3_5ForConditionalGeneration(config)


@dataclass(frozen=True)
class Tiny:
    """One checkpoint: how to build the model, how to save it."""

    name: str
    build: Callable[..., nn.Module]
    changes: dict[str, Any] = field(default_factory=dict)
    save: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name


CHECKPOINTS = [
    Tiny("qwen3_5-dense", qwen3_5),
    Tiny(
        "qwen3_5-tied-bf16-sharded",
        qwen3_5,
        {"tie_word_embeddings": True, "linear_num_value_heads": 6, "attention_bias": True},
        {"max_shard_size": "100KB"},
        torch.bfloat16,
    ),
    Tiny(
        "qwen3_5-moe",
        qwen3_5_moe,
        {"linear_value_head_dim": 32, "linear_num_value_heads": 2, "linear_conv_kernel_dim": 3},
    ),
    Tiny("qwen3_5-wrapper", qwen3_5_wrapper, {"linear_num_key_heads": 1, "linear_num_value_heads": 8}),
    Tiny("qwen3_next-mixed", qwen3_next, {"decoder_sparse_step": 2, "mlp_only_layers": [1], "attention_bias": True}),
    Tiny(
        "qwen3_next-moe",
        qwen3_next,
        {
            "norm_topk_prob": False,
            "num_hidden_layers": 6,
            "layer_types": ["linear_attention", "full_attention"] * 3,
            "linear_key_head_dim": 32,
            "linear_conv_kernel_dim": 2,
        },
    ),
]


def randomize(model: nn.Module) -> None:
    """Norms, biases, gates: what the initialisation leaves at zero or one would hide a mistake."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "visual" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)


def make(tiny: Tiny, folder: Path) -> tuple[Path, nn.Module]:
    """Save the checkpoint; return its directory and the model in float32 as transformers loads it from there."""
    torch.manual_seed(11)
    model = tiny.build(**tiny.changes)
    randomize(model)
    directory = folder / tiny.name
    model.to(tiny.dtype).save_pretrained(directory, **tiny.save)
    reference = type(model).from_pretrained(directory, dtype=torch.float32).eval()
    return directory, reference


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny products are slower on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy continuation of one prompt."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    with one_thread():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()
