# SPDX-License-Identifier: Apache-2.0
"""The parts of the engine, for callers that drive the step loop from Python.

decoder = load_decoder(model_dir, state_dtype=torch.float32)
states = StatePool(decoder.state_specs(), num_slots=8)
kv = KvCache(decoder, num_blocks=1024)
step = builder.build([SequenceStep(kind=SegmentKind.DECODE, ...), ...])
logits = decoder.forward(step.input, states, kv)

A step's tensors hold until the builder's next build. A builder is for one thread at a time.
"""

from xgdn._C import (
    BatchBuilder,
    BuiltStep,
    HybridDecoder,
    KvCache,
    SegmentKind,
    SequenceStep,
    SlotHandle,
    StatePool,
    StepInput,
    load_decoder,
)

__all__ = [
    "BatchBuilder",
    "BuiltStep",
    "HybridDecoder",
    "KvCache",
    "SegmentKind",
    "SequenceStep",
    "SlotHandle",
    "StatePool",
    "StepInput",
    "load_decoder",
]
