# SPDX-License-Identifier: Apache-2.0
"""Decode and draft verification on the state pool against the float64 token recurrence."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

import reference
import xgdn
from cases import (
    DECODE_CASES,
    Case,
    Inputs,
    assert_bits_equal,
    assert_call,
    assert_close,
    cu_seqlens_of,
    i32,
    make_inputs,
    tolerance,
)
from xgdn import ops


def run(x: Inputs, backend: str) -> torch.Tensor:
    return ops.recurrent_gated_delta_rule(*x.tensors(), **x.shared(), backend=backend)


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_matches_recurrence(case: Case, backend: str) -> None:
    x = make_inputs(case, prefill=False)
    got = run(x, backend)
    assert got.data_ptr() == x.out.data_ptr()
    assert xgdn.last_backend("recurrent_gated_delta_rule") == backend
    assert_call(x, got, prefill=False)


def test_no_sequences(backend: str) -> None:
    x = make_inputs(Case(()), prefill=False)
    assert run(x, backend).shape == (0, 2, 64)
    assert_bits_equal("pool", x.state, x.before)


def test_a_padded_write_slot_computes_and_writes_nothing(backend: str) -> None:
    x = make_inputs(Case((1, 3), writes_elsewhere=True), prefill=False)
    want = run(make_inputs(x.case, prefill=False), backend)
    x.write_indices.fill_(xgdn.PAD_SLOT_ID)
    assert_bits_equal("out", run(x, backend), want)
    assert_bits_equal("pool", x.state, x.before)


def test_a_fork_reads_one_slot_twice(backend: str) -> None:
    case = Case((1, 1), writes_elsewhere=True)
    x = make_inputs(case, prefill=False)
    x.state_indices[1] = x.state_indices[0]
    assert_call(x, run(x, backend), prefill=False)


def test_one_sequences_nan_stays_its_own(backend: str) -> None:
    case = Case((1,) * 5, H=1, HV=2)
    want = run(make_inputs(case, prefill=False), backend)
    x = make_inputs(case, prefill=False)
    x.state[x.state_indices[2]] = torch.nan
    got = run(x, backend)
    others = [0, 1, 3, 4]
    assert_bits_equal("other sequences", got[others], want[others])
    assert got[2].isnan().all()


def test_order_of_the_batch_does_not_change_bits(backend: str) -> None:
    case = Case((1,) * 6, H=2, HV=4)
    x, y = make_inputs(case, prefill=False), make_inputs(case, prefill=False)
    want = run(x, backend)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    got = ops.recurrent_gated_delta_rule(
        *(t[order] for t in y.tensors()[:5]),
        y.state,
        cu_seqlens=y.cu_seqlens,
        state_indices=y.state_indices[order],
        backend=backend,
    )
    assert_bits_equal("out", got, want[order])
    assert_bits_equal("pool", y.state, x.state)


@pytest.mark.parametrize("in_one_call", [True, False], ids=["one_call", "2000_calls"])
@pytest.mark.parametrize(("gates", "beta"), [("near0", None), ("halfulp", 0.1)])  # a small beta remembers for longer
def test_2000_steps_with_almost_no_decay(gates: str, beta: float | None, in_one_call: bool, backend: str) -> None:
    case = Case((2000,), H=1, HV=1, K=64, V=32, gates=gates, beta=beta)
    x = make_inputs(case, prefill=False)
    if in_one_call:
        run(x, backend)
    else:
        for t in range(case.T):
            ops.recurrent_gated_delta_rule(
                *(token[t : t + 1] for token in x.tensors()[:5]),
                x.state,
                cu_seqlens=i32([0, 1]),
                state_indices=x.state_indices,
                out=x.out[t : t + 1],
                backend=backend,
            )
    assert_call(x, x.out, prefill=False)


def test_threads_do_not_change_bits(num_threads: Callable[[int], None], backend: str) -> None:
    case = Case((1,) * 3, H=1, HV=2, K=128, V=128)
    results = []
    for count in (1, 2, 5):
        num_threads(count)
        x = make_inputs(case, prefill=False)
        results.append((run(x, backend), x.state))
    for out, state in results[1:]:
        assert_bits_equal("out", out, results[0][0])
        assert_bits_equal("pool", state, results[0][1])


# ---- verification ---------------------------------------------------------------------------------------------------

COLUMNS = 4  # L of the slot table
DRAFTS = (4, 1, 3, 0, 2)


def make_drafts(case: Case, accepted: tuple[int, ...]) -> tuple[Inputs, torch.Tensor]:
    """Inputs with a table [N, L] instead of one slot a sequence; only the slot that is read is not NaN."""
    x = make_inputs(case, prefill=False)
    table = torch.randperm(case.N * COLUMNS + 3)[: case.N * COLUMNS].view(case.N, COLUMNS).int()
    state = torch.full((case.N * COLUMNS + 3, *x.state.shape[1:]), torch.nan, dtype=case.state_dtype)
    for n in range(case.N):
        if n not in case.padded:
            state[table[n, accepted[n] - 1]] = x.before[x.state_indices[n]]
        else:
            table[n] = xgdn.PAD_SLOT_ID
    x.state, x.before, x.state_indices = state, state.clone(), table
    return x, i32(accepted)


def verify(x: Inputs, num_accepted: torch.Tensor, backend: str) -> torch.Tensor:
    return ops.recurrent_gated_delta_rule(*x.tensors(), **x.shared(), num_accepted=num_accepted, backend=backend)


def assert_verified(x: Inputs, accepted: tuple[int, ...], got: torch.Tensor) -> None:
    case = x.case
    written = set()
    for n, rows in enumerate(case.rows):
        if n in case.padded:
            assert not got[rows].any()
            continue
        initial = x.before[x.state_indices[n, accepted[n] - 1]]
        o, states = reference.gated_delta_rule(*(t[rows] for t in x.tensors()[:5]), initial)
        assert_close(f"out of sequence {n}", got[rows], o, tolerance(case, case.result_dtype), parts=(0, 1))
        for t in range(case.lengths[n]):
            slot = int(x.state_indices[n, t])
            written.add(slot)
            bound = tolerance(case, case.state_dtype)
            assert_close(f"state of sequence {n} after token {t}", x.state[slot], states[t + 1], bound, parts=(0,))
    others = [slot for slot in range(x.state.shape[0]) if slot not in written]
    assert_bits_equal("untouched slots", x.state[others], x.before[others])


@pytest.mark.parametrize("accepted", [(a,) * len(DRAFTS) for a in range(1, COLUMNS + 1)] + [(4, 3, 2, 1, 1)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(DRAFTS, H=1, HV=2),
        Case(DRAFTS, H=2, HV=6, K=48, V=32),
        Case(DRAFTS, dtype=torch.bfloat16, state_dtype=torch.bfloat16),
        Case(DRAFTS, padded=(0, 4)),
    ],
    ids=str,
)
def test_verification_writes_the_state_after_every_draft(case: Case, accepted: tuple[int, ...], backend: str) -> None:
    x, num_accepted = make_drafts(case, accepted)
    assert_verified(x, accepted, verify(x, num_accepted, backend))


@pytest.mark.parametrize("accepted", [(1,) * 5, (2, 1, 3, 1, 1)], ids=str)
def test_verification_equals_decode(accepted: tuple[int, ...], backend: str) -> None:
    case = Case(DRAFTS, H=1, HV=2)
    x, num_accepted = make_drafts(case, accepted)
    got = verify(x, num_accepted, backend)
    for n, rows in enumerate(case.rows):
        pool = x.before[x.state_indices[n, accepted[n] - 1]][None].clone()
        for t, row in enumerate(range(rows.start, rows.stop)):
            o = ops.recurrent_gated_delta_rule(
                *(token[row : row + 1] for token in x.tensors()[:5]),
                pool,
                cu_seqlens=i32([0, 1]),
                state_indices=i32([0]),
                backend=backend,
            )
            assert_close(f"out of sequence {n}, token {t}", got[row : row + 1], o, tolerance(case, case.dtype))
            state = x.state[x.state_indices[n, t]]
            assert_close(f"state of sequence {n} after token {t}", state, pool[0], tolerance(case, case.dtype))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("K", [48, 128])
def test_verification_on_the_cpu_has_the_bits_of_decode(state_dtype: torch.dtype, K: int) -> None:
    """Whether tokens were drafted or not, the sequence goes on the same; also where a draft's state is dropped."""
    if "cpu" not in xgdn.available_backends():
        pytest.skip("this build has no cpu backend")
    case = Case((4, 3), H=1, HV=2, K=K, V=32, dtype=torch.bfloat16, state_dtype=state_dtype)
    x, num_accepted = make_drafts(case, (2, 1))
    x.state_indices[1, 1] = xgdn.PAD_SLOT_ID
    got = verify(x, num_accepted, "cpu")
    for n, rows in enumerate(case.rows):
        pool = x.before[x.state_indices[n, (1, 0)[n]]][None].clone()
        for t, row in enumerate(range(rows.start, rows.stop)):
            token = [a[row : row + 1] for a in x.tensors()[:5]]
            o = ops.recurrent_gated_delta_rule(
                *token, pool, cu_seqlens=i32([0, 1]), state_indices=i32([0]), backend="cpu"
            )
            assert_bits_equal(f"out of sequence {n}, token {t}", got[row : row + 1], o)
            slot = int(x.state_indices[n, t])
            if slot != xgdn.PAD_SLOT_ID:
                assert_bits_equal(f"state of sequence {n} after token {t}", x.state[slot], pool[0])


