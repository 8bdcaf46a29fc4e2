# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are not as transformers saves them: what loads, with the same logits, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import xgdn
from checkpoints import CHECKPOINTS, Tiny, make, one_thread, qwen3_5

Tensors = dict[str, torch.Tensor]
PROMPT = [3, 14, 15, 92, 65, 35]
DENSE = CHECKPOINTS[0]
WRAPPER = next(tiny for tiny in CHECKPOINTS if tiny.name == "qwen3_5-wrapper")
MOE = next(tiny for tiny in CHECKPOINTS if tiny.name == "qwen3_5-moe")
DOWN = "model.layers.0.mlp.down_proj.weight"
OPTIONS = xgdn.engine.RunnerOptions(max_batch_size=1, max_cached_tokens=64)


def configure(directory: Path, **changes: Any) -> None:
    """Set keys of config.json; `...` removes one."""
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = directory / "model.safetensors"
    tensors = change({name: tensor.clone() for name, tensor in load_file(file).items()})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def rename(directory: Path, old: str, new: str) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}

    rewrite(directory, change)


def add(directory: Path, names: Iterable[str], tensor: torch.Tensor | None = None) -> None:
    value = torch.ones(1) if tensor is None else tensor
    rewrite(directory, lambda tensors: tensors | {name: value.clone() for name in names})


def load(directory: Path, dtype: torch.dtype | None = torch.float32) -> xgdn.Engine:
    return xgdn.Engine(directory, dtype=dtype, runner=OPTIONS)


def weight_bytes(directory: Path, dtype: torch.dtype | None = torch.float32) -> int:
    return xgdn.engine.plan(directory, dtype=dtype, runner=OPTIONS).weight_bytes


def assert_logits(engine: xgdn.Engine, model: nn.Module) -> None:
    with torch.no_grad(), one_thread():
        want = model(torch.tensor([PROMPT])).logits[0].double()
        got = engine.prompt_logits(PROMPT).double()
    assert float((got - want).norm() / want.norm()) < 1e-4


@pytest.fixture
def dense(tmp_path: Path) -> tuple[Path, nn.Module]:
    return make(DENSE, tmp_path)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.lm_head.weight", "language_model.lm_head.weight"])
def test_own_head_beside_a_tied_flag_is_used(dense: tuple[Path, nn.Module], name: str, capfd: Any) -> None:
    directory, model = dense
    size = weight_bytes(directory)
    rename(directory, "lm_head.weight", name)
    configure(directory, tie_word_embeddings=True)
    if name == "lm_head.weight":
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    engine = load(directory)
    assert_logits(engine, model)
    assert engine.load_report.uses_own_head
    assert "tie_word_embeddings" in capfd.readouterr().err
    assert weight_bytes(directory) == size


@pytest.mark.parametrize("kept", ["both", "embedding", "head"])
def test_tied_tables_are_one(tmp_path: Path, kept: str) -> None:
    directory, model = make(Tiny("tied", qwen3_5, {"tie_word_embeddings": True}), tmp_path)
    size = weight_bytes(directory)

    def change(tensors: Tensors) -> Tensors:
        table = tensors.pop("model.embed_tokens.weight")
        names = {"both": ["model.embed_tokens.weight", "lm_head.weight"], "head": ["lm_head.weight"]}
        return tensors | {name: table.clone() for name in names.get(kept, ["model.embed_tokens.weight"])}

    rewrite(directory, change)
    engine = load(directory)
    assert_logits(engine, model)
    assert weight_bytes(directory) == size
    assert not engine.load_report.warnings


