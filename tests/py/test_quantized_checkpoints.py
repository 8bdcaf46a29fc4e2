# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in 8 and 4 bits: the logits are those of the float64 weights that the parts stand for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import xgdn
from checkpoints import CHECKPOINTS, MOE, Tiny, make, one_thread, qwen3_5, qwen3_5_moe, qwen3_5_wrapper, qwen3_next
from quantized_checkpoints import (
    HEAD,
    PRODUCTS,
    SCHEMES,
    Scheme,
    Tensors,
    awq,
    fp8,
    gptq,
    int8,
    packed,
    quantize,
    reference,
)

TRAINED = Path(__file__).parents[2] / "examples/tiny_model/checkpoint"
PROMPT = [3, 14, 15, 92, 65, 35]
RUNNER = xgdn.RunnerOptions(max_batch_size=2, max_cached_tokens=64)
WIDE_MOE = {"shared_expert_intermediate_size": 64, "moe_intermediate_size": 64}
DENSE = CHECKPOINTS[0]
OTHERS = [
    Tiny("qwen3_5-wrapper", qwen3_5_wrapper),
    Tiny("qwen3_5-moe", qwen3_5_moe, WIDE_MOE),
    Tiny("qwen3_next", qwen3_next, WIDE_MOE | {"mlp_only_layers": [1]}),
    Tiny("qwen3_5-biases", qwen3_5, {"attention_bias": True, "tie_word_embeddings": True}),
]
EACH_METHOD = [fp8(), gptq(4, 32, symmetric=False), awq(32), packed(4, 32, symmetric=True)]


def with_head(scheme: Scheme) -> Scheme:
    return replace(scheme, weights=PRODUCTS + HEAD)


def load(directory: Path, backend: str = "auto") -> xgdn.Engine:
    return xgdn.Engine(directory, dtype=torch.float32, runner=RUNNER, prefill_backend=backend, decode_backend=backend)


def assert_logits(directory: Path, model: nn.Module) -> None:
    """Of the weights as they are, and within the rounding of activations of the kernels that people run."""
    with torch.no_grad(), one_thread():
        want = model(torch.tensor([PROMPT])).logits[0].double()
        for backend, most in (("reference", 1e-5), ("auto", 2e-3)):
            engine = load(directory, backend)
            assert not engine.load_report.warnings
            got = engine.prompt_logits(PROMPT).double()
            assert float((got - want).norm() / want.norm()) < most, backend


def quantized(tiny: Tiny, scheme: Scheme, folder: Path) -> tuple[Path, nn.Module]:
    """The checkpoint in the scheme, and the model with the weights that it stands for."""
    plain, model = make(tiny, folder)
    truth = quantize(plain, scheme, folder / "quantized")
    return folder / "quantized", reference(type(model), plain, truth, folder / "reference")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_logits(tmp_path: Path, scheme: Scheme) -> None:
    directory, model = quantized(DENSE, scheme, tmp_path)
    assert_logits(directory, model)


@pytest.mark.parametrize("scheme", EACH_METHOD, ids=str)
@pytest.mark.parametrize("tiny", OTHERS, ids=str)
def test_logits_of_other_models(tmp_path: Path, tiny: Tiny, scheme: Scheme) -> None:
    directory, model = quantized(tiny, scheme, tmp_path)
    assert_logits(directory, model)


@pytest.mark.parametrize("scheme", EACH_METHOD, ids=str)
def test_a_quantized_head(tmp_path: Path, scheme: Scheme) -> None:
    directory, model = quantized(DENSE, with_head(scheme), tmp_path)
    assert_logits(directory, model)


@pytest.mark.parametrize("scheme", [awq(32), fp8()], ids=str)
def test_projections_of_gates_that_are_quantized_too(tmp_path: Path, scheme: Scheme) -> None:
    tiny = Tiny("eight-heads", qwen3_5, {"linear_num_value_heads": 8})
    gates = r"|linear_attn\.in_proj_(a|b)\.weight$"
    directory, model = quantized(tiny, replace(scheme, weights=PRODUCTS + gates), tmp_path)
    assert_logits(directory, model)


