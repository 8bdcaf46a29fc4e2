# SPDX-License-Identifier: Apache-2.0
"""gdn_decode_step, on plain states and on replay states: the bits of its ops, and the same in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import reference
import xgdn
from cases import DTYPES, assert_batch_invariant, assert_bits_equal, assert_close, i32
from xgdn import ops

EPS = 1e-5
# What the rounding between the parts adds to that of the result: q, k, v and o are rounded as well, and the norm
# magnifies the rounding of an o whose elements partly cancel.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


@dataclass(frozen=True)
class Case:
    N: int = 3
    H: int = 2
    HV: int = 4
    K: int = 32
    V: int = 16
    W: int = 4
    more_rows: int = 0  # R = W - 1 + more_rows
    bias: bool = False
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    conv_dtype: torch.dtype | None = None  # None: dtype
    heads_dtype: torch.dtype = torch.float32  # of A_log, dt_bias and norm_weight
    padded: tuple[int, ...] = ()
    strided: bool = False
    writes_elsewhere: bool = False
    reads_conv_elsewhere: bool = False
    dropped_write: int | None = None  # whose write slot is padding
    lengths: tuple[int, ...] = ()  # of the sequences' rings; empty: plain states
    C: int = 16
    drafts: int = 0  # rows of a ring beyond C
    scale: float | None = None
    logit_size: float = 1.0

    @property
    def D(self) -> int:
        return 2 * self.H * self.K + self.HV * self.V

    def __str__(self) -> str:
        changed = [f for f in self.__dataclass_fields__ if getattr(self, f) != getattr(Case, f)]
        return "-".join(f"{f}={getattr(self, f)}".replace("torch.", "").replace(" ", "") for f in changed) or "default"


CASES = [
    Case(),
    Case(N=1),
    Case(N=0),
    Case(N=9, H=1, HV=2, K=128, V=128),
    Case(N=12, H=8, HV=16),  # several heads and sequences for each range of a thread
    *(Case(H=H, HV=H * ratio) for H, ratio in ((2, 1), (3, 2), (1, 3), (2, 4), (1, 8))),
    *(Case(N=2, H=1, HV=2, K=K, V=V) for K, V in ((16, 48), (96, 64), (256, 128), (64, 256), (112, 144), (48, 256))),
    *(Case(W=W, more_rows=rows, bias=bias) for W in (2, 3, 4) for rows, bias in ((0, False), (2, True))),
    *(Case(dtype=dtype, state_dtype=s) for dtype in DTYPES for s in (torch.float32, torch.bfloat16)),
    *(Case(dtype=torch.bfloat16, state_dtype=torch.bfloat16, H=H, HV=HV, K=128, V=128) for H, HV in ((1, 1), (2, 6))),
    Case(dtype=torch.bfloat16, conv_dtype=torch.float32, bias=True),
    Case(dtype=torch.bfloat16, heads_dtype=torch.bfloat16),
    Case(N=6, padded=(0, 4)),
    Case(N=2, padded=(0, 1)),
    Case(N=6, padded=(5,), dtype=torch.bfloat16, state_dtype=torch.bfloat16, K=64, V=64),
    Case(N=5, strided=True, bias=True),
    Case(N=5, strided=True, dtype=torch.bfloat16),
    Case(N=4, writes_elsewhere=True, padded=(1,)),
    Case(N=4, writes_elsewhere=True, dropped_write=2),
    Case(N=4, writes_elsewhere=True, reads_conv_elsewhere=True, dtype=torch.bfloat16),
    Case(N=4, reads_conv_elsewhere=True),
    Case(scale=0.25),
    Case(logit_size=40.0),
]

# Rings that are empty, that fill up, and between.
LENGTHS = (0, 15, 7)
REPLAY_CASES = [
    Case(lengths=LENGTHS),
    Case(N=1, lengths=(15,)),
    Case(N=0, lengths=(0,)),
    Case(N=9, H=1, HV=2, K=128, V=128, lengths=(0, 15, 1, 2, 14, 15, 8, 3, 0)),
    Case(N=12, H=8, HV=16, lengths=(0, 15, 1, 2, 14, 15, 8, 3, 0, 7, 15, 4)),
    Case(N=4, lengths=(31, 3, 16, 0), C=32),
    Case(N=4, lengths=(63, 3, 16, 0), C=64, drafts=9),
    *(Case(H=H, HV=H * ratio, lengths=LENGTHS) for H, ratio in ((2, 1), (3, 2), (1, 3), (1, 8))),
    *(Case(H=1, HV=2, K=K, V=V, lengths=LENGTHS) for K, V in ((16, 48), (96, 64), (256, 128), (64, 256), (112, 144))),
    *(Case(W=W, more_rows=2, bias=True, lengths=LENGTHS) for W in (2, 3)),
    *(Case(dtype=dtype, state_dtype=s, lengths=LENGTHS) for dtype in DTYPES for s in (torch.float32, torch.bfloat16)),
    Case(dtype=torch.bfloat16, state_dtype=torch.bfloat16, H=1, HV=2, K=128, V=128, lengths=LENGTHS, drafts=5),
    Case(dtype=torch.bfloat16, conv_dtype=torch.float32, heads_dtype=torch.bfloat16, lengths=LENGTHS),
    Case(N=6, padded=(0, 4), lengths=(3, 15, 0, 9, 15, 1)),
    Case(N=2, padded=(0, 1), lengths=(3, 15)),
    Case(N=5, strided=True, bias=True, lengths=(3, 15, 0, 9, 15)),
    Case(N=4, writes_elsewhere=True, padded=(1,), lengths=(15, 15, 0, 9)),
    Case(N=4, writes_elsewhere=True, dropped_write=2, lengths=(15, 0, 15, 9)),
    Case(N=4, writes_elsewhere=True, dropped_write=2, lengths=(15, 0, 4, 9)),
    Case(N=4, writes_elsewhere=True, reads_conv_elsewhere=True, dtype=torch.bfloat16, lengths=(15, 0, 4, 9)),
    Case(N=4, reads_conv_elsewhere=True, lengths=(15, 0, 4, 9)),
    Case(scale=0.25, lengths=LENGTHS),
    Case(logit_size=40.0, lengths=LENGTHS),
]


@dataclass
class Inputs:
    case: Case
    projected: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    conv_state: Tensor
    A_log: Tensor
    dt_bias: Tensor
    state: Tensor
    norm_weight: Tensor
    state_indices: Tensor
    write_indices: Tensor | None
    conv_indices: Tensor | None
    conv_write_indices: Tensor | None
    out: Tensor
    ring: ops.ReplayRing | None  # of replay states, in the slots of the convolution

    @property
    def conv_read(self) -> Tensor:
        return self.state_indices if self.conv_indices is None else self.conv_indices

    @property
    def written(self) -> Tensor:
        return self.state_indices if self.write_indices is None else self.write_indices

    @property
    def conv_written(self) -> Tensor:
        """Without slots of its own the convolution has those of the state."""
        if self.conv_indices is None:
            return self.written
        return self.conv_indices if self.conv_write_indices is None else self.conv_write_indices

    def parts(self) -> tuple[Tensor, ...]:
        """mixed_qkv, z, b, a."""
        c = self.case
        return self.projected.split([c.D, c.HV * c.V, c.HV, c.HV], 1)

    def step(self, backend: str) -> Tensor:
        return ops.gdn_decode_step(
            self.projected,
            self.conv_weight,
            self.conv_state,
            self.A_log,
            self.dt_bias,
            self.state,
            self.norm_weight,
            state_indices=self.state_indices,
            conv_bias=self.conv_bias,
            write_indices=self.write_indices,
            conv_indices=self.conv_indices,
            conv_write_indices=self.conv_write_indices,
            ring=self.ring,
            chunk_size=self.case.C,
            norm_eps=EPS,
            out=self.out,
            scale=self.case.scale,
            backend=backend,
        )

    def op_by_op(self, backend: str) -> Tensor:
        x, z, b, a = self.parts()
        cu_seqlens = torch.arange(self.case.N + 1, dtype=torch.int32)
        mixed_qkv = ops.causal_conv1d_update(
            x,
            self.conv_weight,
            self.conv_state,
            cu_seqlens=cu_seqlens,
            state_indices=self.conv_read,
            bias=self.conv_bias,
            write_indices=self.conv_written,
            backend=backend,
        )
        if self.ring is None:
            o = ops.packed_decode(
                mixed_qkv,
                a,
                b,
                self.A_log,
                self.dt_bias,
                self.state,
                state_indices=self.state_indices,
                write_indices=self.write_indices,
                scale=self.case.scale,
                backend=backend,
            )
        else:
            o = ops.replay_gated_delta_rule(
                *split_heads(self.case, mixed_qkv),
                *ops.gdn_gating(a, b, self.A_log, self.dt_bias, backend=backend),
                self.state,
                self.ring,
                cu_seqlens=cu_seqlens,
                state_indices=self.state_indices,
                ring_indices=self.conv_read,
                write_indices=self.write_indices,
                ring_write_indices=self.conv_written,
                chunk_size=self.case.C,
                scale=self.case.scale,
                backend=backend,
            )
        z = z.unflatten(1, (self.case.HV, self.case.V))
        out = ops.rms_norm_gated(o, z, self.norm_weight, eps=EPS, out=self.out, backend=backend)
        out[self.state_indices == xgdn.PAD_SLOT_ID] = 0  # the norm knows nothing of padding
        return out


def split_heads(case: Case, mixed_qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k, v."""
    keys = case.H * case.K
    q, k, v = mixed_qkv.split([keys, keys, case.HV * case.V], 1)
    return q.unflatten(1, (case.H, case.K)), k.unflatten(1, (case.H, case.K)), v.unflatten(1, (case.HV, case.V))