def test_level_of_the_tied_flag(tmp_path: Path) -> None:
    directory, _ = make(WRAPPER, tmp_path)
    rewrite(directory, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    text = json.loads((directory / "config.json").read_text())["text_config"]
    configure(directory, tie_word_embeddings=False, text_config=text | {"tie_word_embeddings": True})
    with pytest.raises(xgdn.errors.CheckpointError, match=r"lm_head\.weight"):
        load(directory)
    configure(directory, tie_word_embeddings=True, text_config=text | {"tie_word_embeddings": False})
    model = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    assert_logits(load(directory), model)


@pytest.mark.parametrize(
    "name",
    [
        "weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "qweight", "qzeros", "scales", "g_idx",
        "SCB", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4", "weight_packed",
        "weight_shape", "weight_zero_point", "input_quantizer._amax",
    ],
)  # fmt: skip
@pytest.mark.parametrize("module", ["model.layers.0.mlp.down_proj", "lm_head"])
def test_tensors_of_a_quantizer_are_refused(dense: tuple[Path, nn.Module], module: str, name: str) -> None:
    directory, _ = dense
    add(directory, [f"{module}.{name}"])
    with pytest.raises(xgdn.errors.CheckpointError, match=f"(?s)quantize.*{module}.{name}"):
        load(directory)
    with pytest.raises(xgdn.errors.CheckpointError, match=name):
        xgdn.engine.plan(directory)


def test_scales_of_experts_are_refused(tmp_path: Path) -> None:
    directory, model = make(MOE, tmp_path)
    experts = "model.layers.0.mlp.experts."

    def fuse(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(experts)}
        stacked = {
            kind: torch.stack([tensors[f"{experts}{i}.{kind}_proj.weight"] for i in range(6)])
            for kind in ("gate", "up", "down")
        }
        gate_up = torch.cat([stacked["gate"], stacked["up"]], dim=1)
        return kept | {experts + "gate_up_proj": gate_up, experts + "down_proj": stacked["down"]}

    rewrite(directory, fuse)
    assert_logits(load(directory), model)
    for name in (experts + "gate_up_proj_scale_inv", "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"):
        add(directory, [name])
        with pytest.raises(xgdn.errors.CheckpointError, match=name):
            load(directory)
        rewrite(directory, lambda tensors: {n: t for n, t in tensors.items() if "scale" not in n})


def test_packed_weights_in_place_of_a_weight_are_named(dense: tuple[Path, nn.Module]) -> None:
    directory, _ = dense
    rename(directory, DOWN, DOWN.replace(".weight", ".qweight"))
    with pytest.raises(
        xgdn.errors.CheckpointError, match=r"down_proj\.weight.*down_proj\.qweight.*no quantization_config"
    ):
        load(directory)


def test_unused_tensors_are_reported_once(dense: tuple[Path, nn.Module], capfd: Any) -> None:
    directory, model = dense
    unused = [
        "model.layers.0.mlp.down_proj.bias",
        "model.layers.0.mlp.down_proj.lora_A.weight",
        "model.layers.0.mlp.down_proj.lora_scaling",
        "model.layers.4.mlp.down_proj.weight",
        "model.layers.4.mlp.down_proj.weight_scale",
    ]
    quiet = [
        "mtp.fc.weight",
        "mtp.layers.0.mlp.down_proj.weight_scale_inv",
        "visual.merger.norm.weight",
        "model.visual.blocks.0.norm1.bias",
        "model.layers.3.self_attn.rotary_emb.inv_freq",
    ]
    add(directory, unused + quiet)
    engine = load(directory)
    assert_logits(engine, model)
    assert engine.load_report.unused_tensors == unused
    error = capfd.readouterr().err
    for name in unused:
        assert error.count(f"'{name}'") == 1
    for name in quiet:
        assert name not in error


def test_nothing_to_report(dense: tuple[Path, nn.Module], capfd: Any) -> None:
    report = load(dense[0]).load_report
    assert (report.unused_tensors, report.uses_own_head, report.warnings) == ([], False, [])
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2"), (torch.int8, "I8")], ids=str
)
def test_low_precision_is_refused_where_it_is_used(
    dense: tuple[Path, nn.Module], dtype: torch.dtype, name: str
) -> None:
    directory, model = dense
    add(directory, ["mtp.layers.0.mlp.down_proj.weight"], torch.ones(4, 4).to(dtype))
    assert_logits(load(directory), model)
    rewrite(directory, lambda tensors: tensors | {DOWN: tensors[DOWN].to(dtype)})
    with pytest.raises(xgdn.errors.CheckpointError, match=f"{DOWN}.*BF16.*{name}"):
        load(directory)


