# SPDX-License-Identifier: Apache-2.0
"""Gating, the norms and the gate of an MLP against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

import reference
import xgdn
from cases import DTYPES, assert_bits_equal, assert_close, pairwise
from xgdn import ops

BOOLS = (False, True)

# Rounded once to the result's dtype.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


HEADS = [(1, 1, 16), (5, 2, 48), (9, 3, 128), (3, 1, 256), (0, 2, 16)]


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values with gaps between the rows."""
    rows = torch.full((x.shape[0], 2, *x.shape[1:]), torch.nan, dtype=x.dtype)
    rows[:, 1] = x
    return rows[:, 1]


def assert_gaps_untouched(x: torch.Tensor) -> None:
    assert x._base is not None
    assert x._base[:, 0].isnan().all()


@pytest.mark.parametrize(
    ("shape", "dtype", "per_head", "view"),
    pairwise([(1, 1), (7, 3), (33, 32), (0, 4)], DTYPES, ["f32", "as_input"], BOOLS),
    ids=str,
)
def test_gdn_gating(shape: tuple[int, int], dtype: torch.dtype, per_head: str, view: bool, backend: str) -> None:
    head_dtype = torch.float32 if per_head == "f32" else dtype
    a, b = (10 * torch.randn(shape)).to(dtype), (10 * torch.randn(shape)).to(dtype)
    if a.numel() > 20:  # the ends of softplus and sigmoid
        a.view(-1)[:6] = torch.tensor([-80.0, -20.0, 19.5, 20.5, 60.0, 0.0]).to(dtype)
        b.view(-1)[:4] = torch.tensor([-80.0, -30.0, 30.0, 80.0]).to(dtype)
    A_log, dt_bias = torch.randn(shape[1]).to(head_dtype), torch.randn(shape[1]).to(head_dtype)
    g, beta = (torch.full(shape, torch.nan) for _ in range(2))
    ops.gdn_gating(*((strided(a), strided(b)) if view else (a, b)), A_log, dt_bias, g=g, beta=beta, backend=backend)
    assert xgdn.last_backend("gdn_gating") == backend
    want_g, want_beta = reference.gdn_gating(a, b, A_log, dt_bias)
    for name, got, want in (("g", g, want_g), ("beta", beta, want_beta)):
        assert_close(name, got, want, BOUND[torch.float32])
        # Small gates matter as much as large ones: each to its own size, down to the smallest normal number.
        assert ((got.double() - want).abs() <= 1e-5 * want.abs() + 1e-37).all(), name
    assert (g <= 0).all()


@pytest.mark.parametrize(("shape", "dtype", "view"), pairwise(HEADS, DTYPES, BOOLS), ids=str)
def test_l2_norm(shape: tuple[int, int, int], dtype: torch.dtype, view: bool, backend: str) -> None:
    x = torch.randn(shape).to(dtype)
    if x.shape[0] > 2:
        x[1] = 0
        x[2] *= 1e-3
    out = torch.full(shape, torch.nan, dtype=dtype)
    if view:
        out = strided(out)
    ops.l2_norm(strided(x) if view else x, out=out, backend=backend)
    assert xgdn.last_backend("l2_norm") == backend
    assert_close("out", out, reference.l2_norm(x), BOUND[dtype], parts=(0, 1))


def test_l2_norm_uses_eps(backend: str) -> None:
    x = torch.full((1, 1, 16), 0.5)
    assert_close("out", ops.l2_norm(x, eps=12.0, backend=backend), reference.l2_norm(x, 12.0), 1e-6)


@pytest.mark.parametrize(("shape", "x_dtype", "z_dtype", "view"), pairwise(HEADS, DTYPES, DTYPES, BOOLS), ids=str)
def test_rms_norm_gated(
    shape: tuple[int, int, int], x_dtype: torch.dtype, z_dtype: torch.dtype, view: bool, backend: str
) -> None:
    x, z = torch.randn(shape).to(x_dtype), (3 * torch.randn(shape)).to(z_dtype)
    out = torch.full(shape, torch.nan, dtype=z_dtype)
    if view:
        x, z, out = strided(x), strided(z), strided(out)
    for weight_dtype in {torch.float32, z_dtype}:
        weight = torch.randn(shape[-1]).to(weight_dtype)
        out.fill_(torch.nan)
        ops.rms_norm_gated(x, z, weight, eps=1e-5, out=out, backend=backend)
        want = reference.rms_norm_gated(x, z, weight, 1e-5)
        assert_close("out", out, want, BOUND[z_dtype], parts=(0, 1))
    assert xgdn.last_backend("rms_norm_gated") == backend


