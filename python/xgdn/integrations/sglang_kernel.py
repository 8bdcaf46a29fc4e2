# SPDX-License-Identifier: Apache-2.0
"""SGLang's interface of linear attention kernels for Gated DeltaNet layers, on the pools of its engine.

    q, k   [1, T, H, K]     v, results   [1, T, HV, V]     a, b   [T, HV]     g, beta   [1, T, HV]
    ssm_states   [S, HV, V, K], in place     cache_indices   [N], below 0: padding, whose rows are zeros
    query_start_loc   [N + 1]

Every call is computed here or raises: there is no fallback. What SGLang's keyword arguments ask beyond that is refused
where it would change the result.
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import torch
from torch import Tensor

from xgdn import ops
from xgdn.errors import UnsupportedError

__all__ = ["GDNKernel", "kernel_class", "use_in_sglang"]

_BASE = "sglang.srt.layers.attention.linear.kernels.kernel_backend"


class GDNKernel:
    """The methods that SGLang calls; `kernel_class` makes it a subclass of SGLang's own base."""

    uses_state_checkpoints = False
    supports_fused_chain_verify = False
    supports_strided_target_verify_qkv = True
    supports_track_state_snapshot = False
    supports_packed_decode = True

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend

    def packed_decode(
        self,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        A_log: Tensor,
        dt_bias: Tensor,
        scale: float,
        ssm_states: Tensor,
        cache_indices: Tensor,
        num_v_heads: int,
        head_v_dim: int,
        **kwargs: Any,
    ) -> Tensor:
        """One token a sequence from the convolution's output `[N, 2HK + HV V]`; returns `[1, N, HV, V]`."""
        _refuse("packed_decode", kwargs, "replayssm_d", "replayssm_k", "replayssm_g", "replayssm_write_pos")
        out = mixed_qkv.new_empty((mixed_qkv.shape[0], num_v_heads, head_v_dim))
        ops.packed_decode(
            mixed_qkv,
            a,
            b,
            A_log,
            dt_bias,
            ssm_states,
            state_indices=cache_indices.int(),
            out=out,
            scale=scale,
            backend=self.backend,
        )
        return out.unsqueeze(0)

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
    ) -> Tensor:
        """Advance the named states token by token, from the raw gates."""
        slots = cache_indices.int()
        return self._token_by_token((q, k, v), (a, b, A_log, dt_bias), ssm_states, query_start_loc, slots)

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
        inplace_update: bool = True,
        **kwargs: Any,
    ) -> tuple[Tensor, None, None]:
        """Prompts, from the named states; without `inplace_update` the states stay. No state is returned, and none of
        the chunks' own, which SGLang's tracking of states inside a prompt would read.

        Rows behind the last sequence are zeros.
        """
        _refuse("extend", kwargs, "track_state", "track_chunk_idx", "state_checkpoint_cu_starts")
        offsets = query_start_loc.tolist()
        lengths = [end - begin for begin, end in itertools.pairwise(offsets)]
        rows = slice(0, offsets[-1])
        slots = cache_indices.int()
        out = v.new_zeros(v.shape)
        ops.chunk_gated_delta_rule(
            q[0, rows],
            k[0, rows],
            v[0, rows],
            g[0, rows].float(),
            beta[0, rows],
            ssm_states,
            cu_seqlens=query_start_loc.int(),
            state_indices=slots,
            chunk=ops.build_chunk_metadata(lengths, device=q.device),
            write_indices=None if inplace_update else torch.full_like(slots, ops.PAD_SLOT_ID),
            out=out[0, rows],
            backend=self.backend,
        )
        return out, None, None

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
        intermediate_states_buffer: Tensor | None = None,
        intermediate_state_indices: Tensor | None = None,
        cache_steps: int = 0,
        retrieve_parent_token: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute chains of drafts. Sequence `n` starts from its state in the pool, which stays as it is, and leaves
        the state after its token `t` in `intermediate_states_buffer[intermediate_state_indices[n], t]`.
        """
        _refuse("target_verify", {"retrieve_parent_token": retrieve_parent_token}, "retrieve_parent_token")
        if intermediate_states_buffer is None or intermediate_state_indices is None:
            raise UnsupportedError(
                "[sglang target_verify] intermediate_states_buffer, intermediate_state_indices: expected two tensors, "
                "got None"
            )
        num_sequences = query_start_loc.shape[0] - 1
        slots = cache_indices[:num_sequences].long()
        buffer_rows = intermediate_state_indices[:num_sequences].long()
        # Drafts of a row lie side by side; a row may have room for more than the buffer shows.
        buffer = intermediate_states_buffer
        per_row, rest = divmod(buffer.stride(0), buffer.stride(1))
        if rest != 0:
            raise UnsupportedError(
                "[sglang target_verify] intermediate_states_buffer: expected rows a whole number of drafts apart, got "
                f"strides {buffer.stride()}"
            )
        if not 1 <= cache_steps <= buffer.shape[1]:
            raise UnsupportedError(
                f"[sglang target_verify] cache_steps: expected 1 to the {buffer.shape[1]} of the buffer, got "
                f"{cache_steps}"
            )
        pool = buffer.as_strided(
            ((buffer.shape[0] - 1) * per_row + buffer.shape[1], *buffer.shape[2:]), buffer.stride()[1:]
        )
        steps = torch.arange(cache_steps, device=buffer.device)
        table = buffer_rows.unsqueeze(1) * per_row + steps
        is_given = (slots >= 0) & (buffer_rows >= 0)
        _start_from(pool, table[:, 0], ssm_states, slots, is_given)
        return self._token_by_token(
            (q, k, v),
            (a, b, A_log, dt_bias),
            pool,
            query_start_loc,
            table.masked_fill(~is_given.unsqueeze(1), ops.PAD_SLOT_ID).int(),
            num_accepted=torch.ones_like(slots, dtype=torch.int32),
        )

    def _token_by_token(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        raw_gates: tuple[Tensor, Tensor, Tensor, Tensor],
        states: Tensor,
        query_start_loc: Tensor,
        state_indices: Tensor,
        num_accepted: Tensor | None = None,
    ) -> Tensor:
        a, b, A_log, dt_bias = raw_gates
        heads = A_log.shape[0]
        g, beta = ops.gdn_gating(a.reshape(-1, heads), b.reshape(-1, heads), A_log, dt_bias, backend=self.backend)
        q, k, v = (x[0] for x in qkv)
        return ops.recurrent_gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            states,
            cu_seqlens=query_start_loc.int(),
            state_indices=state_indices,
            num_accepted=num_accepted,
            backend=self.backend,
        ).unsqueeze(0)


def kernel_class() -> type[GDNKernel]:
    """`GDNKernel` as a subclass of the base of the SGLang that is installed."""
    base = importlib.import_module(_BASE).LinearAttnKernelBase
    return type("XgdnGDNKernel", (GDNKernel, base), {})


def use_in_sglang(dispatcher: Any, backend: str = "auto") -> GDNKernel:
    """Give SGLang's dispatcher of GDN kernels (`GDNAttnBackend.kernel_dispatcher`) this kernel for decode, prompts and
    chains of drafts; trees of drafts stay with its own. Returns the kernel.
    """
    kernel = kernel_class()(backend)
    for name in ("decode_kernel", "extend_kernel", "verify_kernel"):
        if not hasattr(dispatcher, name):
            raise UnsupportedError(
                f"[use_in_sglang] dispatcher: expected a GDNKernelDispatcher as of SGLang 0.5.23, got "
                f"{type(dispatcher).__name__} without {name}"
            )
    dispatcher.decode_kernel = dispatcher.extend_kernel = dispatcher.verify_kernel = kernel
    dispatcher.verify_kernel_is_flashinfer = False
    dispatcher.supports_packed_decode = kernel.supports_packed_decode
    return kernel


def _refuse(function: str, options: dict[str, Any], *names: str) -> None:
    for name in names:
        if options.get(name) is not None:
            raise UnsupportedError(f"[sglang {function}] {name}: expected None, got {type(options[name]).__name__}")


def _start_from(pool: Tensor, targets: Tensor, states: Tensor, slots: Tensor, is_given: Tensor) -> None:
    """Copy `states[slots]` to `pool[targets]` where given, without a shape that depends on values: a row of padding
    repeats the copy of the first given one, and where all are padding, a slot is written with its own bits.
    """
    order = torch.arange(slots.shape[0], device=slots.device)
    source = torch.where(is_given, order, is_given.int().argmax())
    target = targets[source].clamp_min(0)
    is_copied = is_given[source].view(-1, 1, 1, 1)
    pool[target] = torch.where(is_copied, states[slots[source].clamp_min(0)].to(pool.dtype), pool[target])
