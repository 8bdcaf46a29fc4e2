# SPDX-License-Identifier: Apache-2.0
"""The serving functions, one for each op: packed tokens in, state pools updated in place.

Letters: `T` tokens packed over all sequences, `N` sequences, `S` slots, `H` key heads, `HV` value heads (value head `h`
reads key head `h // (HV // H)`), `K` and `V` head dims, `D` channels, `W` taps, `R` rows of a conv slot, `L` columns of
a verification table, `I` and `O` widths.

    q, k            [T, H, K]      f32 | bf16 | f16
    v, out          [T, HV, V]
    g, beta         [T, HV]        g: f32, natural log of the decay; beta: after the sigmoid
    state           [S, HV, V, K]  f32 | bf16
    conv_state      [S, R, D]      oldest row first
    cu_seqlens      [N + 1]        i32, from 0 to T; equal neighbours are an empty sequence
    state_indices   [N]            i32, the slot read; `PAD_SLOT_ID`: the rows of `out` are zero, no state is touched
    write_indices   [N]            i32, the slot written; default `state_indices`

Slots that a call does not name are bitwise unchanged. Tensors may be strided views as long as their last dimension is
contiguous, unless stated otherwise. `out` is memory for the result, which is returned; without it the result is new.

Errors name the op, the argument, what was expected and what came: `TypeError` for a dtype; `ValueError` for a shape, a
stride, a device or missing chunk metadata; `IndexError` for values of index tensors, checked where they are on the CPU;
`NotImplementedError` for a backend that is unknown or cannot serve the call, and an input that requires a gradient.
"""

import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from xgdn import _C
from xgdn.step_memory import empty, step_memory

__all__ = [
    "PAD_SLOT_ID",
    "ChunkMetadata",
    "ReplayRing",
    "build_chunk_metadata",
    "causal_conv1d",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "copy_slots",
    "gdn_decode_step",
    "gdn_gating",
    "l2_norm",
    "linear",
    "materialize_state",
    "moe_experts",
    "packed_decode",
    "paged_attention",
    "quantized_linear",
    "quantized_moe_experts",
    "recurrent_gated_delta_rule",
    "replay_gated_delta_rule",
    "rms_norm",
    "rms_norm_gated",
    "rms_norm_linear",
    "sigmoid_and_mul",
    "silu_and_mul",
    "step_memory",
    "store_kv",
]

PAD_SLOT_ID = -1

_CHUNK = 64
_LARGE_BLOCK = 1216
_CUMSUM_ELEMENTS = 2**18


class ChunkMetadata(NamedTuple):
    """Tables that map a prefill program to its chunk of a sequence; int32. With n_i(C) = ceil(len_i / C):"""

    chunk_indices_chunk64: Tensor  # [sum n_i(64), 2]    rows (i, j), j < n_i(64)
    chunk_offsets_chunk64: Tensor  # [N + 1]             0, cumsum n_i(64)
    update_chunk_offsets_chunk64: Tensor  # [N + 1]      0, cumsum (n_i(64) + 1)
    final_chunk_indices_chunk64: Tensor  # [N]           cumsum (n_i(64) + 1) - 1
    chunk_indices_large_block: Tensor  # [sum n_i(1216), 2]
    block_indices_cumsum: Tensor  # [sum n_i(B), 2]      B = next_pow2(2^18 / (64 num_v_heads_local))

    @classmethod
    def allocate(
        cls,
        *,
        max_sequences: int,
        max_tokens: int,
        num_v_heads_local: int,
        device: torch.device | str = "cpu",
    ) -> "ChunkMetadata":
        """Allocate uninitialised tables with room for every step of these sizes."""
        tables = _C.allocate_chunk_metadata(
            max_sequences=max_sequences, max_tokens=max_tokens, num_v_heads_local=num_v_heads_local, device=device
        )
        return cls(*tables)

    def write(self, cu_seqlens: Tensor, num_v_heads_local: int) -> None:
        """Write the tables of the sequences in `cu_seqlens` to the front, by code on their device alone.

        The rest holds no chunks: (-1, -1) in the index tables, -1, and the last offset repeated.
        """
        _C.write_chunk_metadata(cu_seqlens, num_v_heads_local, self)