TOKENS = (0, 1, 2, 3, 5, 15, 16, 17, 33, 130)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize(
    ("shape", "types", "weight", "view"),
    pairwise(
        [*((T, 1, 96) for T in TOKENS), (5, 2, 32), (3, 1, 1024), (7, 3, 50), (2, 1, 1)],
        list(itertools.product(DTYPES, BOOLS)),
        ["f32", "as_input"],
        BOOLS,
    ),
    ids=str,
)
def test_rms_norm(
    shape: tuple[int, int, int], types: tuple[torch.dtype, bool], weight: str, view: bool, backend: str
) -> None:
    dtype, has_residual = types
    x, residual = torch.randn(shape).to(dtype), (3 * torch.randn(shape)).to(dtype)
    w = (0.3 * torch.randn(shape[-1])).to(torch.float32 if weight == "f32" else dtype)
    if shape[0] > 2:
        x[1] = residual[1] = 0
        x[2] *= 1e-3
        residual[2] *= 1e-3
    out = torch.full(shape, torch.nan, dtype=dtype)
    summed = (x.float() + residual.float()).to(dtype) if has_residual else x
    if view:
        x, residual, out = strided(x), strided(residual), strided(out)
    before = x.clone()
    ops.rms_norm(x, w, residual=residual if has_residual else None, eps=1e-5, out=out, backend=backend)
    assert xgdn.last_backend("rms_norm") == backend
    assert_close("out", out, reference.rms_norm(summed, w, 1e-5), BOUND[dtype], parts=(0, 1))
    assert_bits_equal("x", x, before)
    if has_residual:
        assert_bits_equal("residual", residual, summed)
    for written in (out, residual) if view else ():
        assert_gaps_untouched(written)


@EACH_DTYPE
def test_rms_norm_norms_the_rounded_sum(dtype: torch.dtype, backend: str) -> None:
    """So a layer that reads the residual again sees what was normed."""
    x, residual, w = torch.randn(5, 1, 96).to(dtype), torch.randn(5, 1, 96).to(dtype), torch.randn(96)
    out = ops.rms_norm(x, w, residual=residual, backend=backend)
    assert_bits_equal("out", out, ops.rms_norm(residual, w, backend=backend))


@pytest.mark.parametrize(
    ("shape", "P", "dtype", "view"),
    pairwise([*((T, 2, 96) for T in TOKENS), (40, 8, 256), (3, 2, 50), (2, 1, 2)], [2, 16, 22, 50], DTYPES, BOOLS),
    ids=str,
)
def test_rms_norm_rotates(shape: tuple[int, int, int], P: int, dtype: torch.dtype, view: bool, backend: str) -> None:
    P = min(P, shape[-1])
    x, w = torch.randn(shape).to(dtype), 0.3 * torch.randn(shape[-1])
    cos, sin = torch.randn(shape[0], P).to(dtype), torch.randn(shape[0], P).to(dtype)
    out = torch.full(shape, torch.nan, dtype=dtype)
    if view:
        x, cos, sin, out = strided(x), strided(cos), strided(sin), strided(out)
    ops.rms_norm(x, w, cos=cos, sin=sin, eps=1e-5, out=out, backend=backend)
    normed = reference.rms_norm(x, w, 1e-5)
    assert_close("out", out, reference.rotate(normed, cos, sin), 4 * BOUND[dtype])  # n, two products, and out
    plain = ops.rms_norm(x, w, eps=1e-5, backend=backend)
    assert_bits_equal("past P", out[..., P:], plain[..., P:])
    low, high = plain[..., :P].chunk(2, -1)
    want = plain[..., :P] * cos.unsqueeze(1) + torch.cat([-high, low], -1) * sin.unsqueeze(1)
    if dtype != torch.float32:  # where products are rounded they cannot be fused with the sum
        assert_bits_equal("rotated", out[..., :P], want)
    if view:
        assert_gaps_untouched(out)


def test_rms_norm_rotates_after_the_residual_sum_and_in_place(backend: str) -> None:
    x, residual, w = torch.randn(5, 2, 32), torch.randn(5, 2, 32), torch.randn(32)
    cos, sin = torch.randn(5, 8), torch.randn(5, 8)
    want = ops.rms_norm(x + residual, w, cos=cos, sin=sin, backend=backend)
    ops.rms_norm(x, w, residual=residual, cos=cos, sin=sin, out=x, backend=backend)
    assert_bits_equal("out", x, want)


def test_rms_norm_uses_eps(backend: str) -> None:
    x, w = torch.full((1, 1, 16), 0.5), torch.zeros(16)
    assert_close("out", ops.rms_norm(x, w, eps=12.0, backend=backend), reference.rms_norm(x, w, 12.0), 1e-6)