def make_ring(case: Case, num_slots: int, slots: Tensor, gen: torch.Generator) -> ops.ReplayRing:
    """What counts is random, all other rows are NaN and all other lengths those of no ring."""
    rows = case.C + case.drafts
    ring = ops.ReplayRing(
        torch.full((num_slots, case.H, rows, case.K), torch.nan),
        torch.full((num_slots, case.HV, rows, case.V), torch.nan),
        torch.full((num_slots, case.HV, rows), torch.nan),
        torch.full((num_slots,), 2**30, dtype=torch.int32),
    )
    for slot, length in zip(slots.tolist(), case.lengths, strict=False):
        k = torch.randn(case.H, length, case.K, generator=gen)
        ring.k[slot, :, :length] = torch.nn.functional.normalize(k, dim=-1)
        ring.u[slot, :, :length] = torch.randn(case.HV, length, case.V, generator=gen)
        ring.g[slot, :, :length] = -torch.rand(case.HV, length, generator=gen)
        ring.length[slot] = length
    return ring


def make_inputs(case: Case) -> Inputs:
    """Slots that nobody reads, and `out`, are NaN; so are the inputs of padded sequences."""
    gen = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    N, D, HV, K, V = case.N, case.D, case.HV, case.K, case.V
    width = D + HV * V + 2 * HV
    projected = randn(N, width)
    projected[:, width - 2 * HV :] *= case.logit_size
    for n in case.padded:
        projected[n] = torch.nan
    wide = torch.full((N, width + (24 if case.strided else 0)), torch.nan, dtype=case.dtype)
    wide[:, :width] = projected

    num_slots = 4 * N + 2
    order = torch.randperm(num_slots, generator=gen).int()
    read, write, conv_read, conv_write = (slots.clone() for slots in order[: 4 * N].view(4, N))
    state = torch.full((num_slots, HV, V, K), torch.nan, dtype=case.state_dtype)
    state[read] = randn(N, HV, V, K).to(case.state_dtype)
    conv_slots = conv_read if case.reads_conv_elsewhere else read
    conv_dtype = case.conv_dtype or case.dtype
    conv_state = torch.full((num_slots, case.W - 1 + case.more_rows, D), torch.nan, dtype=conv_dtype)
    conv_state[conv_slots, : case.W - 1] = randn(N, case.W - 1, D).to(conv_dtype)
    ring = make_ring(case, num_slots, conv_slots, gen) if case.lengths else None
    for n in case.padded:
        read[n] = conv_read[n] = write[n] = conv_write[n] = xgdn.PAD_SLOT_ID
    if case.dropped_write is not None:
        write[case.dropped_write] = conv_write[case.dropped_write] = xgdn.PAD_SLOT_ID
    return Inputs(
        case=case,
        projected=wide[:, :width],
        conv_weight=(0.5 * randn(D, case.W)).to(case.dtype),
        conv_bias=randn(D).to(case.dtype) if case.bias else None,
        conv_state=conv_state,
        A_log=randn(HV).to(case.heads_dtype),
        dt_bias=randn(HV).to(case.heads_dtype),
        state=state,
        norm_weight=randn(V).to(case.heads_dtype),
        state_indices=read,
        write_indices=write if case.writes_elsewhere else None,
        conv_indices=conv_read if case.reads_conv_elsewhere else None,
        conv_write_indices=conv_write if case.reads_conv_elsewhere and case.writes_elsewhere else None,
        out=torch.full((N, 3, HV, V), torch.nan, dtype=case.dtype)[:, 1],
        ring=ring,
    )


