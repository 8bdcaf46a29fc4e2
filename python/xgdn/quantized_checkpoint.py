# SPDX-License-Identifier: Apache-2.0
"""Writing a model directory with weights in 8 or 4 bits, as compressed-tensors (`pack-quantized`)."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from xgdn import _C
from xgdn.errors import CheckpointError
from xgdn.quantization import FORMATS, QuantizedRows, quantize

__all__ = ["write_quantized"]

_BITS = {"int8": 8, "int4": 4}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")  # of three dimensions, one for each expert in the file
_KEPT_PLAIN = ("lm_head", "embed_tokens")
_CONFIG_KEYS = ("quantization_config", "compression_config")


def write_quantized(
    model: Path,
    out: Path,
    format: Literal["int8", "int4"],
    *,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the directory `model` to the new directory `out` with the weights of its products rounded as
    `Engine(quantize=format)` rounds them. The head and whatever else that leaves plain are copied.

    Calls `on_tensor` with (written, all). Raises CheckpointError for a directory that cannot be read or is quantized
    already, and FileExistsError for `out`.
    """
    config = json.loads((model / "config.json").read_text())
    for level in (config, config.get("text_config", {})):
        for key in _CONFIG_KEYS:
            if level.get(key) is not None:
                raise CheckpointError(f"[quantize] {key}: expected a checkpoint of plain weights, got a quantized one")
    shards = _shards(model)
    out.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    groups: dict[int, list[str]] = {}  # size -> modules
    ignored: list[str] = []
    total_size = done = 0
    names = {shard: _names(model / shard) for shard in shards}
    num_tensors = sum(map(len, names.values()))
    for shard in shards:
        tensors: dict[str, Tensor] = {}
        with safe_open(model / shard, framework="pt") as file:
            for name in names[shard]:
                tensor = file.get_tensor(name)
                rounded = dict(_rounded(name, tensor, format, groups))
                if not rounded and tensor.dim() == 2 and not name.endswith("embed_tokens.weight"):
                    ignored.append(name.removesuffix(".weight"))
                tensors |= rounded or {name: tensor}
                on_tensor(done := done + 1, num_tensors)
        save_file(tensors, out / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total_size += sum(t.nbytes for t in tensors.values())
    if shards != [_SINGLE]:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (out / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    config["quantization_config"] = _config(format, groups, ignored)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    written = {"config.json", _INDEX, *shards}
    for path in model.iterdir():
        if path.is_file() and path.name not in written:
            shutil.copy(path, out / path.name)


def _shards(model: Path) -> list[str]:
    if (model / _SINGLE).is_file():
        return [_SINGLE]
    return sorted(set(json.loads((model / _INDEX).read_text())["weight_map"].values()))


def _names(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as file:
        return list(file.keys())


def _rounded(
    name: str, tensor: Tensor, format: Literal["int8", "int4"], groups: dict[int, list[str]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that take the place of a weight; none where it stays plain."""
    module = name.removesuffix(".weight")
    rounding = _C.rounding_of(name, list(tensor.shape), FORMATS[format])
    if rounding is None or module.endswith(_KEPT_PLAIN):
        return
    for part, weight in _matrices(module, tensor):
        rows = quantize(weight.float() if weight.dtype == torch.float64 else weight, format, group_size=rounding[1])
        groups.setdefault(rounding[1], []).append(part)
        yield f"{part}.weight_packed", _packed(rows, _BITS[format])
        yield f"{part}.weight_scale", rows.scales
        yield f"{part}.weight_shape", torch.tensor(weight.shape)


def _matrices(module: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not module.endswith(_EXPERTS):
        yield module, tensor
        return
    prefix, _, name = module.rpartition(".")
    for e, expert in enumerate(tensor):
        if name == "gate_up_proj":
            gate, up = expert.chunk(2)
            yield f"{prefix}.{e}.gate_proj", gate
            yield f"{prefix}.{e}.up_proj", up
        else:
            yield f"{prefix}.{e}.{name}", expert


def _packed(rows: QuantizedRows, bits: int) -> Tensor:
    """Codes above zero, from the lowest bits of an int32 on: `[O, D * bits / 32]`."""
    codes = rows.codes.int() if rows.format == "int4" else rows.codes.int() + 128
    count = 32 // bits
    shifts = torch.arange(count, dtype=torch.int32) * bits
    packed: Tensor = (codes.view(codes.shape[0], -1, count) << shifts).sum(-1, dtype=torch.int32)
    return packed


def _config(format: str, groups: dict[int, list[str]], ignored: list[str]) -> dict[str, Any]:
    def scheme(group_size: int, modules: list[str]) -> dict[str, Any]:
        weights = {
            "num_bits": _BITS[format],
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": group_size,
            "dynamic": False,
        }
        targets = ["Linear"] if len(groups) == 1 else modules
        return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}

    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": scheme(*group) for i, group in enumerate(groups.items())},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