@pytest.mark.parametrize("D", [50, 96])
@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
def test_rms_norm_of_a_nan_token_spoils_its_own_row_alone(D: int, has_residual: bool, backend: str) -> None:
    x, w = torch.randn(5, 2, D), torch.randn(D)
    out, clean = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    for values, result in ((x, clean), (x.index_fill(0, torch.tensor([1]), torch.nan), out)):
        residual = torch.ones_like(x) if has_residual else None
        ops.rms_norm(values, w, residual=residual, out=result, backend=backend)
    assert out[1].isnan().all()
    for token in (0, 2, 3, 4):
        assert_bits_equal(f"token {token}", out[token], clean[token])


@pytest.mark.parametrize(
    ("shape", "dtype", "view", "in_place"),
    pairwise(
        [*((T, 2, 96) for T in TOKENS), *((3, 2, width) for width in (1, 50, 255, 256, 257, 600))],
        DTYPES,
        BOOLS,
        [None, 0, 1],  # apart, x, gate
    ),
    ids=str,
)
def test_sigmoid_and_mul(
    shape: tuple[int, int, int], dtype: torch.dtype, view: bool, in_place: int | None, backend: str
) -> None:
    x, gate = torch.randn(shape).to(dtype), (3 * torch.randn(shape)).to(dtype)
    if gate.numel() > 20:
        gate.view(-1)[:4] = torch.tensor([-80.0, -20.0, 80.0, 0.0]).to(dtype)
    want = reference.sigmoid_and_mul(x, gate)
    out = torch.full(shape, torch.nan, dtype=dtype)
    if view:
        x, gate, out = strided(x), strided(gate), strided(out)
    inputs = (x, gate)
    before = [t.clone() for t in inputs]
    out = out if in_place is None else inputs[in_place]
    ops.sigmoid_and_mul(x, gate, out=out, backend=backend)
    assert xgdn.last_backend("sigmoid_and_mul") == backend
    roundings = 1 if backend == "cpu" else 2  # ATen rounds sigmoid(gate) as well
    assert_close("out", out, want, roundings * BOUND[dtype], parts=(0, 1))
    for i, (t, old) in enumerate(zip(inputs, before, strict=True)):
        if i != in_place:
            assert_bits_equal(f"input {i}", t, old)
    if view:
        assert_gaps_untouched(out)


def run_silu_and_mul(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, backend: str) -> None:
    ops.silu_and_mul(gate, up, out=out, backend=backend)
    assert xgdn.last_backend("silu_and_mul") == backend


# The CPU kernel goes through a row in pieces of 256.
@pytest.mark.parametrize(
    ("shape", "dtype", "view"),
    pairwise([*((T, 96) for T in TOKENS), *((3, width) for width in (1, 50, 255, 256, 257, 600))], DTYPES, BOOLS),
    ids=str,
)
def test_silu_and_mul(shape: tuple[int, int], dtype: torch.dtype, view: bool, backend: str) -> None:
    gate, up = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    if gate.numel() > 20:
        gate.view(-1)[:4] = torch.tensor([-80.0, -20.0, 80.0, 0.0]).to(dtype)
    out = torch.full(shape, torch.nan, dtype=dtype)
    if view:
        gate, up, out = strided(gate), strided(up), strided(out)
    run_silu_and_mul(gate, up, out, backend)
    roundings = 1 if backend == "cpu" else 2  # ATen rounds silu(gate) as well
    assert_close("out", out, reference.silu_and_mul(gate, up), roundings * BOUND[dtype], parts=(0, 1))
    if view:
        assert_gaps_untouched(out)


@EACH_DTYPE
@pytest.mark.parametrize("which", [0, 1], ids=["gate", "up"])
def test_silu_and_mul_in_place(which: int, dtype: torch.dtype, backend: str) -> None:
    """As an MLP has them: the halves of one projection's row."""
    gate_up = torch.randn(5, 2 * 300).to(dtype)
    want = torch.full((5, 300), torch.nan, dtype=dtype)
    run_silu_and_mul(*gate_up.chunk(2, 1), want, backend)
    before = gate_up.chunk(2, 1)[1 - which].clone()
    halves = gate_up.chunk(2, 1)
    run_silu_and_mul(*halves, halves[which], backend)
    assert_bits_equal("out", halves[which], want)
    assert_bits_equal("the other half", halves[1 - which], before)


def test_silu_and_mul_of_a_nan_token_spoils_its_own_row_alone(backend: str) -> None:
    gate, up, out, clean = (torch.randn(5, 50) for _ in range(4))
    run_silu_and_mul(gate, up, clean, backend)
    gate[1] = torch.nan
    run_silu_and_mul(gate, up, out, backend)
    assert out[1].isnan().all()
    for token in (0, 2, 3, 4):
        assert_bits_equal(f"token {token}", out[token], clean[token])
