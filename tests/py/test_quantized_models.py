# SPDX-License-Identifier: Apache-2.0
"""Plain checkpoints whose weights are rounded to 8 or 4 bits while they are loaded, against transformers with the same
weights rounded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import xgdn
from checkpoints import CHECKPOINTS, Tiny, greedy, make, qwen3_5, qwen3_5_moe
from quantized_calls import plain
from test_models import assert_logits_close, pieces_logits, reference_logits
from xgdn import _C, errors
from xgdn.cli import app
from xgdn.quantization import QuantizedRows, pack, quantize

Format = Literal["int8", "int4"]
FORMATS: tuple[Format, ...] = ("int8", "int4")
ROUNDED = {
    "in_proj_qkv", "in_proj_z", "in_proj_qkvz", "out_proj", "q_proj", "k_proj", "v_proj",
    "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "lm_head",
}  # fmt: skip


def rounded(name: str, weight: Tensor, format: Format) -> QuantizedRows | None:
    """What becomes of a weight of that name; None where it stays plain."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    if module not in ROUNDED or "visual" in name or weight.shape[-1] % 32 != 0:
        return None
    format = "int8" if module == "lm_head" else format
    size = 64 if format == "int8" and weight.shape[-1] % 64 == 0 else 32
    return quantize(weight.flatten(0, -2), format, group_size=size)


def round_weights(model: nn.Module, dtype: torch.dtype, format: Format) -> int:
    """Put the rounded weights into the model; return the bytes that an engine in float32 keeps of it."""
    head = model.lm_head
    embedding = model.get_input_embeddings().weight
    is_tied = head.weight is embedding
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    count = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "visual" in name:
                continue
            rows = rounded(name, parameter.to(dtype), format)
            if rows is None:
                count += 4 * parameter.numel()
            else:
                parameter.copy_(plain(rows).view_as(parameter))
                count += sum(t.nbytes for t in pack(rows) if t is not None)
    assert is_tied == model.config.get_text_config().tie_word_embeddings
    return count


@dataclass(frozen=True)
class Rounded:
    directory: Path
    format: Format
    reference: nn.Module
    weight_bytes: int
    unrounded: nn.Module


# Dense, tied bf16 with a bias, experts, with rows of q, k, v and z head by head: [q | k | v | z].
CHOSEN = [tiny for tiny in CHECKPOINTS if tiny.name not in {"qwen3_5-wrapper", "qwen3_next-mixed"}]


@pytest.fixture(scope="module", params=[(t, f) for t in CHOSEN for f in FORMATS], ids=lambda p: f"{p[0]}-{p[1]}")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rounded:
    tiny: Tiny
    tiny, format = request.param
    directory, reference = make(tiny, tmp_path_factory.mktemp("rounded"))
    unrounded = type(reference).from_pretrained(directory, dtype=torch.float32).eval()
    return Rounded(directory, format, reference, round_weights(reference, tiny.dtype, format), unrounded)


def prompt_of(length: int) -> list[int]:
    return torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def load(directory: Path, format: str, **options: object) -> xgdn.Engine:
    return xgdn.Engine(directory, dtype=torch.float32, quantize=format, **options)


def row_errors(got: Tensor, want: Tensor) -> Tensor:
    return (got.double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1)


def assert_close_to_16_bits(got: Tensor, want: Tensor) -> None:
    """A product is 3e-5 off where x has 16 bits; these models make ten times that of it, and more in a few rows, whose
    choice of experts was nearly a tie."""
    error = row_errors(got, want)
    assert error.median() <= (6e-4 if len(error) > 50 else 2e-2)
    assert (error > 2e-2).double().mean() <= 0.05


@pytest.mark.parametrize("length", [1, 65, 200])
def test_products_in_float32_equal_transformers(model: Rounded, length: int) -> None:
    """The reference backend leaves x as it is."""
    prompt = prompt_of(length)
    with xgdn.use_backend("reference"):
        got = load(model.directory, model.format).prompt_logits(prompt)
    assert_logits_close(got, reference_logits(model.reference, prompt))


