# SPDX-License-Identifier: Apache-2.0
"""Inputs as a layer of Qwen3-Next-80B or Qwen3.5-35B has them, their truth and their roofline."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

import xgdn
from xgdn.bench.turns import BYTES_BEYOND_CACHES

H, HV, K, V = 16, 32, 128, 128
CONV_WIDTH = 4
NORM_EPS = 1e-6
# The chunk form with C = 64 needs at least 6KV + 2CV + 2CK H/HV per token and value head: triangular parts counted as
# triangles, products of keys shared by the value heads of a key head.
FLOPS_PER_TOKEN = HV * (6 * K * V + 2 * 64 * V + 2 * 64 * K * H // HV)
LONGEST_CHECK = 512  # tokens of a prompt that are compared with the truth
GEMM_SIZE = 1024

SHORT = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Gates:
    """Raw gates of `count` tokens. The heads forget at rates from a token to a thousand tokens."""

    def __init__(self, count: int) -> None:
        self.a = torch.randn(count, HV).bfloat16()
        self.b = torch.randn(count, HV).bfloat16()
        self.A_log = torch.linspace(-7, 0, HV)
        self.dt_bias = torch.rand(HV).bfloat16().float()
        self.g = torch.empty(count, HV)
        self.beta = torch.empty(count, HV)
        xgdn.ops.gdn_gating(self.a, self.b, self.A_log, self.dt_bias, g=self.g, beta=self.beta)


def _split_qkv(mixed_qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.split(mixed_qkv, [H * K, H * K, HV * V], dim=1)
    return q.view(-1, H, K), k.view(-1, H, K), v.view(-1, HV, V)


class StatePool:
    """States of `batch` sequences, so many times over that they come from memory and not from a cache."""

    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.batch_bytes = batch * HV * V * K * dtype.itemsize
        self.parts = max(1, -(-BYTES_BEYOND_CACHES // self.batch_bytes))
        self.first = torch.randn(batch, HV, V, K).to(dtype)
        slots = torch.arange(self.parts * batch, dtype=torch.int32)
        self._slots: tuple[Tensor, ...] = slots.view(self.parts, batch).unbind()
        self._memory: tuple[Tensor, ...] = torch.ones(self.parts, self.batch_bytes // 4).unbind()

    def make(self) -> Tensor:
        """A provider's own pool `[S, HV, V, K]`."""
        return self.first.repeat(self.parts, 1, 1, 1)

    def slots(self, i: int) -> Tensor:
        return self._slots[i % self.parts]

    def memory(self, i: int) -> Tensor:
        """As many bytes as one call's states have."""
        return self._memory[i % self.parts]

    def stream(self, i: int) -> object:
        """Reads and writes them."""
        return self.memory(i).mul_(1.0001)


class RuleCase(ABC):
    """The rule over a pool of states, token by token."""

    unit = "GB/s"
    roofline_scale = 1.0
    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    cu_seqlens: Tensor
    pool: StatePool
    num_accepted: Tensor | None = None  # of a verification

    @abstractmethod
    def indices(self, i: int) -> Tensor:
        """The slots of the i-th part of the pool: one per sequence, of a verification one per token."""

    def truth(self) -> tuple[Tensor, Tensor]:
        state = self.pool.first.to(torch.float32, copy=True)
        out = torch.empty(self.v.shape)
        xgdn.ops.recurrent_gated_delta_rule(
            self.q.float(),
            self.k.float(),
            self.v.float(),
            self.gates.g,
            self.gates.beta,
            state,
            cu_seqlens=self.cu_seqlens,
            state_indices=self.indices(0),
            num_accepted=self.num_accepted,
            out=out,
            backend="reference",
        )
        return out, state


class DecodeCase(RuleCase):
    """One token for each of `batch` sequences, after the convolution."""

    def __init__(self, batch: int, state_dtype: torch.dtype) -> None:
        self.title = f"decode B={batch} {SHORT[state_dtype]}"
        self.batch = batch
        self.mixed_qkv = torch.randn(batch, 2 * H * K + HV * V).bfloat16()
        self.q, self.k, self.v = _split_qkv(self.mixed_qkv)
        self.gates = Gates(batch)
        self.cu_seqlens = torch.arange(batch + 1, dtype=torch.int32)
        self.pool = StatePool(batch, state_dtype)
        self.work = 2.0 * self.pool.batch_bytes

    def indices(self, i: int) -> Tensor:
        return self.pool.slots(i)

    def roofline(self, i: int) -> object:
        return self.pool.stream(i)