@pytest.mark.parametrize("first_accepted", range(1, COLUMNS + 1))
def test_verification_resumes_behind_the_accepted_draft(first_accepted: int, backend: str) -> None:
    """Two rounds: of the first round's drafts `first_accepted` are kept, the second goes on from there."""
    case = Case((COLUMNS, COLUMNS), H=1, HV=2)
    x, num_accepted = make_drafts(case, (1, 1))
    first = x.before.clone()
    verify(x, num_accepted, backend)
    y = make_inputs(case, seed=1, prefill=False)
    got = ops.recurrent_gated_delta_rule(
        *y.tensors()[:5],
        x.state,
        cu_seqlens=x.cu_seqlens,
        state_indices=x.state_indices,
        num_accepted=i32([first_accepted] * 2),
        backend=backend,
    )
    for n, rows in enumerate(case.rows):
        kept = slice(rows.start, rows.start + first_accepted)
        both = [torch.cat([a[kept], b[rows]]) for a, b in zip(x.tensors()[:5], y.tensors()[:5], strict=True)]
        o, states = reference.gated_delta_rule(*both, first[x.state_indices[n, 0]])
        assert_close(f"out of sequence {n}", got[rows], o[first_accepted:], tolerance(case, case.dtype), parts=(0, 1))
        for t in range(COLUMNS):
            state = x.state[x.state_indices[n, t]]
            assert_close(f"state {t}", state, states[first_accepted + t + 1], tolerance(case, case.dtype))


