# SPDX-License-Identifier: Apache-2.0
"""Inputs of the ops on a device, their float64 truth, and xgdn's own providers of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import xgdn
from kernels.compare import WrongResult, relative_error
from xgdn.bench.turns import BYTES_BEYOND_CACHES

K = V = 128
CONV_WIDTH = 4
NORM_EPS = 1e-6
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16"}

_MAX_PARTS = 512
_CHECKED_SEQUENCES = 16
_CHECKED_TOKENS = 192  # of a prompt, by the recurrence; all of them by the op's exact form


@dataclass(frozen=True)
class Heads:
    H: int = 16
    HV: int = 32

    def __str__(self) -> str:
        return f"{self.H}x{self.HV}"

    @property
    def channels(self) -> int:
        return 2 * self.H * K + self.HV * V

    def split(self, mixed_qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[..., channels]` as q and k `[..., H, K]` and v `[..., HV, V]`."""
        q, k, v = mixed_qkv.split([self.H * K, self.H * K, self.HV * V], dim=-1)
        return q.unflatten(-1, (self.H, K)), k.unflatten(-1, (self.H, K)), v.unflatten(-1, (self.HV, V))


@dataclass(frozen=True)
class Provider:
    """An implementation of a case. After `call(0)` on fresh memory, `result()` is compared with the case's truth."""

    name: str
    call: Callable[[int], object]
    result: Callable[[], tuple[Tensor, ...]]
    tolerances: tuple[float, ...]


@dataclass(frozen=True)
class Work:
    """What a call must at least move and compute."""

    bytes: float
    flops: float = 0.0


class Case(ABC):
    title: str
    parts: int  # of the memory that calls rotate over
    work: Work
    streams: Tensor | None = None  # [parts, N, L], of a case whose roofline is a stream over states
    pool: Tensor

    @abstractmethod
    def truth(self) -> tuple[Tensor, ...]:
        """The results of part 0 that are compared, computed before any call."""

    def reset(self) -> None:  # noqa: B027  nothing to do where calls overwrite nothing that they read
        """Put back what `truth()` read, for the next provider."""

    @abstractmethod
    def providers(self) -> list[Provider]:
        """xgdn's own."""


