# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints with an MTP head (`mtp.*`), and the head's forward in float64 as its reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from checkpoints import Tiny, make, one_thread

Tensors = dict[str, Tensor]
LAYER = "mtp.layers.0."


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    scale = 0.2 if len(shape) == 1 else shape[-1] ** -0.5
    return torch.randn(*shape, generator=generator) * scale


def _attention(c: Any, draw: Any) -> Tensors:
    sizes = {"q_proj": 2 * c.num_attention_heads, "k_proj": c.num_key_value_heads, "v_proj": c.num_key_value_heads}
    tensors = {f"{name}.weight": draw(heads * c.head_dim, c.hidden_size) for name, heads in sizes.items()}
    tensors["o_proj.weight"] = draw(c.hidden_size, c.num_attention_heads * c.head_dim)
    if getattr(c, "attention_bias", False):
        tensors |= {f"{name}.bias": draw(heads * c.head_dim) for name, heads in sizes.items()}
        tensors["o_proj.bias"] = draw(c.hidden_size)
    return tensors | {f"{name}.weight": draw(c.head_dim) for name in ("q_norm", "k_norm")}


def _mlp(width: int, hidden: int, draw: Any) -> Tensors:
    names = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return {f"{name}.weight": draw(*shape) for name, shape in names.items()}


def _moe(c: Any, draw: Any) -> Tensors:
    """Experts one by one as Qwen3-Next has them, or in one tensor as Qwen3.5 may."""
    tensors = {"gate.weight": draw(c.num_experts, c.hidden_size), "shared_expert_gate.weight": draw(1, c.hidden_size)}
    shared = _mlp(c.shared_expert_intermediate_size, c.hidden_size, draw)
    tensors |= {f"shared_expert.{name}": tensor for name, tensor in shared.items()}
    width = c.moe_intermediate_size
    if c.model_type.startswith("qwen3_5"):
        tensors["experts.gate_up_proj"] = draw(c.num_experts, 2 * width, c.hidden_size)
        tensors["experts.down_proj"] = draw(c.num_experts, c.hidden_size, width)
        return tensors
    for expert in range(c.num_experts):
        tensors |= {f"experts.{expert}.{name}": t for name, t in _mlp(width, c.hidden_size, draw).items()}
    return tensors


def random_head(c: Any) -> Tensors:
    """Weights of a head for a model with that config."""
    generator = torch.Generator().manual_seed(23)

    def draw(*shape: int) -> Tensor:
        return _random(generator, *shape)

    feed_forward = _moe(c, draw) if getattr(c, "num_experts", 0) else _mlp(c.intermediate_size, c.hidden_size, draw)
    norms = ("input_layernorm", "post_attention_layernorm")
    return {
        "mtp.fc.weight": draw(c.hidden_size, 2 * c.hidden_size),
        **{
            f"mtp.{name}.weight": draw(c.hidden_size)
            for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        },
        **{f"{LAYER}{name}.weight": draw(c.hidden_size) for name in norms},
        **{f"{LAYER}self_attn.{name}": tensor for name, tensor in _attention(c, draw).items()},
        **{f"{LAYER}mlp.{name}": tensor for name, tensor in feed_forward.items()},
    }


def put_head(directory: Path, head: Tensors) -> None:
    """Write the head's tensors to the checkpoint's file, in place of those that it has."""
    file = directory / "model.safetensors"
    kept = {name: tensor.clone() for name, tensor in load_file(file).items() if not name.startswith("mtp.")}
    dtype = next(iter(kept.values())).dtype
    save_file(kept | {name: tensor.to(dtype).contiguous() for name, tensor in head.items()}, file)


@dataclass(frozen=True)
class WithHead:
    directory: Path
    model: nn.Module
    head: Tensors


def make_with_head(tiny: Tiny, folder: Path) -> WithHead:
    """Save a checkpoint with a head of random weights; the model is transformers' own, in float32."""
    directory, model = make(tiny, folder)
    head = random_head(model.config.get_text_config())
    put_head(directory, head)
    return WithHead(directory, model, head)


