# SPDX-License-Identifier: Apache-2.0
"""Replay states: against the float64 token recurrence, and bit by bit against every other way to the same token."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import xgdn
from cases import (
    DECODE_CASES,
    SHAPE_CASES,
    Case,
    Inputs,
    assert_bits_equal,
    assert_close,
    expected,
    i32,
    make_inputs,
    tolerance,
)
from xgdn import ops

CHUNKS = (16, 32, 64)
TOKENS = ("q", "k", "v", "g", "beta")


def nan_ring(num_slots: int, case: Case, rows: int) -> ops.ReplayRing:
    """Rings that nobody has used, full of NaN, with lengths that no ring has."""
    return ops.ReplayRing(
        torch.full((num_slots, case.H, rows, case.K), torch.nan),
        torch.full((num_slots, case.HV, rows, case.V), torch.nan),
        torch.full((num_slots, case.HV, rows), torch.nan),
        torch.full((num_slots,), 2**30, dtype=torch.int32),
    )


def copied(ring: ops.ReplayRing) -> ops.ReplayRing:
    return ops.ReplayRing(*(x.clone() for x in ring))


def assert_close_to_truth(x: Inputs, got: Tensor, state: Tensor) -> None:
    """`state`: a pool with the plain states in the slots that are written."""
    out, slots = expected(x, prefill=True)
    case = x.case
    assert_close("out", got, out, tolerance(case, case.result_dtype), parts=(0, 1))
    for slot, want in slots.items():
        assert_close(f"slot {slot}", state[slot], want, tolerance(case, case.state_dtype), parts=(0,))


def plain_states(
    x: Inputs, ring: ops.ReplayRing, rings: Tensor, folded: Sequence[bool], C: int, backend: str
) -> Tensor:
    """A copy of the pool in which each written slot has the state after all tokens."""
    pool = x.state.clone()
    served = x.state_indices >= 0
    # A sequence without a fold still has the checkpoint that it read.
    for n in range(x.case.N):
        if served[n] and not folded[n] and x.has_initial_state[n]:
            pool[x.written[n]] = x.before[x.state_indices[n]]
    lengths = torch.where(served, ring.length[rings.long()], 0).int()
    written = torch.where(served, x.written, xgdn.PAD_SLOT_ID).int()
    ops.materialize_state(
        pool,
        ring,
        lengths=lengths,
        state_indices=written,
        ring_indices=torch.where(served, rings, xgdn.PAD_SLOT_ID).int(),
        write_indices=written,
        chunk_size=C,
        backend=backend,
    )
    return pool


CASES = [*SHAPE_CASES, *DECODE_CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_recurrence(case: Case, backend: str) -> None:
    C = CHUNKS[(case.T + case.N) % 3]
    x = make_inputs(case, prefill=True)
    ring = nan_ring(case.N + 3, case, C + 5)
    rings = torch.randperm(case.N + 3, generator=torch.Generator().manual_seed(1))[: case.N].int()
    started = rings[x.has_initial_state & (x.state_indices >= 0)]
    ring.length[started.long()] = 0
    before = copied(ring)
    got = ops.replay_gated_delta_rule(
        *x.tensors(),
        ring,
        **x.shared(),
        ring_indices=torch.where(x.state_indices >= 0, rings, xgdn.PAD_SLOT_ID).int(),
        has_initial_state=x.has_initial_state,
        chunk_size=C,
        backend=backend,
    )
    assert got.data_ptr() == x.out.data_ptr()
    assert xgdn.last_backend("replay_gated_delta_rule") == backend
    moves = case.writes_elsewhere
    folded = [length >= C or moves or not x.has_initial_state[n] for n, length in enumerate(case.lengths)]
    assert_close_to_truth(x, got, plain_states(x, ring, rings, folded, C, backend))

    written = {int(x.written[n]) for n in range(case.N) if x.state_indices[n] >= 0 and folded[n]}
    others = [slot for slot in range(len(x.state)) if slot not in written]
    assert_bits_equal("slots that are not named", x.state[others], x.before[others])
    served = {int(rings[n]): case.lengths[n] for n in range(case.N) if x.state_indices[n] >= 0}
    for slot in range(len(ring.length)):
        assert ring.length[slot] == (served[slot] % C if slot in served else before.length[slot])
        rows = served.get(slot, 0) % C
        for name, now, then in zip("kug", ring[:3], before[:3], strict=True):
            assert now[slot, :, :rows].isfinite().all(), f"{name} of ring {slot}"
            assert_bits_equal(f"{name} behind ring {slot}", now[slot, :, rows:], then[slot, :, rows:])


# ---- the same bits by every route ------------------------------------------------------------------------------------


@dataclass
class Session:
    """Sequences of `case` on pools of their own, of which any may be advanced by any number of tokens."""

    x: Inputs
    C: int
    drafts: int = 0

    def __post_init__(self) -> None:
        case = self.x.case
        self.state = torch.full((2 * case.N + 1, case.HV, case.V, case.K), torch.nan, dtype=case.state_dtype)
        self.ring = nan_ring(2 * case.N + 1, case, self.C + self.drafts)
        self.position = [0] * case.N
        self.out = torch.full((case.T, case.HV, case.V), torch.nan, dtype=case.result_dtype)

    def advance(self, counts: dict[int, int], *, commit: bool = True, accepted: dict[int, int] | None = None) -> Tensor:
        """By counts[n] tokens of sequence n, in this order; of drafts nothing is kept but their outputs."""
        order = list(counts)
        kept = {n: (accepted or {}).get(n, 0) for n in order}
        for n in order:
            self.position[n] += kept[n]
        starts = [self.x.case.rows[n].start + self.position[n] for n in order]
        rows = [range(start, start + counts[n]) for start, n in zip(starts, order, strict=True)]
        tokens = torch.tensor([i for r in rows for i in r], dtype=torch.long)
        out = ops.replay_gated_delta_rule(
            *(t[tokens] for t in self.x.tensors()[:5]),
            self.state,
            self.ring,
            cu_seqlens=i32([0, *itertools.accumulate(counts[n] for n in order)]),
            state_indices=i32([2 * n + 1 for n in order]),
            ring_indices=i32([2 * n for n in order]),
            num_accepted=i32([kept[n] for n in order]) if accepted is not None else None,
            has_initial_state=torch.tensor([self.position[n] > 0 for n in order]),
            chunk_size=self.C,
            commit=commit,
            backend="cpu",
        )
        if commit:
            self.out[tokens] = out
            for n in order:
                self.position[n] += counts[n]
        return out

    def finish(self) -> tuple[Tensor, ...]:
        """What has been computed, and what the pools hold: checkpoints, and the rows of rings that count."""
        kept = [self.out]
        for n, position in enumerate(self.position):
            length = int(self.ring.length[2 * n])
            assert length == position % self.C
            kept += [pool[2 * n, :, :length] for pool in self.ring[:3]]
            kept.append(self.state[2 * n + 1])
        return tuple(kept)


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_bits_equal(str(i), a, b)


ROUTES = [
    Case((150, 64, 33), H=2, HV=4, K=128, V=64),
    Case((150, 64, 33), H=1, HV=2, K=48, V=32, dtype=torch.bfloat16, gates="slow"),
    Case((100, 70), H=1, HV=3, K=128, V=128, dtype=torch.bfloat16, state_dtype=torch.bfloat16),
    Case((100, 70), H=2, HV=2, K=16, V=16, gates="mixed", keys="same"),
]


def one_shot(case: Case, C: int) -> Session:
    session = Session(make_inputs(case, prefill=True), C)
    session.advance(dict(enumerate(case.lengths)))
    return session


@pytest.mark.parametrize("C", CHUNKS)
@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_a_token_at_a_time_has_the_bits_of_one_shot(case: Case, C: int) -> None:
    want = one_shot(case, C).finish()
    session = Session(make_inputs(case, prefill=True), C)
    for t in range(max(case.lengths)):
        session.advance({n: 1 for n, length in enumerate(case.lengths) if t < length})
    assert_same(session.finish(), want)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_any_schedule_has_the_bits_of_one_shot(case: Case, seed: int, num_threads: Callable[[int], None]) -> None:
    """Splits, orders, empty pieces, drafts that are kept or not, alone or beside others, on one to three threads."""
    C = CHUNKS[seed % 3]
    want = one_shot(case, C).finish()
    draw = random.Random(seed)
    session = Session(make_inputs(case, prefill=True), C, drafts=5)
    pending = {n: 0 for n in range(case.N)}
    while any(session.position[n] + pending[n] < case.lengths[n] for n in pending):
        num_threads(draw.randint(1, 3))
        some = draw.sample(range(case.N), draw.randint(1, case.N))
        accepted = {n: draw.randint(0, pending[n]) for n in some}
        left = {n: case.lengths[n] - session.position[n] - accepted[n] for n in some}
        is_draft = draw.random() < 0.4
        most = 5 if is_draft else draw.choice((1, 3, 40))
        counts = {n: draw.randint(0, min(left[n], most)) for n in some}
        starts = {n: case.rows[n].start + session.position[n] + accepted[n] for n in some}
        out = session.advance(counts, commit=not is_draft, accepted=accepted)
        for n, rows in zip(some, out.split([counts[n] for n in some]), strict=True):
            session.out[starts[n] : starts[n] + counts[n]] = rows  # a draft's outputs are those of the token
            pending[n] = counts[n] if is_draft else 0
    session.advance({n: 0 for n in pending}, accepted=pending)
    for n in range(case.N):
        left = case.lengths[n] - session.position[n]
        if left:
            session.advance({n: left})
    assert_same(session.finish(), want)


def test_rejected_drafts_leave_no_trace() -> None:
    case = Case((40,), H=1, HV=2, K=64, V=32)
    want = one_shot(case, 16).finish()
    session = Session(make_inputs(case, prefill=True), 16, drafts=8)
    for t in range(40):
        wrong = replace(session.x, k=session.x.k + 1, v=session.x.v - 1)
        right, session.x = session.x, wrong
        session.advance({0: min(8, 40 - t)}, commit=False)
        session.x = right
        session.advance({0: 1}, accepted={0: 0})
    assert_same(session.finish(), want)


# ---- slots -----------------------------------------------------------------------------------------------------------


def test_forks_share_a_checkpoint_until_they_fold(backend: str) -> None:
    case = Case((40, 40), H=1, HV=2)
    x = make_inputs(case, prefill=True)
    tokens = x.tensors()[:5]
    prefix, rests = slice(0, 20), (slice(20, 40), slice(60, 80))
    state, ring = torch.full((4, 2, 64, 64), torch.nan), nan_ring(3, case, 16)
    slot = {"state_indices": i32([0]), "ring_indices": i32([0]), "backend": backend}
    first = torch.tensor([False])
    ops.replay_gated_delta_rule(
        *(t[prefix] for t in tokens), state, ring, cu_seqlens=i32([0, 20]), has_initial_state=first, **slot
    )
    shared = state[0].clone()
    pieces = []
    for i in range(20):
        # The second branch takes its ring at once, and both a checkpoint when they fold, with the twelfth token.
        slots = {"state_indices": i32([0, 0] if i < 12 else [1, 3]), "ring_indices": i32([0, 0])}
        if i == 0:
            slots["ring_write_indices"] = i32([1, 2])
        else:
            slots["ring_indices"] = i32([1, 2])
        if i == 11:
            slots["write_indices"] = i32([1, 3])
        both = [torch.cat([t[20 + i : 21 + i], t[60 + i : 61 + i]]) for t in tokens]
        pieces.append(
            ops.replay_gated_delta_rule(*both, state, ring, cu_seqlens=i32([0, 1, 2]), backend=backend, **slots)
        )
    got = torch.stack(pieces)
    assert_bits_equal("the shared checkpoint", state[0], shared)
    for branch, rest in enumerate(rests):
        alone, own = torch.full((1, 2, 64, 64), torch.nan), nan_ring(1, case, 16)
        want = ops.replay_gated_delta_rule(
            *(torch.cat([t[prefix], t[rest]]) for t in tokens),
            alone,
            own,
            cu_seqlens=i32([0, 40]),
            has_initial_state=first,
            **slot,
        )
        assert_close("branch", got[:, branch], want[20:], 1e-6)
        assert_close("its checkpoint", state[(1, 3)[branch]], alone[0], 1e-6)
        if backend != "reference":
            assert_bits_equal("branch", got[:, branch], want[20:])
            assert_bits_equal("its checkpoint", state[(1, 3)[branch]], alone[0])


def test_a_sequence_that_moves_leaves_its_slots_as_they_were(backend: str) -> None:
    """Into other slots, without a fold and with one, and as drafts: what moves is what counts."""
    case = Case((3, 20), H=1, HV=2, initial="all")
    x = make_inputs(case, prefill=True)
    state = torch.cat([x.before[x.state_indices.long()], torch.full_like(x.before[:2], torch.nan)])
    whole = [torch.rand(4, *shape) for shape in ((1, 24, 64), (2, 24, 64), (2, 24))]
    ring = ops.ReplayRing(whole[0], whole[1], -whole[2], i32([3, 12, 99, 99]))
    given = {"cu_seqlens": x.cu_seqlens, "state_indices": i32([0, 1]), "ring_indices": i32([0, 1]), "backend": backend}
    moved = {"write_indices": i32([2, 3]), "ring_write_indices": i32([2, 3])}
    want_state, want_ring = state.clone(), copied(ring)
    want = ops.replay_gated_delta_rule(*x.tensors()[:5], want_state, want_ring, **given)
    before_state, before_ring = state.clone(), copied(ring)
    got = ops.replay_gated_delta_rule(*x.tensors()[:5], state, ring, **given, **moved)
    assert_bits_equal("out", got, want)
    assert_bits_equal("moved", state[2:], want_state[:2])
    assert_bits_equal("left behind", state[:2], before_state[:2])
    for i, rows in enumerate((6, 0)):
        assert ring.length[2 + i] == want_ring.length[i] == rows
        for now, then, old in zip(ring[:3], want_ring[:3], before_ring[:3], strict=True):
            assert_bits_equal("moved ring", now[2 + i, :, :rows], then[i, :, :rows])
            assert_bits_equal("ring left behind", now[i], old[i])

    short = {**given, "cu_seqlens": i32([0, 2, 8])}
    drafts = [torch.cat([t[:2], t[3:9]]) for t in x.tensors()[:5]]
    state, ring = before_state.clone(), copied(before_ring)
    ops.replay_gated_delta_rule(*drafts, state, ring, **short, **moved, commit=False)
    assert_bits_equal("checkpoints beside drafts", state[2:], before_state[:2])
    assert ring.length.tolist() == [3, 12, 3, 12]


@pytest.mark.parametrize("padded", [["write_indices"], ["ring_write_indices"], ["write_indices", "ring_write_indices"]])
def test_a_padded_write_slot_computes_and_writes_nothing(padded: list[str], backend: str) -> None:
    case = Case((40, 3), H=1, HV=2)
    x = make_inputs(replace(case, initial="all"), prefill=True)
    ring = ops.ReplayRing(*(torch.rand_like(t) for t in nan_ring(2, case, 16)[:3]), i32([3, 12]))
    slots = {"cu_seqlens": x.cu_seqlens, "state_indices": x.state_indices, "ring_indices": i32([0, 1])}
    want = ops.replay_gated_delta_rule(*x.tensors()[:5], x.state.clone(), copied(ring), **slots, backend=backend)
    before = copied(ring)
    nowhere = {name: i32([xgdn.PAD_SLOT_ID] * 2) for name in padded}
    got = ops.replay_gated_delta_rule(*x.tensors(), ring, **slots, **nowhere, backend=backend)
    assert_bits_equal("out", got, want)
    assert_bits_equal("pool", x.state, x.before)
    for now, then in zip(ring, before, strict=True):
        assert_bits_equal("ring", now, then)


def test_one_sequences_nan_stays_its_own() -> None:
    case = Case((20,) * 4, H=1, HV=2)
    want = one_shot(case, 16)
    session = Session(make_inputs(case, prefill=True), 16)
    session.x.v[25] = torch.nan
    session.advance(dict(enumerate(case.lengths)))
    rows = [i for i in range(case.T) if not 20 <= i < 40]
    assert_bits_equal("other sequences", session.out[rows], want.out[rows])
    assert session.out[25:40].isnan().any()
    assert session.out[20:25].isfinite().all()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("commit", [True, False], ids=["decode", "drafts"])
def test_a_fold_that_overflows_is_seen_in_its_output(state_dtype: torch.dtype, commit: bool, backend: str) -> None:
    """By its value head alone, of which cuda has the rows of one block, with outputs that are finite otherwise; drafts
    leave the fold to the next call."""
    case = Case((1, 1), H=1, HV=2, K=64, V=48, state_dtype=state_dtype)
    x = make_inputs(case, prefill=False)
    x.k[..., 0] = x.q[..., 0] = x.g[:] = 0  # no output reads the first column of S
    ring = nan_ring(len(x.state), case, 32)
    rings = torch.arange(2, dtype=torch.int32)
    for tensor in (ring.k, ring.u, ring.g):
        tensor[rings, :, :15] = 0
    ring.length[rings] = 15
    ring.k[1, :, :2, 0] = 1

    def outputs(u: float) -> tuple[Tensor, Tensor, Tensor]:
        ring.u[1, 1, :2, -1] = u
        state, of_call = x.before.clone(), copied(ring)
        out = ops.replay_gated_delta_rule(
            x.q, x.k, x.v, x.g, x.beta, state, of_call,
            cu_seqlens=x.cu_seqlens, state_indices=x.state_indices, ring_indices=rings,
            chunk_size=16, commit=commit, backend=backend,
        )  # fmt: skip
        return out.clone(), state, of_call.length

    largest = float(torch.finfo(state_dtype).max)
    want, state, _ = outputs(0.4 * largest)
    assert want.isfinite().all()
    assert state[x.state_indices.long()].isfinite().all()
    got, _, lengths = outputs(0.6 * largest)
    assert got[1, 1, -1 if backend == "cuda" else 0 :].isnan().all() == commit
    assert lengths[:2].tolist() == [0, 0] if commit else [15, 15]
    got[1, 1] = want[1, 1]
    assert_bits_equal("other value heads and sequences", got, want)


# ---- plain states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("K", [16, 48, 128])
def test_materialised_states(state_dtype: torch.dtype, K: int, backend: str) -> None:
    """After each token of a ring, into other slots; with all of them the checkpoint that the fold forms."""
    case = Case((16,), H=2, HV=4, K=K, V=32, state_dtype=state_dtype, initial="all")
    x = make_inputs(case, prefill=True)
    slot = int(x.state_indices[0])
    ring = nan_ring(1, case, 16)
    ring.length[0] = 0
    first = [t[:15] for t in x.tensors()[:5]]
    slots = {"state_indices": x.state_indices, "ring_indices": i32([0]), "backend": backend}
    ops.replay_gated_delta_rule(*first, x.state, ring, cu_seqlens=i32([0, 15]), **slots)
    pool = torch.cat([x.before[slot : slot + 1], torch.full((17, *x.before.shape[1:]), torch.nan, dtype=state_dtype)])
    lengths = i32(range(16))
    ops.materialize_state(
        pool,
        ring,
        lengths=lengths,
        state_indices=torch.zeros_like(lengths),
        ring_indices=torch.zeros_like(lengths),
        write_indices=lengths + 1,
        backend=backend,
    )
    assert_bits_equal("after no token", pool[1], pool[0])
    assert pool[17].isnan().all()
    for length in range(1, 16):
        short = replace(x, case=replace(case, lengths=(length,)), **{n: getattr(x, n)[:length] for n in TOKENS})
        (want,) = expected(short, prefill=True)[1].values()
        assert_close(f"after {length} tokens", pool[1 + length], want, tolerance(case, state_dtype), parts=(0,))

    last = [t[15:] for t in x.tensors()[:5]]
    ops.replay_gated_delta_rule(*last, x.state, ring, cu_seqlens=i32([0, 1]), **slots)
    assert ring.length[0] == 0
    if backend != "reference":  # a ring keeps all rows of what it has folded where the last of them was a draft
        drafted = nan_ring(1, case, 17)
        drafted.length[0] = 0
        slots = {"state_indices": i32([0]), "ring_indices": i32([0]), "backend": backend}
        ops.replay_gated_delta_rule(*first, pool, drafted, cu_seqlens=i32([0, 15]), **slots)
        ops.replay_gated_delta_rule(*last, pool, drafted, cu_seqlens=i32([0, 1]), commit=False, **slots)
        ops.materialize_state(pool, drafted, lengths=i32([16]), write_indices=i32([17]), **slots)
        assert_bits_equal("after all tokens", pool[17], x.state[slot])


def test_no_sequences(backend: str) -> None:
    x = make_inputs(Case(()), prefill=True)
    ring = nan_ring(2, x.case, 16)
    none = i32([])
    got = ops.replay_gated_delta_rule(
        *x.tensors(), ring, cu_seqlens=i32([0]), state_indices=none, ring_indices=none, backend=backend
    )
    assert got.shape == (0, 2, 64)
    ops.materialize_state(
        x.state, ring, lengths=none, state_indices=none, ring_indices=none, write_indices=none, backend=backend
    )
    assert_bits_equal("pool", x.state, x.before)


def test_a_ring_length_out_of_range_is_an_error() -> None:
    case = Case((1,), initial="all")
    x = make_inputs(case, prefill=True)
    ring = nan_ring(1, case, 16)
    for length in (-1, 16):
        ring.length[0] = length
        with pytest.raises(
            IndexError, match=rf"\[replay_gated_delta_rule\] ring_length: expected 0..C-1=15, got {length}"
        ):
            ops.replay_gated_delta_rule(*x.tensors(), ring, **x.shared(), ring_indices=i32([0]))


def test_an_accuracy_changes_no_bits_of_a_backend_that_is_exact(backend: str) -> None:
    case = Case((130, 5), H=1, HV=2, dtype=torch.bfloat16, initial="none")
    x = make_inputs(case, prefill=True)

    def call(accuracy: str) -> tuple[Tensor, ...]:
        state, ring = x.before.clone(), nan_ring(2, case, 16)
        out = ops.replay_gated_delta_rule(
            *x.tensors()[:5], state, ring, cu_seqlens=x.cu_seqlens, state_indices=x.state_indices,
            ring_indices=i32([1, 0]), has_initial_state=x.has_initial_state, accuracy=accuracy, backend=backend,
        )  # fmt: skip
        return out, state, *ring

    for accuracy in ("auto", "fast"):
        assert_same(call(accuracy), call("exact"))
    with pytest.raises(
        NotImplementedError,
        match=r"\[replay_gated_delta_rule\] accuracy: expected auto, fast or exact, got 'precise'",
    ):
        call("precise")


def test_long_decays_keep_their_digits(backend: str) -> None:
    """Where nothing is written S is what the gates leave of it. A sum of gates rounded to f32 would cost it its last
    digits, in the same direction at each fold.
    """
    case = Case((64,), H=1, HV=8, K=16, V=16, beta=0.0, initial="all")
    x = make_inputs(case, prefill=True)
    x.g.copy_((-1 - 0.3 * torch.rand(16, 8)).repeat(4, 1))
    slot = x.state_indices[0]
    x.state[slot] = 1.0
    ring = nan_ring(1, case, 16)
    ring.length[0] = 0
    ops.replay_gated_delta_rule(*x.tensors(), ring, **x.shared(), ring_indices=i32([0]), backend=backend)
    want = x.g.double().sum(0).exp()
    assert ((x.state[slot].double().amax((1, 2)) / want - 1).abs() < 8e-7).all()
    assert ((x.state[slot].double().amin((1, 2)) / want - 1).abs() < 8e-7).all()