def test_fused_experts_with_scales_beside_them(tmp_path: Path) -> None:
    plain, model = make(Tiny("moe", qwen3_5_moe, WIDE_MOE), tmp_path)
    tensors: Tensors = {}
    stacks: dict[str, list[torch.Tensor]] = {}
    for name, tensor in sorted(load_file(plain / "model.safetensors").items()):
        layer, _, rest = name.partition(".experts.")
        if not rest or "shared" in name:
            tensors[name] = tensor
        else:
            stacks.setdefault(f"{layer}.experts.{rest.split('.')[1]}", []).append(tensor)
    for name, stack in stacks.items():
        if name.endswith("gate_proj"):
            up = stacks[name.replace("gate_proj", "up_proj")]
            tensors[name.replace("gate_proj", "gate_up_proj")] = torch.cat([torch.stack(stack), torch.stack(up)], 1)
        elif name.endswith("down_proj"):
            tensors[name] = torch.stack(stack)
    assert sum("experts.gate_up_proj" in name for name in tensors) == 4
    assert len(stacks) == 12
    assert len(stacks["model.layers.0.mlp.experts.down_proj"]) == MOE["num_experts"]
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})

    truth = quantize(plain, fp8(torch.float32), tmp_path / "quantized")
    assert "model.layers.0.mlp.experts.gate_up_proj_scale_inv" in load_file(tmp_path / "quantized/model.safetensors")
    assert_logits(tmp_path / "quantized", reference(type(model), plain, truth, tmp_path / "reference"))


