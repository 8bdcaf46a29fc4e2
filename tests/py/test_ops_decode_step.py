# SPDX-License-Identifier: Apache-2.0
"""gdn_decode_step: the bits of the ops that it consists of, and the same in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
            norm_eps=EPS,
            out=self.out,
            scale=self.case.scale,
            backend=backend,
        )

    def op_by_op(self, backend: str) -> Tensor:
        x, z, b, a = self.parts()
        mixed_qkv = ops.causal_conv1d_update(
            x,
            self.conv_weight,
            self.conv_state,
            cu_seqlens=torch.arange(self.case.N + 1, dtype=torch.int32),
            state_indices=self.state_indices if self.conv_indices is None else self.conv_indices,
            bias=self.conv_bias,
            write_indices=self.write_indices if self.conv_indices is None else self.conv_write_indices,
            backend=backend,
        )
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
        z = z.unflatten(1, (self.case.HV, self.case.V))
        out = ops.rms_norm_gated(o, z, self.norm_weight, eps=EPS, out=self.out, backend=backend)
        out[self.state_indices == xgdn.PAD_SLOT_ID] = 0  # the norm knows nothing of padding
        return out


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
    )


def assert_same_pools(got: Inputs, want: Inputs) -> None:
    """The convolution's rows are copies; a state is bits where they are promised, and NaN where nobody wrote."""
    assert_bits_equal("conv_state", got.conv_state, want.conv_state)
    written = ~want.state.isnan()
    assert not got.state[written].isnan().any()
    assert got.state[~written].isnan().all()
    bound = max(TOLERANCE[want.case.dtype], TOLERANCE[want.case.state_dtype])
    assert_batch_invariant("gdn_decode_step", "state", got.state[written], want.state[written], bound)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_are_those_of_the_ops(case: Case, backend: str) -> None:
    x, y = make_inputs(case), make_inputs(case)
    got, want = x.step(backend), y.op_by_op(backend)
    assert xgdn.last_backend("gdn_decode_step") == backend
    assert got.data_ptr() == x.out.data_ptr()
    kept = [n for n in range(case.N) if n not in case.padded]
    assert_batch_invariant("gdn_decode_step", "out", got[kept], want[kept], TOLERANCE[case.dtype])
    assert not got[list(case.padded)].any()
    assert_same_pools(x, y)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case, backend: str) -> None:
    x, before = make_inputs(case), make_inputs(case)
    got = x.step(backend)
    qkv, z, b, a = before.parts()
    g, beta = reference.gdn_gating(a, b, before.A_log, before.dt_bias)
    conv_read = before.state_indices if before.conv_indices is None else before.conv_indices
    want = torch.zeros(got.shape, dtype=torch.float64)
    written, conv_written = set(), set()
    for n in range(case.N):
        if n in case.padded:
            continue
        history = before.conv_state[conv_read[n], : case.W - 1]
        row = reference.causal_conv1d(qkv[n : n + 1], before.conv_weight, before.conv_bias, history)
        keys = case.H * case.K
        q, k, v = row.split([keys, keys, case.HV * case.V], 1)
        o, states = reference.gated_delta_rule(
            q.view(1, case.H, case.K),
            k.view(1, case.H, case.K),
            v.view(1, case.HV, case.V),
            g[n : n + 1],
            beta[n : n + 1],
            before.state[before.state_indices[n]],
            case.scale,
        )
        want[n] = reference.rms_norm_gated(o[0], z[n].view(case.HV, case.V), before.norm_weight, EPS)
        slot = int((before.state_indices if x.write_indices is None else x.write_indices)[n])
        conv_write = x.write_indices if x.conv_indices is None else x.conv_write_indices
        conv_slot = int((conv_read if conv_write is None else conv_write)[n])
        if slot == xgdn.PAD_SLOT_ID:
            continue
        written.add(slot)
        conv_written.add(conv_slot)
        bound = max(TOLERANCE[case.dtype], TOLERANCE[case.state_dtype])
        assert_close(f"state of slot {slot}", x.state[slot], states[-1], bound, parts=(0,))
        rows = torch.cat([history[1:], qkv[n : n + 1].to(history.dtype)])
        assert_bits_equal(f"history of slot {conv_slot}", x.conv_state[conv_slot, : case.W - 1], rows)
    assert_close("out", got, want, TOLERANCE[case.dtype])
    for name, pool, old, slots in (
        ("state", x.state, before.state, written),
        ("conv_state", x.conv_state, before.conv_state, conv_written),
    ):
        others = [slot for slot in range(pool.shape[0]) if slot not in slots]
        assert_bits_equal(f"untouched slots of {name}", pool[others], old[others])


def test_threads_do_not_change_bits(num_threads: Callable[[int], None], backend: str) -> None:
    case = Case(N=5, H=4, HV=8, K=64, V=64, dtype=torch.bfloat16)
    results = []
    for count in (1, 2, 5):
        num_threads(count)
        x = make_inputs(case)
        results.append((x.step(backend), x.state, x.conv_state))
    for result in results[1:]:
        for name, got, want in zip(("out", "state", "conv_state"), result, results[0], strict=True):
            finite = ~want.isnan()  # slots that nobody reads are NaN
            assert_batch_invariant("gdn_decode_step", name, got[finite], want[finite], TOLERANCE[case.dtype])


def test_batch_does_not_change_bits(backend: str) -> None:
    case = Case(N=5, dtype=torch.bfloat16, state_dtype=torch.bfloat16, K=64, V=64)
    x, y = make_inputs(case), make_inputs(case)
    want = x.step(backend)
    for n in (3, 0, 4, 2, 1):
        y.case = Case(N=1, dtype=torch.bfloat16, state_dtype=torch.bfloat16, K=64, V=64)
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