def build_chunk_metadata(
    lengths: Sequence[int],
    num_v_heads_local: int = 1,
    *,
    sequence_ids: Literal["true", "compact_ranks"] = "true",
    device: torch.device | str | None = None,
) -> ChunkMetadata:
    """Build the tables of one prefill step on `device` (default: the CPU), which must be that of `q`. Build them once
    per step and pass them to every layer's op.

    `num_v_heads_local`, 1..64, sets the block length of `block_indices_cumsum` alone, which no op of this library
    reads: give it for kernels that do. `sequence_ids="compact_ranks"` numbers non-empty sequences only, as
    vllm-ascend's kernels expect. A negative length, and more than 2^31 - 1 tokens and sequences together, are an
    `IndexError`.
    """
    if sequence_ids not in ("true", "compact_ranks"):
        raise ValueError(
            f"[build_chunk_metadata] sequence_ids: expected 'true' or 'compact_ranks', got {sequence_ids!r}"
        )
    compact_ranks = sequence_ids == "compact_ranks"
    whole = [operator.index(length) for length in lengths]  # a length of 30.9 is an error, in a list or in a tensor
    tables = torch.ops.xgdn.build_chunk_metadata(whole, num_v_heads_local, compact_ranks, device=device)
    return ChunkMetadata(*tables)


