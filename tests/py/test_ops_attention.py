# SPDX-License-Identifier: Apache-2.0
"""Paged attention and the mixture of experts against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import xgdn
from attention_calls import (
    ATTENTION,
    DECODE,
    EXPERTS,
    MIXED,
    PIECES,
    PROMPTS,
    ROUNDING,
    AttentionCall,
    ExpertsCall,
)
from cases import assert_batch_invariant, assert_bits_equal, assert_close


@pytest.mark.parametrize("call", ATTENTION, ids=str)
def test_attention_is_the_formula(call: AttentionCall, backend: str) -> None:
    """The cache is NaN wherever no context lies, so nothing else is read."""
    call.make()
    assert_close("out", call.run(backend=backend), call.expected(), call.bound, parts=(0, 1))
    assert xgdn.last_backend("paged_attention") == backend


def test_attention_needs_no_rows_where_it_reads_blocks() -> None:
    call = ATTENTION[4].make()
    assert torch.equal(call.run(with_rows=False), call.run())


def test_a_context_of_no_rows_pads(backend: str) -> None:
    """Its table and its queries may hold anything; the others' bits stay."""
    call = AttentionCall(((1, 40), (1, 0), (12, 30), (10, 0), (2, 5))).make()
    padded = torch.tensor([False] + [True] + [False] * 12 + [True] * 10 + [False] * 2)
    want = AttentionCall(((1, 40), (12, 30), (2, 5))).make()
    want.k, want.v = call.k, call.v
    want.blocks, want.rows = ([part[n] for n in (0, 2, 4)] for part in (call.blocks, call.rows))
    want.q = call.q[~padded]
    call.q[padded] = torch.nan
    got = call.run(backend=backend)
    assert torch.equal(got[padded], torch.zeros_like(got[padded]))
    assert_batch_invariant("paged_attention", "others", got[~padded], want.run(backend=backend), call.bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("q_size", [1.0, 30.0])
def test_decode_of_the_cpu_kernel_is_rounded_once(dtype: torch.dtype, q_size: float) -> None:
    """Probabilities stay f32: the error is that of rounding the result, also where the scores are large."""
    if "cpu" not in xgdn.available_backends():
        pytest.skip("this build has no cpu backend")
    call = AttentionCall((*DECODE, (8, 50)), HQ=8, D=64, dtype=dtype, q_size=q_size).make()
    once = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4}[dtype]
    assert_close("out", call.run(backend="cpu"), call.expected(), once, parts=(0, 1))


@pytest.mark.parametrize(
    "call",
    [
        AttentionCall(MIXED, HQ=8, D=64),
        AttentionCall(MIXED, D=80, block_size=1, strided=True),
        AttentionCall((*DECODE, (8, 300)), HQ=8, D=64, dtype=torch.float32),
        AttentionCall((*PROMPTS, *PIECES), HQ=6, D=64, dtype=torch.float16),
        AttentionCall((*PROMPTS, *PIECES), HQ=6, D=64, int8=True),
    ],
    ids=str,
)
def test_other_sequences_do_not_change_bits(
    call: AttentionCall, num_threads: Callable[[int], None], backend: str
) -> None:
    num_threads(3)
    call.make()
    together = call.run(backend=backend).split([t for t, _ in call.sequences])
    num_threads(1)
    for n in range(len(call.sequences)):
        alone = call.alone(n).run(backend=backend)
        assert xgdn.last_is_batch_invariant("paged_attention") == (backend == "cpu")
        assert_batch_invariant("paged_attention", f"sequence {n}", alone, together[n], call.bound)