@torch.no_grad()
@pytest.mark.parametrize("scheme", [*EACH_METHOD, gptq(8, 64, symmetric=True, desc_act=True), int8()], ids=str)
def test_perplexity_of_the_trained_model(tmp_path: Path, scheme: Scheme) -> None:
    """As that of the float64 weights, to four digits."""
    truth = quantize(TRAINED, scheme, tmp_path / "quantized")
    model = reference(transformers.Qwen3_5ForCausalLM, TRAINED, truth, tmp_path / "reference")
    text = (TRAINED / "held_out.txt").read_text(encoding="utf-8")
    window = Tokenizer.from_file(str(TRAINED / "tokenizer.json")).encode(text).ids[:512]

    def perplexity(logits: torch.Tensor) -> float:
        return nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(window[1:])).exp().item()

    want = perplexity(model(torch.tensor([window])).logits[0])
    runner = xgdn.RunnerOptions(max_batch_size=1, max_cached_tokens=512)
    engine = xgdn.Engine(tmp_path / "quantized", dtype=torch.float32, runner=runner)
    assert abs(perplexity(engine.prompt_logits(window)) / want - 1) < 5e-5


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint, not to be changed."""
    return make(DENSE, tmp_path_factory.mktemp("dense"))[0]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_plan_is_what_the_engine_takes(tmp_path: Path, dense: Path, scheme: Scheme) -> None:
    quantize(dense, with_head(scheme), tmp_path / "quantized")
    for dtype in (None, torch.bfloat16):
        plan = xgdn.Engine.plan(tmp_path / "quantized", dtype=dtype, runner=RUNNER)
        engine = xgdn.Engine(tmp_path / "quantized", dtype=dtype, runner=RUNNER, memory_limit=plan.total_bytes)
        assert engine.memory_bytes["weights"] == plan.weight_bytes
        assert plan.weight_bytes < xgdn.Engine.plan(dense, dtype=dtype, runner=RUNNER).weight_bytes


@pytest.mark.parametrize("scheme", [fp8(torch.float32, 16), fp8(torch.float32, 32)], ids=str)
def test_transformers_reads_the_same_from_fp8(scheme: Scheme) -> None:
    """Its own dequantization gives the weights that these tests take for the truth, where blocks divide the weight."""
    weight = torch.randn(64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    parts, truth = scheme.store(weight)
    got = Fp8Dequantize(None).convert(parts)["weight"].double()
    assert torch.allclose(got, truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.config["quant_method"] == "compressed-tensors"], ids=str)
def test_compressed_tensors_reads_the_same(scheme: Scheme) -> None:
    """Its own decompressor gives the weights that these tests take for the truth."""
    weight = torch.randn(48, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    parts, truth = scheme.store(weight)
    group = QuantizationScheme.model_validate(scheme.config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(scheme.config["format"])
    parts["weight_scale"] = parts["weight_scale"].float()  # the result has the dtype of the scales
    got = compressor.decompress(parts, group)["weight"].double()
    assert torch.allclose(got, truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", EACH_METHOD, ids=str)
def test_files_without_the_config_are_refused(tmp_path: Path, scheme: Scheme) -> None:
    plain, _ = make(DENSE, tmp_path)
    quantize(plain, scheme, tmp_path / "quantized")
    (tmp_path / "quantized/config.json").write_text((plain / "config.json").read_text())
    with pytest.raises(xgdn.errors.CheckpointError, match=r"(quantization_config|F8_E4M3)"):
        load(tmp_path / "quantized")


@pytest.mark.parametrize(
    "name", ["embed_tokens", "layers.0.mlp.gate", "layers.0.mlp.shared_expert_gate", "layers.0.linear_attn.norm"]
)
def test_what_must_be_plain(tmp_path: Path, name: str) -> None:
    plain, _ = make(Tiny("moe", qwen3_5_moe, WIDE_MOE), tmp_path)
    quantize(plain, fp8(), tmp_path / "quantized")
    file = tmp_path / "quantized/model.safetensors"
    tensors = load_file(file)
    weight = f"model.{name}.weight"
    tensors[weight] = tensors[weight].to(torch.float8_e4m3fn)
    tensors[f"model.{name}.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, file)
    with pytest.raises(xgdn.errors.CheckpointError, match=f"{weight}.*BF16.*got F8_E4M3"):
        load(tmp_path / "quantized")


def test_parts_that_the_scheme_does_not_explain_are_refused(tmp_path: Path) -> None:
    plain, _ = make(DENSE, tmp_path)
    quantize(plain, awq(32), tmp_path / "quantized")
    file = tmp_path / "quantized/model.safetensors"
    save_file(load_file(file) | {"model.layers.0.mlp.down_proj.weight_scale": torch.ones(1)}, file)
    for read in (load, xgdn.Engine.plan):
        with pytest.raises(xgdn.errors.CheckpointError, match=r"config\.json explains.*down_proj\.weight_scale"):
            read(tmp_path / "quantized")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qweight", None, "a tensor of that name.*none"),
        ("qweight", lambda t: t.float(), "dtype I32.*F32"),
        ("qzeros", lambda t: t | 15, "zero points from 0 to 15.*16"),
        ("scales", lambda t: t[:1].contiguous(), r"\[2, 96\].*\[1, 96\]"),
        ("scales", lambda t: t * float("inf"), "finite"),
        ("g_idx", lambda t: t + 1, "groups from 0 to 1.*2"),
        ("g_idx", lambda t: t - 1, "groups from 0 to 1.*-1"),
    ],
)  # fmt: skip
def test_malformed_parts_are_named(tmp_path: Path, part: str, change: object, message: str) -> None:
    plain, _ = make(DENSE, tmp_path)
    quantize(plain, gptq(4, 32, symmetric=False, desc_act=True), tmp_path / "quantized")
    file = tmp_path / "quantized/model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.2.mlp.up_proj.{part}"
    tensor = tensors.pop(name)
    if callable(change):
        tensors[name] = change(tensor)
    save_file(tensors, file)
    with pytest.raises(xgdn.errors.CheckpointError, match=f"(?s){name}.*{message}"):
        load(tmp_path / "quantized")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_unknown_methods_are_refused_with_a_list(tmp_path: Path, key: str) -> None:
    plain, _ = make(DENSE, tmp_path)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {key: {"quant_method": "bitsandbytes"}}))
    for read in (load, xgdn.Engine.plan):
        with pytest.raises(
            xgdn.errors.CheckpointError, match=rf"{key}.*awq, compressed-tensors, fp8, gptq.*'bitsandbytes'"
        ):
            read(plain)
