# SPDX-License-Identifier: Apache-2.0
"""Prefill on the state pool against the float64 token recurrence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import xgdn
from cases import SHAPE_CASES, Case, Inputs, assert_bits_equal, assert_call, assert_close, i32, make_inputs, tolerance
from xgdn import ops


def run(x: Inputs, backend: str) -> torch.Tensor:
    return ops.chunk_gated_delta_rule(
        *x.tensors(),
        **x.shared(),
        has_initial_state=x.has_initial_state,
        chunk=ops.build_chunk_metadata(x.case.lengths, x.case.HV),
        backend=backend,
    )


@pytest.mark.parametrize("case", SHAPE_CASES, ids=str)
def test_matches_recurrence(case: Case, backend: str) -> None:
    x = make_inputs(case, prefill=True)
    got = run(x, backend)
    assert got.data_ptr() == x.out.data_ptr()
    assert xgdn.last_backend("chunk_gated_delta_rule") == backend
    assert_call(x, got, prefill=True)


def test_no_sequences(backend: str) -> None:
    x = make_inputs(Case(()), prefill=True)
    assert run(x, backend).shape == (0, 2, 64)
    assert_bits_equal("pool", x.state, x.before)


def test_only_empty_sequences_still_move_their_state(backend: str) -> None:
    x = make_inputs(Case((0, 0), writes_elsewhere=True, initial="all"), prefill=True)
    run(x, backend)
    assert_call(x, x.out, prefill=True)


def test_a_padded_write_slot_computes_and_writes_nothing(backend: str) -> None:
    x = make_inputs(Case((66, 3), writes_elsewhere=True, initial="all"), prefill=True)
    want = run(make_inputs(x.case, prefill=True), backend)
    x.write_indices.fill_(xgdn.PAD_SLOT_ID)
    assert_bits_equal("out", run(x, backend), want)
    assert_bits_equal("pool", x.state, x.before)


@pytest.mark.parametrize("pieces", [(64, 64, 64, 8), (128, 72), (192, 8)], ids=str)
def test_pieces_at_multiples_of_64_equal_the_whole(pieces: tuple[int, ...], backend: str) -> None:
    case = Case((200,), H=1, HV=2, initial="all")
    whole = make_inputs(case, prefill=True)
    want = run(whole, backend)
    x = make_inputs(case, prefill=True)
    begin = 0
    for length in pieces:
        rows = slice(begin, begin + length)
        ops.chunk_gated_delta_rule(
            *(t[rows] for t in x.tensors()[:5]),
            x.state,
            cu_seqlens=i32([0, length]),
            state_indices=x.state_indices,
            chunk=ops.build_chunk_metadata([length], case.HV),
            out=x.out[rows],
            backend=backend,
        )
        begin += length
    bound = tolerance(case, case.dtype)
    assert_close("out", x.out, want, bound)
    assert_close("state", x.state[x.state_indices], whole.state[x.state_indices], bound)


def test_threads_do_not_change_bits(num_threads: Callable[[int], None], backend: str) -> None:
    case = Case((130, 5), H=1, HV=2)
    results = []
    for count in (1, 2, 5):
        num_threads(count)
        x = make_inputs(case, prefill=True)
        results.append((run(x, backend), x.state))
    for out, state in results[1:]:
        assert_bits_equal("out", out, results[0][0])
        assert_bits_equal("pool", state, results[0][1])


def test_one_sequences_nan_stays_its_own(backend: str) -> None:
    case = Case((65, 66, 64), H=1, HV=2, initial="all")
    want = run(make_inputs(case, prefill=True), backend)
    x = make_inputs(case, prefill=True)
    x.state[x.state_indices[1]] = torch.nan
    got = run(x, backend)
    for n in (0, 2):
        assert_bits_equal(f"sequence {n}", got[case.rows[n]], want[case.rows[n]])
    assert got[case.rows[1]].isnan().all()