def check(case: Case, provider: Provider, truth: Sequence[Tensor]) -> list[float]:
    """Return the error of each result. Raises WrongResult where one exceeds its tolerance or is NaN."""
    case.reset()
    provider.call(0)
    errors = [relative_error(got, want) for got, want in zip(provider.result(), truth, strict=True)]
    if not all(error <= most for error, most in zip(errors, provider.tolerances, strict=True)):
        raise WrongResult(
            f"{case.title}, {provider.name}: errors {', '.join(f'{error:.1e}' for error in errors)}, expected at most "
            f"{', '.join(f'{most:.1e}' for most in provider.tolerances)}"
        )
    return errors


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The rule in float64, token by token, for N sequences of T tokens: `[N, T, ...]` and `[N, HV, V, K]` in,
    `o [N, T, HV, V]` and the state after each token `[N, T, HV, V, K]` out."""
    q, k, v, g, beta, S = (x.double() for x in (q, k, v, g, beta, state))
    groups = v.shape[2] // q.shape[2]
    q = (q * K**-0.5).repeat_interleave(groups, dim=2)
    k = k.repeat_interleave(groups, dim=2)
    outs, states = [], []
    for t in range(q.shape[1]):
        S = S * g[:, t, :, None, None].exp()
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("nhvk,nhk->nhv", S, k[:, t]))
        S = S + u[..., None] * k[:, t, :, None, :]
        outs.append(torch.einsum("nhvk,nhk->nhv", S, q[:, t]))
        states.append(S)
    return torch.stack(outs, 1), torch.stack(states, 1)


def _normalised(x: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _rotations(bytes_of_a_part: int, rotated_bytes: int) -> int:
    return max(2, min(_MAX_PARTS, -(-rotated_bytes // bytes_of_a_part)))


# ---- decode and verification ----------------------------------------------------------------------------------------


class Decode(Case):
    """`tokens` tokens for each of `batch` sequences on a pool of states; of several, the state after each is kept, or
    `states` of them."""

    def __init__(
        self,
        batch: int,
        state_dtype: torch.dtype,
        *,
        tokens: int = 1,
        states: int | None = None,
        heads: Heads = Heads(),
        device: str = "cuda",
        rotated_bytes: int = BYTES_BEYOND_CACHES,
    ) -> None:
        self.batch, self.tokens, self.heads, self.device = batch, tokens, heads, device
        states = tokens if states is None else states
        kind = f"verify T={tokens}" if tokens > 1 else "decode"
        shard = "" if heads == Heads() else f" {heads}"
        self.title = f"{kind} B={batch}{shard} {SHORT[state_dtype]}"
        state_bytes = heads.HV * V * K * state_dtype.itemsize
        self.parts = _rotations(batch * states * state_bytes, rotated_bytes)
        self.work = Work(bytes=batch * state_bytes * (1 + states))
        slots = self.parts * batch * states
        # Slot 0 stays unused: libraries take it for padding.
        self.pool = torch.empty(slots + 1, heads.HV, V, K, dtype=state_dtype, device=device).normal_()
        order = 1 + torch.randperm(slots, device=device).int()
        self.streams = order.view(self.parts, batch, states)
        self.state_indices = self.streams if states > 1 else self.streams.squeeze(2).contiguous()
        rows = batch * tokens
        self.mixed_qkv = torch.randn(self.parts, rows, heads.channels, device=device).bfloat16()
        self.a, self.b = torch.randn(2, self.parts, rows, heads.HV, device=device).bfloat16().unbind()
        # Heads that forget within a token and within a thousand.
        self.A_log = torch.linspace(-7, 0, heads.HV, device=device)
        self.dt_bias = torch.rand(heads.HV, device=device)
        self.g = -self.A_log.exp() * F.softplus(self.a.float() + self.dt_bias)
        self.beta = self.b.float().sigmoid()
        self.checked = min(batch, _CHECKED_SEQUENCES)
        self._checked_slots = self.streams[0, : self.checked].flatten().long()
        self._before = self.pool[self._checked_slots]

    def reset(self) -> None:
        self.pool[self._checked_slots] = self._before

    def truth(self) -> tuple[Tensor, ...]:
        return self.truth_of(self.mixed_qkv[0])

    def truth_of(self, mixed_qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Truth of part 0 after the convolution `[N T, channels]`."""

        def sequences(x: Tensor) -> Tensor:
            return x.unflatten(0, (self.batch, self.tokens))[: self.checked]

        q, k, v = self.heads.split(sequences(mixed_qkv))
        q, k = _normalised(q), _normalised(k)
        out, states = recurrence(q, k, v, sequences(self.g[0]), sequences(self.beta[0]), self.first_states())
        return out.flatten(0, 1), states.flatten(0, 1)

    def first_states(self) -> Tensor:
        """The plain states that the sequences begin with that are checked."""
        return self._before.view(self.checked, -1, *self.pool.shape[1:])[:, 0]

    def states(self) -> Tensor:
        """The written states of the sequences that are checked."""
        return self.pool[self._checked_slots]

    def empty_out(self) -> Tensor:
        """Outputs of every part, NaN."""
        rows = self.batch * self.tokens
        shape = (self.parts, rows, self.heads.HV, V)
        return torch.full(shape, torch.nan, dtype=torch.bfloat16, device=self.device)

    def provider(self, name: str, call: Callable[[int], object], out: Tensor) -> Provider:
        """One that writes to `out`, `[parts, N T, HV, V]`, and to the pool."""
        # Of several tokens in bf16, each starts from the state of the one before it as it was written, rounded.
        of_states = 1e-5 if self.pool.dtype == torch.float32 else 4e-3
        rows = self.checked * self.tokens
        return Provider(name, call, lambda: (out[0, :rows], self.states()), (8e-3, of_states))

    def providers(self) -> list[Provider]:
        rule = self._recurrent()
        return [rule, self._packed()] if self.tokens == 1 else [rule]

    def _recurrent(self) -> Provider:
        out = self.empty_out()
        q, k, v = self.heads.split(self.mixed_qkv)
        rows = self.batch * self.tokens
        cu_seqlens = torch.arange(0, rows + 1, self.tokens, dtype=torch.int32, device=self.device)
        accepted = torch.ones(self.batch, dtype=torch.int32, device=self.device) if self.tokens > 1 else None

        def call(i: int) -> None:
            xgdn.ops.recurrent_gated_delta_rule(
                *(x[i] for x in (q, k, v, self.g, self.beta)),
                self.pool,
                cu_seqlens=cu_seqlens,
                state_indices=self.state_indices[i],
                num_accepted=accepted,
                out=out[i],
            )

        return self.provider("xgdn recurrent_gated_delta_rule", call, out)

    def _packed(self) -> Provider:
        out = self.empty_out()

        def call(i: int) -> None:
            xgdn.ops.packed_decode(
                self.mixed_qkv[i],
                self.a[i],
                self.b[i],
                self.A_log,
                self.dt_bias,
                self.pool,
                state_indices=self.state_indices[i],
                out=out[i],
            )

        return self.provider("xgdn packed_decode", call, out)