@pytest.mark.parametrize("length", [65, 200])
def test_products_in_16_bits_are_close_to_transformers(model: Rounded, length: int) -> None:
    prompt = prompt_of(length)
    got = load(model.directory, model.format).prompt_logits(prompt)
    want = reference_logits(model.reference, prompt)
    assert_close_to_16_bits(got, want)
    # Rounding the weights changes far more: the comparison tells them apart.
    assert row_errors(reference_logits(model.unrounded, prompt), want).median() > 2e-2


@pytest.mark.parametrize("length", [65, 200])
def test_activations_in_8_bits(model: Rounded, length: int) -> None:
    """An activation is off by up to 1/254 of the largest of its group, as those of these models are often."""
    prompt = prompt_of(length)
    want = reference_logits(model.reference, prompt)
    logits = {bits: load(model.directory, model.format, activation_bits=bits).prompt_logits(prompt) for bits in (8, 16)}
    error = {bits: row_errors(got, want).median() for bits, got in logits.items()}
    assert 10 * error[16] < error[8] < 0.15


@pytest.mark.parametrize("ask", [xgdn.Engine, xgdn.plan], ids=["Engine", "plan"])
def test_activations_that_there_are_not(tmp_path: Path, ask: Callable[..., object]) -> None:
    directory = tiny_model(tmp_path, num_hidden_layers=1)
    with pytest.raises(errors.UnsupportedError, match=r"\[Engine\] activation_bits: expected 8 or 16, got 4"):
        ask(directory, quantize="int8", activation_bits=4)
    with pytest.raises(errors.UnsupportedError, match="activation_bits: expected 16 beside plain weights, got 8"):
        ask(directory, activation_bits=8)


def test_gates_norms_and_embeddings_stay_plain(model: Rounded) -> None:
    engine = load(model.directory, model.format)
    assert engine.memory_bytes["weights"] == model.weight_bytes


def test_a_plan_is_what_the_engine_takes(model: Rounded) -> None:
    runner = xgdn.RunnerOptions(max_batch_size=3, max_cached_tokens=100, max_tokens_per_step=128)
    for dtype in (None, torch.bfloat16):
        plan = xgdn.plan(model.directory, dtype=dtype, quantize=model.format, runner=runner)
        options = {"dtype": dtype, "quantize": model.format, "runner": runner, "memory_limit": plan.total_bytes}
        engine = xgdn.Engine(model.directory, **options)
        assert engine.memory_bytes == {
            "weights": plan.weight_bytes,
            "states": plan.state_bytes,
            "kv_cache": plan.kv_bytes,
        }
    assert plan.weight_bytes < xgdn.plan(model.directory, dtype=torch.bfloat16).weight_bytes


def test_prefill_in_one_piece_in_pieces_and_token_by_token_agree(model: Rounded) -> None:
    prompt = prompt_of(200)
    want = reference_logits(model.reference, prompt)
    decoder = _C.load_decoder(
        str(model.directory), dtype=torch.float32, state_dtype=torch.float32, quantize=model.format
    )
    ends = torch.tensor([64, 192, 200]) - 1
    assert_close_to_16_bits(pieces_logits(decoder, prompt, [64, 128, 8], _C.SegmentKind.PREFILL), want[ends])
    assert_close_to_16_bits(pieces_logits(decoder, prompt, [1] * 200, _C.SegmentKind.DECODE), want)
    assert_close_to_16_bits(pieces_logits(decoder, prompt, [200], _C.SegmentKind.PREFILL), want[-1:])


