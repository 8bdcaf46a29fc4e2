# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in 8 and 4 bits, written the way the tools that people quantize with write them.

Every scheme rounds to the nearest code and returns, beside the parts to store, the weight that they stand for in
float64: that is the truth, whoever reads the parts.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

Tensors = dict[str, torch.Tensor]

# Weights that quantizers leave to others are not in: gates, router, embedding, norms, convolution.
PRODUCTS = (
    r"layers\..*\.((q|k|v|o|gate|up|down|out)_proj|in_proj_qkv|in_proj_z|in_proj_qkvz)\.weight$|"
    r"layers\..*\.experts\.(gate_up|down)_proj$"
)
HEAD = r"|lm_head\.weight$"
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored, and what config.json says of it."""

    name: str
    config: dict[str, Any]
    store: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]  # a weight [O, D] in float64: parts, what they say
    weights: str = PRODUCTS  # a pattern of the names of those to quantize

    def __str__(self) -> str:
        return self.name


# ---- Rounding and packing -------------------------------------------------------------------------------------------


def pack(codes: torch.Tensor, bits: int, dim: int, order: list[int] | None = None) -> torch.Tensor:
    """Neighbours along `dim` share a word of 32 bits; slot k of a word holds neighbour order[k]."""
    count = 32 // bits
    rows = codes.movedim(dim, -1).to(torch.int64)
    rows = nn.functional.pad(rows, (0, -rows.shape[-1] % count)).unflatten(-1, (-1, count))
    words = sum(rows[..., neighbour] << bits * slot for slot, neighbour in enumerate(order or range(count)))
    assert isinstance(words, torch.Tensor)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32).movedim(-1, dim).contiguous()


def round_groups(
    weight: torch.Tensor, group_of: torch.Tensor, *, bits: int, symmetric: bool, dtype: torch.dtype, least_zero: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [O, D] and zero points [O, G], both from 0 on, scales [O, G], and what they say in float64."""
    levels = 2**bits - 1
    groups = int(group_of.max()) + 1
    scales = torch.empty(weight.shape[0], groups, dtype=torch.float64)
    zeros = torch.empty_like(scales)
    for g in range(groups):
        columns = weight[:, group_of == g]
        if symmetric:
            scale = columns.abs().amax(1) / (levels // 2)
            zero = torch.full_like(scale, 2 ** (bits - 1))
        else:
            low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
            scale = (high - low) / levels
            zero = (-low / scale).round().clamp(least_zero, levels)
        scales[:, g], zeros[:, g] = scale, zero
    scales = scales.to(dtype).double()
    codes = (weight / scales[:, group_of] + zeros[:, group_of]).round().clamp(0, levels)
    return codes, zeros, scales.to(dtype), (codes - zeros[:, group_of]) * scales[:, group_of]


# ---- Schemes --------------------------------------------------------------------------------------------------------


def gptq(bits: int, group: int, *, symmetric: bool, version: int = 1, desc_act: bool = False) -> Scheme:
    """AutoGPTQ's layout: words along the columns, zero points less one in the first format."""

    def store(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        columns = weight.shape[1]
        group_of = torch.arange(columns) // (columns if group == -1 else group)
        if desc_act:
            shuffle = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
            group_of = group_of[shuffle]
        less = 1 if version == 1 else 0
        codes, zeros, scales, dequantized = round_groups(
            weight, group_of, bits=bits, symmetric=symmetric, dtype=torch.float16, least_zero=less
        )
        parts = {
            "qweight": pack(codes.T, bits, 0),
            "qzeros": pack((zeros - less).T, bits, 1),
            "scales": scales.T.contiguous(),
            "g_idx": group_of.to(torch.int32),
        }
        return parts, dequantized

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": desc_act,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    kind = f"gptq{version}-w{bits}g{group}{'' if symmetric else '-zeros'}{'-desc_act' if desc_act else ''}"
    return Scheme(kind, config, store)


def awq(group: int) -> Scheme:
    """AutoAWQ's GEMM layout: words along the rows, in an order of their own."""

    def store(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        group_of = torch.arange(weight.shape[1]) // group
        codes, zeros, scales, dequantized = round_groups(weight, group_of, bits=4, symmetric=False, dtype=torch.float16)
        parts = {
            "qweight": pack(codes.T, 4, 1, AWQ_ORDER),
            "qzeros": pack(zeros.T, 4, 1, AWQ_ORDER),
            "scales": scales.T.contiguous(),
        }
        return parts, dequantized

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Scheme(f"awq-g{group}", config | {"modules_to_not_convert": ["lm_head", "mlp.gate"]}, store)


def compressed(name: str, form: str, weights: dict[str, Any], **group: Any) -> dict[str, Any]:
    """quantization_config of compressed-tensors with one group."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$", "re:.*in_proj_(a|b|ba)$"],
        "config_groups": {name: {"targets": ["Linear"], "weights": weights} | group},
    }


def packed(bits: int, group: int, *, symmetric: bool) -> Scheme:
    """w4a16 and w8a16 of compressed-tensors; group -1: a scale per row."""

    def store(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        group_of = torch.arange(weight.shape[1]) // (weight.shape[1] if group == -1 else group)
        codes, zeros, scales, dequantized = round_groups(
            weight, group_of, bits=bits, symmetric=symmetric, dtype=torch.bfloat16
        )
        parts = {
            "weight_packed": pack(codes, bits, 1),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = pack(zeros, bits, 0)
        return parts, dequantized

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel", "dynamic": False}
    if group != -1:
        weights |= {"strategy": "group", "group_size": group}
    kind = f"packed-w{bits}g{group}{'' if symmetric else '-zeros'}"
    return Scheme(kind, compressed("group_0", "pack-quantized", weights), store)


def int8(*, symmetric: bool = True) -> Scheme:
    """w8a8 of compressed-tensors: a scale per row; the activations' scheme is not followed."""

    def store(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        group_of = torch.zeros(weight.shape[1], dtype=torch.int64)
        codes, zeros, scales, dequantized = round_groups(
            weight, group_of, bits=8, symmetric=symmetric, dtype=torch.float32
        )
        parts = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales}
        if not symmetric:
            parts["weight_zero_point"] = (zeros - 128).to(torch.int8)
        return parts, dequantized

    weights = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config = compressed("group_0", "int-quantized", weights, input_activations=activations)
    return Scheme(f"int8{'' if symmetric else '-zeros'}", config, store)


def to_float8(weight: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    """e4m3 codes, a scale per block of rows x columns (-1: all of them), and what they say in float64."""
    rows = weight.shape[0] if rows == -1 else rows
    columns = weight.shape[1] if columns == -1 else columns
    grid = [(r, c) for r in range(0, weight.shape[0], rows) for c in range(0, weight.shape[1], columns)]
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns), dtype=torch.float64)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    dequantized = torch.empty_like(weight)
    for r, c in grid:
        block = (slice(r, r + rows), slice(c, c + columns))
        scale = (weight[block].abs().max() / 448).to(dtype).double()
        scales[r // rows, c // columns] = scale
        codes[block] = (weight[block] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        dequantized[block] = codes[block].double() * scale
    return {"weight": codes, "scale": scales.to(dtype)}, dequantized


def fp8(dtype: torch.dtype = torch.bfloat16, block: int = 128) -> Scheme:
    """Fine-grained FP8: one scale for each block."""

    def store(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        parts, dequantized = to_float8(weight, block, block, dtype)
        return {"weight": parts["weight"], "weight_scale_inv": parts["scale"]}, dequantized

    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
        "modules_to_not_convert": ["lm_head", "in_proj_a", "in_proj_b", "in_proj_ba", "mlp.gate", "shared_expert_gate"],
    }
    return Scheme(f"fp8-{block}-{str(dtype).removeprefix('torch.')}", config, store)


def float8(strategy: str) -> Scheme:
    """FP8 of compressed-tensors: a scale per tensor, row or block."""
    rows, columns = {"tensor": (-1, -1), "channel": (1, -1), "block": (32, 32)}[strategy]

    def store(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        parts, dequantized = to_float8(weight, rows, columns, torch.float32)
        stored = {"weight": parts["weight"], "weight_scale": parts["scale"]}
        if strategy == "tensor":
            stored |= {"weight_scale": parts["scale"].reshape(1), "input_scale": torch.ones(1)}
        return stored, dequantized

    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [rows, columns]
    activations = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": strategy != "tensor"}
    config = compressed("group_0", "float-quantized", weights, input_activations=activations)
    return Scheme(f"float8-{strategy}", config, store)


SCHEMES = [
    fp8(),
    fp8(torch.float32, 32),
    gptq(4, 32, symmetric=True),
    gptq(4, 32, symmetric=False),
    gptq(4, -1, symmetric=False, version=2),
    gptq(4, 32, symmetric=False, version=2, desc_act=True),
    gptq(8, 32, symmetric=True, desc_act=True),
    gptq(8, 32, symmetric=False),
    awq(32),
    packed(4, 32, symmetric=True),
    packed(4, 32, symmetric=False),
    packed(8, -1, symmetric=True),
    packed(8, 32, symmetric=False),
    int8(),
    int8(symmetric=False),
    float8("tensor"),
    float8("channel"),
    float8("block"),
]


# ---- Files ----------------------------------------------------------------------------------------------------------


def part_name(name: str, part: str) -> str:
    """A part's name beside that of the plain weight, which for fused experts has no `.weight`."""
    return name.removesuffix("weight") + part if name.endswith(".weight") else name + part.removeprefix("weight")


def store_weight(scheme: Scheme, name: str, tensor: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    if tensor.ndim == 2:
        parts, dequantized = scheme.store(tensor.double())
    else:
        each = [scheme.store(matrix.double()) for matrix in tensor]
        parts = {part: torch.stack([stored[part] for stored, _ in each]) for part in each[0][0]}
        dequantized = torch.stack([weight for _, weight in each])
    return {part_name(name, part): value.contiguous() for part, value in parts.items()}, dequantized


def quantize(plain: Path, scheme: Scheme, out: Path) -> Tensors:
    """Store the checkpoint `plain` in the scheme, in the folder `out`; return its tensors with what the parts say."""
    shutil.copytree(plain, out)
    stored: Tensors = {}
    truth: Tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not re.search(scheme.weights, name) or "visual" in name:
            stored[name] = truth[name] = tensor
            continue
        parts, truth[name] = store_weight(scheme, name, tensor)
        stored |= parts
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": scheme.config}))
    return truth


def reference(model_class: Any, plain: Path, truth: Tensors, folder: Path) -> nn.Module:
    """The model with the weights `truth` in float32, as transformers loads it."""
    folder.mkdir()
    shutil.copy(plain / "config.json", folder)
    tensors = {name: tensor.to(torch.float32) for name, tensor in truth.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model: nn.Module = model_class.from_pretrained(folder, dtype=torch.float32)
    return model.eval()
