# SPDX-License-Identifier: Apache-2.0
"""Attention of the prompts that begin in a step of vLLM, on the step's own keys and values.

Steps in which any sequence has tokens from before are vLLM's, and so is the cache, which it writes by itself: its rows
lie in the order of its own kernels.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from xgdn.integrations import calls, vllm_layer, vllm_projections
from xgdn.integrations.prompt_attention import Prompts, attend, prompts_of

__all__ = ["PROMPTS", "VARIABLE", "PromptAttention", "is_wanted"]

VARIABLE = "XGDN_VLLM_ATTENTION"  # `vllm`: none is computed here
PROMPTS = "attention, prompts"

_PROMPTS = "_xgdn_prompts"  # on a step's metadata, which all layers share


def is_wanted() -> bool:
    """Whether it was measured on such a processor, and the variable has no word against it."""
    return os.environ.get(VARIABLE) != "vllm" and vllm_projections.is_faster_here()


class PromptAttention:
    """Comes before vLLM's implementation of attention on a CPU among the bases."""

    _serves: bool | None = None  # what the model's layers say when they have all been built

    def forward(
        self: Any,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        prompts = None
        if attn_metadata is not None and output_scale is None and output_block_scale is None and self._takes(query):
            prompts = _prompts_of(attn_metadata)
        if prompts is None:
            theirs = (layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
            return super().forward(*theirs)  # type: ignore[misc,no-any-return]
        rows = slice(attn_metadata.num_actual_tokens)
        attend(prompts, query[rows], key[rows], value[rows], scale=self.scale, out=output[rows])
        calls.count(vllm_layer.HOST, PROMPTS, None, output.device)
        return output

    def _takes(self: Any, query: Tensor) -> bool:
        if self._serves is None:
            from vllm.forward_context import get_forward_context

            layers = get_forward_context().no_compile_layers.values()
            self._serves = _is_plain(self) and _has_served_layer(layers)
        return bool(self._serves) and query.dtype == torch.bfloat16


def _is_plain(attention: Any) -> bool:
    return bool(
        attention.attn_type == "decoder"
        and attention.kv_sharing_target_layer_name is None
        and attention.alibi_slopes is None
        and attention.sliding_window == -1
        and not attention.logits_soft_cap
        and attention.sinks is None
    )


def _has_served_layer(layers: Iterable[Any]) -> bool:
    """Whether it is the attention of a model whose GDN layers are computed here."""
    return any(getattr(layer, "xgdn_why_not", "not such a layer") is None for layer in layers)


def _prompts_of(metadata: Any) -> Prompts | None:
    """None: a sequence of the step has tokens from before."""
    if _PROMPTS not in vars(metadata):
        setattr(metadata, _PROMPTS, _read(metadata))
    return vars(metadata)[_PROMPTS]  # type: ignore[no-any-return]


def _read(metadata: Any) -> Prompts | None:
    starts, lengths = metadata.query_start_loc, metadata.seq_lens
    if not metadata.causal or metadata.dynamic_causal is not None or not torch.equal(starts.diff(), lengths):
        return None
    return prompts_of(starts, int(lengths.max()))
