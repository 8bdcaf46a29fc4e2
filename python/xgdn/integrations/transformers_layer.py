# SPDX-License-Identifier: Apache-2.0
"""The `forward` of transformers' GDN layers, computed by the ops here from the projections to the output.

A decoded token is one `gdn_decode_step` between the projections. The tensors of the cache are the kernels' pools:
sequence `n` of the batch is slot `n`. Outside `torch.compile` a tensor of the cache whose memory is laid out otherwise
is replaced once by one of the same values and shape, with the memory that the kernels work on; inside, and for caches
of other classes, the kernels work on a copy. What a call leaves goes through the cache's own methods.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xgdn import ops
from xgdn.integrations.reasons import why_not_activation, why_not_taps
from xgdn.integrations.transformers_functions import (
    count_of,
    sequences,
    step_history,
    why_not_options,
    why_not_tensors,
)
from xgdn.integrations.transformers_modules import is_trained, linear
from xgdn.step_memory import empty

__all__ = ["CACHE_METHODS", "PARAMETERS", "forward"]

# What a layer's `forward` is called with, whose cache has another name since transformers 5.24, and what is asked of
# the cache.
PARAMETERS = tuple(("self", "hidden_states", cache, "attention_mask") for cache in ("cache_params", "cache"))
CACHE_METHODS = (
    "get_conv_state",
    "get_recurrent_state",
    "update_conv_state",
    "update_recurrent_state",
    "is_recording_past",
)

_OPTIONS = ("seq_idx", "cu_seqlens", "cu_seq_lens_q")
# A layer's projections and their widths, in the order of a row [q | k | v | z | b | a].
_IN_ROW_ORDER = (
    {"in_proj_qkv": "conv_dim", "in_proj_z": "value_dim", "in_proj_b": "num_v_heads", "in_proj_a": "num_v_heads"},
    {
        **{"q_proj": "key_dim", "k_proj": "key_dim", "v_proj": "value_dim", "g_proj": "value_dim"},
        **{"b_proj": "num_v_heads", "a_proj": "num_v_heads"},
    },
)
_BY_KEY_HEAD = ("in_proj_qkvz", "in_proj_ba")  # Qwen3-Next's, in which a key head's parts are neighbours


def forward(
    original: Callable[..., Any],
    self: Any,
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The layer's output. What cannot be served goes to the host's `forward`, whose functions are replaced too."""
    cache = kwargs.pop("cache_params", cache)
    if torch.compiler.is_exporting():
        return original(self, hidden_states, cache, attention_mask, **kwargs)  # type: ignore[no-any-return]
    reason = _why_not(self, hidden_states, cache, kwargs)
    is_step = hidden_states.shape[1] == 1 and _has_history(self, cache)
    count_of("GatedDeltaNet, one token" if is_step else "GatedDeltaNet", reason, hidden_states)
    if reason is not None:
        return original(self, hidden_states, cache, attention_mask, **kwargs)  # type: ignore[no-any-return]
    if attention_mask is not None:
        hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
    projected = _project(self, hidden_states.flatten(0, 1))
    o = (_step if is_step else _prefill)(self, projected, hidden_states.shape[:2], cache)
    return linear(_out_proj(self), o.flatten(1)).view(hidden_states.shape)


def _step(layer: Any, projected: Tensor, sizes: torch.Size, cache: Any) -> Tensor:
    """Decode: one fused step from the projections' rows to the gated norm, on the cache's own tensors."""
    cu_seqlens, slots = sequences(sizes[0], 1, projected.device)
    conv_state = _conv_state(layer, cache)
    recurrent_state, state = _recurrent_state(layer, cache)
    norm = _norm(layer)
    o = step_history(
        conv_state,
        projected[:, : layer.conv_dim],
        layer.conv_kernel_size - 1,
        lambda history: ops.gdn_decode_step(
            projected,
            layer.conv1d.weight.squeeze(1),
            history,
            layer.A_log,
            layer.dt_bias,
            state,
            norm.weight,
            state_indices=slots,
            conv_bias=layer.conv1d.bias,
            cu_seqlens=cu_seqlens,
            may_have_padding=False,
            norm_eps=norm.variance_epsilon,
        ),
    )
    cache.update_recurrent_state(recurrent_state, layer.layer_idx)
    return o


