# SPDX-License-Identifier: Apache-2.0
"""xgdn's ops as providers. Their tolerances are those of bf16 inputs and outputs, or the accuracy that is asked for."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import xgdn
from kernels.cases import HV, NORM_EPS, DecodeCase, DecodeStepCase, H, K, PrefillCase, RuleCase, V, VerifyCase
from kernels.compare import Provider

CHUNK = 16  # tokens of a ring

_OUT = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}  # rounding out to bf16 costs 1.7e-3
_STATE = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}


def _tokens(case: RuleCase | PrefillCase) -> tuple[Tensor, ...]:
    return case.q, case.k, case.v, case.gates.g, case.gates.beta


def decode(case: DecodeCase) -> list[Provider]:
    return [_recurrent(case), _packed_decode(case), _replay_decode(case)]


def _recurrent(case: RuleCase) -> Provider:
    pool = case.pool.make()
    out = torch.full_like(case.v, torch.nan)

    def call(i: int) -> None:
        xgdn.ops.recurrent_gated_delta_rule(
            *_tokens(case),
            pool,
            cu_seqlens=case.cu_seqlens,
            state_indices=case.indices(i),
            num_accepted=case.num_accepted,
            out=out,
        )

    return _provider("xgdn recurrent_gated_delta_rule", call, out, pool, len(case.q))


def _packed_decode(case: DecodeCase) -> Provider:
    pool = case.pool.make()
    out = torch.full_like(case.v, torch.nan)

    def call(i: int) -> None:
        xgdn.ops.packed_decode(
            case.mixed_qkv,
            case.gates.a,
            case.gates.b,
            case.gates.A_log,
            case.gates.dt_bias,
            pool,
            state_indices=case.pool.slots(i),
            out=out,
        )

    return _provider("xgdn packed_decode", call, out, pool, case.batch)


def _replay_decode(case: DecodeCase) -> Provider:
    """On rings whose tokens write nothing, so that the truth is that of the states; as many are full in each call."""
    pool = case.pool.make()
    return _replay(case, pool, _staggered_rings(pool), case.pool.slots, case.batch, state_tolerance=_STATE[pool.dtype])


def _staggered_rings(pool: Tensor) -> xgdn.ops.ReplayRing:
    rings = _rings(pool)
    rings.length.copy_(torch.arange(len(pool)) % CHUNK)
    return rings


def _rings(pool: Tensor) -> xgdn.ops.ReplayRing:
    return xgdn.ops.ReplayRing.allocate(
        len(pool),
        num_key_heads=H,
        num_value_heads=HV,
        key_head_dim=K,
        value_head_dim=V,
        chunk_size=CHUNK,
    )


def _replay(
    case: DecodeCase | PrefillCase,
    pool: Tensor,
    ring: xgdn.ops.ReplayRing,
    slots: Callable[[int], Tensor],
    count: int,
    *,
    has_initial_state: Tensor | None = None,
    state_tolerance: float,
) -> Provider:
    """Of `count` sequences, the first of which have the first slots."""
    out = torch.full_like(case.v, torch.nan)

    def call(i: int) -> None:
        xgdn.ops.replay_gated_delta_rule(
            *_tokens(case),
            pool,
            ring,
            cu_seqlens=case.cu_seqlens,
            state_indices=slots(i),
            ring_indices=slots(i),
            has_initial_state=has_initial_state,
            chunk_size=CHUNK,
            out=out,
        )

    return _replay_provider(
        "xgdn replay_gated_delta_rule", call, out, pool, ring, slots(0), count, state_tolerance=state_tolerance
    )


def _replay_provider(
    name: str,
    call: Callable[[int], None],
    out: Tensor,
    pool: Tensor,
    ring: xgdn.ops.ReplayRing,
    first: Tensor,
    count: int,
    *,
    state_tolerance: float,
) -> Provider:
    """Of `count` sequences, which have the slots `first` in the first call."""

    def result() -> tuple[Tensor, Tensor]:
        states = pool[:count].clone()
        xgdn.ops.materialize_state(
            states,
            ring,
            lengths=ring.length[:count],
            state_indices=first,
            ring_indices=first,
            write_indices=first,
            chunk_size=CHUNK,
        )
        return out, states

    return Provider(name=name, call=call, result=result, out_tolerance=_OUT[out.dtype], state_tolerance=state_tolerance)


def decode_step(case: DecodeStepCase) -> list[Provider]:
    """The fused step; decode() has the rules alone to compare it with."""
    # The rule's input and output are rounded to bf16, as they are between the ops that the step consists of; a few
    # values lie so close to the middle of two that they round the other way than the truth does.
    return [
        dataclasses.replace(provider, out_tolerance=5e-3, state_tolerance=provider.state_tolerance + 1e-4)
        for provider in (_decode_step(case), _replay_decode_step(case))
    ]


def _decode_step(case: DecodeStepCase) -> Provider:
    pool, out = case.pool.make(), torch.full_like(case.v, torch.nan)
    call = _step_call(case, pool, None, out)
    return _provider("xgdn gdn_decode_step", call, out, pool, case.batch)


def _replay_decode_step(case: DecodeStepCase) -> Provider:
    """With rings as those of _replay_decode."""
    pool, out = case.pool.make(), torch.full_like(case.v, torch.nan)
    rings = _staggered_rings(pool)
    call, first = _step_call(case, pool, rings, out), case.pool.slots(0)
    name, tolerance = "xgdn gdn_decode_step, replay", _STATE[pool.dtype]
    return _replay_provider(name, call, out, pool, rings, first, case.batch, state_tolerance=tolerance)


def _step_call(
    case: DecodeStepCase, pool: Tensor, ring: xgdn.ops.ReplayRing | None, out: Tensor
) -> Callable[[int], None]:
    conv_pool = case.make_conv_pool()

    def call(i: int) -> None:
        xgdn.ops.gdn_decode_step(
            case.projected,
            case.conv_weight,
            conv_pool,
            case.gates.A_log,
            case.gates.dt_bias,
            pool,
            case.norm_weight,
            state_indices=case.pool.slots(i),
            ring=ring,
            chunk_size=CHUNK,
            norm_eps=NORM_EPS,
            out=out,
        )

    return call


def verify(case: VerifyCase) -> list[Provider]:
    provider = _recurrent(case)
    if case.pool.dtype == torch.bfloat16:  # a token starts from the state as the one before it was written, rounded
        provider = dataclasses.replace(provider, out_tolerance=4e-3, state_tolerance=4e-3)
    return [provider]


def prefill(case: PrefillCase) -> list[Provider]:
    accuracies = ("fast", "exact") if case.dtype == torch.bfloat16 else ("exact",)
    return [*(_prefill(case, accuracy) for accuracy in accuracies), _replay_prefill(case)]


def _prefill(case: PrefillCase, accuracy: str) -> Provider:
    pool = case.make_pool()
    out = torch.full_like(case.v, torch.nan)
    has_initial_state = torch.zeros(len(case.lengths), dtype=torch.bool)

    def call(_: int) -> None:
        xgdn.ops.chunk_gated_delta_rule(
            *_tokens(case),
            pool,
            cu_seqlens=case.cu_seqlens,
            state_indices=case.state_indices,
            chunk=case.chunk,
            has_initial_state=has_initial_state,
            out=out,
            accuracy=accuracy,
        )

    return Provider(
        name=f"xgdn chunk_gated_delta_rule {accuracy}",
        call=call,
        result=lambda: (out, pool),
        out_tolerance=_OUT[case.dtype],
        state_tolerance=1.5e-3 if accuracy == "fast" else 1e-6,
    )


def _replay_prefill(case: PrefillCase) -> Provider:
    pool = case.make_pool()
    starts = torch.zeros(len(pool), dtype=torch.bool)
    return _replay(
        case,
        pool,
        _rings(pool),
        lambda _: case.state_indices,
        len(pool),
        has_initial_state=starts,
        state_tolerance=1e-6,
    )


def _provider(name: str, call: Callable[[int], None], out: Tensor, pool: Tensor, num_slots: int) -> Provider:
    return Provider(
        name=name,
        call=call,
        result=lambda: (out, pool[:num_slots]),
        out_tolerance=_OUT[out.dtype],
        state_tolerance=_STATE[pool.dtype],
    )
