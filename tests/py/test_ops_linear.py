# SPDX-License-Identifier: Apache-2.0
"""Linear against float64, and its promise that the bits of a token do not depend on the tokens beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import xgdn
from cases import Matrix, assert_batch_invariant, assert_bits_equal, assert_close
from xgdn import ops

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# f32: sums of up to 1024 products. 16-bit types: products are exact in f32, the sum is rounded once.
BOUND = {F32: 1e-6, BF16: 4e-3, F16: 5e-4}


NEEDS_CPU = pytest.mark.skipif("cpu" not in xgdn.available_backends(), reason="this build has no cpu backend")


@dataclass(frozen=True)
class Call:
    T: int
    D: int = 96
    O: int = 48  # noqa: E741
    dtype: torch.dtype = BF16
    out_dtype: torch.dtype | None = None  # None: dtype
    bias: bool = False
    gaps: tuple[int, int, int] = (0, 0, 0)  # between the rows of x, weight and out

    def __str__(self) -> str:
        parts = [f"T{self.T}", f"D{self.D}", f"O{self.O}", str(self.dtype).removeprefix("torch.")]
        parts += [f"out_{self.out_dtype}".replace("torch.", "")] if self.out_dtype is not None else []
        return "-".join(
            parts + ["bias"] * self.bias + (["gaps" + "_".join(map(str, self.gaps))] if any(self.gaps) else [])
        )

    def make(self) -> Inputs:
        return Inputs(
            self,
            Matrix(torch.randn(self.T, self.D).to(self.dtype), self.gaps[0]),
            Matrix(torch.randn(self.O, self.D).to(self.dtype), self.gaps[1]),
            (10 * torch.randn(self.O)).to(self.dtype) if self.bias else None,
        )

    def bound(self, backend: str) -> float:
        """ATen has no f32 sums of 16-bit factors to give: it rounds them to the dtype of x first."""
        has_products = backend == "cpu" and self.dtype == BF16 and self.D % 32 == 0
        return BOUND[self.out_dtype or self.dtype] if has_products else BOUND[self.dtype]


@dataclass
class Inputs:
    call: Call
    x: Matrix
    weight: Matrix
    bias: Tensor | None

    def run(self, backend: str, rows: slice = slice(None)) -> Tensor:
        """The result for some tokens; what lies around it must keep its bits."""
        x = self.x.values[rows]
        empty = torch.full((len(x), self.call.O), torch.nan, dtype=self.call.out_dtype or self.call.dtype)
        out = Matrix(empty, self.call.gaps[2], around=3.0)
        before = out.memory.clone()
        ops.linear(x, self.weight.values, bias=self.bias, out=out.values, backend=backend)
        assert xgdn.last_backend("linear") == backend
        after = out.memory.clone()
        out.within(after).fill_(torch.nan)
        assert_bits_equal("memory around out", after, before)
        return out.values

    def expected(self) -> Tensor:
        sums = self.x.values.double() @ self.weight.values.double().T
        return sums if self.bias is None else sums + self.bias.double()


TOKENS = (0, 1, 2, 3, 5, 15, 16, 17, 33, 130)
# From 241 tokens on the cpu backend takes blocks of 128 outputs and, after the first 32 tokens, pieces of 256 of D.
MANY_TOKENS = (240, 241, 256, 257, 275)
LONG_ROWS = (2048, 3584, 6176)  # of which the cpu backend cuts tokens to what a cache holds
CALLS = [
    *(Call(T, O=width) for T in TOKENS for width in (16, 32, 48, 80)),
    *(Call(T, O=width, bias=bias) for T in TOKENS for width in (1, 6, 33, 35) for bias in (False, True)),
    *(Call(T, O=width, bias=True) for T in TOKENS for width in (48, 80)),
    *(Call(T, O=80, out_dtype=F32, bias=bias) for T in TOKENS for bias in (False, True)),
    *(Call(T, D=D, O=width, bias=True) for T in (1, 17) for D in (32, 96, 1024, 40) for width in (80, 41, 8)),
    *(Call(T, dtype=dtype, bias=True) for T in TOKENS for dtype in (F32, F16)),
    *(Call(T, D=1024, O=80, dtype=dtype) for T in (1, 17) for dtype in (F32, F16)),
    *(Call(T, D=D, O=35, bias=True) for T in (1, 2, 4, 6, 7, 8, 13, 65) for D in LONG_ROWS),
    *(Call(T, O=width, dtype=F32, bias=True) for T in range(1, 18) for width in (1, 33)),
    *(Call(T, dtype=F32, gaps=gaps) for T in (2, 7) for gaps in ((3, 0, 0), (0, 5, 0), (0, 0, 7))),
    *(Call(5, dtype=F16, out_dtype=F32, bias=bias) for bias in (False, True)),
    *(Call(T, O=80, bias=True, gaps=gaps) for T in (1, 3, 17, 33) for gaps in ((4, 0, 0), (0, 4, 0), (0, 0, 4))),
    *(Call(T, O=80, gaps=gaps) for T in (2, 17, 33) for gaps in ((3, 0, 0), (0, 3, 0), (0, 0, 3), (3, 3, 3))),
    *(Call(T, O=80, out_dtype=F32, gaps=gaps) for T in (2, 17) for gaps in ((4, 6, 8), (6, 3, 4), (4, 4, 3))),
    *(Call(T, dtype=dtype, bias=True, gaps=(3, 5, 7)) for T in (1, 17) for dtype in (F32, F16)),
    *(Call(T, D=544, O=width, bias=True) for T in MANY_TOKENS for width in (16, 112, 128, 144, 304)),
    *(Call(T, D=D, O=144) for T in (240, 241, 275) for D in (32, 256, 288, 512, 1024)),
    *(Call(T, D=288, O=144, out_dtype=F32, bias=bias) for T in (241, 275) for bias in (False, True)),
    *(Call(275, D=544, O=272, gaps=gaps) for gaps in ((4, 0, 0), (0, 3, 0), (0, 0, 4), (6, 5, 2))),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_linear(call: Call, backend: str) -> None:
    x = call.make()
    assert_close("out", x.run(backend), x.expected(), call.bound(backend), parts=(0, 1))


@pytest.mark.parametrize("out_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("width", [41, 80])
@pytest.mark.parametrize("T", [33, 257])
def test_a_nan_token_spoils_its_own_row_alone(T: int, width: int, out_dtype: torch.dtype, backend: str) -> None:
    x = Call(T, D=288, O=width, out_dtype=out_dtype, bias=True).make()
    clean = x.run(backend)
    others = torch.ones(T, dtype=torch.bool)
    for token in (3, 17, T - 1):  # of a whole panel, of another, of the remainder
        x.x.values[token, 5] = torch.nan
        others[token] = False
    got = x.run(backend)
    assert got[~others].isnan().all()
    assert_batch_invariant("linear", "other tokens", got[others], clean[others], x.call.bound(backend))


def test_out_is_made_like_x(backend: str) -> None:
    x = Call(17, bias=True).make()
    got = ops.linear(x.x.values, x.weight.values, bias=x.bias, backend=backend)
    assert got.dtype == BF16
    assert_batch_invariant("linear", "out", got, x.run(backend), x.call.bound(backend))


@NEEDS_CPU
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("out_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("width", [48, 1040])
@pytest.mark.parametrize("T", [130, 275, 700])
def test_other_tokens_do_not_change_bits(
    T: int, width: int, out_dtype: torch.dtype, bias: bool, num_threads: Callable[[int], None]
) -> None:
    x = Call(T, D=1056, O=width, out_dtype=out_dtype, bias=bias).make()
    num_threads(1)
    together = x.run("cpu")
    assert xgdn.last_is_batch_invariant("linear")
    for count in (2, 3, 5, 15, 16, 17, 33, 240, 241, 256):
        assert_bits_equal(f"the first {count} tokens", x.run("cpu", slice(count)), together[:count])
    for token in (0, 1, 15, 16, 31, 32, 127, 128, T - 1):
        assert_bits_equal(f"token {token}", x.run("cpu", slice(token, token + 1)), together[token : token + 1])
    num_threads(3)
    assert_bits_equal("three threads", x.run("cpu"), together)


@NEEDS_CPU
@pytest.mark.parametrize("D", LONG_ROWS)
def test_other_tokens_do_not_change_bits_of_long_rows(D: int) -> None:
    x = Call(65, D=D, O=35, out_dtype=F32, bias=True).make()
    together = x.run("cpu")
    for count in (1, 2, 3, 4, 6, 7, 8, 9, 12, 16, 33):
        assert_bits_equal(f"the first {count} tokens", x.run("cpu", slice(count)), together[:count])


@NEEDS_CPU
def test_other_few_tokens_do_not_change_bits_of_f32(num_threads: Callable[[int], None]) -> None:
    x = Call(16, D=1056, O=1041, dtype=F32, bias=True).make()
    num_threads(1)
    together = x.run("cpu")
    for count in (2, 3, 5, 15):
        assert_bits_equal(f"the first {count} tokens", x.run("cpu", slice(count)), together[:count])
    for token in (0, 3, 4, 15):
        assert_bits_equal(f"token {token}", x.run("cpu", slice(token, token + 1)), together[token : token + 1])
    num_threads(3)
    assert_bits_equal("three threads", x.run("cpu"), together)


@NEEDS_CPU
@pytest.mark.parametrize("T", [17, 257])
def test_gaps_do_not_change_bits(T: int) -> None:
    x = Call(T, D=544, O=144, bias=True).make()
    want = x.run("cpu")
    for gaps in ((4, 0, 0), (0, 3, 0), (0, 0, 4), (2, 1, 6)):
        moved = Inputs(
            replace(x.call, gaps=gaps), Matrix(x.x.values, gaps[0]), Matrix(x.weight.values, gaps[1]), x.bias
        )
        assert_bits_equal(f"gaps {gaps}", moved.run("cpu"), want)


@NEEDS_CPU
@pytest.mark.parametrize("T", [1, 17, 257])
def test_out_is_rounded_once(T: int) -> None:
    """With bias: the bf16 result is the f32 one rounded, so the sum was not rounded before the bias."""
    x = Call(T, D=1024, O=80, bias=True).make()
    wide = Inputs(replace(x.call, out_dtype=F32), x.x, x.weight, x.bias)
    assert_bits_equal("out", x.run("cpu"), wide.run("cpu").bfloat16())


# ---- rms_norm_linear ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("T", [0, 1, 3, 17])
def test_rms_norm_linear_has_the_bits_of_its_parts(
    T: int, dtype: torch.dtype, gated: bool, has_residual: bool, backend: str
) -> None:
    D, width = 96, 34
    x, residual = (Matrix(torch.randn(T, D).to(dtype), gap=3) for _ in range(2))
    before = x.memory.clone(), residual.memory.clone()
    norm, weight, bias = 0.3 * torch.randn(D), torch.randn(width, D).to(dtype), torch.randn(width).to(dtype)
    empty = torch.full((T, D), torch.nan, dtype=dtype), torch.full((T, width // (1 + gated)), torch.nan, dtype=dtype)
    residual_out, out = Matrix(empty[0], 5, around=3.0), Matrix(empty[1], 3, around=3.0)
    ops.rms_norm_linear(
        x.values,
        norm,
        weight,
        bias=bias,
        residual=residual.values if has_residual else None,
        residual_out=residual_out.values if has_residual else None,
        use_silu_and_mul=gated,
        eps=1e-5,
        out=out.values,
        backend=backend,
    )
    assert xgdn.last_backend("rms_norm_linear") == backend
    is_promised = xgdn.last_is_batch_invariant("rms_norm_linear")

    summed = residual.values.clone() if has_residual else None
    normed = ops.rms_norm(
        x.values[:, None], norm, residual=None if summed is None else summed[:, None], eps=1e-5, backend=backend
    )[:, 0]
    want = ops.linear(normed, weight, bias=bias, backend=backend)
    assert xgdn.last_is_batch_invariant("linear") == is_promised
    if gated:
        want = ops.silu_and_mul(*want.chunk(2, 1), backend=backend)
    assert_bits_equal("out", out.values, want)
    if summed is not None:
        assert_bits_equal("residual_out", residual_out.values, summed)
    for name, read, memory in zip(("x", "residual"), (x, residual), before, strict=True):
        assert_bits_equal(name, read.memory, memory)
    for name, written, values in (("residual_out", residual_out, empty[0]), ("out", out, empty[1])):
        around = written.memory.clone()
        written.within(around).copy_(values)
        assert (around.isnan() | (around == 3.0)).all(), name
