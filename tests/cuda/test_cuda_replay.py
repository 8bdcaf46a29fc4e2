# SPDX-License-Identifier: Apache-2.0
"""Replay states on the GPU: the tests of the op on copies on the device, large batches, captured calls, engines."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import test_ops_replay as op_tests
import xgdn
from cases import Case, assert_bits_equal, assert_close, i32, make_inputs
from checkpoints import CHECKPOINTS, Tiny, make, qwen3_5
from cuda_calls import OnCuda, Pools
from test_replay_states import generated, prompts
from xgdn import ops

KEY_DIMS = (16, 32, 64, 128, 256)
ROUTES = [
    *(case for case in op_tests.ROUTES if case.K in KEY_DIMS),
    Case((100, 33), H=1, HV=2, K=256, V=40, dtype=torch.bfloat16),
    Case((100, 33), H=2, HV=2, K=16, V=48, dtype=torch.float16, state_dtype=torch.bfloat16),
    Case((100, 33), H=1, HV=2, K=128, V=33, dtype=torch.float16),
    Case((100, 33), H=1, HV=3, K=128, V=64, state_dtype=torch.bfloat16),
]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_tests, "ops", OnCuda())


# ---- the op, as on the CPU -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_cuda")
class TestOp:
    @pytest.mark.parametrize("case", [c for c in op_tests.CASES if c.K in KEY_DIMS], ids=str)
    def test_matches_recurrence(self, case: Case) -> None:
        op_tests.test_matches_recurrence(case, "cuda")

    @pytest.mark.parametrize("C", op_tests.CHUNKS)
    @pytest.mark.parametrize("case", ROUTES, ids=str)
    def test_a_token_at_a_time_has_the_bits_of_one_shot(self, case: Case, C: int) -> None:
        op_tests.test_a_token_at_a_time_has_the_bits_of_one_shot(case, C)

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("case", ROUTES, ids=str)
    def test_any_schedule_has_the_bits_of_one_shot(self, case: Case, seed: int) -> None:
        op_tests.test_any_schedule_has_the_bits_of_one_shot(case, seed, lambda threads: None)

    def test_rejected_drafts_leave_no_trace(self) -> None:
        op_tests.test_rejected_drafts_leave_no_trace()

    def test_forks_share_a_checkpoint_until_they_fold(self) -> None:
        op_tests.test_forks_share_a_checkpoint_until_they_fold("cuda")

    def test_a_sequence_that_moves_leaves_its_slots_as_they_were(self) -> None:
        op_tests.test_a_sequence_that_moves_leaves_its_slots_as_they_were("cuda")

    @pytest.mark.parametrize(
        "padded", [["write_indices"], ["ring_write_indices"], ["write_indices", "ring_write_indices"]]
    )
    def test_a_padded_write_slot_computes_and_writes_nothing(self, padded: list[str]) -> None:
        op_tests.test_a_padded_write_slot_computes_and_writes_nothing(padded, "cuda")

    def test_one_sequences_nan_stays_its_own(self) -> None:
        op_tests.test_one_sequences_nan_stays_its_own()

    @pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("commit", [True, False], ids=["decode", "drafts"])
    def test_a_fold_that_overflows_is_seen_in_its_output(self, state_dtype: torch.dtype, commit: bool) -> None:
        op_tests.test_a_fold_that_overflows_is_seen_in_its_output(state_dtype, commit, "cuda")

    @pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("K", KEY_DIMS)
    def test_materialised_states(self, state_dtype: torch.dtype, K: int) -> None:
        op_tests.test_materialised_states(state_dtype, K, "cuda")

    def test_no_sequences(self) -> None:
        op_tests.test_no_sequences("cuda")

    def test_long_decays_keep_their_digits(self) -> None:
        op_tests.test_long_decays_keep_their_digits("cuda")


# ---- the op on the device --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("N", [16, 40])
@pytest.mark.parametrize("tokens", [1, 3, 21])
def test_a_sequence_has_the_bits_that_it_has_alone(
    tokens: int, N: int, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    """Beside enough others that a block takes several rows for a group, where it takes one for a single sequence: 512
    blocks of 16 sequences, and 1,280 of 40, more than four for each multiprocessor. Some sequences have no tokens."""
    lengths = tuple(0 if n % 7 == 3 else tokens for n in range(N))
    case = Case(lengths, H=8, HV=16, K=128, V=128, dtype=dtype, state_dtype=state_dtype)
    x = make_inputs(case, prefill=False)
    given = [t.cuda() for t in x.tensors()[:5]]
    before = Pools(N, case, 32)
    together, alone = before.copy(), before.copy()
    slots = torch.randperm(N, dtype=torch.int32)
    accepted = torch.randint(0, 17, (N,), dtype=torch.int32)
    commit = tokens != 3

    def run(pools: Pools, chosen: range) -> Tensor:
        starts = list(itertools.accumulate((lengths[n] for n in chosen), initial=0))
        rows = slice(case.rows[chosen.start].start, case.rows[chosen.start].start + starts[-1])
        of_call = slots[chosen.start : chosen.stop].cuda()
        return ops.replay_gated_delta_rule(
            *(t[rows] for t in given),
            pools.state,
            pools.ring,
            cu_seqlens=i32(starts).cuda(),
            state_indices=of_call,
            ring_indices=of_call,
            num_accepted=accepted[chosen.start : chosen.stop].cuda(),
            commit=commit,
            out=torch.full((starts[-1], case.HV, case.V), torch.nan, dtype=case.result_dtype, device="cuda"),
        )

    want = run(together, range(N))
    assert xgdn.last_backend("replay_gated_delta_rule") == "cuda"
    assert xgdn.last_is_batch_invariant("replay_gated_delta_rule")
    assert want.isfinite().all()
    got = torch.cat([run(alone, range(n, n + 1)) for n in range(N)])
    assert_bits_equal("out", got.cpu(), want.cpu())
    alone.assert_same(together)
    counts = before.ring.length.cpu()[slots.long()] + accepted + (torch.tensor(lengths) if commit else 0)
    # What a call folds is whole chunks of what is committed, or the first one of what drafts have left.
    assert_bits_equal("lengths", together.ring.length.cpu()[slots.long()], (counts % 16).int())


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("V", [128, 40])
@pytest.mark.parametrize("N", [36, 140])
def test_few_drafts_have_the_bits_of_many(N: int, V: int, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """Rings with room for 4 drafts, beside rings with room for more: of up to 4 tokens of enough sequences a kernel of
    its own takes rows in one pass (36 sequences) or in two (140 of 128 rows a head). Some sequences begin, some move to
    other slots, some write nothing."""
    C, drafts, wide = 16, 4, 32
    lengths = tuple(n % 5 for n in range(N))
    case = Case(lengths, H=8, HV=16, K=128, V=V, dtype=dtype, state_dtype=state_dtype)
    given = [t.cuda() for t in make_inputs(case, prefill=False).tensors()[:5]]
    many = Pools(N + N // 7 + 1, case, wide)
    few = many.copy()
    few.ring = ops.ReplayRing(*(t[:, :, : C + drafts].contiguous() for t in few.ring[:3]), few.ring.length)
    slots = torch.randperm(N + N // 7 + 1, dtype=torch.int32).cuda()
    n = torch.arange(N, device="cuda")
    written = torch.where(n % 7 == 2, slots[N:][n // 7], slots[:N])
    written = torch.where(n % 6 == 5, xgdn.PAD_SLOT_ID, written).int()
    accepted = torch.randint(0, drafts + 1, (N,), dtype=torch.int32).cuda()
    has_state = n % 11 != 3

    def run(pools: Pools) -> Tensor:
        return ops.replay_gated_delta_rule(
            *given,
            pools.state,
            pools.ring,
            cu_seqlens=i32([0, *itertools.accumulate(lengths)]).cuda(),
            state_indices=slots[:N],
            ring_indices=slots[:N],
            write_indices=written,
            ring_write_indices=written,
            has_initial_state=has_state,
            num_accepted=torch.where(has_state, accepted, 0).int(),
            commit=False,
            out=torch.full((case.T, case.HV, case.V), torch.nan, dtype=case.result_dtype, device="cuda"),
        )

    want, got = run(many), run(few)
    assert want.isfinite().all()
    assert_bits_equal("out", got.cpu(), want.cpu())
    many.ring = ops.ReplayRing(*(t[:, :, : C + drafts].contiguous() for t in many.ring[:3]), many.ring.length)
    few.assert_same(many)


def test_a_captured_call_is_replayed_with_other_slots_and_padding() -> None:
    """The graph is of eight sequences; it is replayed for fewer, the others being padding. Thirty steps of some."""
    case = Case((1,) * 8, H=2, HV=4, K=128, V=128, dtype=torch.bfloat16)
    given = [torch.zeros_like(t).cuda() for t in make_inputs(case, prefill=False).tensors()[:5]]
    slots = torch.full((8,), xgdn.PAD_SLOT_ID, dtype=torch.int32, device="cuda")
    out = torch.zeros(8, case.HV, case.V, dtype=torch.bfloat16, device="cuda")
    captured = Pools(20, case, 16)
    eager = captured.copy()

    def call(pools: Pools, results: Tensor) -> None:
        ops.replay_gated_delta_rule(
            *given,
            pools.state,
            pools.ring,
            cu_seqlens=starts,
            state_indices=slots,
            ring_indices=slots,
            out=results,
        )

    starts = i32(range(9)).cuda()
    call(captured, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(captured, out)
    draw = random.Random(1)
    for step in range(30):
        count = draw.randint(0, 8)
        chosen = draw.sample(range(20), count) + [xgdn.PAD_SLOT_ID] * (8 - count)
        slots.copy_(i32(chosen))
        for t, new in zip(given, make_inputs(case, prefill=False, seed=step).tensors()[:5], strict=True):
            t.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        want = torch.full_like(out, torch.nan)
        call(eager, want)
        assert_bits_equal("out", out.cpu(), want.cpu())
        assert not out[count:].any()
        captured.assert_same(eager)


def test_pools_and_key_dims_without_a_kernel_are_refused() -> None:
    def call(case: Case, state: Tensor) -> None:
        x = make_inputs(case, prefill=False)
        ops.replay_gated_delta_rule(
            *(t.cuda() for t in x.tensors()[:5]),
            state,
            ops.ReplayRing(*(t.cuda() for t in op_tests.nan_ring(1, case, 16))),
            cu_seqlens=i32([0, 1]).cuda(),
            state_indices=i32([0]).cuda(),
            ring_indices=i32([0]).cuda(),
        )

    with pytest.raises(NotImplementedError, match=r"cuda.*K = 16, 32, 64, 128 or 256, got K=48"):
        call(Case((1,), K=48), torch.zeros(1, 2, 64, 48, device="cuda"))
    unaligned = torch.zeros(1 + 2 * 64 * 64, device="cuda")[1:].view(1, 2, 64, 64)
    with pytest.raises(NotImplementedError, match=r"cuda.*multiples of 16 bytes"):
        call(Case((1,)), unaligned)


# ---- engines ---------------------------------------------------------------------------------------------------------


def engine(directory: Path, **options: Any) -> xgdn.Engine:
    runner = options.pop("runner", {})
    sizes = xgdn.RunnerOptions(**{"max_batch_size": 8, "max_cached_tokens": 2048, **runner})
    return xgdn.Engine(directory, dtype=torch.float32, replay_states=True, runner=sizes, **options)


def tokens(answers: list[list[tuple[int, float]]]) -> list[list[int]]:
    return [[token for token, _ in answer] for answer in answers]


@pytest.mark.parametrize("model", CHECKPOINTS, ids=str)
def test_tokens_are_those_of_the_cpu(model: Tiny, tmp_path: Path) -> None:
    """Decoded by recorded steps, and verified."""
    directory, _ = make(model, tmp_path)
    want = tokens(generated(engine(directory, device="cpu"), prompts(), 40))
    assert tokens(generated(engine(directory, device="cuda"), prompts(), 40)) == want
    drafting = engine(directory, device="cuda", draft_tokens=5)
    assert tokens(generated(drafting, prompts(), 40)) == want


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(Tiny("qwen3_5-dense", qwen3_5), tmp_path_factory.mktemp("replay"))[0]


def test_cached_prefixes_and_branches_have_the_tokens_of_the_cpu(dense: Path) -> None:
    """A conversation that grows, twice, and branches of its prompts, beside an engine without a cache."""
    draw = random.Random(2)
    shared = [draw.randrange(128) for _ in range(70)]
    conversation = [shared[:end] for end in (17, 40, 70)]
    cached, plain = (
        engine(dense, device="cuda", runner={"prefix_cache_slots": slots, "max_cached_tokens": 4096})
        for slots in (6, 0)
    )
    cpu = engine(dense, device="cpu")
    sampling = xgdn.SamplingParams(temperature=1.0, seed=5)
    for prompt in conversation * 2:
        greedy = tokens(generated(cpu, [prompt], 20))
        assert tokens(generated(cached, [prompt], 20)) == greedy
        assert tokens(generated(plain, [prompt], 20)) == greedy
        branches = [
            [r.tokens for r in e.generate([prompt], max_new_tokens=20, ignore_eos=True, sampling=sampling, n=3)]
            for e in (cpu, cached, plain)
        ]
        assert branches[1] == branches[0] == branches[2]
    assert cached.prefix_cache_stats.num_found > 0


def test_preempted_requests_go_on(dense: Path) -> None:
    want = generated(engine(dense, device="cuda"), prompts(), 40)
    tight = {"max_batch_size": 4, "max_cached_tokens": 192, "kv_block_size": 8}
    preempting = engine(dense, device="cuda", runner=tight)
    got = generated(preempting, prompts(), 40)
    assert preempting.num_preemptions > 0
    assert tokens(got) == tokens(want)
    for a, b in zip(got, want, strict=True):
        assert_close("log probabilities", torch.tensor([p for _, p in a]), torch.tensor([p for _, p in b]), 1e-5)