class ReplayDecode(Decode):
    """The same on checkpoints and rings that are filled to different lengths; several tokens are drafts, of which any
    number counts in the next call."""

    C = 16

    def __init__(self, batch: int, state_dtype: torch.dtype, *, tokens: int = 1, **options: Any) -> None:
        super().__init__(batch, state_dtype, tokens=tokens, states=1, **options)
        self.title = f"replay {self.title}"
        self.streams = None
        H, HV, slots, rows = self.heads.H, self.heads.HV, len(self.pool), self.C + (tokens if tokens > 1 else 0)
        self.ring = xgdn.ops.ReplayRing(
            F.normalize(torch.randn(slots, H, rows, K, device=self.device), dim=-1),
            torch.randn(slots, HV, rows, V, device=self.device),
            -torch.rand(slots, HV, rows, device=self.device),
            torch.randint(0, self.C, (slots,), dtype=torch.int32, device=self.device),
        )
        drafts = (1, tokens + 1) if tokens > 1 else (0, 1)
        self.accepted = torch.randint(*drafts, (self.parts, batch), dtype=torch.int32, device=self.device)
        self._ring_before = self._checked_ring()
        # On average: S and half a ring are read, tokens are written, and S by the share of them that fill a ring.
        states, row = batch * HV * V * K * state_dtype.itemsize, 4 * batch * (H * K + HV * V)
        kept = float(self.accepted.float().mean()) if tokens > 1 else 1.0
        self.work = Work(bytes=states * (1 + kept / self.C) + row * ((self.C - 1) / 2 + tokens))

    def _checked_ring(self) -> xgdn.ops.ReplayRing:
        return xgdn.ops.ReplayRing(*(pool[self._checked_slots] for pool in self.ring))

    def reset(self) -> None:
        super().reset()
        for pool, before in zip(self.ring, self._ring_before, strict=True):
            pool[self._checked_slots] = before

    def first_states(self) -> Tensor:
        return _plain_states(self._before, self._ring_before, self.accepted[0, : self.checked])

    def truth(self) -> tuple[Tensor, ...]:
        out, states = super().truth()
        return out, states.unflatten(0, (self.checked, self.tokens))[:, -1]

    def states(self) -> Tensor:
        drafts = self.tokens if self.tokens > 1 else 0
        return _plain_states(super().states(), self._checked_ring(), torch.full_like(self.accepted[0], drafts))

    def providers(self) -> list[Provider]:
        out = self.empty_out()
        q, k, v = self.heads.split(self.mixed_qkv)
        rows = self.batch * self.tokens
        cu_seqlens = torch.arange(0, rows + 1, self.tokens, dtype=torch.int32, device=self.device)

        def call(i: int) -> None:
            xgdn.ops.replay_gated_delta_rule(
                *(x[i] for x in (q, k, v, self.g, self.beta)),
                self.pool,
                self.ring,
                cu_seqlens=cu_seqlens,
                state_indices=self.state_indices[i],
                ring_indices=self.state_indices[i],
                num_accepted=self.accepted[i] if self.tokens > 1 else None,
                chunk_size=self.C,
                commit=self.tokens == 1,
                out=out[i],
            )

        return [self.provider("xgdn replay_gated_delta_rule", call, out)]


def _plain_states(checkpoints: Tensor, ring: xgdn.ops.ReplayRing, more: Tensor) -> Tensor:
    """In float64, after the committed tokens of each ring and `more` behind them."""
    S = checkpoints.double()
    groups = ring.u.shape[1] // ring.k.shape[1]
    for row in range(ring.k.shape[2]):
        k = ring.k[:, :, row].double().repeat_interleave(groups, dim=1)
        after = S * ring.g[:, :, row, None, None].double().exp() + ring.u[:, :, row, :, None].double() * k[:, :, None]
        counts = row < ring.length + more[: len(S)]
        S = torch.where(counts[:, None, None, None], after, S)
    return S


