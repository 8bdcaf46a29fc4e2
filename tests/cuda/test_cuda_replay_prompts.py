# SPDX-License-Identifier: Apache-2.0
"""Prompts on replay states on the GPU with accuracy="fast", most of whose tokens go through the chunk kernels: against
the float64 recurrence, beside the exact route, alone and beside others, captured, in an engine."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import test_ops_replay as op_tests
import xgdn
from cases import Case, assert_bits_equal, assert_close, expected, i32, make_inputs
from checkpoints import Tiny, make, qwen3_5
from cuda_calls import OnCuda, Pools
from test_replay_states import generated
from xgdn import ops

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LEAST = 32  # tokens for which the chunk kernels are taken
TOLERANCE = 4e-3  # of bf16 operands


def is_divided(in_ring: int, length: int, C: int) -> bool:
    """Whether tokens of a sequence go through the chunk kernels: those up to the last fold, if they are enough."""
    return in_ring <= C and length - (in_ring + length) % C >= LEAST


# ---- against the recurrence ------------------------------------------------------------------------------------------

MATCHES = [
    Case((300, 0, 129, 1), H=2, HV=4, K=128, V=128, dtype=BF16, padded=(2,)),
    Case((200, 64, 130), H=1, HV=3, K=128, V=64, dtype=BF16, state_dtype=BF16, writes_elsewhere=True),
    Case((200, 80), H=2, HV=2, K=64, V=128, dtype=BF16, out_dtype=F32, strided=True),
    Case((130, 65), K=128, dtype=BF16, gates="g380", state_dtype=BF16),
    Case((130, 165), K=128, dtype=BF16, gates="mixed", scale=0.3),
    Case((150, 64), K=128, dtype=BF16, beta_dtype=BF16, use_qk_l2norm=False, initial="all"),
]


@pytest.mark.parametrize("case", MATCHES, ids=str)
def test_matches_the_recurrence(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, states, rings and what is not written, as with the exact route."""
    monkeypatch.setattr(op_tests, "ops", OnCuda("fast"))
    op_tests.test_matches_recurrence(case, "cuda")


