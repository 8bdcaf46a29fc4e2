# SPDX-License-Identifier: Apache-2.0
"""Prefill on the state pool against the float64 token recurrence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import xgdn
from cases import (
    KEY_GEOMETRIES,
    SHAPE_CASES,
    Case,
    Inputs,
    assert_bits_equal,
    assert_call,
    assert_close,
    expected,
    i32,
    make_inputs,
    relative_error,
    tolerance,
)
from xgdn import ops


def run(x: Inputs, backend: str, accuracy: str = "auto") -> torch.Tensor:
    return ops.chunk_gated_delta_rule(
        *x.tensors(),
        **x.shared(),
        has_initial_state=x.has_initial_state,
        chunk=ops.build_chunk_metadata(x.case.lengths, x.case.HV),
        accuracy=accuracy,
        backend=backend,
    )


def run_piece(x: Inputs, rows: slice, backend: str, accuracy: str, columns: slice = slice(None)) -> None:
    """Rows (and columns of V) of a single sequence."""
    q, k, v, g, beta = (t[rows] for t in x.tensors()[:5])
    ops.chunk_gated_delta_rule(
        q,
        k,
        v[..., columns],
        g,
        beta,
        x.state,
        cu_seqlens=i32([0, len(q)]),
        state_indices=x.state_indices,
        chunk=ops.build_chunk_metadata([len(q)], x.case.HV),
        out=x.out[rows],
        accuracy=accuracy,
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


ACCURACIES = ("fast", "exact")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
EACH_ACCURACY = pytest.mark.parametrize("accuracy", ACCURACIES)


def assert_same_call(got: Inputs, want: Inputs) -> None:
    assert_bits_equal("out", got.out, want.out)
    assert_bits_equal("pool", got.state, want.state)


@DTYPES
@EACH_ACCURACY
@pytest.mark.parametrize("pieces", [(64, 64, 64, 8), (128, 72), (192, 8)], ids=str)
def test_pieces_at_multiples_of_64_equal_the_whole(
    pieces: tuple[int, ...], accuracy: str, dtype: torch.dtype, backend: str
) -> None:
    case = Case((200,), H=1, HV=2, K=48, dtype=dtype, initial="all")
    whole = make_inputs(case, prefill=True)
    run(whole, backend, accuracy)
    x = make_inputs(case, prefill=True)
    begin = 0
    for length in pieces:
        run_piece(x, slice(begin, begin + length), backend, accuracy)
        begin += length
    if backend == "reference":  # keeps the state in f64 until a call's end
        assert_close("out", x.out, whole.out, tolerance(case, dtype))
        assert_close("state", x.state[x.state_indices], whole.state[x.state_indices], tolerance(case, dtype))
    else:
        assert_same_call(x, whole)


# With few work items, threads share the value heads of a key head and the columns of V.
@DTYPES
@EACH_ACCURACY
@pytest.mark.parametrize("lengths", [(130, 5), (200,)], ids=str)
def test_threads_do_not_change_bits(
    lengths: tuple[int, ...], accuracy: str, dtype: torch.dtype, num_threads: Callable[[int], None], backend: str
) -> None:
    case = Case(lengths, H=1, HV=2, K=64, V=112, dtype=dtype)
    num_threads(1)
    alone = make_inputs(case, prefill=True)
    run(alone, backend, accuracy)
    for count in (2, 5):
        num_threads(count)
        x = make_inputs(case, prefill=True)
        run(x, backend, accuracy)
        assert_same_call(x, alone)


@DTYPES
@EACH_ACCURACY
def test_other_sequences_do_not_change_bits(accuracy: str, dtype: torch.dtype, backend: str) -> None:
    case = Case((65, 3, 0, 130), H=1, HV=2, dtype=dtype, initial="all")
    together = make_inputs(case, prefill=True)
    run(together, backend, accuracy)
    for n, rows in enumerate(case.rows):
        x = make_inputs(case, prefill=True)
        slot = x.state_indices[n : n + 1]
        run_piece(replace(x, state_indices=slot), rows, backend, accuracy)
        assert_bits_equal(f"out of sequence {n}", x.out[rows], together.out[rows])
        assert_bits_equal(f"state of sequence {n}", x.state[slot], together.state[slot])


@EACH_ACCURACY
def test_16_columns_alone_equal_those_columns_of_all(accuracy: str, backend: str) -> None:
    case = Case((130,), H=1, HV=2, V=112, dtype=torch.bfloat16, initial="all")
    whole = make_inputs(case, prefill=True)
    run(whole, backend, accuracy)
    for begin in (0, 48, 96):
        columns = slice(begin, begin + 16)
        x = make_inputs(case, prefill=True)
        x = replace(x, state=x.state[:, :, columns].contiguous(), out=x.out[..., columns].contiguous())
        run_piece(x, slice(0, 130), backend, accuracy, columns)
        assert_bits_equal("out", x.out, whole.out[..., columns])
        assert_bits_equal("pool", x.state, whole.state[:, :, columns])


# ---- accuracy --------------------------------------------------------------------------------------------------------

# Rounding the outputs to bf16 alone costs 1.7e-3; S is f32.
FAST_OUT, FAST_STATE = 2e-3, 1e-4
EXACT = 1e-6
WIDE = Case((700,), H=1, HV=2, K=128, V=128, dtype=torch.bfloat16, initial="all")


def sized(case: Case, backend: str) -> Case:
    """Narrower for the reference, which computes in f64 whatever the keys and gates are, one token after the other."""
    return replace(case, K=min(case.K, 48), V=min(case.V, 48)) if backend == "reference" else case


def errors(x: Inputs) -> tuple[float, float]:
    want, slots = expected(x, prefill=True)
    (state,) = slots.values()
    return relative_error(x.out, want), relative_error(x.state[next(iter(slots))], state)


@pytest.mark.parametrize("gates", ["typical", "g5", "g380", "mixed", "slow"])
def test_fast_keeps_its_promise(gates: str, backend: str) -> None:
    x = make_inputs(sized(replace(WIDE, gates=gates), backend), prefill=True)
    run(x, backend, "fast")
    out, state = errors(x)
    assert out <= FAST_OUT
    assert state <= FAST_STATE


# (g, beta) of each sequence
STEADY_GATES = ((0.0, 1.0), (-1e-3, 1.0), (-0.01, 0.9), (-0.1, 0.5), (-0.5, 0.1))


@pytest.mark.parametrize("keys", KEY_GEOMETRIES)
def test_fast_keeps_its_promise_for_keys(keys: str, backend: str) -> None:
    case = sized(replace(WIDE, lengths=(65, 130, 500, 65, 130), keys=keys), backend)
    x = make_inputs(case, prefill=True)
    for rows, (g, beta) in zip(case.rows, STEADY_GATES, strict=True):
        x.g[rows] = g
        x.beta[rows] = beta
    run(x, backend, "fast")
    want, states = expected(x, prefill=True)
    for n, rows in enumerate(case.rows):
        assert_close(f"out of sequence {n}", x.out[rows], want[rows], FAST_OUT, parts=(1,))
        slot = int(x.state_indices[n])
        assert_close(f"state of sequence {n}", x.state[slot], states[slot], FAST_STATE, parts=(0,))


@pytest.mark.parametrize("keys", ["same", "random"])
def test_fast_keeps_its_promise_for_long_prompts(keys: str, backend: str) -> None:
    x = make_inputs(sized(replace(WIDE, lengths=(8192,), HV=1, K=64, V=64, keys=keys, beta=1.0), backend), prefill=True)
    x.g.zero_()
    run(x, backend, "fast")
    out, state = errors(x)
    assert out <= FAST_OUT
    assert state <= FAST_STATE


@pytest.mark.parametrize("gates", ["typical", "mixed", "slow", "near0"])
def test_exact_keeps_its_promise_for_bf16_inputs(gates: str, backend: str) -> None:
    x = make_inputs(sized(replace(WIDE, gates=gates, out_dtype=torch.float32), backend), prefill=True)
    run(x, backend, "exact")
    assert max(errors(x)) <= EXACT


@pytest.mark.parametrize("g", [-1e-5, -3e-8])
def test_exact_keeps_states_that_hardly_decay(g: float, backend: str) -> None:
    x = make_inputs(Case((2000,), HV=1, K=32, V=32, initial="all"), prefill=True)
    x.g.fill_(g)
    run(x, backend)
    assert max(errors(x)) <= EXACT


def test_exact_decays_without_bias(backend: str) -> None:
    """exp of a whole chunk's decay lies halfway between two f32, so rounding it would err to one side 32 times."""
    x = make_inputs(Case((2048,), HV=1, K=16, V=16, beta=0.0, initial="all"), prefill=True)
    x.g.fill_(-118.5 * 2**-24 / 64)
    run(x, backend)
    assert max(errors(x)) <= EXACT


