# SPDX-License-Identifier: Apache-2.0
"""Prefill of sequences that are cut into pieces within the device: beside the exact rule and beside short calls, which
are not cut; alone and in batches; in a captured graph whose sequences change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import xgdn
from cases import (
    Case,
    Inputs,
    assert_bits_equal,
    assert_close,
    assert_untouched,
    cu_seqlens_of,
    i32,
    make_inputs,
    relative_error,
)
from cuda_calls import bring_back, device_inputs, prefill
from xgdn import ops

BF16 = torch.bfloat16
SHORT = 1984  # tokens of a call that cuts nothing; a multiple of the chunk

# A device cuts at other lengths where it has other multiprocessors; the comments are about 132.
SHARD = {"H": 4, "HV": 8, "K": 128, "V": 128, "dtype": BF16}  # 16 blocks a sequence: up to 8 pieces
WIDE = {"H": 16, "HV": 32, "K": 128, "V": 128, "dtype": BF16}  # 64: two pieces where it is alone

ONE_SEQUENCE = [
    *(Case((T,), **SHARD, gates="slow") for T in (2047, 2049, 4032, 4033, 4097, 5000)),
    Case((9000,), **SHARD, gates="near0"),
    Case((4200,), **SHARD, initial="none", gates="near0"),
    Case((4200,), **SHARD, gates="mixed", writes_elsewhere=True),
    Case((4200,), **SHARD, state_dtype=BF16, gates="slow"),
    Case((4200,), **SHARD, out_dtype=torch.float32, gates="slow", strided=True),
    Case((4200,), H=2, HV=6, K=128, V=64, dtype=BF16, gates="near0"),
    Case((4200,), H=1, HV=3, K=64, V=128, dtype=BF16, gates="near0"),
    Case((4200,), H=1, HV=2, K=64, V=192, dtype=BF16, gates="near0"),
    Case((17000,), H=1, HV=2, K=128, V=128, dtype=BF16, gates="near0"),  # 16 pieces
    Case((4200,), H=1, HV=2, K=128, V=128, dtype=torch.float16, gates="near0"),  # copied in pieces of 16 bytes
    Case((4200,), H=1, HV=2, K=64, V=64, dtype=torch.float32, gates="slow"),
    *(Case((T,), **WIDE, gates="slow") for T in (2048, 2049, 4160)),
]

BATCHES = [
    Case((70, 0, 4500, 1, 0, 64, 4096, 300), **SHARD, gates="slow", padded=(3,)),
    Case((0, 4200, 0), **SHARD, gates="near0", writes_elsewhere=True),
    Case((4500, 5000, 65), **SHARD, gates="near0", padded=(1,)),
    Case((4500, 130), **SHARD, gates="slow", state_dtype=BF16),
    Case((*(1 + n for n in range(40)), 4200), H=1, HV=2, K=64, V=64, dtype=BF16, gates="near0"),
    Case((4500, 4096), H=1, HV=2, K=128, V=64, dtype=torch.float16, gates="near0"),
    Case((3000, 2048, 64), **WIDE, gates="slow"),  # whole together, in two pieces alone
]


def exact(case: Case, x: Inputs) -> Inputs:
    y = device_inputs(x)
    y = replace(y, state=y.state.float(), out=torch.full(y.out.shape, torch.nan, device="cuda"))
    prefill(case, y, "exact")
    return y


def rows_of(y: Inputs, n: int, rows: slice, *, reads: Tensor, has_initial_state: Tensor) -> Inputs:
    """Tokens `rows` of sequence n as a call of its own."""
    return replace(
        y,
        **{name: getattr(y, name)[rows] for name in ("q", "k", "v", "g", "beta", "out")},
        cu_seqlens=i32([0, rows.stop - rows.start]).cuda(),
        state_indices=reads,
        write_indices=y.written[n : n + 1],
        has_initial_state=has_initial_state,
    )


def in_short_calls(case: Case, x: Inputs) -> Inputs:
    """The first sequence in calls that are too short to be cut."""
    y = device_inputs(x)
    for first in range(0, case.T, SHORT):
        rows = slice(first, min(first + SHORT, case.T))
        call = rows_of(
            y,
            0,
            rows,
            reads=y.state_indices if first == 0 else y.written,
            has_initial_state=y.has_initial_state if first == 0 else torch.ones_like(y.has_initial_state),
        )
        prefill(replace(case, lengths=(rows.stop - rows.start,)), call, "fast")
    return y


def state_of(y: Inputs, n: int) -> Tensor:
    return y.state[int(y.written[n])]


@pytest.mark.parametrize("case", ONE_SEQUENCE, ids=str)
def test_a_cut_sequence_is_as_accurate_as_one_in_short_calls(case: Case) -> None:
    x = make_inputs(case, prefill=True)
    want, got = exact(case, x), device_inputs(x)
    prefill(case, got, "fast")
    short = in_short_calls(case, x)
    results = {
        "out": (got.out, short.out, want.out),
        "state": (state_of(got, 0), state_of(short, 0), state_of(want, 0)),
    }
    for name, (whole, pieces, true) in results.items():
        bound = 1.2 * relative_error(pieces, true) + 2e-5
        assert bound < 2e-2, f"{name}: short calls are off by {bound:.3g}"
        assert_close(name, whole, true, bound, parts=(0,))
    bring_back(x, got)
    assert_untouched(x, dict.fromkeys(x.written.tolist(), torch.empty(0)))


@pytest.mark.parametrize("with_lengths", [True, False])
@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_a_cut_sequence_has_the_bits_that_it_has_alone(case: Case, with_lengths: bool) -> None:
    """Whether or not the host knows the lengths, by which it may leave out what they do not need."""
    x = make_inputs(case, prefill=True)
    together = device_inputs(x)
    ops.chunk_gated_delta_rule(
        *together.tensors(),
        **together.shared(),
        has_initial_state=together.has_initial_state,
        chunk=ops.build_chunk_metadata(case.lengths, case.HV, device="cuda"),
        cu_seqlens_cpu=x.cu_seqlens if with_lengths else None,
        accuracy="fast",
    )
    assert xgdn.last_is_batch_invariant("chunk_gated_delta_rule")
    for n, rows in enumerate(case.rows):
        if n in case.padded:
            assert not together.out[rows].any()
            continue
        alone = rows_of(
            device_inputs(x),
            n,
            rows,
            reads=together.state_indices[n : n + 1],
            has_initial_state=together.has_initial_state[n : n + 1],
        )
        prefill(replace(case, lengths=(rows.stop - rows.start,)), alone, "fast")
        assert together.out[rows].isfinite().all()
        assert_bits_equal(f"out of {n}", alone.out, together.out[rows])
        assert_bits_equal(f"state of {n}", state_of(alone, 0), state_of(together, n))
    bring_back(x, together)
    written = [int(slot) for n, slot in enumerate(x.written) if n not in case.padded]
    assert_untouched(x, dict.fromkeys(written, torch.empty(0)))


@pytest.mark.parametrize("case", [Case((4160,), **WIDE, gates="slow"), Case((4032,), **SHARD, gates="near0")], ids=str)
def test_a_sequence_in_two_pieces_has_the_bits_of_short_calls(case: Case) -> None:
    """The state at the cut is that of the chunks before it, and is not rounded; nor is it in a float32 pool."""
    x = make_inputs(case, prefill=True)
    whole, short = device_inputs(x), in_short_calls(case, x)
    prefill(case, whole, "fast")
    assert_bits_equal("out", whole.out, short.out)
    assert_bits_equal("state", state_of(whole, 0), state_of(short, 0))


CAPACITY = 6016
SHARD_STEPS = ((CAPACITY, 0, 0), (4500, 0, 700), (0, 5000, 0), (100, 64, 200), (0, 0, 0), (1, 1400, 4600))
WIDE_STEPS = ((CAPACITY,), (2048,), (2000,), (0,), (4161,))  # one sequence: with more there is no room for pieces


@pytest.mark.parametrize(("heads", "steps"), [(SHARD, SHARD_STEPS), (WIDE, WIDE_STEPS)], ids=["shard", "wide"])
def test_a_captured_prefill_is_replayed_with_sequences_that_are_cut_elsewhere(
    heads: dict[str, Any], steps: tuple[tuple[int, ...], ...]
) -> None:
    case = Case(steps[0], **heads, gates="slow", initial="all")
    x = make_inputs(case, prefill=True)
    captured = device_inputs(replace(x, state_indices=torch.arange(case.N, dtype=torch.int32)))
    pool = torch.randn(captured.state.shape, device="cuda")
    chunk = ops.ChunkMetadata.allocate(
        max_sequences=case.N, max_tokens=CAPACITY, num_v_heads_local=case.HV, device="cuda"
    )

    def call() -> None:
        ops.chunk_gated_delta_rule(
            *captured.tensors(),
            **captured.shared(),
            has_initial_state=captured.has_initial_state,
            chunk=chunk,
            accuracy="fast",
        )

    chunk.write(captured.cu_seqlens, case.HV)
    call()  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for lengths in steps:
        step = replace(case, lengths=lengths)
        captured.cu_seqlens.copy_(cu_seqlens_of(lengths))
        chunk.write(captured.cu_seqlens, case.HV)
        captured.state.copy_(pool)
        captured.out.fill_(torch.nan)
        graph.replay()
        eager = replace(captured, state=pool.clone(), out=torch.full_like(captured.out, torch.nan))
        prefill(step, eager, "fast")
        assert captured.out[: step.T].isfinite().all()
        assert_bits_equal("out", captured.out, eager.out)
        assert_bits_equal("state", captured.state, eager.state)