@torch.library.register_fake("xgdn::build_chunk_metadata")  # type: ignore[untyped-decorator]
def _(
    lengths: Sequence[int], num_v_heads_local: int = 1, compact_ranks: bool = False, device: torch.device | None = None
) -> list[Tensor]:
    def rows(chunk: int) -> int:
        return sum((length + chunk - 1) // chunk for length in lengths)

    # The smallest power of two that is not below the quotient.
    cumsum_block = 1 << max(0, _CUMSUM_ELEMENTS // (num_v_heads_local * _CHUNK) - 1).bit_length()
    n = len(lengths)
    shapes = [(rows(_CHUNK), 2), (n + 1,), (n + 1,), (n,), (rows(_LARGE_BLOCK), 2), (rows(cumsum_block), 2)]
    return [torch.empty(shape, dtype=torch.int32, device=device or "cpu") for shape in shapes]


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    cu_seqlens: Tensor,
    state_indices: Tensor,
    write_indices: Tensor | None = None,
    num_accepted: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    may_have_padding: bool = True,
    out: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Decode, and with `num_accepted` draft verification: advance `state` token by token, return `[T, HV, V]`.

    Verification: `state_indices` is a table `[N, L]`; sequence `n` reads `table[n, num_accepted[n] - 1]` and writes
    `table[n, t]` after its token `t`. `cu_seqlens_cpu`: the same lengths on the host, for backends whose kernels limit
    them (npu). `may_have_padding=False` promises that no slot is `PAD_SLOT_ID`.
    """
    out = empty(v.shape, v) if out is None else out
    torch.ops.xgdn.recurrent_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        state,
        cu_seqlens,
        state_indices,
        out,
        write_indices=write_indices,
        num_accepted=num_accepted,
        cu_seqlens_cpu=cu_seqlens_cpu,
        may_have_padding=may_have_padding,
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        backend=backend,
    )
    return out


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    cu_seqlens: Tensor,
    state_indices: Tensor,
    chunk: ChunkMetadata | None = None,
    has_initial_state: Tensor | None = None,
    write_indices: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    may_have_padding: bool = True,
    out: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    accuracy: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Prefill: read initial states from `state`, write final states to it, return `[T, HV, V]`.

    `chunk` comes from `build_chunk_metadata`, on the device of `q`; without it the op raises, it never rebuilds the
    tables. `has_initial_state` `[N]` bool: if false, the sequence starts from zero, whatever its slot holds.
    `accuracy`: `"fast"` may multiply sums of two bf16 numbers, with f32 sums, and rounds q and k to bf16; `"exact"` is
    f32 throughout; `"auto"` is fast for bf16 inputs, else exact. A backend may be more exact than asked.
    `cu_seqlens_cpu`, `may_have_padding`: as in `recurrent_gated_delta_rule`.
    """
    out = empty(v.shape, v) if out is None else out
    torch.ops.xgdn.chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        state,
        cu_seqlens,
        state_indices,
        None if chunk is None else chunk.chunk_indices_chunk64,
        None if chunk is None else chunk.chunk_offsets_chunk64,
        out,
        has_initial_state=has_initial_state,
        write_indices=write_indices,
        cu_seqlens_cpu=cu_seqlens_cpu,
        may_have_padding=may_have_padding,
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        accuracy=accuracy,
        backend=backend,
    )
    return out


class ReplayRing(NamedTuple):
    """Pools of rings, which replay states have beside their checkpoints: the tokens of a sequence since its checkpoint,
    in float32.
    """

    k: Tensor  # [B, H, R, K]   normalised keys; R rows: C for tokens, up to C more for drafts
    u: Tensor  # [B, HV, R, V]  what the tokens write
    g: Tensor  # [B, HV, R]
    length: Tensor  # [B]       int32, committed tokens, 0..C-1

    @classmethod
    def allocate(
        cls,
        num_slots: int,
        *,
        num_key_heads: int,
        num_value_heads: int,
        key_head_dim: int,
        value_head_dim: int,
        chunk_size: int = 16,
        num_drafts: int = 0,
        device: torch.device | str = "cpu",
    ) -> "ReplayRing":
        """Allocate empty rings of `chunk_size + num_drafts` rows."""
        rows = chunk_size + num_drafts

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(num_slots, *shape, device=device)

        return cls(
            k=zeros(num_key_heads, rows, key_head_dim),
            u=zeros(num_value_heads, rows, value_head_dim),
            g=zeros(num_value_heads, rows),
            length=torch.zeros(num_slots, dtype=torch.int32, device=device),
        )


def replay_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    ring: ReplayRing,
    *,
    cu_seqlens: Tensor,
    state_indices: Tensor,
    ring_indices: Tensor,
    write_indices: Tensor | None = None,
    ring_write_indices: Tensor | None = None,
    num_accepted: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = 16,
    commit: bool = True,
    out: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    accuracy: str = "exact",
    backend: str = "auto",
) -> Tensor:
    """Decode, verification and prefill on replay states, return `[T, HV, V]`: `state` holds checkpoints, formed after
    every `chunk_size`-th token of a sequence (16, 32 or 64), `ring` the tokens since then.

    A sequence reads its checkpoint `state_indices[n]` and its ring `ring_indices[n]` `[N]`; `write_indices[n]` and
    `ring_write_indices[n]` (default: where they are) hold them afterwards. One that stays in its slot is written by
    folds alone, each time a ring is full: forks may share it until then. What is computed and written has the same bits
    however a sequence is cut into calls, on backends that promise it (`cpu`, `cuda`).

    Drafts: with `commit=False` the call's tokens, at most `R - chunk_size` a sequence, stay behind the ring's length;
    `num_accepted` `[N]` i32 of the sequence's next call says how many of them count. `has_initial_state` `[N]` bool: if
    false, the sequence starts from zero with an empty ring, whatever its slots hold.

    `accuracy`: with `"fast"`, and `"auto"` for bf16 inputs, a backend (`cuda`) may compute the tokens up to a
    sequence's last fold as `chunk_gated_delta_rule` does: many times as fast, and then the bits depend on how a
    sequence is cut into calls. `cu_seqlens_cpu`: the lengths on the host; where all are short, a "fast" call costs no
    more than an exact one.
    """
    out = empty(v.shape, v) if out is None else out
    torch.ops.xgdn.replay_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        state,
        ring.k,
        ring.u,
        ring.g,
        ring.length,
        cu_seqlens,
        state_indices,
        ring_indices,
        out,
        write_indices=write_indices,
        ring_write_indices=ring_write_indices,
        num_accepted=num_accepted,
        has_initial_state=has_initial_state,
        cu_seqlens_cpu=cu_seqlens_cpu,
        chunk_size=chunk_size,
        commit=commit,
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        accuracy=accuracy,
        backend=backend,
    )
    return out


