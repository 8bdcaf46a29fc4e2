# SPDX-License-Identifier: Apache-2.0
"""Calls of the delta rules on cuda tensors, whose inputs are made on the CPU."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cases import Case, Inputs
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
