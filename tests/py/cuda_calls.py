# SPDX-License-Identifier: Apache-2.0
"""Calls of the delta rules on cuda tensors, whose inputs are made on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from cases import Case, Inputs, assert_bits_equal
from xgdn import ops


def on_device(t: Tensor) -> Tensor:
    """A copy with the same strides, inside a copy of all of its memory."""
    memory = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return memory.cuda().as_strided(t.shape, t.stride(), t.storage_offset())


def device_inputs(x: Inputs) -> Inputs:
    names = ("q", "k", "v", "g", "beta", "state", "cu_seqlens", "state_indices", "has_initial_state", "out")
    moved = {name: on_device(getattr(x, name)) for name in names}
    return replace(x, **moved, write_indices=None if x.write_indices is None else x.write_indices.cuda())


def bring_back(x: Inputs, on_cuda: Inputs) -> None:
    x.state.copy_(on_cuda.state)
    x.out.copy_(on_cuda.out)


def prefill(case: Case, y: Inputs, accuracy: str = "auto") -> None:
    ops.chunk_gated_delta_rule(
        *y.tensors(),
        **y.shared(),
        has_initial_state=y.has_initial_state,
        chunk=ops.build_chunk_metadata(case.lengths, case.HV, device="cuda"),
        accuracy=accuracy,
    )


# ---- replay states --------------------------------------------------------------------------------------------------


def memory_of(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


class OnCuda:
    """`xgdn.ops` for tests whose tensors lie on the CPU: calls take copies on the device, all of whose memory comes
    back."""

    ReplayRing = ops.ReplayRing

    def __init__(self, accuracy: str = "exact") -> None:
        self._accuracy = accuracy

    def replay_gated_delta_rule(self, *args: Any, out: Tensor | None = None, backend: str, **kwargs: Any) -> Tensor:
        out = torch.full_like(args[2], torch.nan) if out is None else out
        self._call(ops.replay_gated_delta_rule, *args, out=out, accuracy=self._accuracy, **kwargs)
        return out

    def materialize_state(self, *args: Any, backend: str, **kwargs: Any) -> None:
        self._call(ops.materialize_state, *args, **kwargs)

    def _call(self, op: Any, *args: Any, **kwargs: Any) -> None:
        moved = tree_map_only(Tensor, on_device, (args, kwargs))
        op(*moved[0], backend="cuda", **moved[1])
        for host, device in zip(tree_leaves((args, kwargs)), tree_leaves(moved), strict=True):
            if isinstance(host, Tensor):
                memory_of(host).copy_(memory_of(device))


class Pools:
    """Checkpoints and rings of random contents on the device, `num_slots` of each."""

    def __init__(self, num_slots: int, case: Case, rows: int) -> None:
        self.state = torch.randn(num_slots, case.HV, case.V, case.K).to(case.state_dtype).cuda()
        self.ring = ops.ReplayRing(
            torch.nn.functional.normalize(torch.randn(num_slots, case.H, rows, case.K), dim=-1).cuda(),
            torch.randn(num_slots, case.HV, rows, case.V).cuda(),
            -torch.rand(num_slots, case.HV, rows).cuda(),
            torch.randint(0, 16, (num_slots,), dtype=torch.int32).cuda(),
        )

    def copy(self) -> Pools:
        other = Pools.__new__(Pools)
        other.state, other.ring = self.state.clone(), ops.ReplayRing(*(t.clone() for t in self.ring))
        return other

    def assert_same(self, other: Pools) -> None:
        for name, a, b in zip(
            ("state", *self.ring._fields), (self.state, *self.ring), (other.state, *other.ring), strict=True
        ):
            assert_bits_equal(name, a.cpu(), b.cpu())
