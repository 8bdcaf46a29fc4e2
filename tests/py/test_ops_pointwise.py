# SPDX-License-Identifier: Apache-2.0
"""Gating and the two norms against float64."""

from __future__ import annotations

import pytest
import torch

import reference
import xgdn
from cases import DTYPES, assert_close
from xgdn import ops

# Rounded once to the result's dtype.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values with gaps between the rows."""
    rows = torch.full((x.shape[0], 2, *x.shape[1:]), torch.nan, dtype=x.dtype)
    rows[:, 1] = x
    return rows[:, 1]


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (33, 32), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_head", ["f32", "as_input"])
@pytest.mark.parametrize("view", [False, True], ids=["contiguous", "strided"])
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


@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 2, 48), (9, 3, 128), (3, 1, 256), (0, 2, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [False, True], ids=["contiguous", "strided"])
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


@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 2, 48), (9, 3, 128), (3, 1, 256), (0, 2, 16)], ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("z_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [False, True], ids=["contiguous", "strided"])
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