def test_a_padded_column_of_the_table_is_not_written(backend: str) -> None:
    case = Case((3, 3), H=1, HV=2)
    x, num_accepted = make_drafts(case, (1, 1))
    y, _ = make_drafts(case, (1, 1))
    want = verify(y, num_accepted, backend)
    x.state, x.before, x.state_indices = y.before.clone(), y.before, y.state_indices.clone()
    dropped = list(itertools.product(range(2), (1, 3)))
    slots = {int(x.state_indices[at]) for at in dropped}
    for at in dropped:
        x.state_indices[at] = xgdn.PAD_SLOT_ID
    assert_bits_equal("out", verify(x, num_accepted, backend), want)
    kept = [slot for slot in range(x.state.shape[0]) if slot not in slots]
    assert_bits_equal("written slots", x.state[kept], y.state[kept])
    assert_bits_equal("dropped slots", x.state[sorted(slots)], x.before[sorted(slots)])


def test_verification_without_drafts_left(backend: str) -> None:
    case = Case((0, 0), H=1, HV=2)
    x, num_accepted = make_drafts(case, (2, 1))
    assert verify(x, num_accepted, backend).shape == (0, 2, 64)
    assert_bits_equal("pool", x.state, x.before)
    assert x.cu_seqlens.equal(cu_seqlens_of((0, 0)))
