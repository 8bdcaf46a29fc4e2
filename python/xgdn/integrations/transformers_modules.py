# SPDX-License-Identifier: Apache-2.0
"""The `forward` of what stands beside the GDN layers in transformers' models: MLPs and heads, whose products of few
tokens, and in 16 bits of many, torch has no quick kernels for on many CPUs, and Qwen's attention and norms.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xgdn import ops
from xgdn.integrations.prompt_attention import attend, prompts_of
from xgdn.integrations.transformers_functions import count_of, sequences, why_not_options, why_not_tensors

__all__ = [
    "ATTENTION_PARAMETERS",
    "attention_forward",
    "causal_lm_forward",
    "is_trained",
    "linear",
    "mlp_forward",
    "rms_norm_forward",
]

# What an attention's `forward` is called with, whose cache has another name since transformers 5.24.
ATTENTION_PARAMETERS = tuple(
    ("self", "hidden_states", "position_embeddings", "attention_mask", cache) for cache in ("past_key_values", "cache")
)

_SILU = ("SiLU", "SiLUActivation")
_SERVED_ATTENTION = "sdpa"
# What changes the result of the host's attention function beside its mask.
_ATTENTION_OPTIONS = ("cu_seq_lens_q", "output_attentions", "position_bias", "sliding_window", "softcap")


def mlp_forward(original: Callable[..., Any], self: Any, x: Tensor) -> Tensor:
    """`down(silu(gate(x)) * up(x))`."""
    if torch.compiler.is_exporting():
        return original(self, x)  # type: ignore[no-any-return]
    projections = (self.gate_proj, self.up_proj, self.down_proj)
    reason = why_not_tensors(x, *(getattr(p, "weight", None) for p in projections)) or _why_not_now(self, x)
    if reason is None and type(self.act_fn).__name__ not in _SILU:
        reason = f"activation {type(self.act_fn).__name__}"
    count_of("MLP", reason, x)
    if reason is not None:
        return original(self, x)  # type: ignore[no-any-return]
    rows = x.reshape(-1, x.shape[-1])
    gate, up = linear(self.gate_proj, rows), linear(self.up_proj, rows)
    return linear(self.down_proj, ops.silu_and_mul(gate, up, out=gate)).view(*x.shape[:-1], -1)


def rms_norm_forward(original: Callable[..., Any], self: Any, x: Tensor) -> Tensor:
    """Qwen's norm, whose weight is around zero, in one pass and not in one for each of its operations."""
    if torch.compiler.is_exporting():
        return original(self, x)  # type: ignore[no-any-return]
    reason = why_not_tensors(x, self.weight) or _why_not_now(self, x)
    if reason is None and self.weight.dtype not in (x.dtype, torch.float32):
        reason = "mixed dtypes"
    count_of("RMSNorm", reason, x)
    if reason is not None:
        return original(self, x)  # type: ignore[no-any-return]
    return ops.rms_norm(x.reshape(-1, 1, x.shape[-1]), self.weight, eps=self.eps).view(x.shape)