def assert_same_pools(got: Inputs, want: Inputs) -> None:
    """The convolution's rows are copies; a state is bits where they are promised, and NaN where nobody wrote."""
    assert_bits_equal("conv_state", got.conv_state, want.conv_state)
    written = ~want.state.isnan()
    assert not got.state[written].isnan().any()
    assert got.state[~written].isnan().all()
    bound = max(TOLERANCE[want.case.dtype], TOLERANCE[want.case.state_dtype])
    assert_batch_invariant("gdn_decode_step", "state", got.state[written], want.state[written], bound)
    if got.ring is None or want.ring is None:
        return
    assert_bits_equal("ring_length", got.ring.length, want.ring.length)
    for name, ours, theirs in zip("kug", got.ring[:3], want.ring[:3], strict=True):
        written = ~theirs.isnan()
        assert ours[~written].isnan().all()
        assert_batch_invariant("gdn_decode_step", f"ring_{name}", ours[written], theirs[written], bound)


@pytest.mark.parametrize("case", [*CASES, *REPLAY_CASES], ids=str)
def test_the_bits_are_those_of_the_ops(case: Case, backend: str) -> None:
    x, y = make_inputs(case), make_inputs(case)
    got, want = x.step(backend), y.op_by_op(backend)
    assert xgdn.last_backend("gdn_decode_step") == backend
    assert got.data_ptr() == x.out.data_ptr()
    kept = [n for n in range(case.N) if n not in case.padded]
    assert_batch_invariant("gdn_decode_step", "out", got[kept], want[kept], TOLERANCE[case.dtype])
    assert not got[list(case.padded)].any()
    assert_same_pools(x, y)