def test_greedy_tokens_in_a_batch_equal_transformers(model: Rounded) -> None:
    """Up to the first choice that is nearly a tie."""
    prompts = [prompt_of(length) for length in (1, 5, 64, 129)]
    engine = load(model.directory, model.format, runner=xgdn.RunnerOptions(max_batch_size=3, max_tokens_per_step=64))
    results = engine.generate(prompts, max_new_tokens=8, ignore_eos=True)
    num_compared = 0
    for prompt, result in zip(prompts, results, strict=True):
        want = greedy(model.reference, prompt, 8)
        logits = reference_logits(model.reference, prompt + want)[len(prompt) - 1 : -1]
        best, second = logits.topk(2, dim=-1).values.unbind(-1)
        is_clear = (best - second > 0.02 * logits.norm(dim=-1) / logits.shape[-1] ** 0.5).cumprod(0).bool()
        count = int(is_clear.sum())
        assert result.tokens[:count] == want[:count]
        num_compared += count
    assert num_compared > 12


# ---- what cannot be rounded -----------------------------------------------------------------------------------------


def tiny_model(folder: Path, **changes: object) -> Path:
    return make(Tiny("tiny", qwen3_5, changes), folder)[0]


def test_widths_without_groups_stay_plain(tmp_path: Path) -> None:
    """Of the products only down_proj has another width than hidden_size's 48 that 32 divides, and the heads' out_proj
    and o_proj."""
    changes = {"hidden_size": 48, "intermediate_size": 40}
    directory, reference = make(Tiny("tiny", qwen3_5, changes), tmp_path)
    want_bytes = round_weights(reference, torch.float32, "int4")
    engine = load(directory, "int4")
    assert engine.memory_bytes["weights"] == want_bytes == xgdn.plan(directory, quantize="int4").weight_bytes
    assert want_bytes > 0.8 * xgdn.plan(directory).weight_bytes
    prompt = prompt_of(30)
    assert_close_to_16_bits(engine.prompt_logits(prompt), reference_logits(reference, prompt))


def test_experts_of_which_only_one_weight_has_groups_are_refused(tmp_path: Path) -> None:
    directory = make(Tiny("tiny", qwen3_5_moe, {"moe_intermediate_size": 40}), tmp_path)[0]
    for ask in (load, xgdn.plan):
        with pytest.raises(errors.UnsupportedError, match=r"experts: expected .* both quantized, or neither"):
            ask(directory, quantize="int8") if ask is xgdn.plan else ask(directory, "int8")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    directory = tiny_model(tmp_path)
    weights = load_file(directory / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    weights[name][3, 5] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.CheckpointError, match=rf"^\[Engine\] quantize: {name}: .* expected finite values"):
        load(directory, "int8")


@pytest.mark.parametrize("format", ["int3", "float8", ""])
def test_formats_that_there_are_not(tmp_path: Path, format: str) -> None:
    directory = tiny_model(tmp_path, num_hidden_layers=1)
    for ask in (xgdn.Engine, xgdn.plan):
        with pytest.raises(
            errors.UnsupportedError, match=rf"\[Engine\] quantize: expected int8 or int4, got '{format}'"
        ):
            ask(directory, quantize=format)


def test_the_commands_take_the_format(tmp_path: Path) -> None:
    directory = tiny_model(tmp_path)
    run = CliRunner(env={"FORCE_COLOR": None}).invoke
    document = json.loads(run(app, ["plan", str(directory), "--quantize", "int4", "--json"]).stdout)
    assert document["weight_bytes"] == xgdn.plan(directory, quantize="int4").weight_bytes
    arguments = ["generate", str(directory), "--prompt-ids", "1,2,3", "--max-new-tokens", "4", "--dtype", "float32"]
    result = run(app, [*arguments, "--quantize", "int8"])
    assert result.exit_code == 0, result.output
    [want] = load(directory, "int8").generate([[1, 2, 3]], max_new_tokens=4)
    assert " ".join(map(str, want.tokens)) in result.stdout
    refused = run(app, ["plan", str(directory), "--quantize", "int3"])
    assert refused.exit_code != 0
    assert "int8" in refused.output
