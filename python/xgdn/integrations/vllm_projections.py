# SPDX-License-Identifier: Apache-2.0
"""The products of a GDN layer's projections and of its model's head for the few tokens of a decode step of vLLM.

vLLM's own product takes longer for them than reading a weight does, and vLLM keeps a projection's weight in the order
of that product alone. So copies are kept for `linear`, in huge pages where the system has them; of the projections into
the layer they are one, with the rows `[q | k | v | z | b | a]`. A head's weight vLLM keeps as it was loaded: nothing is
copied for it.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from xgdn import _C, ops

__all__ = [
    "VARIABLE",
    "Projections",
    "can_multiply_head",
    "in_row_order",
    "is_faster_here",
    "is_few",
    "multiply_head",
    "serves_heads",
]

VARIABLE = "XGDN_VLLM_PROJECTIONS"  # `layers`: not the head's, `vllm`: none; else both

_MOST_TOKENS = 16  # with more vLLM's own product is as fast or faster

_NAMES = ("in_proj_qkvz", "in_proj_ba", "out_proj")
_PLAIN = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


def is_faster_here() -> bool:
    """Whether it was measured on such a processor: bf16 dot products and no tiles, for which vLLM has kernels."""
    return bool(torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported())


def is_few(x: Tensor) -> bool:
    """Whether the tokens of `x` `[T, D]` are as few as those of a decode step."""
    return x.shape[0] <= _MOST_TOKENS


def in_row_order(layer: Any, qkvz: Tensor, ba: Tensor) -> tuple[Tensor, Tensor]:
    """Return projections with rows `[q | k | v | z]` and `[b | a]`; in Qwen3-Next's a key head's parts are together."""
    if not layer.gqa_interleaved_layout:
        return qkvz, ba
    q, k, v, z, b, a = (part.flatten(1) for part in layer.fix_query_key_value_ordering(qkvz, ba))
    return torch.cat([q, k, v, z], dim=1), torch.cat([b, a], dim=1)


class Projections:
    """The projections of one layer. Made before weights are loaded, it copies them before vLLM packs them."""

    def __init__(self, layer: Any) -> None:
        self._modules = {name: getattr(layer, name) for name in _NAMES}
        self._loaded: dict[str, Tensor] = {}
        self._into: Tensor | None = None  # [O, D]
        self._out_of: Tensor | None = None  # [D, HV V]
        self._why_not = _why_not(self._modules.values())
        if self._why_not is None:
            for name in _NAMES:
                self._copy_when_loaded(layer, name)

    @classmethod
    def of(cls, layer: Any) -> "Projections | None":
        """None: with this type of weights, on this processor or by the variable's word all products are vLLM's."""
        is_wanted = os.environ.get(VARIABLE) != "vllm"
        return cls(layer) if is_wanted and layer.model_config.dtype == torch.bfloat16 and is_faster_here() else None

    def why_not(self, layer: Any) -> str | None:
        """Say why few tokens are left to vLLM's products."""
        if self._why_not is not None:
            return self._why_not
        if self._into is None:
            return "weights that vLLM has not loaded itself"
        for name, module in self._modules.items():
            if layer._modules.get(name) is not module or module._forward_hooks or module._forward_pre_hooks:
                return f"{name} has been replaced or has hooks"
        return None

    def project(self, x: Tensor) -> Tensor:
        """Rows `[q | k | v | z | b | a]` of `x` `[T, D]`."""
        assert self._into is not None
        return ops.linear(x, self._into, has_constant_weight=True)

    def project_out(self, o: Tensor) -> Tensor:
        """The layer's output `[T, D]` for `o` `[T, HV V]`."""
        assert self._out_of is not None
        return ops.linear(o, self._out_of, has_constant_weight=True)

    def _copy_when_loaded(self, layer: Any, name: str) -> None:
        method = self._modules[name].quant_method
        pack = method.process_weights_after_loading

        def copy_and_pack(module: Any) -> None:
            self._loaded[name] = module.weight.data
            if len(self._loaded) == len(_NAMES):
                self._copy(layer, **self._loaded)
                self._loaded.clear()
            pack(module)

        method.process_weights_after_loading = copy_and_pack

    def _copy(self, layer: Any, in_proj_qkvz: Tensor, in_proj_ba: Tensor, out_proj: Tensor) -> None:
        parts = [part.T for part in in_row_order(layer, in_proj_qkvz.T, in_proj_ba.T)]
        into = _C.allocate_weight([sum(map(len, parts)), in_proj_qkvz.shape[1]], in_proj_qkvz)
        self._into = torch.cat(parts, out=into)
        self._out_of = _C.allocate_weight(list(out_proj.shape), out_proj).copy_(out_proj)


def serves_heads(layers: Iterable[Any]) -> bool:
    """Whether the head of a model with these layers is multiplied with here: if the projections of any are."""
    is_wanted = os.environ.get(VARIABLE) not in ("vllm", "layers")
    return is_wanted and any(getattr(layer, "xgdn_projections", None) is not None for layer in layers)


def can_multiply_head(head: Any, x: Tensor, head_dtype: torch.dtype | None, bias: Tensor | None) -> bool:
    return (
        x.dtype == torch.bfloat16
        and head_dtype in (None, torch.bfloat16)
        and x.dim() == 2
        and is_few(x)
        and type(head.quant_method).__name__ in _PLAIN
        and head.weight.dtype == torch.bfloat16
        and head.weight.shape[1:] == x.shape[1:]  # not if vLLM has kept its own copy alone
        and (bias is None or bias.dtype == torch.bfloat16)
    )


def multiply_head(head: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Logits `[T, vocabulary]` of `x` `[T, D]`."""
    return ops.linear(x, head.weight, bias=bias, has_constant_weight=True)


def _why_not(modules: Iterable[Any]) -> str | None:
    for module in modules:
        if (method := type(module.quant_method).__name__) not in _PLAIN:
            return f"weights of {method}"
        if module.tp_size > 1:
            return "tensor parallelism"
        if module.bias is not None:
            return "a bias"
    return None