class DecodeStep(Decode):
    """What lies between the projections of a layer: convolution, gates, rule and gated norm."""

    def __init__(self, batch: int, state_dtype: torch.dtype, **options: object) -> None:
        super().__init__(batch, state_dtype, **options)  # type: ignore[arg-type]
        self.title = self.title.replace("decode", "decode step")
        channels, HV = self.heads.channels, self.heads.HV
        self.z = torch.randn(self.parts, batch, HV * V, device=self.device).bfloat16()
        self.projected = torch.cat((self.mixed_qkv, self.z, self.b, self.a), dim=2)
        self.conv_weight = torch.randn(channels, CONV_WIDTH, device=self.device).bfloat16()
        self.conv_pool = torch.randn(len(self.pool), CONV_WIDTH - 1, channels, device=self.device).bfloat16()
        self.norm_weight = torch.rand(V, device=self.device) + 0.5
        self._conv_before = self.conv_pool[self.state_indices[0].long()]

    def reset(self) -> None:
        super().reset()
        self.conv_pool[self.state_indices[0].long()] = self._conv_before

    def truth(self) -> tuple[Tensor, ...]:
        window = torch.cat((self._conv_before, self.mixed_qkv[0].unsqueeze(1)), dim=1).double()
        conv = F.silu(torch.einsum("nwd,dw->nd", window, self.conv_weight.double()))
        out, states = self.truth_of(conv)
        z = self.z[0, : self.checked].view(out.shape).double()
        normed = out * (out.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
        return self.norm_weight.double() * normed * F.silu(z), states

    def provider(self, name: str, call: Callable[[int], object], out: Tensor) -> Provider:
        # The convolution's output may be rounded to bf16, as it is between the ops that the step consists of.
        return Provider(name, call, lambda: (out[0, : self.checked], self.states()), (8e-3, 6e-3))

    def providers(self) -> list[Provider]:
        out = self.empty_out()

        def call(i: int) -> None:
            xgdn.ops.gdn_decode_step(
                self.projected[i],
                self.conv_weight,
                self.conv_pool,
                self.A_log,
                self.dt_bias,
                self.pool,
                self.norm_weight,
                state_indices=self.state_indices[i],
                norm_eps=NORM_EPS,
                out=out[i],
            )

        return [self.provider("xgdn gdn_decode_step", call, out)]


# ---- prefill --------------------------------------------------------------------------------------------------------


def ragged(total: int, count: int = 32) -> list[int]:
    """Lengths of very different prompts that add up to `total`."""
    weights = torch.randn(count, generator=torch.Generator().manual_seed(7)).exp()
    lengths = (weights / weights.sum() * (total - 16 * count)).long() + 16
    lengths[-1] += total - lengths.sum()
    return [int(length) for length in lengths]


class Prefill(Case):
    """Packed prompts that continue from f32 states; q and k are normalised beforehand, as peers want them."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        heads: Heads = Heads(),
        name: str | None = None,
        device: str = "cuda",
    ) -> None:
        self.lengths, self.heads, self.device = list(lengths), heads, device
        total, N = sum(lengths), len(lengths)
        self.title = f"prefill {heads} {name or f'{total} x{N}'}"
        self.parts = 4 if total <= 4096 else 2

        def unit(count: int) -> Tensor:
            x = torch.randn(self.parts, total, count, K, device=device)
            return F.normalize(x, dim=-1).bfloat16()

        self.q, self.k = unit(heads.H), unit(heads.H)
        self.v = torch.randn(self.parts, total, heads.HV, V, device=device).bfloat16()
        A_log, dt_bias = torch.linspace(-7, 0, heads.HV, device=device), torch.rand(heads.HV, device=device)
        self.g = -A_log.exp() * F.softplus(torch.randn(self.parts, total, heads.HV, device=device) + dt_bias)
        self.beta = torch.randn(self.parts, total, heads.HV, device=device).sigmoid()
        self.initial = 0.5 * torch.randn(self.parts, N, heads.HV, V, K, device=device)
        self.cu_seqlens_cpu = torch.tensor([0, *self.lengths]).cumsum(0).int()
        self.cu_seqlens = self.cu_seqlens_cpu.to(device)
        # At least 6KV + 2CV + 2CK H/HV flops per token and value head, C = 64 (kernels/cases.py).
        flops = total * heads.HV * (6 * K * V + 2 * 64 * V + 2 * 64 * K * heads.H / heads.HV)
        self.tokens_bytes = total * (4 * heads.H * K + 4 * heads.HV * V + 8 * heads.HV)
        self.work = Work(bytes=self.tokens_bytes + 8 * N * heads.HV * V * K, flops=flops)

    def truth(self) -> tuple[Tensor, ...]:
        """The op's exact form in f32, after a check of its first tokens against the recurrence."""
        first = slice(0, min(self.lengths[0], _CHECKED_TOKENS))
        inputs = (self.q, self.k, self.v, self.g, self.beta)
        want, _ = recurrence(*(x[0, first].unsqueeze(0) for x in inputs), self.initial[0, :1])
        out, states = self._call("exact", *(x[0].float() for x in inputs), self.initial[0].clone())
        if not (error := relative_error(out[first], want[0])) <= 1e-5:
            raise WrongResult(f"{self.title}, exact: error {error:.1e} from the recurrence, expected at most 1e-5")
        return out, states

    def _call(
        self, accuracy: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, pool: Tensor
    ) -> tuple[Tensor, Tensor]:
        N = len(self.lengths)
        out = xgdn.ops.chunk_gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            pool,
            cu_seqlens=self.cu_seqlens,
            cu_seqlens_cpu=self.cu_seqlens_cpu,
            state_indices=torch.arange(N, dtype=torch.int32, device=self.device),
            has_initial_state=torch.ones(N, dtype=torch.bool, device=self.device),
            chunk=xgdn.ops.build_chunk_metadata(self.lengths, self.heads.HV, device=self.device),
            use_qk_l2norm_in_kernel=False,
            accuracy=accuracy,
        )
        return out, pool

    def providers(self) -> list[Provider]:
        N = len(self.lengths)
        pool = self.initial.flatten(0, 1).clone()
        slots = torch.arange(self.parts * N, dtype=torch.int32, device=self.device).view(self.parts, N)
        starts = torch.ones(N, dtype=torch.bool, device=self.device)
        chunk = xgdn.ops.build_chunk_metadata(self.lengths, self.heads.HV, device=self.device)
        out = torch.full_like(self.v, torch.nan)

        def call(i: int) -> None:
            xgdn.ops.chunk_gated_delta_rule(
                *(x[i] for x in (self.q, self.k, self.v, self.g, self.beta)),
                pool,
                cu_seqlens=self.cu_seqlens,
                cu_seqlens_cpu=self.cu_seqlens_cpu,
                state_indices=slots[i],
                has_initial_state=starts,
                chunk=chunk,
                out=out[i],
                use_qk_l2norm_in_kernel=False,
                accuracy="fast",
            )

        return [Provider("xgdn chunk_gated_delta_rule", call, lambda: (out[0], pool[:N]), (8e-3, 8e-3))]


