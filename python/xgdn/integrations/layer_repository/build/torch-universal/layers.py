# SPDX-License-Identifier: Apache-2.0
"""What takes the place of transformers' functions and modules of these names.

`forward` of a class here becomes that of a module of the host, which is `self`, and whose own one takes the calls that
cannot be served. So the classes have no constructor and no state, and parameters as the host has them.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from xgdn.integrations import calls, transformers_functions, transformers_layer

__all__ = [
    "CausalConv1d",
    "CausalConv1dUpdate",
    "ChunkGatedDeltaRule",
    "FusedRecurrentGatedDeltaRule",
    "GatedDeltaNet",
    "RMSNormGated",
]


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    return functools.partial(type(module).forward, module)


class ChunkGatedDeltaRule(nn.Module):
    can_torch_compile = True
    has_backward = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        kwargs |= {"initial_state": initial_state, "output_final_state": output_final_state}
        kwargs |= {"chunk_size": chunk_size, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        return transformers_functions.chunk_gated_delta_rule(_own_forward(self), query, key, value, g, beta, **kwargs)


class FusedRecurrentGatedDeltaRule(nn.Module):
    can_torch_compile = True
    has_backward = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        kwargs |= {"initial_state": initial_state, "output_final_state": output_final_state}
        kwargs |= {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        rule = transformers_functions.fused_recurrent_gated_delta_rule
        return rule(_own_forward(self), query, key, value, g, beta, **kwargs)


class CausalConv1d(nn.Module):
    can_torch_compile = True
    has_backward = False

    def forward(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        convolve = transformers_functions.causal_conv1d_fn
        return convolve(_own_forward(self), hidden_states, weight, bias, activation, **kwargs)


class CausalConv1dUpdate(nn.Module):
    can_torch_compile = True
    has_backward = False

    def forward(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        update = transformers_functions.causal_conv1d_update
        return update(_own_forward(self), hidden_states, conv_state, weight, bias, activation)


class RMSNormGated(nn.Module):
    can_torch_compile = True
    has_backward = False

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return transformers_functions.rms_norm_gated(type(self).forward, self, hidden_states, gate)


class GatedDeltaNet(nn.Module):
    can_torch_compile = True
    has_backward = False

    def forward(
        self, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        return transformers_layer.forward(type(self).forward, self, hidden_states, cache, attention_mask, **kwargs)


transformers_functions.look_up_devices()
calls.log_at_exit(transformers_functions.HOST)