def _prefill(layer: Any, projected: Tensor, sizes: torch.Size, cache: Any) -> Tensor:
    """Any number of tokens, from nothing or behind what the cache holds."""
    N, D, HV = projected.shape[0], layer.conv_dim, layer.num_v_heads
    o, norm = _rule(layer, projected, sizes, cache), _norm(layer)
    z = projected[:, D : D + layer.value_dim].view(N, HV, -1)
    return ops.rms_norm_gated(o, z, norm.weight, eps=norm.variance_epsilon)


def _rule(layer: Any, projected: Tensor, sizes: torch.Size, cache: Any) -> Tensor:
    (B, T), HV = sizes, layer.num_v_heads
    cu_seqlens, slots = sequences(B, T, projected.device)
    b, a = projected[:, -2 * HV : -HV], projected[:, -HV:]
    g, beta = ops.gdn_gating(a, b, layer.A_log, layer.dt_bias)
    had_state = cache is not None and cache.get_recurrent_state(layer.layer_idx) is not None
    mixed = _convolve(layer, projected[:, : layer.conv_dim], sizes, cache)
    q, k, v = torch.split(mixed, [layer.key_dim, layer.key_dim, layer.value_dim], dim=1)
    if had_state:
        recurrent_state, state = _recurrent_state(layer, cache)
    else:
        state = projected.new_zeros((B, HV, layer.head_v_dim, layer.head_k_dim), dtype=torch.float32)
        recurrent_state = state.transpose(-1, -2)
    o = ops.chunk_gated_delta_rule(
        q.view(B * T, -1, layer.head_k_dim),
        k.view(B * T, -1, layer.head_k_dim),
        v.view(B * T, HV, -1),
        g,
        beta,
        state,
        cu_seqlens=cu_seqlens,
        state_indices=slots,
        chunk=ops.build_chunk_metadata([T] * B, device=projected.device),
        may_have_padding=False,
    )
    if cache is not None:
        cache.update_recurrent_state(recurrent_state, layer.layer_idx)
    return o


def _convolve(layer: Any, x: Tensor, sizes: torch.Size, cache: Any) -> Tensor:
    """The convolution of `x` `[B T, D]`, behind the columns that the cache has kept."""
    B, T = sizes
    length = T
    if cache is not None:
        columns = x.view(B, T, -1).transpose(1, 2)
        columns = cache.update_conv_state(columns, layer.layer_idx, conv_kernel_size=layer.conv_kernel_size)
        length = columns.shape[2]
        if length != T:
            x = columns.transpose(1, 2).reshape(B * length, -1)
    cu_seqlens, slots = sequences(B, length, x.device)
    out = ops.causal_conv1d(
        x,
        layer.conv1d.weight.squeeze(1),
        x.new_zeros(B, layer.conv_kernel_size - 1, x.shape[1]),
        cu_seqlens=cu_seqlens,
        state_indices=slots,
        bias=layer.conv1d.bias,
    )
    return out if length == T else out.view(B, length, -1)[:, -T:].flatten(0, 1)


def _conv_state(layer: Any, cache: Any) -> Tensor:
    """The cache's `[B, D, S]`, with the memory of `[B, S, D]` where that can be."""
    conv_state: Tensor = cache.get_conv_state(layer.layer_idx)
    if conv_state.stride(1) == 1:
        return conv_state
    laid_out = conv_state.transpose(1, 2).contiguous().transpose(1, 2)
    return _replace(cache, layer.layer_idx, "conv_states", conv_state, laid_out)


