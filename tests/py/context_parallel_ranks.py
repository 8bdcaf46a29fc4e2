# SPDX-License-Identifier: Apache-2.0
"""One of the processes of test_context_parallel.py, with torchrun's variables. Rank 0 prints what all of them saw."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from xgdn import _C, errors
from xgdn.context_parallel import prefill_slice
from xgdn.layers import GdnBatch, GdnState, Segment, SegmentKind, build_chunk_metadata

LENGTHS = (192, 64, 77)  # of the ranks' slices
HIDDEN = 64
H, HV, K, V = 2, 4, 16, 32
WIDTHS = (2, 4)  # of the convolution


def layer_of(width: int, *, has_replay_states: bool) -> _C.Qwen3GatedDeltaNet:
    """The same weights in every process."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    channels = 2 * H * K + HV * V
    weights = {
        "in_proj_qkv.weight": draw(channels, HIDDEN),
        "in_proj_z.weight": draw(HV * V, HIDDEN),
        "in_proj_b.weight": draw(HV, HIDDEN),
        "in_proj_a.weight": draw(HV, HIDDEN),
        "conv1d.weight": draw(channels, 1, width),
        "A_log": draw(HV),
        "dt_bias": draw(HV),
        "norm.weight": draw(V) + 1,
        "out_proj.weight": draw(HIDDEN, HV * V),
    }
    config = _C.GdnConfig(
        hidden_size=HIDDEN,
        num_k_heads=H,
        num_v_heads=HV,
        head_k_dim=K,
        head_v_dim=V,
        conv_kernel_dim=width,
        state_dtype=torch.float32,
        has_replay_states=has_replay_states,
    )
    return _C.Qwen3GatedDeltaNet(config, weights, dtype=torch.float32)


def piece(net: Any, hidden: torch.Tensor, state: GdnState, *, is_first: bool) -> torch.Tensor:
    """The same tokens in one process."""
    slot = torch.tensor([1], dtype=torch.int32)
    segment = Segment(
        kind=SegmentKind.PREFILL,
        cu_seqlens_cpu=torch.tensor([0, len(hidden)], dtype=torch.int32),
        state_indices=slot,
        conv_indices=slot,
        has_initial_state=torch.tensor([not is_first]),
        chunk=build_chunk_metadata([len(hidden)], net.local_config.num_v_heads),
    )
    return net.forward(hidden, GdnBatch([segment]), state)


def nan_state(net: Any) -> GdnState:
    state = GdnState.allocate(net.state_specs(), 2)
    for spec in net.state_specs():
        pool = state.pool(spec.kind)
        pool.fill_(float("nan") if pool.is_floating_point() else 2**30)
    return state


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def slot_of(net: Any, state: GdnState, slot: int) -> list[str]:
    return [digest(state.pool(spec.kind)[slot]) for spec in net.state_specs()]


def run(width: int, has_replay_states: bool) -> dict[str, Any]:
    """Two layers after each other: rows and last states of all ranks, and of one process."""
    nets = [layer_of(width, has_replay_states=has_replay_states) for _ in range(2)]
    slices = torch.randn(sum(LENGTHS), HIDDEN, generator=torch.Generator().manual_seed(4)).split(LENGTHS)
    rank = dist.get_rank()
    states = [nan_state(net) for net in nets]
    rows = slices[rank]
    for net, state in zip(nets, states, strict=True):
        rows = prefill_slice(net, rows, state, slot=1)
    assert not rows.isnan().any()
    own = {"rows": digest(rows), "states": [slot_of(n, s, 1) for n, s in zip(nets, states, strict=True)]}
    untouched = all(
        s.pool(spec.kind)[0].isnan().all()
        for n, s in zip(nets, states, strict=True)
        for spec in n.state_specs()
        if s.pool(spec.kind).is_floating_point()
    )
    gathered: list[Any] = [None] * len(LENGTHS)
    dist.all_gather_object(gathered, {**own, "untouched": bool(untouched)})
    alone = [nan_state(net) for net in nets]
    wanted = []
    for i, part in enumerate(slices):
        for net, state in zip(nets, alone, strict=True):
            part = piece(net, part, state, is_first=i == 0)
        wanted.append({"rows": digest(part), "states": [slot_of(n, s, 1) for n, s in zip(nets, alone, strict=True)]})
    return {"ranks": gathered, "one": wanted}


def refused() -> list[str]:
    """What a rank says of a slice that it cannot take."""
    net = layer_of(4, has_replay_states=False)
    words = []
    for length in (0, 65):
        try:
            prefill_slice(net, torch.zeros(length, HIDDEN), nan_state(net))
        except errors.ShapeError as error:
            words.append(str(error))
    return words


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen = {f"{width}-{replay}": run(width, replay) for width in WIDTHS for replay in (False, True)}
    if dist.get_rank() == 0:
        json.dump({"seen": seen, "refused": refused()}, sys.stdout)
    dist.destroy_process_group()
