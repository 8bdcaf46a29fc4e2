# SPDX-License-Identifier: Apache-2.0
"""The two causal convolutions against a float64 loop; their pools are compared bit by bit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import reference
import xgdn
from cases import DTYPES, assert_bits_equal, assert_close, cu_seqlens_of, i32
from xgdn import ops

# The result is rounded once to the input's dtype; the sum has at most 5 terms in f32.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@dataclass(frozen=True)
class ConvCase:
    lengths: tuple[int, ...]
    D: int = 48
    W: int = 4
    spare_rows: int = 0  # rows of a slot beyond those needed
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | None = None  # None: dtype
    bias: bool = True
    silu: bool = True
    strided: bool = False
    padded: tuple[int, ...] = ()
    writes_elsewhere: bool = False

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths)) or "empty"
        name = f"{lengths}-D{self.D}-W{self.W}-{str(self.dtype).removeprefix('torch.')}"
        name += f"-spare{self.spare_rows}" if self.spare_rows else ""
        name += f"-state_{str(self.state_dtype).removeprefix('torch.')}" if self.state_dtype else ""
        for flag in ("strided", "writes_elsewhere"):
            name += f"-{flag}" if getattr(self, flag) else ""
        for flag in ("bias", "silu"):
            name += "" if getattr(self, flag) else f"-no_{flag}"
        return name + ("-pad" + "_".join(map(str, self.padded)) if self.padded else "")

    @property
    def rows(self) -> list[slice]:
        ends = itertools.accumulate(self.lengths, initial=0)
        return [slice(a, b) for a, b in itertools.pairwise(ends)]


class ConvCall:
    def __init__(self, case: ConvCase, needed_rows: int) -> None:
        N, T, D = len(case.lengths), sum(case.lengths), case.D
        self.case = case
        self.x = torch.randn(T, 3 * D).to(case.dtype)[:, D : 2 * D]
        self.out = torch.full((T, 2 * D), torch.nan, dtype=case.dtype)[:, D:]
        if not case.strided:
            self.x, self.out = self.x.contiguous(), self.out.contiguous()
        self.weight = torch.randn(D, case.W).to(case.dtype)
        self.bias = torch.randn(D).to(case.dtype) if case.bias else None
        slots = torch.randperm(2 * N + 2).int()
        self.read = slots[:N].clone()
        self.write = slots[N : 2 * N].clone() if case.writes_elsewhere else None
        shape = (2 * N + 2, needed_rows + case.spare_rows, D)
        self.state = torch.full(shape, torch.nan, dtype=case.state_dtype or case.dtype)
        self.padded = case.padded
        for n in case.padded:
            self.read[n] = xgdn.PAD_SLOT_ID
            self.x[case.rows[n]] = torch.nan

    def fill_history(self, n: int, first: int) -> None:
        """Gives sequence n a history, rows first .. first + W - 2 of its slot; the other rows stay NaN."""
        if n not in self.padded:
            rows = slice(first, first + self.case.W - 1)
            self.state[self.read[n], rows] = torch.randn(self.case.W - 1, self.case.D).to(self.state.dtype)

    def written_slot(self, n: int) -> int:
        return int(self.read[n] if self.write is None else self.write[n])

    def shared(self) -> dict[str, object]:
        return {
            "cu_seqlens": cu_seqlens_of(self.case.lengths),
            "state_indices": self.read,
            "write_indices": self.write,
            "bias": self.bias,
            "silu": self.case.silu,
            "out": self.out,
        }

    def assert_output(self, histories: dict[int, Tensor]) -> None:
        want = torch.zeros(self.out.shape, dtype=torch.float64)
        for n, history in histories.items():
            rows = self.case.rows[n]
            want[rows] = reference.causal_conv1d(self.x[rows], self.weight, self.bias, history, self.case.silu)
        assert_close("out", self.out, want, BOUND[self.case.dtype], parts=(0, 1))
        for n in self.padded:
            assert not self.out[self.case.rows[n]].any()


RAGGED = (3, 0, 1, 70, 2)
PREFILL = [
    *(ConvCase(RAGGED, W=W) for W in (2, 3, 4)),
    *(ConvCase((T,)) for T in (1, 2, 3, 4, 65)),
    *(ConvCase((65, 2), dtype=dtype) for dtype in DTYPES if dtype != torch.float32),
    ConvCase(RAGGED, dtype=torch.bfloat16, state_dtype=torch.float32),
    ConvCase(RAGGED, bias=False),
    ConvCase(RAGGED, silu=False),
    ConvCase(RAGGED, spare_rows=3),
    ConvCase((5, 9), D=1),
    ConvCase((5, 9), D=70, strided=True),
    ConvCase((5, 9), D=64, strided=True, dtype=torch.bfloat16),
    ConvCase(RAGGED, padded=(0, 3)),
    ConvCase(RAGGED, padded=(0, 1, 2, 3, 4)),
    ConvCase(RAGGED, writes_elsewhere=True, padded=(2,)),
    ConvCase((0, 0), writes_elsewhere=True),
]


@pytest.mark.parametrize("case", PREFILL, ids=str)
@pytest.mark.parametrize("initial", ["all", "none", "some", "absent"])
def test_prefill(case: ConvCase, initial: str, backend: str) -> None:
    W, N = case.W, len(case.lengths)
    call = ConvCall(case, needed_rows=W - 1)
    starts = {"none": [False] * N, "some": [n % 2 == 0 for n in range(N)]}.get(initial, [True] * N)
    for n in range(N):
        if starts[n]:
            call.fill_history(n, 0)
    before = call.state.clone()
    got = ops.causal_conv1d(
        call.x,
        call.weight,
        call.state,
        **call.shared(),
        has_initial_state=None if initial == "absent" else torch.tensor(starts, dtype=torch.bool),
        backend=backend,
    )
    assert got.data_ptr() == call.out.data_ptr()
    assert xgdn.last_backend("causal_conv1d") == backend

    histories, want_state = {}, before.clone()
    for n in range(N):
        if n in case.padded:
            continue
        history = before[call.read[n], : W - 1] if starts[n] else torch.zeros(W - 1, case.D, dtype=before.dtype)
        histories[n] = history
        inputs = torch.cat([history, call.x[case.rows[n]].to(before.dtype)])
        want_state[call.written_slot(n), : W - 1] = inputs[inputs.shape[0] - (W - 1) :]
    call.assert_output(histories)
    assert_bits_equal("conv pool", call.state, want_state)


UPDATE = [
    *(ConvCase((1,) * 5, W=W) for W in (2, 3, 4)),
    *(ConvCase((1,) * 3, dtype=dtype) for dtype in DTYPES if dtype != torch.float32),
    ConvCase((1,) * 3, dtype=torch.bfloat16, state_dtype=torch.float32),
    ConvCase((1,) * 3, bias=False, silu=False),
    ConvCase((1, 0, 1)),
    ConvCase((1,) * 4, spare_rows=2),
    ConvCase((1,) * 4, D=70, strided=True),
    ConvCase((1,) * 4, D=64, strided=True, dtype=torch.bfloat16),
    ConvCase((1,) * 4, padded=(1, 3)),
    ConvCase((1,) * 4, writes_elsewhere=True, padded=(1,)),
    ConvCase((3, 1, 0, 2), W=4),
    ConvCase((3, 1, 0, 2), W=2, writes_elsewhere=True),
]


@pytest.mark.parametrize("case", UPDATE, ids=str)
def test_decode(case: ConvCase, backend: str) -> None:
    _update(case, None, backend)


@pytest.mark.parametrize("accepted", [1, 2, 3, 4, "mixed"])
@pytest.mark.parametrize(
    "case",
    [
        *(ConvCase((4, 1, 3, 0, 2), W=W) for W in (2, 3, 4)),
        ConvCase((4, 1, 3, 0, 2), dtype=torch.bfloat16),
        ConvCase((4, 1, 3, 0, 2), padded=(0,), spare_rows=1),
        ConvCase((4, 1, 3, 0, 2), writes_elsewhere=True),
    ],
    ids=str,
)
def test_verification(case: ConvCase, accepted: int | str, backend: str) -> None:
    _update(case, [4, 1, 2, 3, 1] if accepted == "mixed" else [int(accepted)] * len(case.lengths), backend)


def _update(case: ConvCase, accepted: list[int] | None, backend: str) -> None:
    W, N, max_len = case.W, len(case.lengths), max(case.lengths)
    call = ConvCall(case, needed_rows=W - 2 + max_len)
    first = [0] * N if accepted is None else [count - 1 for count in accepted]
    for n in range(N):
        call.fill_history(n, first[n])
    before = call.state.clone()
    ops.causal_conv1d_update(
        call.x,
        call.weight,
        call.state,
        **call.shared(),
        max_len=max_len,
        num_accepted=None if accepted is None else i32(accepted),
        backend=backend,
    )
    assert xgdn.last_backend("causal_conv1d_update") == backend

    histories, want_state = {}, before.clone()
    for n, length in enumerate(case.lengths):
        if n in case.padded:
            continue
        histories[n] = before[call.read[n], first[n] : first[n] + W - 1]
        slot = call.written_slot(n)
        if length == 0:
            want_state[slot] = before[call.read[n]]
            continue
        inputs = torch.cat([histories[n], call.x[case.rows[n]].to(before.dtype)])
        want_state[slot, : W - 2 + length] = inputs[1:]
    call.assert_output(histories)
    assert_bits_equal("conv pool", call.state, want_state)


@pytest.mark.parametrize("W", [2, 3, 4])
def test_prefill_then_steps_equal_prefill_of_everything(W: int, backend: str) -> None:
    D, T, head = 16, 12, 5
    x, weight = torch.randn(T, D), torch.randn(D, W)
    none = torch.tensor([False])
    want_state = torch.zeros(1, W - 1, D)
    want = ops.causal_conv1d(
        x,
        weight,
        want_state,
        cu_seqlens=i32([0, T]),
        state_indices=i32([0]),
        has_initial_state=none,
        backend=backend,
    )
    state = torch.full((1, W - 1, D), torch.nan)
    got = [
        ops.causal_conv1d(
            x[:head],
            weight,
            state,
            cu_seqlens=i32([0, head]),
            state_indices=i32([0]),
            has_initial_state=none,
            backend=backend,
        )
    ]
    for t in range(head, T):
        step = ops.causal_conv1d_update(
            x[t : t + 1], weight, state, cu_seqlens=i32([0, 1]), state_indices=i32([0]), backend=backend
        )
        got.append(step)
    assert_close("out", torch.cat(got), want, BOUND[torch.float32])
    assert_bits_equal("conv pool", state, want_state)


@pytest.mark.parametrize("W", [2, 3, 4])
def test_a_prompt_has_the_bits_of_its_tokens_one_by_one(W: int) -> None:
    """On the cpu backend; the prompt is longer than what is widened at once."""
    torch.manual_seed(3)
    T, D = 40, 70
    x, weight, bias = torch.randn(T, D), torch.randn(D, W), torch.randn(D)
    states = torch.randn(1, W - 1, D).repeat(2, 1, 1)
    starts, first, second = i32([0, 1]), i32([0]), i32([1])
    whole = ops.causal_conv1d(x, weight, states, cu_seqlens=i32([0, T]), state_indices=first, bias=bias, backend="cpu")
    steps = [
        ops.causal_conv1d_update(
            token[None], weight, states, cu_seqlens=starts, state_indices=second, bias=bias, backend="cpu"
        )
        for token in x
    ]
    assert_bits_equal("outputs", torch.cat(steps), whole)
    assert_bits_equal("states", states[1], states[0])