def attention_forward(
    original: Callable[..., Any],
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Qwen's gated attention. Softmax is computed here for prompts that begin and have no mask, else by the host's
    function for it.
    """
    cache = kwargs.pop("past_key_values", cache)
    args = (hidden_states, position_embeddings, attention_mask, cache)
    if torch.compiler.is_exporting():
        return original(self, *args, **kwargs)  # type: ignore[no-any-return]
    reason = _why_not_attention(self, hidden_states, position_embeddings)
    count_of("Attention", reason, hidden_states)
    if reason is not None:
        return original(self, *args, **kwargs)  # type: ignore[no-any-return]
    (B, T), D = hidden_states.shape[:2], self.head_dim
    x = hidden_states.flatten(0, 1)
    cos, sin = (p.expand(B, T, -1).flatten(0, 1) for p in position_embeddings)
    q, gate = linear(self.q_proj, x).view(B * T, -1, 2 * D).chunk(2, dim=-1)
    k, v = linear(self.k_proj, x).view(B * T, -1, D), linear(self.v_proj, x).view(B * T, -1, D)
    q = ops.rms_norm(q, self.q_norm.weight, cos=cos, sin=sin, eps=self.q_norm.eps)
    k = ops.rms_norm(k, self.k_norm.weight, cos=cos, sin=sin, eps=self.k_norm.eps)
    by_head = [t.view(B, T, -1, D).transpose(1, 2) for t in (q, k, v)]
    if cache is not None:
        by_head[1:] = cache.update(*by_head[1:], self.layer_idx)
    begins = T > 1 and attention_mask is None and by_head[1].shape[2] == T
    if begins and kwargs.get("is_causal") is not False and why_not_options(kwargs, _ATTENTION_OPTIONS) is None:
        prompts = prompts_of(sequences(B, T, x.device)[0], T)
        o = attend(prompts, q, k, v, scale=self.scaling)
    else:
        function = _attention_function(self)
        o, _ = function(self, *by_head, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        o = o.reshape(q.shape)
    o = ops.sigmoid_and_mul(o, gate)
    return linear(self.o_proj, o.flatten(1)).view(B, T, -1), None


def causal_lm_forward(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The `forward` of a model with a head, which is computed here. Its layers share memory."""
    head = self.get_output_embeddings()
    if torch.compiler.is_exporting() or not _is_plain(head):
        return original(self, *args, **kwargs)
    head.forward = functools.partial(_head_forward, head)
    try:
        with contextlib.nullcontext() if torch.compiler.is_compiling() else ops.step_memory():
            return original(self, *args, **kwargs)
    finally:
        vars(head).pop("forward", None)  # another thread may have been quicker


def linear(projection: Any, x: Tensor, out: Tensor | None = None) -> Tensor:
    """A projection of `x` `[N, C]`; by its own `forward` unless it is known to be the plain one."""
    if _is_plain(projection) and projection.weight.dtype == x.dtype:
        return ops.linear(x, projection.weight, bias=projection.bias, out=out)
    result: Tensor = projection(x)
    return result if out is None else out.copy_(result)


def is_trained(module: nn.Module) -> bool:
    """Whether any of its weights is: adapters and projections too."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


def _head_forward(head: nn.Linear, x: Tensor) -> Tensor:
    reason = why_not_tensors(x, head.weight, head.bias) or _why_not_now(head, x)
    if reason is None and head.weight.dtype != x.dtype:
        reason = "mixed dtypes"
    count_of("head", reason, x)
    if reason is not None:
        return nn.Linear.forward(head, x)
    return ops.linear(x.reshape(-1, x.shape[-1]), head.weight, bias=head.bias).view(*x.shape[:-1], -1)


def _attention_function(attention: Any) -> Callable[..., tuple[Tensor, Any]]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]  # type: ignore[no-any-return]


def _is_plain(projection: Any) -> bool:
    return (
        type(projection) is nn.Linear
        and "forward" not in projection.__dict__
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
    )


def _why_not_attention(attention: Any, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> str | None:
    norms = (attention.q_norm.weight, attention.k_norm.weight)
    if reason := why_not_tensors(x, *norms, *position_embeddings) or _why_not_now(attention, x):
        return reason
    if (implementation := attention.config._attn_implementation) != _SERVED_ATTENTION:
        return f"attention by {implementation}"
    if attention.training and attention.attention_dropout:
        return "dropout"
    if any(p.dtype != x.dtype for p in position_embeddings):
        return "mixed dtypes"
    return "mixed dtypes" if any(w.dtype not in (x.dtype, torch.float32) for w in norms) else None


def _why_not_now(module: nn.Module, x: Tensor) -> str | None:
    if is_trained(module):
        return "a gradient is required"
    return "autocast" if torch.is_autocast_enabled(x.device.type) else None
