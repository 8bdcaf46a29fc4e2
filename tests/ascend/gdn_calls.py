# SPDX-License-Identifier: Apache-2.0
"""Calls of torch_npu's two gated delta rule ops, with their inputs, and what they must compute in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import reference

NAN_BITS = 0x7FC1  # of a bf16 NaN that no arithmetic produces, in slots that a call must leave alone


@dataclass
class Call:
    """Sequences of the given lengths; slot `table[n][t]` takes sequence n's state after its token t."""

    lengths: tuple[int, ...]
    Nk: int = 2
    Nv: int = 4
    Dk: int = 128
    Dv: int = 128
    accepted: tuple[int, ...] | None = None  # None: 1 for every sequence
    scale: float = 0.125
    strided: bool = False  # q, k, v are views of one packed tensor, a slot is a view of a wider one
    with_g: bool = True
    state_dtype: torch.dtype = torch.bfloat16
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = ["+".join(map(str, self.lengths)), f"{self.Nk}x{self.Dk}", f"{self.Nv}x{self.Dv}"]
        parts += [] if self.accepted is None else ["accepted" + "_".join(map(str, self.accepted))]
        parts += ["strided"] * self.strided + ["no_g"] * (not self.with_g)
        parts += ["state_f32"] * (self.state_dtype == torch.float32)
        return "-".join(parts)

    @property
    def T(self) -> int:
        return sum(self.lengths)

    @property
    def first(self) -> list[int]:
        return [sum(self.lengths[:n]) for n in range(len(self.lengths))]

    def make(self) -> Call:
        """Inputs on the CPU: query, key, value, g, beta, state with its free slots full of NaN, indices."""
        T, Nk, Nv, Dk, Dv = self.T, self.Nk, self.Nv, self.Dk, self.Dv
        q, k = (F.normalize(torch.randn(T, Nk, Dk), dim=-1) for _ in range(2))
        packed = torch.cat([q.flatten(1), k.flatten(1), torch.randn(T, Nv * Dv)], dim=1).bfloat16()
        query, key, value = packed.split([Nk * Dk, Nk * Dk, Nv * Dv], dim=1)
        num_slots = T + 3
        state = (
            torch.full((num_slots, Nv, Dv, Dk), NAN_BITS, dtype=torch.int16).view(torch.bfloat16).to(self.state_dtype)
        )
        indices = torch.randperm(num_slots)[:T].int()
        for n, first in enumerate(self.first):
            state[indices[first + self.accepted_of(n) - 1]] = 0.3 * torch.randn(Nv, Dv, Dk).to(self.state_dtype)
        self.tensors = {
            "query": query.unflatten(1, (Nk, Dk)),
            "key": key.unflatten(1, (Nk, Dk)),
            "value": value.unflatten(1, (Nv, Dv)),
            "g": -torch.rand(T, Nv),
            "beta": torch.rand(T, Nv).clamp(0.05, 0.95).bfloat16(),
            "state": state,
            "indices": indices,
        }
        return self

    def accepted_of(self, n: int) -> int:
        return 1 if self.accepted is None else self.accepted[n]

    def initial_slot(self, n: int) -> int:
        return int(self.tensors["indices"][self.first[n] + self.accepted_of(n) - 1])

    def on_npu(self, name: str) -> Tensor:
        t = self.tensors[name]
        if name in ("query", "key", "value"):
            if self.strided:  # rows of a wider tensor, as a fused projection leaves them
                wide = torch.full((t.shape[0], t[0].numel() + 7), torch.nan, dtype=t.dtype)
                wide[:, 5:-2] = t.flatten(1)
                return wide.npu()[:, 5:-2].unflatten(1, t.shape[1:])
            return t.contiguous().npu()
        if name == "state" and self.strided:
            wide = torch.full((t.shape[0], 3 * t[0].numel()), torch.nan, dtype=t.dtype)
            wide[:, t[0].numel() : 2 * t[0].numel()] = t.flatten(1)
            return wide.npu()[:, t[0].numel() : 2 * t[0].numel()].unflatten(1, t.shape[1:])
        return t.npu()

    def inputs(self) -> dict[str, Tensor]:
        names = ["query", "key", "value", "beta"] + ["g"] * self.with_g
        return {name: self.on_npu(name) for name in names}

    def recurrent_arguments(self, lengths: tuple[int, ...] | None = None) -> dict[str, object]:
        accepted = [self.accepted_of(n) for n in range(len(self.lengths))]
        return self.inputs() | {
            "state": self.on_npu("state"),
            "scale": self.scale,
            "actual_seq_lengths": torch.tensor(lengths or self.lengths, dtype=torch.int32).npu(),
            "ssm_state_indices": self.on_npu("indices"),
            "num_accepted_tokens": torch.tensor(accepted, dtype=torch.int32).npu(),
        }

    def chunk_arguments(self) -> dict[str, object]:
        rows = [self.initial_slot(n) for n in range(len(self.lengths))]
        return self.inputs() | {
            "initial_state": self.tensors["state"][rows].npu(),
            "actual_seq_lengths": torch.tensor(self.lengths, dtype=torch.int32).npu(),
            "scale": self.scale,
        }

    def expected(self) -> tuple[Tensor, list[Tensor]]:
        """Outputs [T, Nv, Dv], and for each sequence its states after every token, the given one first."""
        x = self.tensors
        outputs, states = [], []
        for n, first in enumerate(self.first):
            rows = slice(first, first + self.lengths[n])
            g = x["g"][rows] if self.with_g else torch.zeros_like(x["g"][rows])
            out, after = reference.gated_delta_rule(
                x["query"][rows],
                x["key"][rows],
                x["value"][rows],
                g,
                x["beta"][rows],
                x["state"][self.initial_slot(n)],
                scale=self.scale,
                use_qk_l2norm=False,
            )
            outputs.append(out)
            states.append(after)
        return torch.cat(outputs), states

    def written(self) -> dict[int, Tensor]:
        """What the recurrent op must leave in each slot that it writes."""
        _, states = self.expected()
        return {
            int(self.tensors["indices"][first + t]): states[n][t + 1]
            for n, first in enumerate(self.first)
            for t in range(self.lengths[n])
        }


def assert_close(name: str, got: Tensor, want: Tensor, bound: float) -> None:
    got, want = got.cpu().double(), want.double()
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    error = float((got - want).norm() / want.norm())
    assert error <= bound, f"{name}: relative error {error:.3g} > {bound:.3g}"  # NaN is not <=


def assert_only_written(before: Tensor, after: Tensor, slots: set[int]) -> None:
    """Bitwise, so that NaN equals itself."""
    bits = torch.int16 if before.element_size() == 2 else torch.int32
    others = [slot for slot in range(before.shape[0]) if slot not in slots]
    assert torch.equal(after.cpu()[others].view(bits), before[others].view(bits)), "a slot that the call did not name"