class ReplayPrefill(Prefill):
    """The same on checkpoints and rings of `in_ring` tokens, of which the call leaves as many: lengths are multiples of
    C."""

    C = 16

    def __init__(self, lengths: Sequence[int], state_dtype: torch.dtype, *, in_ring: int, **options: Any) -> None:
        super().__init__(lengths, **options)
        self.title = f"replay {self.title} {SHORT[state_dtype]} ring {in_ring}"
        N, H, HV = len(lengths), self.heads.H, self.heads.HV
        slots = self.parts * N
        self.initial = self.initial.to(state_dtype)
        self.ring = xgdn.ops.ReplayRing(
            F.normalize(torch.randn(slots, H, self.C, K, device=self.device), dim=-1),
            torch.randn(slots, HV, self.C, V, device=self.device),
            -torch.rand(slots, HV, self.C, device=self.device),
            torch.full((slots,), in_ring, dtype=torch.int32, device=self.device),
        )
        states, rows = HV * V * K * state_dtype.itemsize, 4 * in_ring * (H * K + HV * V + HV)
        self.work = Work(bytes=self.tokens_bytes + 2 * N * (states + rows), flops=self.work.flops)

    def truth(self) -> tuple[Tensor, ...]:
        first = slice(0, min(self.lengths[0], _CHECKED_TOKENS))
        inputs = (self.q, self.k, self.v, self.g, self.beta)
        begun = _plain_states(self.initial[0, :1], self._rings(slice(1)), torch.zeros(1, device=self.device))
        want, _ = recurrence(*(x[0, first].unsqueeze(0) for x in inputs), begun)
        call, result = self._route("exact", *(x[:1].float() for x in inputs))
        call(0)
        out, states = result()
        most = 1e-5 if self.initial.dtype == torch.float32 else 4e-3
        if not (error := relative_error(out[first], want[0])) <= most:
            raise WrongResult(
                f"{self.title}, exact: error {error:.1e} from the recurrence, expected at most {most:.0e}"
            )
        return out, states

    def _rings(self, slots: slice) -> xgdn.ops.ReplayRing:
        return xgdn.ops.ReplayRing(*(pool[slots].clone() for pool in self.ring))

    def _route(
        self, accuracy: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
    ) -> tuple[Callable[[int], None], Callable[[], tuple[Tensor, ...]]]:
        """Calls on states of their own, and what the first leaves."""
        N = len(self.lengths)
        parts = len(q)
        pool, ring = self.initial[:parts].flatten(0, 1).clone(), self._rings(slice(parts * N))
        slots = torch.arange(parts * N, dtype=torch.int32, device=self.device).view(parts, N)
        out = torch.full_like(v, torch.nan)

        def call(i: int) -> None:
            xgdn.ops.replay_gated_delta_rule(
                *(x[i] for x in (q, k, v, g, beta)),
                pool,
                ring,
                cu_seqlens=self.cu_seqlens,
                cu_seqlens_cpu=self.cu_seqlens_cpu,
                state_indices=slots[i],
                ring_indices=slots[i],
                chunk_size=self.C,
                out=out[i],
                use_qk_l2norm_in_kernel=False,
                accuracy=accuracy,
            )

        def result() -> tuple[Tensor, ...]:
            first = xgdn.ops.ReplayRing(*(t[:N] for t in ring))
            return out[0], _plain_states(pool[:N], first, torch.zeros(N, device=self.device))

        return call, result

    def providers(self) -> list[Provider]:
        inputs = (self.q, self.k, self.v, self.g, self.beta)
        return [
            Provider(f"xgdn replay_gated_delta_rule {accuracy}", *self._route(accuracy, *inputs), (8e-3, 8e-3))
            for accuracy in ("fast", "exact")
        ]