def _recurrent_state(layer: Any, cache: Any) -> tuple[Tensor, Tensor]:
    """The cache's `[B, HV, K, V]` and the same as the pool that the kernels update, of one memory."""
    recurrent_state: Tensor = cache.get_recurrent_state(layer.layer_idx)
    state = recurrent_state.transpose(-1, -2)
    if state.is_contiguous():
        return recurrent_state, state
    state = state.contiguous()
    laid_out = state.transpose(-1, -2)
    _replace(cache, layer.layer_idx, "recurrent_states", recurrent_state, laid_out)
    return laid_out, state


def _replace(cache: Any, index: int, name: str, tensor: Tensor, laid_out: Tensor) -> Tensor:
    """Put `laid_out` in the place of `tensor` in the cache, if it is kept where transformers' classes keep it; return
    what is in the cache then.
    """
    kept = getattr(cache.layers[index], name, None) if hasattr(cache, "layers") else None
    if torch.compiler.is_compiling() or not isinstance(kept, dict) or kept.get(0) is not tensor:
        return tensor
    kept[0] = laid_out
    torch._dynamo.mark_static_address(laid_out)  # as the host does, for graphs of a device
    return laid_out


def _project(layer: Any, x: Tensor) -> Tensor:
    """Rows `[q | k | v | z | b | a]` of `x` `[N, C]`."""
    HV = layer.num_v_heads
    projections = _projections(layer)
    if projections is None:
        qkvz, ba = (linear(getattr(layer, name), x).unsqueeze(1) for name in _BY_KEY_HEAD)
        return torch.cat([part.reshape(x.shape[0], -1) for part in layer.fix_query_key_value_ordering(qkvz, ba)], dim=1)
    row = empty((x.shape[0], layer.conv_dim + layer.value_dim + 2 * HV), x)
    begin = 0
    for name, width in projections.items():
        end = begin + getattr(layer, width)
        linear(getattr(layer, name), x, row[:, begin:end])
        begin = end
    return row


def _projections(layer: Any) -> dict[str, str] | None:
    return next((names for names in _IN_ROW_ORDER if all(hasattr(layer, name) for name in names)), None)


def _norm(layer: Any) -> Any:
    return layer.norm if hasattr(layer, "norm") else layer.o_norm


def _out_proj(layer: Any) -> Any:
    return layer.out_proj if hasattr(layer, "out_proj") else layer.o_proj


def _has_history(layer: Any, cache: Any) -> bool:
    """Whether the host would decode a single token: not before the first tokens, nor while rollbacks are possible."""
    if cache is None or cache.get_conv_state(layer.layer_idx) is None:
        return False
    return not cache.is_recording_past(layer.layer_idx)


def _why_not(layer: Any, x: Tensor, cache: Any, kwargs: dict[str, Any]) -> str | None:
    norm, conv = _norm(layer), layer.conv1d
    if hasattr(conv, "_hf_hook"):
        return "weights offloaded by accelerate"
    if reason := why_not_tensors(x, conv.weight, conv.bias, norm.weight, layer.A_log, layer.dt_bias):
        return reason
    if is_trained(layer):
        return "a gradient is required"
    if reason := why_not_options(kwargs, _OPTIONS):
        return reason
    if _projections(layer) is None and not all(hasattr(layer, name) for name in _BY_KEY_HEAD):
        return "projections of an unknown kind"
    if conv.weight.shape[0] != layer.conv_dim:
        return "a sharded layer"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast"
    if reason := why_not_activation(layer.activation) or why_not_activation(getattr(norm, "activation", "of the norm")):
        return reason
    if reason := why_not_taps(layer.conv_kernel_size):
        return reason
    if getattr(layer, "allow_neg_eigval", False):
        return "negative eigenvalues"
    if conv.weight.dtype != x.dtype or any(
        t.dtype not in (x.dtype, torch.float32) for t in (norm.weight, layer.A_log, layer.dt_bias)
    ):
        return "mixed dtypes"
    if cache is not None and _state_dtype(layer, cache) not in (None, torch.float32):
        return "states that are not float32"
    return None


def _state_dtype(layer: Any, cache: Any) -> torch.dtype | None:
    state: Tensor | None = cache.get_recurrent_state(layer.layer_idx)
    return None if state is None else state.dtype
