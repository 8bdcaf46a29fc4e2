# SPDX-License-Identifier: Apache-2.0
"""The delta rules on cuda tensors against the float64 token recurrence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import xgdn
from cases import DECODE_CASES, SHAPE_CASES, Case, assert_bits_equal, assert_call, i32, make_inputs
from cuda_calls import bring_back, device_inputs, prefill
from xgdn import ops

KEY_DIMS = (16, 32, 64, 128, 256)


@pytest.mark.parametrize("case", [c for c in DECODE_CASES if c.K in KEY_DIMS], ids=str)
def test_decode_matches_the_recurrence(case: Case) -> None:
    x = make_inputs(case, prefill=False)
    y = device_inputs(x)
    ops.recurrent_gated_delta_rule(*y.tensors(), **y.shared())
    assert xgdn.last_backend("recurrent_gated_delta_rule") == "cuda"
    bring_back(x, y)
    assert_call(x, x.out, prefill=False)


@pytest.mark.parametrize("case", [c for c in SHAPE_CASES if c.K in KEY_DIMS], ids=str)
def test_prefill_matches_the_recurrence(case: Case) -> None:
    x = make_inputs(case, prefill=True)
    y = device_inputs(x)
    prefill(case, y)
    assert xgdn.last_backend("chunk_gated_delta_rule") == "cuda"
    bring_back(x, y)
    assert_call(x, x.out, prefill=True)


WIDE = Case((200, 0, 64, 1, 700), H=2, HV=4, K=128, V=128, dtype=torch.bfloat16)


@pytest.mark.parametrize("accuracy", ["fast", "exact"])
def test_a_sequence_of_a_prefill_has_the_bits_that_it_has_alone(accuracy: str) -> None:
    x = make_inputs(WIDE, prefill=True)
    together = device_inputs(x)
    prefill(WIDE, together, accuracy)
    for n, rows in enumerate(WIDE.rows):
        alone = device_inputs(x)
        length = rows.stop - rows.start
        one = replace(
            alone,
            **{name: getattr(alone, name)[rows] for name in ("q", "k", "v", "g", "beta", "out")},
            cu_seqlens=i32([0, length]).cuda(),
            state_indices=alone.state_indices[n : n + 1],
            has_initial_state=alone.has_initial_state[n : n + 1],
        )
        prefill(replace(WIDE, lengths=(length,)), one, accuracy)
        assert_bits_equal("out", one.out, together.out[rows])
        slot = int(x.state_indices[n])
        assert_bits_equal("state", one.state[slot], together.state[slot])


def test_a_sequence_of_a_decode_has_the_bits_that_it_has_alone() -> None:
    case = Case((1,) * 70, H=8, HV=16, K=128, V=128, dtype=torch.bfloat16)  # enough for several rows a group
    x = make_inputs(case, prefill=False)
    together = device_inputs(x)
    ops.recurrent_gated_delta_rule(*together.tensors(), **together.shared())
    for n in (0, 41, 69):
        alone = device_inputs(x)
        rows = slice(n, n + 1)
        out = alone.out[rows]
        ops.recurrent_gated_delta_rule(
            *(t[rows] for t in alone.tensors()[:5]),
            alone.state,
            cu_seqlens=i32([0, 1]).cuda(),
            state_indices=alone.state_indices[rows],
            out=out,
        )
        assert_bits_equal("out", out, together.out[rows])
        slot = int(x.state_indices[n])
        assert_bits_equal("state", alone.state[slot], together.state[slot])


def test_verification_writes_the_state_after_every_token() -> None:
    case = Case((4, 1, 3, 4), H=2, HV=4, K=128, V=128, dtype=torch.bfloat16)
    x = make_inputs(case, prefill=False)
    table = torch.full((4, 4), -1, dtype=torch.int32)
    accepted = i32([2, 1, 4, 3])
    free = iter(torch.randperm(24).tolist())
    for n in range(4):
        for t in range(4):
            table[n, t] = next(free)
    state = torch.full((24, 4, 128, 128), torch.nan)
    for n in range(4):
        state[table[n, accepted[n] - 1]] = torch.randn(4, 128, 128)
    y = device_inputs(x)
    on_cuda = state.cuda()
    ops.recurrent_gated_delta_rule(
        *y.tensors()[:5],
        on_cuda,
        cu_seqlens=y.cu_seqlens,
        state_indices=table.cuda(),
        num_accepted=accepted.cuda(),
        out=y.out,
    )
    want, want_out = state.clone(), x.out.clone()
    ops.recurrent_gated_delta_rule(
        *x.tensors()[:5],
        want,
        cu_seqlens=x.cu_seqlens,
        state_indices=table,
        num_accepted=accepted,
        out=want_out,
        backend="reference",
    )
    torch.testing.assert_close(on_cuda.cpu(), want, rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(y.out.cpu(), want_out, rtol=2e-2, atol=2e-2)


def test_key_dims_without_a_kernel_are_refused() -> None:
    case = Case((1,), K=48, V=64)
    y = device_inputs(make_inputs(case, prefill=False))
    with pytest.raises(NotImplementedError, match=r"cuda.*K = 16, 32, 64, 128 or 256, got K=48"):
        ops.recurrent_gated_delta_rule(*y.tensors(), **y.shared())