def replayed(x: Inputs, n: int, state: Tensor, ring: ops.ReplayRing, slot: int) -> Tensor:
    """In float64 the state that a checkpoint and a ring stand for."""
    case, S = x.case, state.double()
    for i in range(int(ring.length[slot])):
        k = ring.k[slot, :, i].double().repeat_interleave(case.HV // case.H, 0)
        u, alpha = ring.u[slot, :, i].double(), ring.g[slot, :, i].double().exp()
        S = alpha[:, None, None] * S + u[:, :, None] * k[:, None, :]
    return S


@pytest.mark.parametrize("case", [*CASES, *REPLAY_CASES], ids=str)
def test_matches_float64(case: Case, backend: str) -> None:
    x, before = make_inputs(case), make_inputs(case)
    got = x.step(backend)
    qkv, z, b, a = before.parts()
    g, beta = reference.gdn_gating(a, b, before.A_log, before.dt_bias)
    want = torch.zeros(got.shape, dtype=torch.float64)
    written, conv_written = set(), set()
    bound = max(TOLERANCE[case.dtype], TOLERANCE[case.state_dtype])
    for n in range(case.N):
        if n in case.padded:
            continue
        read, conv_read = int(before.state_indices[n]), int(before.conv_read[n])
        slot, conv_slot = int(x.written[n]), int(x.conv_written[n])
        history = before.conv_state[conv_read, : case.W - 1]
        row = reference.causal_conv1d(qkv[n : n + 1], before.conv_weight, before.conv_bias, history)
        state = before.state[read]
        o, states = reference.gated_delta_rule(
            *split_heads(case, row),
            g[n : n + 1],
            beta[n : n + 1],
            state if before.ring is None else replayed(before, n, state, before.ring, conv_read),
            case.scale,
        )
        want[n] = reference.rms_norm_gated(o[0], z[n].view(case.HV, case.V), before.norm_weight, EPS)
        if slot == xgdn.PAD_SLOT_ID:
            continue
        conv_written.add(conv_slot)
        if x.ring is None:
            written.add(slot)
            assert_close(f"state of slot {slot}", x.state[slot], states[-1], bound, parts=(0,))
        else:
            length = (case.lengths[n] + 1) % case.C
            assert x.ring.length[conv_slot] == length
            if length == 0 or slot != read:
                written.add(slot)
            if length > 0:
                assert_bits_equal(f"checkpoint of slot {slot}", x.state[slot], state)
            got_state = replayed(x, n, x.state[slot], x.ring, conv_slot)
            assert_close(f"state of slot {slot}", got_state, states[-1], bound, parts=(0,))
        rows = torch.cat([history[1:], qkv[n : n + 1].to(history.dtype)])
        assert_bits_equal(f"history of slot {conv_slot}", x.conv_state[conv_slot, : case.W - 1], rows)
    assert_close("out", got, want, TOLERANCE[case.dtype])
    pools = [("state", x.state, before.state, written), ("conv_state", x.conv_state, before.conv_state, conv_written)]
    if x.ring is not None and before.ring is not None:
        names = (f"ring_{name}" for name in x.ring._fields)
        pools += [(name, *both, conv_written) for name, *both in zip(names, x.ring, before.ring, strict=True)]
    for name, pool, old, slots in pools:
        others = [slot for slot in range(pool.shape[0]) if slot not in slots]
        assert_bits_equal(f"untouched slots of {name}", pool[others], old[others])


@pytest.mark.parametrize("lengths", [(), (3, 15, 0, 15, 14)], ids=["plain", "replay"])
def test_threads_do_not_change_bits(lengths: tuple[int, ...], num_threads: Callable[[int], None], backend: str) -> None:
    case = Case(N=5, H=4, HV=8, K=64, V=64, dtype=torch.bfloat16, lengths=lengths)
    results = []
    for count in (1, 2, 5):
        num_threads(count)
        x = make_inputs(case)
        results.append((x.step(backend), x.state, x.conv_state, *(x.ring or ())))
    for result in results[1:]:
        for i, (got, want) in enumerate(zip(result, results[0], strict=True)):
            finite = ~want.isnan()  # slots that nobody reads are NaN
            assert_batch_invariant("gdn_decode_step", str(i), got[finite], want[finite], TOLERANCE[case.dtype])


@pytest.mark.parametrize("lengths", [(), (3, 15, 0, 15, 14)], ids=["plain", "replay"])
def test_batch_does_not_change_bits(lengths: tuple[int, ...], backend: str) -> None:
    case = Case(N=5, dtype=torch.bfloat16, state_dtype=torch.bfloat16, K=64, V=64, lengths=lengths)
    x, y = make_inputs(case), make_inputs(case)
    want = x.step(backend)
    for n in (3, 0, 4, 2, 1):
        y.case = replace(case, N=1)
        single = Inputs(**{**vars(y), "projected": y.projected[n : n + 1], "out": y.out[n : n + 1]})
        single.state_indices = y.state_indices[n : n + 1]
        got = single.step(backend)
        assert_batch_invariant("gdn_decode_step", f"out of sequence {n}", got, want[n : n + 1], TOLERANCE[case.dtype])
    assert_same_pools(y, x)


def test_a_given_cu_seqlens_changes_nothing(backend: str) -> None:
    x, y = make_inputs(Case()), make_inputs(Case())
    want = x.step(backend)
    got = ops.gdn_decode_step(
        y.projected,
        y.conv_weight,
        y.conv_state,
        y.A_log,
        y.dt_bias,
        y.state,
        y.norm_weight,
        state_indices=y.state_indices,
        cu_seqlens=i32([0, 1, 2, 3]),
        norm_eps=EPS,
        backend=backend,
    )
    assert_bits_equal("out", got, want)
    assert_bits_equal("state", y.state, x.state)


# ---- replay states: the same bits by every route ---------------------------------------------------------------------


def decode_one_by_one(x: Inputs, tokens: Tensor, backend: str = "cpu") -> Tensor:
    """The outputs of a sequence's tokens, by steps."""
    rows = []
    for token in tokens.split(1):
        x.projected, x.out = token, torch.full_like(x.out, torch.nan)
        rows.append(x.step(backend))
    return torch.cat(rows)


def as_prompt(x: Inputs, tokens: Tensor) -> Tensor:
    """The same by the ops of a prompt, at once."""
    case, cu_seqlens = x.case, i32([0, len(tokens)])
    qkv, z, b, a = tokens.split([case.D, case.HV * case.V, case.HV, case.HV], 1)
    mixed_qkv = ops.causal_conv1d(
        qkv, x.conv_weight, x.conv_state, cu_seqlens=cu_seqlens, state_indices=x.conv_read, backend="cpu"
    )
    assert x.ring is not None
    o = ops.replay_gated_delta_rule(
        *split_heads(case, mixed_qkv),
        *ops.gdn_gating(a, b, x.A_log, x.dt_bias, backend="cpu"),
        x.state,
        x.ring,
        cu_seqlens=cu_seqlens,
        state_indices=x.state_indices,
        ring_indices=x.conv_read,
        chunk_size=case.C,
        backend="cpu",
    )
    return ops.rms_norm_gated(o, z.unflatten(1, (case.HV, case.V)), x.norm_weight, eps=EPS, backend="cpu")


def assert_same_states(got: Inputs, want: Inputs) -> None:
    """Of one sequence: all that counts. What lies behind a ring's length depends on the route."""
    assert_bits_equal("state", got.state, want.state)
    assert got.ring is not None
    assert want.ring is not None
    assert_bits_equal("ring_length", got.ring.length, want.ring.length)
    (slot,) = want.conv_read.tolist()
    for name, ours, theirs in zip("kug", got.ring[:3], want.ring[:3], strict=True):
        rows = slice(int(want.ring.length[slot]))
        assert_bits_equal(f"ring_{name}", ours[slot, :, rows], theirs[slot, :, rows])
        assert not ours[slot, :, rows].isnan().any()
    history = slice(want.case.W - 1)
    assert_bits_equal("conv_state", got.conv_state[slot, history], want.conv_state[slot, history])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C", [16, 32])
def test_steps_have_the_bits_of_a_prompt(C: int, state_dtype: torch.dtype) -> None:
    case = Case(N=1, K=128, V=64, lengths=(5,), C=C, dtype=torch.bfloat16, state_dtype=state_dtype)
    x, y = make_inputs(case), make_inputs(case)
    tokens = torch.randn(45, case.D + case.HV * case.V + 2 * case.HV).bfloat16()
    assert_bits_equal("out", decode_one_by_one(x, tokens), as_prompt(y, tokens))
    assert_same_states(x, y)


def test_drafts_that_were_rejected_leave_no_trace() -> None:
    """A verification of a token and three drafts, of which the token alone is taken, by the cursor; then steps."""
    case = Case(N=1, lengths=(9,), drafts=4, more_rows=3)
    x, y = make_inputs(case), make_inputs(case)
    tokens = torch.randn(12, case.D + case.HV * case.V + 2 * case.HV)
    want = decode_one_by_one(x, tokens)

    drafts = torch.cat([tokens[:1], torch.randn(3, tokens.shape[1])])
    qkv, _, b, a = drafts.split([case.D, case.HV * case.V, case.HV, case.HV], 1)
    shared = {"cu_seqlens": i32([0, 4]), "state_indices": y.state_indices, "backend": "cpu"}
    mixed_qkv = ops.causal_conv1d_update(qkv, y.conv_weight, y.conv_state, max_len=4, **shared)
    assert y.ring is not None
    gates = ops.gdn_gating(a, b, y.A_log, y.dt_bias, backend="cpu")
    heads = split_heads(case, mixed_qkv)
    ops.replay_gated_delta_rule(*heads, *gates, y.state, y.ring, ring_indices=y.conv_read, commit=False, **shared)
    y.ring.length[y.conv_read.long()] += 1
    assert_bits_equal("out", decode_one_by_one(y, tokens[1:]), want[1:])
    assert_same_states(y, x)


def test_forks_share_a_checkpoint_until_they_fold(backend: str) -> None:
    """Two rings of one checkpoint, each of which is folded into a slot of its own; beside two that share nothing."""
    case = Case(N=2, reads_conv_elsewhere=True, lengths=(13, 13))
    x, y = make_inputs(case), make_inputs(case)
    shared, other = y.state_indices.tolist()
    y.state[other] = y.state[shared]
    free = int(x.conv_read[0])  # nobody's state
    before = x.state.clone()
    x.state_indices = i32([shared, shared])
    for i, token in enumerate(torch.randn(4, *x.projected.shape)):
        if i == 2:
            x.write_indices, x.conv_write_indices = i32([free, other]), x.conv_indices
        elif i == 3:
            x.state_indices, x.write_indices = i32([free, other]), None
        x.projected = y.projected = token
        assert_batch_invariant("gdn_decode_step", "out", x.step(backend), y.step(backend), TOLERANCE[case.dtype])
    for slot, want in ((free, y.state[shared]), (other, y.state[other])):
        assert_batch_invariant("gdn_decode_step", f"slot {slot}", x.state[slot], want, TOLERANCE[case.dtype])
    rest = [slot for slot in range(len(before)) if slot not in (free, other)]
    assert_bits_equal("all other slots", x.state[rest], before[rest])


def test_a_fold_that_overflows_is_seen_in_the_output(backend: str) -> None:
    """Each of two updates is a number, and so is what the token reads of them; their sum is none."""
    x = make_inputs(Case(lengths=(15, 15, 3)))
    assert x.ring is not None
    x.A_log.fill_(-9)
    slot, head = x.state_indices[0], 1
    x.ring.k[slot, 0, :2] = torch.nn.functional.one_hot(torch.tensor(3), x.case.K)
    x.ring.u[slot, head, :2] = 3e38
    x.ring.g[slot] = 0
    got = x.step(backend)
    assert got[0, head].isnan().all()
    assert got[0, [0, 2, 3]].isfinite().all()
    assert got[1:].isfinite().all()
