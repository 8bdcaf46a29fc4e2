# SPDX-License-Identifier: Apache-2.0
"""The accuracy gate: held-out perplexity of the trained model, for every backend and type of state."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

import xgdn

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_model"
FOUR_DIGITS = 5e-5


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("perplexity", FOLDER / "perplexity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["perplexity"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def half_window(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "WINDOW", 256)  # still four chunks and sixteen blocks of the cache


@torch.no_grad()
@pytest.mark.usefixtures("half_window")
def test_perplexity_equals_transformers(program: ModuleType) -> None:
    windows = program.held_out_windows(2)
    want = program.by_transformers(windows)
    assert 2 < want < 20  # the model has learned something
    figures = program.figures(windows, ("cpu", "reference"))
    assert set(figures) == set(product(("cpu", "reference"), ("prefill", "decode"), ("f32", "bf16")))
    for (backend, phase, state), got in figures.items():
        tolerance = FOUR_DIGITS if state == "f32" else 1e-3
        assert abs(got / want - 1) < tolerance, (backend, phase, state)


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("quantize", "share"), [("int8", 1e-3), ("int4", 2e-2)])
def test_perplexity_of_rounded_weights(
    program: ModuleType, quantize: str, share: float, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = program.held_out_windows(4)
    for dtype in (torch.bfloat16, torch.float32):
        want = program.by_prefill(windows, program.Numbers(dtype))
        got = program.by_prefill(windows, program.Numbers(dtype, quantize=quantize, activation_bits=bits))
        assert 0 < abs(got / want - 1) < share, dtype
    monkeypatch.setattr(program, "WINDOW", 256)
    windows = program.held_out_windows(2)
    prefilled, decoded = (
        read(windows, program.Numbers(dtype, quantize=quantize, activation_bits=bits))
        for read in (program.by_prefill, program.by_decode)
    )
    assert abs(decoded / prefilled - 1) < (3e-4 if bits == 16 else 3e-3)  # a last bit may turn an integer of 8 bits


@torch.no_grad()
def test_perplexity_of_int8_keys_and_values(program: ModuleType) -> None:
    """Within 0.05 % of those of float32; decode reads what prefill reads, but for codes that the last bits of a key
    turn, which whole windows average.
    """
    windows = program.held_out_windows(2)
    want = program.by_prefill(windows, program.Numbers())
    numbers = program.Numbers(kv_dtype=torch.int8)
    got = program.by_prefill(windows, numbers)
    assert 0 < abs(got / want - 1) < 5e-4
    assert abs(program.by_decode(windows, numbers) / got - 1) < 2e-5


@pytest.mark.usefixtures("half_window")
def test_a_model_that_is_slightly_off_is_seen(program: ModuleType, tmp_path: Path) -> None:
    """A decay one per cent too strong in one layer of eight is more than the gate lets pass."""
    off = tmp_path / "off"
    shutil.copytree(program.MODEL, off)
    weights = load_file(off / "model.safetensors")
    weights["model.layers.0.linear_attn.A_log"] += 1e-2
    save_file(weights, off / "model.safetensors", metadata={"format": "pt"})
    windows = program.held_out_windows(2)
    engines = [xgdn.Engine(model, dtype=torch.float32) for model in (program.MODEL, off)]
    logits = [torch.stack([engine.prompt_logits(window.tolist()) for window in windows]) for engine in engines]
    right, wrong = (program.perplexity(x, windows) for x in logits)
    print(wrong / right - 1)
    assert abs(wrong / right - 1) > FOUR_DIGITS


def test_checkpoint_is_small_and_complete() -> None:
    checkpoint = FOLDER / "checkpoint"
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 16 * 2**20
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["linear_num_value_heads"] >= 2 * config["linear_num_key_heads"]
    engine = xgdn.Engine(checkpoint)
    [result] = engine.generate([[1, 2, 3]], max_new_tokens=3, ignore_eos=True)
    assert len(result.tokens) == 3