class DecodeStepCase(DecodeCase):
    """What lies between the projections of a layer: convolution, rule and gated norm. The roofline is the rule's."""

    def __init__(self, batch: int, state_dtype: torch.dtype) -> None:
        super().__init__(batch, state_dtype)
        self.title = f"decode step B={batch} {SHORT[state_dtype]}"
        channels = self.mixed_qkv.shape[1]
        self.before_conv = torch.randn(batch, channels).bfloat16()
        self.z = torch.randn(batch, HV * V).bfloat16()
        self.projected = torch.cat((self.before_conv, self.z, self.gates.b, self.gates.a), dim=1)
        self.conv_weight = torch.randn(channels, CONV_WIDTH).bfloat16()
        self.first_conv_state = torch.randn(batch, CONV_WIDTH - 1, channels).bfloat16()
        self.norm_weight = torch.rand(V) + 0.5
        # What the convolution gives is rounded to the type of the activations; the rule alone is measured on it.
        conv_state = self.first_conv_state.float()
        xgdn.ops.causal_conv1d_update(
            self.before_conv.float(),
            self.conv_weight.float(),
            conv_state,
            cu_seqlens=self.cu_seqlens,
            state_indices=self.pool.slots(0),
            out=(mixed_qkv := torch.empty(batch, channels)),
            backend="reference",
        )
        self.mixed_qkv = mixed_qkv.bfloat16()
        self.q, self.k, self.v = _split_qkv(self.mixed_qkv)

    def make_conv_pool(self) -> Tensor:
        return self.first_conv_state.repeat(self.pool.parts, 1, 1)

    def truth_of_step(self) -> tuple[Tensor, Tensor]:
        o, state = self.truth()
        out = torch.empty_like(o)
        z = self.z.float().view(self.batch, HV, V)
        xgdn.ops.rms_norm_gated(o, z, self.norm_weight, eps=NORM_EPS, out=out, backend="reference")
        return out, state


class VerifyCase(RuleCase):
    """`drafts` tokens for each of `batch` sequences, the state after each of them kept."""

    def __init__(self, batch: int, drafts: int, state_dtype: torch.dtype) -> None:
        self.title = f"verify B={batch} T={drafts} {SHORT[state_dtype]}"
        count = batch * drafts
        self.q, self.k, self.v = _split_qkv(torch.randn(count, 2 * H * K + HV * V).bfloat16())
        self.gates = Gates(count)
        self.cu_seqlens = torch.arange(0, count + 1, drafts, dtype=torch.int32)
        self.num_accepted = torch.ones(batch, dtype=torch.int32)
        self.pool = StatePool(count, state_dtype)
        self.work = self.pool.batch_bytes * (drafts + 1) / drafts
        self._table = (batch, drafts)

    def roofline(self, i: int) -> object:
        """Reads one state of each sequence and writes all of them."""
        for first, *others in self.pool.memory(i).view(*self._table, -1):
            first.mul_(1.0001)
            for other in others:
                other.copy_(first)
        return None

    def indices(self, i: int) -> Tensor:
        return self.pool.slots(i).view(self._table)


class PrefillCase:
    """Prompts of these lengths, packed, that start from nothing. q, k, v and out have `dtype`, the states are f32."""

    unit = "GFLOP/s"

    def __init__(self, lengths: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> None:
        self.lengths = list(lengths)
        self.dtype = dtype
        count = sum(self.lengths)
        name = f"T={count}" if len(self.lengths) == 1 else f"T={count} N={len(self.lengths)}"
        self.title = f"prefill {name} {SHORT[dtype]}"
        self.q, self.k, self.v = _split_qkv(torch.randn(count, 2 * H * K + HV * V).to(dtype))
        self.gates = Gates(count)
        self.cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).int()
        self.state_indices = torch.arange(len(self.lengths), dtype=torch.int32)
        self.chunk = xgdn.ops.build_chunk_metadata(self.lengths, HV)
        self.work = float(count * FLOPS_PER_TOKEN)
        self.roofline_scale = self.work / (2.0 * GEMM_SIZE**3)
        self._factors = torch.randn(2, GEMM_SIZE, GEMM_SIZE).to(dtype).unbind()

    def roofline(self, _: int) -> object:
        return self._factors[0] @ self._factors[1]

    def short(self) -> "PrefillCase":
        """Of the same kind, short enough for truth()."""
        left = LONGEST_CHECK
        lengths = []
        for length in self.lengths:
            lengths.append(min(length, left))
            left -= lengths[-1]
        return PrefillCase(lengths, self.dtype)

    def make_pool(self) -> Tensor:
        return torch.full((len(self.lengths), HV, V, K), torch.nan)

    def truth(self) -> tuple[Tensor, Tensor]:
        state = self.make_pool()
        out = torch.empty(self.v.shape)
        xgdn.ops.chunk_gated_delta_rule(
            self.q.float(),
            self.k.float(),
            self.v.float(),
            self.gates.g,
            self.gates.beta,
            state,
            cu_seqlens=self.cu_seqlens,
            state_indices=self.state_indices,
            chunk=self.chunk,
            has_initial_state=torch.zeros(len(self.lengths), dtype=torch.bool),
            out=out,
            backend="reference",
        )
        return out, state