# ---- attention ------------------------------------------------------------------------------------------------------


class Attention(Case):
    """The last `tokens` tokens of each of `batch` contexts, in a full-attention layer of Qwen3.5-0.8B."""

    HQ, HKV, D, BLOCK = 8, 2, 256, 16

    def __init__(
        self,
        batch: int,
        tokens: int,
        context: int,
        *,
        device: str = "cuda",
        rotated_bytes: int = BYTES_BEYOND_CACHES,
    ) -> None:
        self.batch, self.tokens, self.context = batch, tokens, context
        self.title = f"attention B={batch} T={tokens} C={context}"
        part_bytes = 4 * batch * context * self.HKV * self.D
        self.parts = min(32, _rotations(part_bytes, rotated_bytes))
        pairs = batch * tokens * (context - (tokens - 1) / 2)
        out_bytes = 4 * batch * tokens * self.HQ * self.D
        self.work = Work(bytes=part_bytes + out_bytes, flops=4 * pairs * self.HQ * self.D)
        blocks = -(-context // self.BLOCK)
        shape = (self.parts * batch * blocks, self.BLOCK, self.HKV, self.D)
        self.k, self.v = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
        order = torch.randperm(shape[0], device=device).int()
        self.block_table = order.view(self.parts, batch, blocks)
        self.q = torch.randn(self.parts, batch * tokens, self.HQ, self.D, device=device).bfloat16()
        self.context_lens = torch.full((batch,), context, dtype=torch.int32, device=device)
        self.cu_seqlens = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)

    def gathered(self, part: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[N, HKV, C, D]`, without the table."""
        rows = self.block_table[part].long()
        return tuple(x[rows].flatten(1, 2)[:, : self.context].transpose(1, 2) for x in (self.k, self.v))  # type: ignore[return-value]

    def truth(self) -> tuple[Tensor, ...]:
        """The last tokens of the last sequence, which see all of its context."""
        last = min(self.tokens, 8)
        k, v = (x[-1].double().repeat_interleave(self.HQ // self.HKV, dim=0) for x in self.gathered(0))
        scores = torch.einsum("thd,hcd->htc", self.q[0, -last:].double(), k) * self.D**-0.5
        ends = self.context - last + torch.arange(last, device=scores.device)
        hidden = torch.arange(self.context, device=scores.device) > ends[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return (torch.einsum("htc,hcd->thd", weights, v),)

    def providers(self) -> list[Provider]:
        out = torch.full_like(self.q, torch.nan)

        def call(i: int) -> None:
            xgdn.ops.paged_attention(
                self.q[i],
                self.k,
                self.v,
                block_table=self.block_table[i],
                context_lens=self.context_lens,
                cu_seqlens=self.cu_seqlens,
                out=out[i],
            )

        last = min(self.tokens, 8)
        return [Provider("xgdn paged_attention", call, lambda: (out[0, -last:],), (8e-3,))]
