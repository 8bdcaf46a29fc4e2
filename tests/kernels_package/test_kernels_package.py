# SPDX-License-Identifier: Apache-2.0
"""transformers with layers of the package `kernels`: its own tokens, every call of a layer here counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import xgdn
from checkpoints import CHECKPOINTS, SMALL, Tiny, one_thread, randomize
from kernels import Mode, kernelize, use_kernel_mapping

LENGTHS = (19, 7, 3)
NEW_TOKENS = 8


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    xgdn.report(reset=True)
    with one_thread():
        yield
    xgdn.report(reset=True)


def build(tiny: Tiny) -> Any:
    torch.manual_seed(11)
    model: Any = tiny.build(**tiny.changes)
    randomize(model)
    return model.float().eval()


def kernelized(model: Any, mapping: dict[str, Any], mode: Mode = Mode.INFERENCE) -> Any:
    """The model with the layers of the mapping; without one, as it was: functions are the process's, not a model's."""
    with use_kernel_mapping(mapping, inherit_mapping=False):
        return kernelize(model, mode=mode, device="cpu")


def generate(model: Any, side: str = "left") -> Tensor:
    """Of three prompts, padded on one side."""
    generator = torch.Generator().manual_seed(3)
    ids, mask = torch.zeros(2, len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        where = slice(-length, None) if side == "left" else slice(length)
        ids[row, where] = torch.randint(1, SMALL["vocab_size"], (length,), generator=generator)
        mask[row, where] = 1
    count = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    tokens: Tensor = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **count)
    return tokens


def served() -> dict[str, int]:
    report = xgdn.report(reset=True)
    assert report.fallbacks == 0, str(report)
    return {f.function: f.served for f in report.functions}


def num_gdn_layers(model: Any) -> int:
    return sum(type(m).__name__.endswith("GatedDeltaNet") for m in model.modules())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layers", [False, True], ids=["functions", "layers"])
@pytest.mark.parametrize("tiny", CHECKPOINTS, ids=lambda tiny: tiny.name)
def test_tokens_are_the_host_s(tiny: Tiny, layers: bool, side: str) -> None:
    model = build(tiny)
    want = generate(kernelized(model, {}), side)
    assert served() == {}
    kernelized(model, xgdn.kernel_mapping(layers=layers))
    assert torch.equal(generate(model, side), want)
    prompts, tokens = num_gdn_layers(model), num_gdn_layers(model) * (NEW_TOKENS - 1)
    if layers and type(model).__name__.startswith("Qwen3_5"):
        assert served() == {"GatedDeltaNet": prompts, "GatedDeltaNet, one token": tokens}
    else:  # the host names no whole layer of Qwen3-Next
        assert served() == {
            "RMSNormGated": prompts + tokens,
            "causal_conv1d_fn": prompts,
            "causal_conv1d_update": tokens,
            "chunk_gated_delta_rule": prompts,
            "fused_recurrent_gated_delta_rule": tokens,
        }
    kernelized(model, {})
    assert torch.equal(generate(model, side), want)
    assert served() == {}


def test_training_keeps_the_host_s_own() -> None:
    model = kernelized(build(CHECKPOINTS[0]).train(), xgdn.kernel_mapping(layers=True), Mode.TRAINING)
    ids = torch.randint(1, SMALL["vocab_size"], (1, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad is not None
    assert served() == {}
