# SPDX-License-Identifier: Apache-2.0
"""packed_decode against gating and recurrence in float64."""

from __future__ import annotations

import pytest
import torch

import reference
import xgdn
from cases import DTYPES, Case, assert_bits_equal, assert_close, i32, tolerance
from xgdn import ops

CASES = [
    Case((1,)),
    Case((1,) * 9, HV=1, K=128, V=128),
    *(Case((1,) * 3, H=H, HV=H * ratio, K=32, V=16) for H, ratio in ((2, 1), (2, 2), (2, 3), (1, 4), (1, 8), (3, 4))),
    *(Case((1,) * 2, HV=1, K=K, V=V) for K, V in ((16, 48), (96, 64), (256, 64), (64, 256))),
    *(Case((1,) * 4, dtype=dtype, state_dtype=s) for dtype in DTYPES for s in (torch.float32, torch.bfloat16)),
    Case((1,) * 4, dtype=torch.bfloat16, out_dtype=torch.float32),
    Case((1,) * 6, padded=(0, 4)),
    Case((1,) * 6, H=2, HV=4, strided=True),
    Case((1,) * 6, H=2, HV=4, strided=True, dtype=torch.bfloat16),
    Case((1,) * 4, writes_elsewhere=True, padded=(1,)),
    Case((1,) * 3, use_qk_l2norm=False),
    Case((1,) * 3, scale=0.25),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("gate_dtype", ["f32", "as_input"])
def test_matches_reference(case: Case, gate_dtype: str, backend: str) -> None:
    N, H, HV, K, V = case.N, case.H, case.HV, case.K, case.V
    width = 2 * H * K + HV * V
    stride = width + (16 if case.strided else 0)
    mixed_qkv = torch.randn(N, stride).to(case.dtype)[:, :width]
    if not case.use_qk_l2norm:
        mixed_qkv *= 0.1
    a, b = torch.randn(N, 2, 2 * HV).to(case.dtype)[:, 1].split(HV, 1)
    per_head = torch.float32 if gate_dtype == "f32" else case.dtype
    A_log, dt_bias = torch.randn(HV).to(per_head), torch.randn(HV).to(per_head)
    state = torch.full((2 * N + 2, HV, V, K), torch.nan, dtype=case.state_dtype)
    slots = torch.randperm(2 * N + 2).int()
    read, write = slots[:N].clone(), slots[N : 2 * N].clone() if case.writes_elsewhere else None
    state[read] = torch.randn(N, HV, V, K).to(case.state_dtype)
    for n in case.padded:
        read[n] = xgdn.PAD_SLOT_ID
        for x in (mixed_qkv, a, b):
            x[n] = torch.nan
    before = state.clone()
    out = torch.full((N, 2, HV, V), torch.nan, dtype=case.result_dtype)[:, 1]

    got = ops.packed_decode(
        mixed_qkv,
        a,
        b,
        A_log,
        dt_bias,
        state,
        state_indices=read,
        write_indices=write,
        out=out,
        scale=case.scale,
        use_qk_l2norm_in_kernel=case.use_qk_l2norm,
        backend=backend,
    )
    assert xgdn.last_backend("packed_decode") == backend

    g, beta = reference.gdn_gating(a, b, A_log, dt_bias)
    q, k, v = mixed_qkv.split([H * K, H * K, HV * V], 1)
    want = torch.zeros(N, HV, V, dtype=torch.float64)
    written = set()
    for n in range(N):
        if n in case.padded:
            continue
        token = (q[n].view(1, H, K), k[n].view(1, H, K), v[n].view(1, HV, V), g[n : n + 1], beta[n : n + 1])
        o, states = reference.gated_delta_rule(*token, before[read[n]], case.scale, case.use_qk_l2norm)
        want[n] = o[0]
        slot = int(read[n] if write is None else write[n])
        written.add(slot)
        assert_close(f"state of slot {slot}", state[slot], states[-1], tolerance(case, case.state_dtype), parts=(0,))
    assert_close("out", got, want, tolerance(case, case.result_dtype), parts=(0, 1))
    assert not got[list(case.padded)].any()
    others = [slot for slot in range(state.shape[0]) if slot not in written]
    assert_bits_equal("untouched slots", state[others], before[others])


def test_no_sequences(backend: str) -> None:
    state = torch.randn(3, 2, 16, 16)
    before = state.clone()
    empty = torch.empty(0, 2)
    got = ops.packed_decode(
        torch.empty(0, 64),
        empty,
        empty,
        torch.zeros(2),
        torch.zeros(2),
        state,
        state_indices=i32([]),
        backend=backend,
    )
    assert got.shape == (0, 2, 16)
    assert_bits_equal("pool", state, before)