@pytest.mark.parametrize("C", op_tests.CHUNKS)
@pytest.mark.parametrize(
    ("H", "HV", "K", "dtype", "state_dtype"),
    [(1, 2, 128, BF16, F32), (2, 4, 128, BF16, BF16), (1, 3, 128, F32, F32), (1, 2, 64, F16, F32)],
    ids=["bf16", "bf16-state_bf16", "f32", "f16-K64"],
)
def test_a_prompt_goes_on_from_any_ring(
    H: int, HV: int, K: int, dtype: torch.dtype, state_dtype: torch.dtype, C: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences with every number of tokens in their rings, and some with none behind a fold, in one ragged batch."""
    begun = [*(C * n // 16 for n in range(16)), C, 2 * C, C]
    more = [(200, 41, 32, 0, 131, 31, 330, 79)[n % 8] for n in range(len(begun))]
    lengths = tuple(map(sum, zip(begun, more, strict=True)))
    case = Case(lengths, H=H, HV=HV, K=K, V=64, dtype=dtype, state_dtype=state_dtype, initial="none")
    x = make_inputs(case, prefill=True)
    sessions = {accuracy: op_tests.Session(x, C) for accuracy in ("exact", "fast")}
    for accuracy, session in sessions.items():
        monkeypatch.setattr(op_tests, "ops", OnCuda())
        session.advance(dict(enumerate(begun)))
        monkeypatch.setattr(op_tests, "ops", OnCuda(accuracy))
        session.advance(dict(enumerate(more)))
    exact, fast = sessions["exact"], sessions["fast"]
    assert_close("out", fast.out, expected(x, prefill=True)[0], TOLERANCE, parts=(0, 1))
    results = {accuracy: session.finish()[1:] for accuracy, session in sessions.items()}
    for n, rows in enumerate(case.rows):
        got, want = (results[accuracy][4 * n : 4 * n + 4] for accuracy in ("fast", "exact"))
        assert_bits_equal("ring k", got[0], want[0])
        assert_bits_equal("ring g", got[2], want[2])
        if not is_divided(begun[n] % C, more[n], C):
            assert_bits_equal("out", fast.out[rows], exact.out[rows])
            assert_bits_equal("ring u", got[1], want[1])
            assert_bits_equal("checkpoint", got[3], want[3])
            continue
        assert not torch.equal(got[3], want[3]), f"sequence {n} of {more[n]} tokens took the exact route"
        assert_close("checkpoint", got[3], want[3], 2 * TOLERANCE, parts=(0,))  # bf16 ones are both rounded
        assert_close("ring u", got[1], want[1], TOLERANCE, parts=(0, 1))
    for name, session in sessions.items():
        assert session.state[0::2].isnan().all(), f"{name}: slots of no sequence"
        assert all(t[1::2].isnan().all() for t in session.ring[:3]), f"{name}: rings of no sequence"
        assert (session.ring.length[1::2] == 2**30).all()


# ---- calls on the device ---------------------------------------------------------------------------------------------


def call(
    given: Sequence[Tensor],
    pools: Pools,
    lengths: Sequence[int] | None = None,
    *,
    accuracy: str = "fast",
    **options: Any,
) -> Tensor:
    out = options.pop("out", None)
    if out is None:
        out = torch.full_like(given[2], torch.nan)
    if lengths is not None:
        options["cu_seqlens"] = i32([0, *itertools.accumulate(lengths)]).cuda()
    return ops.replay_gated_delta_rule(*given, pools.state, pools.ring, accuracy=accuracy, out=out, **options)


@pytest.mark.parametrize("state_dtype", [F32, BF16], ids=str)
def test_a_prompt_has_the_bits_that_it_has_alone(state_dtype: torch.dtype) -> None:
    """From rings of any length with drafts that count, into other slots, into none, from nothing; some too short to be
    divided, one long enough to be scanned in pieces."""
    lengths = (200, 150, 32, 1, 700, 31, 47, 79, 4500, 130, 64, 0)
    N, C = len(lengths), 16
    case = Case(lengths, H=1, HV=2, K=128, V=128, dtype=BF16, state_dtype=state_dtype)
    given = [t.cuda() for t in make_inputs(case, prefill=False).tensors()[:5]]
    before = Pools(2 * N, case, C + 4)
    slots = torch.randperm(2 * N, dtype=torch.int32)
    before.ring.length[int(slots[4])] = C - 1  # with drafts more than C tokens
    n = torch.arange(N)
    table = {
        "state_indices": slots[:N],
        "ring_indices": slots[:N],
        "write_indices": torch.where((n % 4 == 1) | (n % 4 == 2), slots[N:], slots[:N]),
        "ring_write_indices": torch.where(n % 4 >= 2, slots[N:], slots[:N]),
        "has_initial_state": n % 6 != 5,
        "num_accepted": torch.where(n % 6 != 5, n % 5, 0).int(),
    }
    table["write_indices"][9] = xgdn.PAD_SLOT_ID
    table["ring_write_indices"][9] = xgdn.PAD_SLOT_ID
    on_device = {name: t.cuda() for name, t in table.items()}
    exact, together, alone = before.copy(), before.copy(), before.copy()
    want = call(given, exact, lengths, accuracy="exact", **on_device)
    got = call(given, together, lengths, **on_device)
    assert xgdn.last_backend("replay_gated_delta_rule") == "cuda"
    assert xgdn.last_is_batch_invariant("replay_gated_delta_rule")
    pieces = [
        call([t[rows] for t in given], alone, (lengths[i],), **{k: t[i : i + 1] for k, t in on_device.items()})
        for i, rows in enumerate(case.rows)
    ]
    assert_bits_equal("out", torch.cat(pieces).cpu(), got.cpu())
    alone.assert_same(together)

    assert_bits_equal("lengths", together.ring.length.cpu(), exact.ring.length.cpu())
    for i, rows in enumerate(case.rows):
        in_ring = int(before.ring.length[slots[i]] + table["num_accepted"][i]) if table["has_initial_state"][i] else 0
        write = int(table["write_indices"][i])
        if write >= 0 and is_divided(in_ring, lengths[i], C):
            assert not torch.equal(got[rows], want[rows])
            assert_close(f"out of {i}", got[rows].cpu(), want[rows].cpu(), 2 * TOLERANCE)
            assert_close(
                f"state of {i}", together.state[write].cpu(), exact.state[write].cpu(), 2 * TOLERANCE, parts=(0,)
            )
        else:
            assert_bits_equal(f"out of {i}", got[rows].cpu(), want[rows].cpu())
            assert_bits_equal(f"state of {i}", together.state[write].cpu(), exact.state[write].cpu())
    named = {int(slot) for name in ("write_indices", "ring_write_indices") for slot in table[name]}
    others = [slot for slot in range(2 * N) if slot not in named]
    for pool, old in zip((together.state, *together.ring), (before.state, *before.ring), strict=True):
        assert_bits_equal("slots that are not written", pool[others].cpu(), old[others].cpu())


def test_a_batch_that_is_known_to_be_short_is_exact() -> None:
    lengths = (31, 20, 30)
    case = Case(lengths, H=1, HV=2, K=128, V=128, dtype=BF16)
    given = [t.cuda() for t in make_inputs(case, prefill=False).tensors()[:5]]
    slots = {"state_indices": i32([2, 0, 1]).cuda(), "ring_indices": i32([2, 0, 1]).cuda()}
    before = Pools(3, case, 16)
    exact, unknown, known = before.copy(), before.copy(), before.copy()
    want = call(given, exact, lengths, accuracy="exact", **slots)
    assert_bits_equal("unknown", call(given, unknown, lengths, **slots).cpu(), want.cpu())
    starts = i32([0, *itertools.accumulate(lengths)])
    assert_bits_equal("known", call(given, known, lengths, cu_seqlens_cpu=starts, **slots).cpu(), want.cpu())
    unknown.assert_same(exact)
    known.assert_same(exact)


def test_drafts_are_exact() -> None:
    """However many: what is committed later has the bits that it has as drafts."""
    case = Case((64, 64), H=1, HV=2, K=128, V=128, dtype=BF16)
    given = [t.cuda() for t in make_inputs(case, prefill=False).tensors()[:5]]
    slots = {"state_indices": i32([1, 0]).cuda(), "ring_indices": i32([1, 0]).cuda(), "chunk_size": 64}
    exact = Pools(2, case, 128)
    fast = exact.copy()
    want = call(given, exact, case.lengths, accuracy="exact", commit=False, **slots)
    assert_bits_equal("out", call(given, fast, case.lengths, commit=False, **slots).cpu(), want.cpu())
    fast.assert_same(exact)


def test_a_captured_prompt_is_replayed_with_other_lengths() -> None:
    """And other slots, padding, and rings that go on from replay to replay."""
    case = Case((600,), H=1, HV=2, K=128, V=128, dtype=BF16)
    N, slots = 4, 9
    given = [torch.zeros_like(t).cuda() for t in make_inputs(case, prefill=False).tensors()[:5]]
    on_device = {
        "cu_seqlens": i32([0, 600, 600, 600, 600]).cuda(),
        "state_indices": i32(range(N)).cuda(),
        "ring_indices": i32(range(N)).cuda(),
        "has_initial_state": torch.ones(N, dtype=torch.bool, device="cuda"),
    }
    out = torch.zeros(600, case.HV, case.V, dtype=BF16, device="cuda")
    captured = Pools(slots, case, 16)
    eager = captured.copy()
    call(given, captured.copy(), out=out, **on_device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(given, captured, out=out, **on_device)
    draw = random.Random(1)
    for step in range(8):
        chosen = i32([slot if draw.random() < 0.8 else xgdn.PAD_SLOT_ID for slot in draw.sample(range(slots), N)])
        starts = i32([0, *sorted(draw.randrange(601) for _ in range(N - 1)), 600])
        states = torch.tensor([draw.random() < 0.7 for _ in range(N)])
        for t, new in zip(on_device.values(), (starts, chosen, chosen, states), strict=True):
            t.copy_(new)
        for t, new in zip(given, make_inputs(case, prefill=False, seed=step).tensors()[:5], strict=True):
            t.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        want = call(given, eager, **on_device)
        assert want.isfinite().all()
        assert_bits_equal("out", out.cpu(), want.cpu())
        captured.assert_same(eager)


@pytest.mark.parametrize("state_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("accuracy", ["exact", "fast"])
def test_a_state_that_overflows_behind_the_last_token_is_seen_in_its_output(
    accuracy: str, state_dtype: torch.dtype
) -> None:
    """By rows of its value head alone, with outputs that are finite otherwise: none reads the first column of S, which
    the last token writes."""
    case = Case((64, 64), H=1, HV=2, K=128, V=128, dtype=BF16, state_dtype=state_dtype, use_qk_l2norm=False)
    x = make_inputs(case, prefill=False)
    x.k[..., 0] = x.q[..., 0] = x.g[:] = 0
    x.beta[-1] = 1
    x.k[-1] = 0
    x.k[-1, :, 0] = 1.5
    before = Pools(2, case, 16)
    before.ring.length[:] = 0
    before.state[..., 0] = 0
    row = (0, 1, 70)  # of S
    before.state[row][0] = 1.25 * 2.0**119
    slots = {"state_indices": i32([1, 0]).cuda(), "ring_indices": i32([1, 0]).cuda()}

    def outputs(v: float) -> tuple[Tensor, Pools]:
        x.v[-1, 1, 70] = v
        pools = before.copy()
        given = [t.cuda() for t in x.tensors()[:5]]
        out = call(given, pools, case.lengths, accuracy=accuracy, use_qk_l2norm_in_kernel=False, **slots)
        return out.cpu(), pools

    # The last token leaves about 1.5 v there: 2**126, more than bf16 holds and less than f32, more than either.
    want, pools = outputs(2.0**125)
    assert want.isfinite().all()
    assert pools.state.isfinite().all()
    for v, overflows in ((171 / 128 * 2.0**127, state_dtype == BF16), (1.75 * 2.0**127, True)):
        got, pools = outputs(v)
        assert bool(pools.state[row][0].isfinite()) != overflows
        is_marked = got[-1, 1].isnan()
        assert bool(is_marked[70]) == overflows
        assert bool(is_marked.any()) == overflows
        assert is_marked.sum() <= 64
        got[-1, 1] = torch.where(is_marked, want[-1, 1], got[-1, 1])
        assert_bits_equal("other outputs", got, want)
        assert not pools.ring.length.any()


# ---- an engine -------------------------------------------------------------------------------------------------------


def test_an_engine_takes_its_accuracy_for_prompts(tmp_path: Path) -> None:
    """Log probabilities are those of plain states within rounding, whichever; "auto" is "fast" for a bf16 model."""
    heads = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    directory, _ = make(Tiny("qwen3_5-wide-heads", qwen3_5, heads, dtype=BF16), tmp_path)
    draw = random.Random(4)
    prompts = [[draw.randrange(128) for _ in range(length)] for length in (203, 31, 150, 32)]
    sizes = xgdn.RunnerOptions(max_batch_size=4, max_cached_tokens=2048)

    def answers(**options: Any) -> list[Tensor]:
        engine = xgdn.Engine(directory, device="cuda", dtype=BF16, runner=sizes, **options)
        results = [generated(engine, [prompt], 1)[0] for prompt in prompts]
        return [torch.tensor([p for _, p in result]) for result in results]

    found = {name: answers(replay_states=True, prefill_accuracy=name) for name in ("exact", "fast", "auto")}
    plain = answers(prefill_accuracy="exact")
    for length, exact, fast, auto, other in zip(map(len, prompts), *found.values(), plain, strict=True):
        assert_bits_equal(f"auto of {length} tokens", auto, fast)
        assert torch.equal(fast, exact) == (length < LEAST), f"a prompt of {length} tokens"
        assert_close("fast", fast, other, 5e-2)  # a step of a bf16 logit
        assert_close("exact", exact, other, 5e-2)