@pytest.mark.parametrize("value", [..., None, "auto", "bfloat16", "torch.bfloat16"], ids=str)
@pytest.mark.parametrize("level", ["text", "outer", "inner"])
def test_dtype_is_that_of_the_file(tmp_path: Path, level: str, value: Any) -> None:
    tiny = DENSE if level == "text" else WRAPPER
    directory, _ = make(Tiny("bf16", tiny.build, tiny.changes, dtype=torch.bfloat16), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    text = config.get("text_config", {})
    text = {key: entry for key, entry in text.items() if key not in ("dtype", "torch_dtype")}
    if level == "inner":
        text |= {} if value is ... else {"torch_dtype": value}
    configure(directory, dtype=... if level == "inner" else value, torch_dtype=...)
    if level != "text":
        configure(directory, text_config=text)
    wide = weight_bytes(directory)
    narrow = weight_bytes(directory, None)
    assert 0.5 * wide <= narrow < 0.6 * wide


@pytest.mark.parametrize("value", ["bf16", "torch.int8", "float8_e4m3fn", 16])
def test_unknown_dtypes_are_refused(dense: tuple[Path, nn.Module], value: Any) -> None:
    configure(dense[0], dtype=value)
    with pytest.raises(xgdn.errors.CheckpointError, match="dtype"):
        load(dense[0])


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "language_model.", ""], ids=repr)
def test_text_part_of_a_wrapper(dense: tuple[Path, nn.Module], prefix: str) -> None:
    directory, model = dense
    rename(directory, "model.", prefix)
    configure(directory, architectures=["Qwen3_5ForConditionalGeneration"])
    if prefix in ("model.language_model.", ""):
        again = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    assert_logits(load(directory), model)


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", ""], ids=repr)
def test_wrapper_with_names_of_the_text_part(tmp_path: Path, prefix: str) -> None:
    directory, model = make(WRAPPER, tmp_path)
    rename(directory, "model.language_model.", prefix)
    configure(directory, architectures=["Qwen3_5ForCausalLM"])
    assert_logits(load(directory), model)


def test_two_tensors_of_one_name_must_be_equal(dense: tuple[Path, nn.Module]) -> None:
    directory, model = dense
    norm = load_file(directory / "model.safetensors")["model.norm.weight"]
    add(directory, ["model.language_model.norm.weight"], norm)
    assert_logits(load(directory), model)
    add(directory, ["model.language_model.norm.weight"], norm + 1)
    with pytest.raises(xgdn.errors.CheckpointError, match=r"model\.language_model\.norm\.weight.*model\.norm\.weight"):
        load(directory)


@pytest.mark.parametrize(
    "other", ["base_model.model.model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.base_layer.weight"]
)
def test_missing_tensor_is_named_where_it_is(dense: tuple[Path, nn.Module], other: str) -> None:
    rename(dense[0], DOWN, other)
    with pytest.raises(xgdn.errors.CheckpointError, match=f"{DOWN}.*{other}"):
        load(dense[0])


@pytest.mark.parametrize("width", [1, 5, 9])
def test_convolutions_that_no_backend_has_are_refused_at_load(tmp_path: Path, width: int) -> None:
    directory, _ = make(Tiny("wide", qwen3_5, {"linear_conv_kernel_dim": width}), tmp_path)
    with pytest.raises(xgdn.errors.UnsupportedError, match=rf"\[Engine\] config.*linear_conv_kernel_dim={width}"):
        load(directory)


def test_a_backend_that_cannot_serve_and_an_unknown_accuracy_are_refused_at_load(dense: tuple[Path, nn.Module]) -> None:
    with pytest.raises(xgdn.errors.UnsupportedError, match="backend"):
        xgdn.Engine(dense[0], prefill_backend="npu", runner=OPTIONS)
    with pytest.raises(
        xgdn.errors.UnsupportedError,
        match=r"\[Engine\] prefill_accuracy: expected auto, fast or exact, got 'precise'",
    ):
        xgdn.Engine(dense[0], prefill_accuracy="precise", runner=OPTIONS)


@pytest.mark.parametrize("changes", [{"pad_token_id": -1}, {"bos_token_id": 10**6}], ids=str)
def test_odd_settings_that_nothing_uses(dense: tuple[Path, nn.Module], changes: dict[str, Any]) -> None:
    directory, model = dense
    configure(directory, **changes)
    assert_logits(load(directory), model)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"attn_output_gate": False},
        {"output_gate_type": "sigmoid"},
        {"use_sliding_window": True, "sliding_window": 4},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ],
    ids=str,
)
def test_other_computations_are_refused(dense: tuple[Path, nn.Module], changes: dict[str, Any]) -> None:
    configure(dense[0], **changes)
    with pytest.raises(xgdn.errors.CheckpointError, match=next(iter(changes))):
        load(dense[0])


@pytest.mark.parametrize(
    "changes", [{"norm_topk_prob": False}, {"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}], ids=str
)
def test_other_routings_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    directory, _ = make(MOE, tmp_path)
    configure(directory, **changes)
    with pytest.raises(xgdn.errors.CheckpointError, match=next(iter(changes))):
        load(directory)
