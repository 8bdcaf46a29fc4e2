# SPDX-License-Identifier: Apache-2.0
"""SGLang's interface of linear attention kernels as its version 0.5.23 has it, and a dispatcher that calls as its GDN
backend does. Names and order of parameters are SGLang's; there is nothing else of it here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor


class LinearAttnKernelBase(ABC):
    uses_state_checkpoints = False
    supports_fused_chain_verify = False
    supports_strided_target_verify_qkv = False
    supports_track_state_snapshot = False

    @abstractmethod
    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        A_log: Tensor,
        dt_bias: Tensor,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        **kwargs: Any,
    ) -> Tensor: ...

    @abstractmethod
    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        **kwargs: Any,
    ) -> tuple[Any, ...]: ...

    def target_verify(
        self,
        A_log: Tensor,
        dt_bias: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        ssm_states: Tensor,
        cache_indices: Tensor,
        query_start_loc: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        raise NotImplementedError


class GDNKernelDispatcher:
    """Which kernel serves what, before anyone has chosen."""

    def __init__(self) -> None:
        own = object()
        self.decode_kernel: Any = own
        self.extend_kernel: Any = own
        self.verify_kernel: Any = own
        self.tree_verify_kernel: Any = own
        self.verify_kernel_is_flashinfer = True
        self.supports_packed_decode = False