@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("HQ", [2, 8, 12])
def test_a_prompt_has_the_same_bits_in_any_pieces(HQ: int, dtype: torch.dtype, int8: bool) -> None:
    if "cpu" not in xgdn.available_backends():
        pytest.skip("this build has no cpu backend")
    whole = AttentionCall(((170, 200),), HQ=HQ, D=48, dtype=dtype, int8=int8).make()
    want = whole.run(backend="cpu")
    for piece in (1, 7, 32, 64, 169):
        parts = []
        for begin in range(0, 170, piece):
            end = min(begin + piece, 170)
            call = whole.alone(0)
            call.sequences = ((end - begin, 30 + end),)
            call.rows = [whole.rows[0][: 30 + end]]
            call.q = whole.q[begin:end]
            parts.append(call.run(backend="cpu"))
        assert_bits_equal(f"pieces of {piece}", torch.cat(parts), want)


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
@pytest.mark.parametrize("pool", ["k", "v"])
def test_a_row_spoils_only_the_tokens_that_see_it(pool: str, special: float) -> None:
    """Not those before it, although they are worked on together."""
    if "cpu" not in xgdn.available_backends():
        pytest.skip("this build has no cpu backend")
    call = AttentionCall(((90, 100), (1, 30)), D=40).make()
    clean = call.run(backend="cpu")
    getattr(call, pool).flatten(0, 1)[call.rows[0][70], 1, 3] = special  # seen by tokens 60 and later
    got = call.run(backend="cpu")
    assert_bits_equal("tokens before it", got[:60], clean[:60])
    assert_bits_equal("the other sequence", got[90:], clean[90:])
    assert_bits_equal("the other key head", got[:, :2], clean[:, :2])
    spoilt = got[60:90, 2:] if pool == "k" else got[60:90, 2:, 3]
    if pool == "v":
        assert not spoilt.isfinite().any()
        others = torch.arange(40) != 3
        assert_bits_equal("the other columns", got[..., others], clean[..., others])
    elif special is torch.nan:
        assert spoilt.isnan().all()


@pytest.mark.parametrize("pool", ["k", "v"])
def test_an_int8_row_of_nan_spoils_only_the_tokens_that_see_it(pool: str, backend: str) -> None:
    call = AttentionCall(((90, 100), (1, 30)), D=40, int8=True).make()
    clean = call.run(backend=backend)
    # Seen by tokens 60 and later.
    getattr(call, pool).flatten(0, 1)[call.rows[0][70], 1, 40:] = torch.tensor([torch.nan]).view(torch.int8)
    got = call.run(backend=backend)
    assert got[60:90, 2:].isnan().all()
    if backend == "cpu":
        assert_bits_equal("tokens before it", got[:60], clean[:60])
    assert_bits_equal("the other sequence", got[90:], clean[90:])
    assert_bits_equal("the other key head", got[:, :2], clean[:, :2])


def test_a_nan_query_spoils_its_own_row_alone(backend: str) -> None:
    call = AttentionCall(((3, 20), (1, 9), (10, 12)), D=40, dtype=torch.float32).make()
    clean = call.run(backend=backend)
    call.q[1, 2] = torch.nan
    got = call.run(backend=backend)
    spoilt = torch.zeros(14, 4, dtype=torch.bool)
    spoilt[1, 2] = True
    assert got[spoilt].isnan().all()
    assert_batch_invariant("paged_attention", "others", got[~spoilt], clean[~spoilt], call.bound)


@pytest.mark.parametrize("call", EXPERTS, ids=str)
def test_experts_are_the_formula(call: ExpertsCall, backend: str) -> None:
    call.make()
    idle = sorted(set(range(call.E)) - set(call.chosen.flatten().tolist()))
    call.gate_up[idle], call.down[idle] = torch.nan, torch.nan  # what nobody chooses is not read
    got, want = call.run(backend=backend), call.expected()
    if call.T == 0:
        assert got.shape == want.shape
        return
    assert_close("out", got, want, ROUNDING[call.dtype], parts=(0,))
    assert xgdn.last_backend("moe_experts") == backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_a_nan_token_spoils_its_own_row_alone_with_experts(dtype: torch.dtype, backend: str) -> None:
    call = ExpertsCall(21, dtype=dtype).make()
    clean = call.run(backend=backend)
    call.x[4, 7] = torch.nan
    got = call.run(backend=backend)
    assert got[4].isnan().all()
    others = torch.arange(21) != 4
    assert_batch_invariant("moe_experts", "others", got[others], clean[others], ROUNDING[dtype])
