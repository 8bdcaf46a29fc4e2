# SPDX-License-Identifier: Apache-2.0
"""What the ops compute, in float64, one token at a time. Knows no pool, no chunk and nothing of the C++."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

L2_EPS = 1e-6


def l2_norm(x: Tensor, eps: float = L2_EPS) -> Tensor:
    x = x.double()
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    every_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """One sequence: q, k [T, H, K], v [T, HV, V], g, beta [T, HV], state [HV, V, K].

    Returns the outputs [T, HV, V] and the states after each token, [T + 1, HV, V, K], the first being the given one;
    without `every_state` the last alone, [1, HV, V, K].
    """
    q, k, v, g, beta, S = (x.double() for x in (q, k, v, g, beta, state))
    if use_qk_l2norm:
        q, k = l2_norm(q), l2_norm(k)
    group = v.shape[1] // q.shape[1]
    key_head = [head // group for head in range(v.shape[1])]
    q, k, v = (x.unsqueeze(-1) for x in (q[:, key_head], k[:, key_head], v))  # columns
    decay, beta = (x[..., None, None] for x in (g.exp(), beta))
    scale = q.shape[-2] ** -0.5 if scale is None else scale
    outputs, states = [], [S]
    for t in range(q.shape[0]):
        S = decay[t] * S
        u = beta[t] * (v[t] - S @ k[t])
        S = S + u * k[t].mT
        outputs.append(scale * (S @ q[t]))
        if every_state:
            states.append(S)
        else:
            states[0] = S
    return torch.stack(outputs)[..., 0] if outputs else v.new_empty(v.shape[:-1]), torch.stack(states)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, silu: bool = True) -> Tensor:
    """One sequence: x [T, D], weight [D, W], history [W - 1, D] oldest first. Returns [T, D]."""
    x, weight, history = x.double(), weight.double(), history.double()
    width = weight.shape[1]
    padded = torch.cat([history, x])
    rows = [(padded[t : t + width].T * weight).sum(-1) for t in range(x.shape[0])]
    y = torch.stack(rows) if rows else x
    if bias is not None:
        y = y + bias.double()
    return y * torch.sigmoid(y) if silu else y


def gdn_gating(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    # softplus without PyTorch's threshold, beyond which it returns its argument.
    x = a.double() + dt_bias.double()
    softplus = torch.logaddexp(x, torch.zeros_like(x))
    return -A_log.double().exp() * softplus, torch.sigmoid(b.double())


def rms_norm_gated(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, z = x.double(), z.double()
    return weight.double() * (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()) * F.silu(z)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return (1 + weight.double()) * (x / (x.square().mean(-1, keepdim=True) + eps).sqrt())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of a row's halves as a complex number, which is turned; what is past the table stays."""
    P = cos.shape[-1]
    low, high = x.double()[..., :P].chunk(2, -1)
    (cos_low, cos_high), (sin_low, sin_high) = (t.double().unsqueeze(1).chunk(2, -1) for t in (cos, sin))
    turned = (low * cos_low - high * sin_low, high * cos_high + low * sin_high, x.double()[..., P:])
    return torch.cat(turned, -1)


def sigmoid_and_mul(x: Tensor, gate: Tensor) -> Tensor:
    return x.double() / (1 + (-gate.double()).exp())


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.double()) * up.double()