def materialize_state(
    state: Tensor,
    ring: ReplayRing,
    *,
    lengths: Tensor,
    state_indices: Tensor,
    ring_indices: Tensor,
    write_indices: Tensor,
    chunk_size: int = 16,
    backend: str = "auto",
) -> None:
    """Write the state after the first `lengths[n]` tokens, 0 to `chunk_size`, of a ring as a plain one: row `n` reads
    the checkpoint `state_indices[n]` and the ring `ring_indices[n]` and writes `state[write_indices[n]]`.
    """
    torch.ops.xgdn.materialize_state(
        state,
        ring.k,
        ring.u,
        ring.g,
        ring.length,
        lengths,
        state_indices,
        ring_indices,
        write_indices,
        chunk_size=chunk_size,
        backend=backend,
    )


def packed_decode(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    *,
    state_indices: Tensor,
    write_indices: Tensor | None = None,
    may_have_padding: bool = True,
    out: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Decode one token per sequence straight from the conv output `[N, 2HK + HV V]` and the raw gates `[N, HV]`;
    returns `[N, HV, V]`. Gating, l2norm and recurrence in one kernel.
    """
    out = empty((mixed_qkv.shape[0], state.shape[1], state.shape[2]), mixed_qkv) if out is None else out
    torch.ops.xgdn.packed_decode(
        mixed_qkv,
        a,
        b,
        A_log,
        dt_bias,
        state,
        state_indices,
        out,
        write_indices=write_indices,
        may_have_padding=may_have_padding,
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        backend=backend,
    )
    return out


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    conv_state: Tensor,
    *,
    cu_seqlens: Tensor,
    state_indices: Tensor,
    bias: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    write_indices: Tensor | None = None,
    silu: bool = True,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Depthwise causal convolution of `x` `[T, D]` with `weight` `[D, W]` (tap `W - 1` is the current token) and SiLU
    over packed sequences. Continues from the last `W - 1` inputs in `conv_state` and leaves the new ones there.
    """
    out = empty(x.shape, x) if out is None else out
    torch.ops.xgdn.causal_conv1d(
        x,
        weight,
        conv_state,
        cu_seqlens,
        state_indices,
        out,
        bias=bias,
        has_initial_state=has_initial_state,
        write_indices=write_indices,
        silu=silu,
        backend=backend,
    )
    return out


def causal_conv1d_update(
    x: Tensor,
    weight: Tensor,
    conv_state: Tensor,
    *,
    cu_seqlens: Tensor,
    state_indices: Tensor,
    max_len: int = 1,
    bias: Tensor | None = None,
    write_indices: Tensor | None = None,
    num_accepted: Tensor | None = None,
    may_have_padding: bool = True,
    silu: bool = True,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The convolution for decode and verification. `max_len` is the length of the longest sequence, known to the host.

    With `num_accepted` the history starts at row `num_accepted[n] - 1` of the slot. Afterwards the slot holds history
    and inputs without the oldest row, so that any number of accepted drafts can be resumed.
    """
    out = empty(x.shape, x) if out is None else out
    torch.ops.xgdn.causal_conv1d_update(
        x,
        weight,
        conv_state,
        cu_seqlens,
        state_indices,
        out,
        max_len=max_len,
        bias=bias,
        write_indices=write_indices,
        num_accepted=num_accepted,
        may_have_padding=may_have_padding,
        silu=silu,
        backend=backend,
    )
    return out


def gdn_gating(
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`g = -exp(A_log) softplus(a + dt_bias)` and `beta = sigmoid(b)`, both `[T, HV]` f32."""
    g = empty(a.shape, a, torch.float32) if g is None else g
    beta = empty(a.shape, a, torch.float32) if beta is None else beta
    torch.ops.xgdn.gdn_gating(a, b, A_log, dt_bias, g, beta, backend=backend)
    return g, beta


def l2_norm(x: Tensor, *, eps: float = 1e-6, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last dimension of `[T, H, K]`, computed in f32."""
    out = empty(x.shape, x) if out is None else out
    torch.ops.xgdn.l2_norm(x, out, eps=eps, backend=backend)
    return out


def rms_norm_gated(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`weight * (x / rms(x)) * silu(z)` over the last dimension of `[T, HV, V]`, in the dtype of `z`."""
    out = empty(z.shape, z) if out is None else out
    torch.ops.xgdn.rms_norm_gated(x, z, weight, out, eps=eps, backend=backend)
    return out


def gdn_decode_step(
    projected: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    norm_weight: Tensor,
    *,
    state_indices: Tensor,
    conv_bias: Tensor | None = None,
    write_indices: Tensor | None = None,
    conv_indices: Tensor | None = None,
    conv_write_indices: Tensor | None = None,
    ring: ReplayRing | None = None,
    chunk_size: int = 16,
    cu_seqlens: Tensor | None = None,
    may_have_padding: bool = True,
    norm_eps: float = 1e-6,
    out: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Run a layer's decode step between its two projections, one token per sequence: `causal_conv1d_update`,
    `packed_decode` and `rms_norm_gated` in one kernel where the backend has one; returns `[N, HV, V]`.

    A row of `projected` is `[q | k | v | z | b | a]`. `conv_indices` and `conv_write_indices` are the slots of
    `conv_state` to read and to write. Without either they are `state_indices` and `write_indices`; with one of them,
    `conv_indices` defaults to `state_indices` and `conv_write_indices` to `conv_indices`.

    With `ring` the states are replay states, of which `ring` has the tokens since the last multiple of `chunk_size`:
    `gdn_gating` and `replay_gated_delta_rule` take the place of `packed_decode`, and a sequence's ring has the slots of
    its convolution.
    """
    out = empty((projected.shape[0], state.shape[1], state.shape[2]), projected) if out is None else out
    torch.ops.xgdn.gdn_decode_step(
        projected,
        conv_weight,
        conv_state,
        A_log,
        dt_bias,
        state,
        norm_weight,
        state_indices,
        out,
        conv_bias=conv_bias,
        write_indices=write_indices,
        conv_indices=conv_indices,
        conv_write_indices=conv_write_indices,
        ring_k=None if ring is None else ring.k,
        ring_u=None if ring is None else ring.u,
        ring_g=None if ring is None else ring.g,
        ring_length=None if ring is None else ring.length,
        chunk_size=chunk_size,
        cu_seqlens=cu_seqlens,
        may_have_padding=may_have_padding,
        norm_eps=norm_eps,
        scale=scale,
        backend=backend,
    )
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    has_constant_weight: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`x weight^T + bias` of `x` `[T, D]`, `weight` `[O, D]` and a contiguous `bias` `[O]`, all of one dtype, summed in
    f32; returns `[T, O]`. `out` may also be f32 where the inputs are 16-bit.

    `has_constant_weight` promises that no call which may still run writes `weight` or `bias`, so that a device may read
    them ahead of the calls before.
    """
    out = empty(x.shape[:1] + weight.shape[:1], x) if out is None else out
    torch.ops.xgdn.linear(x, weight, out, bias=bias, has_constant_weight=has_constant_weight, backend=backend)
    return out


def rms_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
    use_silu_and_mul: bool = False,
    eps: float = 1e-6,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`linear` of what `rms_norm` makes of `x` `[T, D]` and `norm_weight` `[D]`, which is f32 or as `x`; returns
    `[T, O]`. The weights are constant, as `has_constant_weight` of `linear` promises it.

    With `residual` `[T, D]`, as `x`, the sum of both is normed and written to `residual_out`, which is other memory.
    With `use_silu_and_mul` the rows of `weight` and `bias` are those of gate and up, and the result is
    `silu_and_mul(gate, up)` `[T, O/2]`. The result has the bits of these functions one after the other, where the
    product is the backend's own and not a library's.
    """
    if out is None:
        out = empty((x.shape[0], weight.shape[0] // 2 if use_silu_and_mul else weight.shape[0]), x)
    torch.ops.xgdn.rms_norm_linear(
        x,
        norm_weight,
        weight,
        out,
        bias=bias,
        residual=residual,
        residual_out=residual_out,
        use_silu_and_mul=use_silu_and_mul,
        eps=eps,
        backend=backend,
    )
    return out


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    num_outputs: int | None = None,
    zeros: Tensor | None = None,
    order: Tensor | None = None,
    bias: Tensor | None = None,
    activation_bits: int = 16,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`linear` with a weight in 8 or 4 bits, packed by `xgdn.quantization.pack`: `codes` `[P, D/4, 16, 4]` of int8,
    `[P, D/8, 16, 4]` of uint8 for 4 bits, or `[P, D/2, 16, 2]` of float8_e4m3fn, where `P = ceil(O / 16)`.

    `scales` `[P, G, 16]` f32 | bf16 | f16 and `zeros` `[P, G, 16]` int8 (default 0; of 4 bits 8) belong to groups of
    `D / G` columns, 32, 64 or 128. `order` `[D]` int32: column `i` of the codes is column `order[i]` of the weight. `O`
    is `num_outputs`, or 16 P. On the cpu backend integer codes are multiplied with `x` in `activation_bits`, 16 or 8,
    behind a scale for each group, so that a group's sum is exact.
    """
    if out is None:
        out = empty((x.shape[0], 16 * codes.shape[0] if num_outputs is None else num_outputs), x)
    torch.ops.xgdn.quantized_linear(
        x,
        codes,
        scales,
        out,
        zeros=zeros,
        order=order,
        bias=bias,
        activation_bits=activation_bits,
        backend=backend,
    )
    return out


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`(1 + weight) * (x / rms(x))` over the last dimension of `[T, H, D]`, computed in f32; `rms(x)` is
    `sqrt(mean(x^2) + eps)`. `weight` `[D]` is f32 or as `x`, contiguous, and around zero, as checkpoints store it.

    `residual` `[T, H, D]`, as `x`, is updated in place: `x` is added to it, and the sum is normed.

    `cos` and `sin` `[T, P]`, as `x`, with an even P of at most D, rotate the first P elements of a normed row `n`,
    halves and not pairs: `n * cos + (-n[P/2:P], n[:P/2]) * sin`. `n` and both products are rounded to the dtype.
    """
    out = empty(x.shape, x) if out is None else out
    torch.ops.xgdn.rms_norm(x, weight, out, residual=residual, cos=cos, sin=sin, eps=eps, backend=backend)
    return out


def sigmoid_and_mul(x: Tensor, gate: Tensor, *, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """`x * sigmoid(gate)`, all `[T, H, D]` of one dtype: the output gate of attention. `out` may be `x` or `gate`."""
    out = empty(x.shape, x) if out is None else out
    torch.ops.xgdn.sigmoid_and_mul(x, gate, out, backend=backend)
    return out


def silu_and_mul(gate: Tensor, up: Tensor, *, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """`silu(gate) * up`, all `[T, I]` of one dtype. `out` may be `gate` or `up`."""
    out = empty(gate.shape, gate) if out is None else out
    torch.ops.xgdn.silu_and_mul(gate, up, out, backend=backend)
    return out


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    context_rows: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    context_lens_cpu: Tensor | None = None,
    out: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of `q` `[T, HQ, D]` over paged keys and values `[P, B, HKV, D]`, contiguous: `P` blocks of `B`
    rows; query head `h` reads head `h // (HQ // HKV)`. All of one dtype, or `k` and `v` int8 `[P, B, HKV, D + 4]` as
    `store_kv` writes them; returns `[T, HQ, D]`.

    `block_table` i32 `[N, M]`, rows of any stride, has each sequence's blocks; `context_lens` i32 `[N]` the rows of its
    context, of which its tokens are the last, and each sees the rows up to its own; `cu_seqlens` i32 `[N + 1]`. What
    lies outside the contexts is never read, in the cache and in the table. A context of length 0 is padding: its rows
    of the result are zero. `scale` is `D^-0.5` by default.

    For backends that read all sequences at once (npu): `context_rows` i32, `block * B + offset` of every row of the
    contexts, one sequence after another, and the lengths on the CPU.

    A context that is shorter than its tokens or longer than its blocks is an `IndexError` where the lengths are on the
    CPU.
    """
    out = empty(q.shape, q) if out is None else out
    torch.ops.xgdn.paged_attention(
        q,
        k,
        v,
        block_table,
        context_lens,
        cu_seqlens,
        out,
        context_rows=context_rows,
        cu_seqlens_cpu=cu_seqlens_cpu,
        context_lens_cpu=context_lens_cpu,
        scale=scale,
        backend=backend,
    )
    return out


def copy_slots(
    pools: Sequence[Tensor],
    *,
    from_indices: Tensor,
    to_indices: Tensor,
    may_have_padding: bool = True,
    backend: str = "auto",
) -> None:
    """Copy slot `from_indices[n]` to slot `to_indices[n]` in each of `pools`, for every row `n`.

    `pools` are `[S, ...]` with one `S`, f32 | bf16 | f16 or integers, each slot contiguous, updated in place.
    `from_indices`, `to_indices` `[N]` i32: `PAD_SLOT_ID` in either skips the row; no slot is written twice, nor read by
    one row and written by another. `may_have_padding=False` promises that there is no `PAD_SLOT_ID`.
    """
    torch.ops.xgdn.copy_slots(pools, from_indices, to_indices, may_have_padding=may_have_padding, backend=backend)


def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    slot_mapping: Tensor,
    may_have_padding: bool = True,
    backend: str = "auto",
) -> None:
    """Write keys and values `[T, HKV, D]` of new tokens to a paged cache, `k_cache` and `v_cache` `[P, B, HKV, D]`,
    contiguous and updated in place: `P` blocks of `B` rows. All of one dtype, f32 | bf16 | f16, or the caches int8
    `[P, B, HKV, D + 4]`, with `D` a multiple of 4: `D` codes, then the four bytes of their f32 scale, `max |x| / 127`.
    A row with an infinity or a NaN reads as NaN.

    `slot_mapping` `[T]` i32: `block * B + offset` of each token's row, none twice; `PAD_SLOT_ID`: the token is not
    stored. `may_have_padding=False` promises that there is no `PAD_SLOT_ID`.
    """
    torch.ops.xgdn.store_kv(k, v, k_cache, v_cache, slot_mapping, may_have_padding=may_have_padding, backend=backend)


def moe_experts(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """For each token of `x` `[T, D]` the sum over its `A` experts of `weights[t, a] * expert(x[t])`, `[T, D]`.

    Expert `e` is `chosen[t, a]`, i64 of `[T, A]`: `down[e] @ (silu(gate) * up)`, where `gate_up[e] @ x[t]` is `gate`,
    then `up`. `gate_up` `[E, 2 I, D]`, `down` `[E, D, I]` and `weights` `[T, A]` are of the dtype of `x`; everything
    but `x` is contiguous.
    """
    out = empty(x.shape, x) if out is None else out
    torch.ops.xgdn.moe_experts(x, weights, chosen, gate_up, down, out, backend=backend)
    return out


def quantized_moe_experts(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_up_codes: Tensor,
    gate_up_scales: Tensor,
    down_codes: Tensor,
    down_scales: Tensor,
    *,
    gate_up_zeros: Tensor | None = None,
    down_zeros: Tensor | None = None,
    activation_bits: int = 16,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`moe_experts` with weights in 8 or 4 bits: the tensors of `quantized_linear`, each with a dimension `E` before
    its own. `2 I` and `D` are multiples of 16; the columns have no order.
    """
    out = empty(x.shape, x) if out is None else out
    torch.ops.xgdn.quantized_moe_experts(
        x,
        weights,
        chosen,
        gate_up_codes,
        gate_up_scales,
        down_codes,
        down_scales,
        out,
        gate_up_zeros=gate_up_zeros,
        down_zeros=down_zeros,
        activation_bits=activation_bits,
        backend=backend,
    )
    return out
