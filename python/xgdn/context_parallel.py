# SPDX-License-Identifier: Apache-2.0
"""One long prompt on several processes: each computes a slice of its tokens in every GDN layer.

out = prefill_slice(layer, hidden, state)  # on every rank of torch.distributed's group, its own tokens

A rank takes the convolution's last rows and the delta rule's state from the rank before, and hands its own on. Through
a stack of layers the ranks work side by side: while one computes a layer, the one before computes the next, so that L
layers on R equal slices are L + R - 1 turns of one slice. Full attention has no such form.
"""

import torch
import torch.distributed as dist

from xgdn.errors import ShapeError
from xgdn.layers import GdnBatch, GdnState, Qwen3GatedDeltaNet, Segment, SegmentKind, build_chunk_metadata

__all__ = ["prefill_slice"]

_CHUNK = 64  # tokens; states are the same by one piece or several if these are cut between chunks


def prefill_slice(
    layer: Qwen3GatedDeltaNet,
    hidden: torch.Tensor,
    state: GdnState,
    *,
    slot: int = 0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Compute this rank's tokens of a prompt whose slices lie on the ranks in order, and return its rows.

    Every rank of the group (default: all processes) calls this for the same layer. The rows have the bits that they
    have where one process computes the prompt in pieces of these lengths. Afterwards the last rank's slot has the state
    after the whole prompt, each other's the state after its slice.

    Args:
        layer: the whole layer, with the same weights on all ranks.
        hidden: `[T, hidden_size]`, this rank's tokens; T is a multiple of 64 except on the last rank.
        state: pools of this rank, on the device of `hidden`.
        slot: of the pools; what it holds is overwritten.
        group: of ranks; tensors of the pools' device can be sent in it.

    Raises:
        xgdn.errors.ShapeError: T is not a multiple of 64, or is 0; nothing has been computed or sent.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    num_tokens = hidden.size(0)
    if num_tokens == 0 or (num_tokens % _CHUNK and rank + 1 < world):
        raise ShapeError(
            f"[prefill_slice] hidden: expected a multiple of {_CHUNK} tokens on rank {rank} of {world}, "
            f"got {num_tokens}"
        )
    slots = [state.pool(spec.kind)[slot] for spec in layer.state_specs()]
    if rank > 0:
        for pool in slots:
            received = torch.empty_like(pool)
            dist.recv(received, group=group, group_src=rank - 1)
            pool.copy_(received)
    index = torch.tensor([slot], dtype=torch.int32, device=hidden.device)
    segment = Segment(
        kind=SegmentKind.PREFILL,
        cu_seqlens_cpu=torch.tensor([0, num_tokens], dtype=torch.int32),
        state_indices=index,
        conv_indices=index,
        has_initial_state=torch.tensor([rank > 0], device=hidden.device),
        chunk=build_chunk_metadata([num_tokens], device=hidden.device),
        may_have_padding=False,
    )
    out = layer.forward(hidden, GdnBatch([segment]), state)
    if rank + 1 < world:
        for pool in slots:
            dist.send(pool.contiguous(), group=group, group_dst=rank + 1)
    return out
