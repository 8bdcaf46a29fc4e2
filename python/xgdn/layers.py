# SPDX-License-Identifier: Apache-2.0
"""The GDN layer alone, for a host with its own runtime.

layer = Qwen3GatedDeltaNet(config, state_dict, prefix="model.layers.0.linear_attn.", dtype=torch.bfloat16)
state = GdnState.allocate(layer.state_specs(), num_slots)
out = layer.forward(hidden, GdnBatch([Segment(kind=SegmentKind.DECODE, ...)]), state)

A segment of prompts (`SegmentKind.PREFILL`) takes `chunk=build_chunk_metadata(lengths)`.
"""

from xgdn._C import (
    GdnBatch,
    GdnConfig,
    GdnState,
    Qwen3GatedDeltaNet,
    Segment,
    SegmentKind,
    SlotGroup,
    StateKind,
    StateSpec,
)
from xgdn.ops import ChunkMetadata, build_chunk_metadata

__all__ = [
    "ChunkMetadata",
    "GdnBatch",
    "GdnConfig",
    "GdnState",
    "Qwen3GatedDeltaNet",
    "Segment",
    "SegmentKind",
    "SlotGroup",
    "StateKind",
    "StateSpec",
    "build_chunk_metadata",
]
