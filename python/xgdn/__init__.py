# SPDX-License-Identifier: Apache-2.0
"""xgdn: serving the gated delta rule (Qwen3-Next, Qwen3.5) from Python.

- `xgdn.chunk_gated_delta_rule`, `xgdn.fused_recurrent_gated_delta_rule`: FLA's functions, names, order and defaults.
- `xgdn.Engine`: loads a checkpoint and generates, with continuous batching.
- `xgdn.Session`: a conversation whose state an engine holds between requests; forks, goes back, is saved and loaded.
- `xgdn.plan`: the memory that an engine would take, before anything is allocated.
- `xgdn.ops`: a function for each op, which updates state pools in place.
- `xgdn.patch_transformers`, `unpatch_transformers`, `report`: transformers' own models on these kernels;
  `kernel_mapping`: the same by the package `kernels`.
- `xgdn.available_backends`, `use_backend`, `last_backend`, `doctor`: which backend runs which op, and why.
"""

import torch  # noqa: F401  (libxgdn needs torch's libraries in the process)

import xgdn._C  # noqa: F401  (loads libxgdn, which registers torch.ops.xgdn)
from xgdn import errors, ops
from xgdn.backends import (
    BackendReport,
    available_backends,
    doctor,
    last_backend,
    last_is_batch_invariant,
    use_backend,
)
from xgdn.engine import (
    Engine,
    EngineArgs,
    FinishReason,
    GenerationResult,
    Logprobs,
    Plan,
    PrefixCacheStats,
    Request,
    RequestEvent,
    RunnerOptions,
    SamplingParams,
    SpeculationStats,
    StepStats,
    TokenLogprob,
    plan,
)
from xgdn.fla import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from xgdn.integrations import (
    FunctionReport,
    Report,
    kernel_mapping,
    patch_transformers,
    report,
    unpatch_transformers,
)
from xgdn.ops import PAD_SLOT_ID, ChunkMetadata
from xgdn.session import Session

__all__ = [
    "PAD_SLOT_ID",
    "BackendReport",
    "ChunkMetadata",
    "Engine",
    "EngineArgs",
    "FinishReason",
    "FunctionReport",
    "GenerationResult",
    "Logprobs",
    "Plan",
    "PrefixCacheStats",
    "Report",
    "Request",
    "RequestEvent",
    "RunnerOptions",
    "SamplingParams",
    "Session",
    "SpeculationStats",
    "StepStats",
    "TokenLogprob",
    "available_backends",
    "chunk_gated_delta_rule",
    "doctor",
    "errors",
    "fused_recurrent_gated_delta_rule",
    "kernel_mapping",
    "last_backend",
    "last_is_batch_invariant",
    "ops",
    "patch_transformers",
    "plan",
    "report",
    "unpatch_transformers",
    "use_backend",
]