def test_auto_is_fast_for_bf16_and_exact_for_more_bits(backend: str) -> None:
    for dtype, accuracy in ((torch.bfloat16, "fast"), (torch.float16, "exact"), (torch.float32, "exact")):
        case = Case((130, 5), dtype=dtype)
        auto, named = (make_inputs(case, prefill=True) for _ in range(2))
        run(auto, backend)
        run(named, backend, accuracy)
        assert_same_call(auto, named)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_fast_takes_inputs_of_more_bits(dtype: torch.dtype, backend: str) -> None:
    x = make_inputs(sized(replace(WIDE, dtype=dtype, out_dtype=torch.float32), backend), prefill=True)
    run(x, backend, "fast")
    assert max(errors(x)) <= 2 * FAST_OUT  # q and k are rounded as well


def test_unknown_accuracy_is_an_error(backend: str) -> None:
    x = make_inputs(Case((3,)), prefill=True)
    with pytest.raises(NotImplementedError, match="accuracy: expected auto, fast or exact, got 'precise'"):
        run(x, backend, "precise")


def test_one_sequences_nan_stays_its_own(backend: str) -> None:
    case = Case((65, 66, 64), H=1, HV=2, initial="all")
    want = run(make_inputs(case, prefill=True), backend)
    x = make_inputs(case, prefill=True)
    x.state[x.state_indices[1]] = torch.nan
    got = run(x, backend)
    for n in (0, 2):
        assert_bits_equal(f"sequence {n}", got[case.rows[n]], want[case.rows[n]])
    assert got[case.rows[1]].isnan().all()
