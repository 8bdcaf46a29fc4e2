# SPDX-License-Identifier: Apache-2.0
"""An MTP head for a checkpoint that has none: of the right sizes and untrained, for what its steps cost."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

HEAD = "model-untrained-mtp.safetensors"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def shards_of(model: Path) -> dict[str, str]:
    """The file of every tensor."""
    if (model / SINGLE).exists():
        with safe_open(model / SINGLE, "pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    shards: dict[str, str] = json.loads((model / INDEX).read_text())["weight_map"]
    return shards


def has_head(model: Path) -> bool:
    """Whether the checkpoint has an MTP head of its own."""
    return any(name.startswith("mtp.") for name in shards_of(model))


def untrained(model: Path) -> dict[str, Tensor]:
    """A head whose layer is the model's last one with full attention, over the embedding of the next token alone."""
    shards = shards_of(model)
    prefix = max(name.split("self_attn.")[0] for name in shards if "self_attn.q_proj" in name)
    tensors = {}
    for name in (name for name in shards if name.startswith(prefix)):
        with safe_open(model / shards[name], "pt") as file:
            tensors["mtp.layers.0." + name.removeprefix(prefix)] = file.get_tensor(name)
    norm = tensors["mtp.layers.0.input_layernorm.weight"]
    names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    tensors |= {f"mtp.{name}.weight": torch.zeros_like(norm) for name in names}
    one = torch.eye(len(norm), dtype=norm.dtype)
    return tensors | {"mtp.fc.weight": torch.cat([one, torch.zeros_like(one)], dim=1)}


def with_untrained_head(model: Path, folder: Path) -> Path:
    """The checkpoint with such a head, in an empty folder: links to its files, and one file more."""
    shards = shards_of(model)
    head = untrained(model)
    save_file({name: tensor.contiguous() for name, tensor in head.items()}, folder / HEAD)
    linked = {name: "model-of-" + shard for name, shard in shards.items()}
    for file in model.iterdir():
        if file.name in (INDEX, HEAD):
            continue
        target = folder / ("model-of-" + file.name if file.name in shards.values() else file.name)
        target.symlink_to(file.resolve())
    index = {"metadata": {}, "weight_map": linked | dict.fromkeys(head, HEAD)}
    (folder / INDEX).write_text(json.dumps(index))
    return folder
