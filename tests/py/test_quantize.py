# SPDX-License-Identifier: Apache-2.0
"""`xgdn quantize`: what it writes, read by hand and by the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

import xgdn
from cases import assert_bits_equal, assert_close
from checkpoints import CHECKPOINTS, Tiny, make
from xgdn.cli import app
from xgdn.quantization import quantize

BITS = {"int8": 8, "int4": 4}
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape")
PROMPT = list(range(3, 40))


def run(*args: object) -> Result:
    return CliRunner(env={"NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["quantize", *map(str, args)])


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def plain_weight(tensors: dict[str, Tensor], module: str, bits: int) -> Tensor:
    """The weight in float64, from the bits of the words that hold it."""
    packed, scale, shape = (tensors[f"{module}.{suffix}"] for suffix in SUFFIXES)
    rows, columns = shape.tolist()
    values = [(packed.long() >> shift) % 2**bits - 2 ** (bits - 1) for shift in range(0, 32, bits)]
    codes = torch.stack(values, -1).view(rows, columns).double()
    return codes * scale.double().repeat_interleave(columns // scale.shape[1], 1)


def original_weight(tensors: dict[str, Tensor], module: str) -> Tensor:
    """That of the checkpoint, which may hold all experts in one tensor."""
    if f"{module}.weight" in tensors:
        return tensors[f"{module}.weight"]
    experts, index, name = module.rsplit(".", 2)
    if name == "down_proj":
        return tensors[f"{experts}.down_proj"][int(index)]
    gate, up = tensors[f"{experts}.gate_up_proj"][int(index)].chunk(2)
    return gate if name == "gate_proj" else up


@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize("tiny", CHECKPOINTS, ids=str)
def test_the_weights_of_products_are_written(tiny: Tiny, format: str, tmp_path: Path) -> None:
    model, _ = make(tiny, tmp_path)
    (model / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    result = run(model, out, "--format", format)
    assert result.exit_code == 0, result.output
    assert (out / "tokenizer.json").read_text() == "{}"

    before, after = tensors_of(model), tensors_of(out)
    modules = [name.removesuffix(".weight_packed") for name in after if name.endswith(".weight_packed")]
    assert len(modules) >= 8
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = list(config["config_groups"].values())
    for module in modules:
        weight = original_weight(before, module)
        (group,) = (g for g in groups if g["targets"] == ["Linear"] or module in g["targets"])
        size = group["weights"]["group_size"]
        want = quantize(weight, format, group_size=size).dequantize()  # type: ignore[arg-type]
        assert_bits_equal(module, plain_weight(after, module, BITS[format]), want)
    plain = {name for name in after if not name.endswith(SUFFIXES)}
    for name in plain:
        assert_bits_equal(name, after[name], before[name])
    ignored = {name.removesuffix(".weight") for name in plain if after[name].dim() == 2 and "embed_tokens" not in name}
    assert set(config["ignore"]) == ignored

    # The engine reads it as the plain weights that it stands for.
    stood_for = tmp_path / "plain"
    shutil.copytree(model, stood_for)
    for file in stood_for.glob("*.safetensors*"):
        file.unlink()
    weights = {name: after[name] for name in plain}
    weights |= {f"{module}.weight": plain_weight(after, module, BITS[format]).float() for module in modules}
    save_file(weights, stood_for / "model.safetensors", metadata={"format": "pt"})
    got, expected = (
        xgdn.Engine(d, dtype=torch.float32, prefill_backend="reference", decode_backend="reference").prompt_logits(
            PROMPT
        )
        for d in (out, stood_for)
    )
    assert_close("logits", got, expected, 1e-5, parts=(0,))


def test_what_is_refused(tmp_path: Path) -> None:
    model, _ = make(CHECKPOINTS[0], tmp_path)
    assert run(model, tmp_path / "out").exit_code == 0
    again = run(model, tmp_path / "out")
    assert again.exit_code == 1
    assert "exists" in again.stderr
    quantized = run(tmp_path / "out", tmp_path / "twice")
    assert quantized.exit_code == 1
    assert "quantization_config: expected a checkpoint of plain weights" in quantized.stderr
    assert not (tmp_path / "twice").exists()
    with pytest.raises(xgdn.errors.UnsupportedError, match="expected a checkpoint of plain weights"):
        xgdn.Engine(tmp_path / "out", quantize="int8")