def hidden_of(made: WithHead, tokens: list[int]) -> Tensor:
    """Hidden states [T, D] behind transformers' last norm."""
    decoder = getattr(made.model.model, "language_model", made.model.model)
    with torch.no_grad(), one_thread():
        hidden: Tensor = decoder(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    return hidden


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (1 + weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rotate(x: Tensor, c: Any) -> Tensor:
    """x [T, H, D] at the positions 0..T-1."""
    rope = c.rope_parameters
    dim = int(c.head_dim * rope["partial_rotary_factor"])
    frequencies = rope["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    angles = torch.arange(x.shape[0], dtype=x.dtype)[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second, rest = x.split([dim // 2, dim // 2, c.head_dim - dim], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _attend(x: Tensor, w: Tensors, c: Any) -> Tensor:
    def project(name: str, width: int) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias")).unflatten(-1, (-1, width))

    q, gate = project("q_proj", 2 * c.head_dim).chunk(2, dim=-1)
    q = _rotate(_norm(q, w["q_norm.weight"], c.rms_norm_eps), c)
    k = _rotate(_norm(project("k_proj", c.head_dim), w["k_norm.weight"], c.rms_norm_eps), c)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, project("v_proj", c.head_dim)))
    scores = torch.einsum("qhd,khd->hqk", q, k) * c.head_dim**-0.5
    causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~causal, -torch.inf).softmax(-1), v) * gate.sigmoid()
    return F.linear(out.flatten(1), w["o_proj.weight"], w.get("o_proj.bias"))


def _feed(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _three(w: Tensors, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
    return w[f"{prefix}gate_proj.weight"], w[f"{prefix}up_proj.weight"], w[f"{prefix}down_proj.weight"]


def _expert(w: Tensors, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of one expert, in whichever way they are stored."""
    if "experts.gate_up_proj" not in w:
        return _three(w, f"experts.{index}.")
    gate, up = w["experts.gate_up_proj"][index].chunk(2)
    return gate, up, w["experts.down_proj"][index]


def _sparse(x: Tensor, w: Tensors, c: Any) -> Tensor:
    shared = F.linear(x, w["shared_expert_gate.weight"]).sigmoid() * _feed(x, *_three(w, "shared_expert."))
    weights, chosen = F.linear(x, w["gate.weight"]).softmax(-1).topk(c.num_experts_per_tok, dim=-1)
    if getattr(c, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    per_expert = torch.zeros(len(x), c.num_experts, dtype=x.dtype).scatter(1, chosen, weights)
    return shared + sum(per_expert[:, [e]] * _feed(x, *_expert(w, e)) for e in range(c.num_experts))


def _under(weights: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


class Reference:
    """The head of a checkpoint in float64, with the model's embedding and output head."""

    def __init__(self, made: WithHead, dtype: torch.dtype = torch.float32) -> None:
        """`dtype`: that of the stored weights."""
        self.config = made.model.config.get_text_config()
        self._head = {name: tensor.to(dtype).double() for name, tensor in made.head.items()}
        self._embedding = made.model.get_input_embeddings().weight.detach().double()
        self._output = made.model.get_output_embeddings().weight.detach().double()

    def hidden(self, next_tokens: list[int], hidden: Tensor) -> Tensor:
        """The head's hidden states [T, D] of a sequence's first T tokens, of which `hidden` is, and those behind."""
        w, eps = self._head, self.config.rms_norm_eps
        e = _norm(self._embedding[next_tokens], w["mtp.pre_fc_norm_embedding.weight"], eps)
        h = _norm(hidden.double(), w["mtp.pre_fc_norm_hidden.weight"], eps)
        x = F.linear(torch.cat([e, h], dim=-1), w["mtp.fc.weight"])
        attended = _norm(x, w[f"{LAYER}input_layernorm.weight"], eps)
        x = x + _attend(attended, _under(w, f"{LAYER}self_attn."), self.config)
        fed = _norm(x, w[f"{LAYER}post_attention_layernorm.weight"], eps)
        mlp = _under(w, f"{LAYER}mlp.")
        x = x + (_sparse(fed, mlp, self.config) if "gate.weight" in mlp else _feed(fed, *_three(mlp, "")))
        return _norm(x, w["mtp.norm.weight"], eps)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self._output)

    def drafts(self, tokens: list[int], hidden: Tensor, count: int) -> list[int]:
        """What the head proposes behind `tokens`; `hidden` [T - 1, D] is of all but the last."""
        following, drafted = tokens[1:], list[int]()
        for _ in range(count):
            last = self.hidden(following, hidden)[-1:]
            drafted.append(int(self.logits(last).argmax()))
            following, hidden = [*following, drafted[-1]], torch.cat([hidden, last.to(hidden)])
        return drafted
