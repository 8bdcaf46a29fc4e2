# SPDX-License-Identifier: Apache-2.0
"""How a model is loaded and served: one list of names, docs and defaults, for the command line and for Python.

The defaults are those of the C++ structs `RunnerOptions` and `EngineOptions`.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch

from xgdn._C import EngineOptions, RunnerOptions

_DEFAULTS = EngineOptions()
_SIZES = RunnerOptions()

_Class = TypeVar("_Class", bound=type)


def _documented(doc: str, *, choices: Sequence[torch.dtype | str | int] = ()) -> dict[str, Any]:
    """Metadata of a field: its doc and the values that it may have, where they are few."""
    return {"doc": doc, "choices": tuple(choices)}


def documents_engine_args(cls: _Class) -> _Class:
    """Append the doc of every field of EngineArgs to the class's own."""
    if cls.__doc__ is not None:  # python -OO has none
        lines = [f"    {argument.name}: {argument.metadata['doc']}" for argument in fields(EngineArgs)]
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__), "", "Arguments of an engine:", *lines, ""])
    return cls


@dataclass(frozen=True)
class EngineArgs:
    """How a model is loaded and served."""

    dtype: torch.dtype | None = field(
        default=_DEFAULTS.dtype,
        metadata=_documented(
            "Dtype of weights and activations (default: the checkpoint's).",
            choices=[torch.float32, torch.bfloat16, torch.float16],
        ),
    )
    state_dtype: torch.dtype = field(
        default=_DEFAULTS.state_dtype,
        metadata=_documented("Dtype of the delta-rule states.", choices=[torch.float32, torch.bfloat16]),
    )
    replay_states: bool = field(
        default=_DEFAULTS.replay_states,
        metadata=_documented(
            "Keep delta-rule states as checkpoints and rings: a token gets the same bits by prompt and by decode."
        ),
    )
    speculate: str | None = field(
        default=_DEFAULTS.speculate,
        metadata=_documented(
            "Source of drafts: mtp (the checkpoint's MTP head), lookup (the sequence's own text) or off. Needs "
            "replay_states (default: lookup where draft_tokens are given, else off).",
            choices=["mtp", "lookup", "off"],
        ),
    )
    draft_tokens: int = field(
        default=_DEFAULTS.draft_tokens,
        metadata=_documented(
            "Tokens that are drafted for a sequence and verified in one step; no token changes. At most 15; 0: 1 with "
            "speculate=mtp, 4 with speculate=lookup, else none."
        ),
    )
    kv_dtype: torch.dtype | None = field(
        default=_DEFAULTS.kv_dtype,
        metadata=_documented(
            "Dtype of cached keys and values; int8 takes half the memory of 16 bits (default: that of activations).",
            choices=[torch.int8],
        ),
    )
    quantize: str | None = field(
        default=_DEFAULTS.quantize,
        metadata=_documented(
            "Round the weights of a 16-bit checkpoint to int8 or int4 while it is loaded (default: as stored).",
            choices=["int8", "int4"],
        ),
    )
    activation_bits: int = field(
        default=_DEFAULTS.activation_bits,
        metadata=_documented(
            "Bits of activations where they meet weights in int8 or int4: 16, or 8, which is faster and less exact.",
            choices=[16, 8],
        ),
    )
    device: str = field(
        default=_DEFAULTS.device,
        metadata=_documented("Device of weights, activations and pools: cpu, cuda:0 or npu:0."),
    )
    tensor_parallel: int = field(
        default=_DEFAULTS.tensor_parallel,
        metadata=_documented(
            "Number of processes that share the model, each with a part of weights, states and KV cache; "
            "started by torchrun or with the engine. The first has the named device, the next the one after it."
        ),
    )
    prefill_backend: str = field(
        default=_DEFAULTS.prefill_backend,
        metadata=_documented("Backend for prefill; see `xgdn doctor`."),
    )
    decode_backend: str = field(
        default=_DEFAULTS.decode_backend,
        metadata=_documented("Backend for decode; see `xgdn doctor`."),
    )
    prefill_accuracy: str = field(
        default=_DEFAULTS.prefill_accuracy,
        metadata=_documented(
            "Accuracy of the delta rule in prefill: fast (bf16 products), exact (float32), or auto (fast for bf16)."
        ),
    )
    max_batch_size: int = field(
        default=_SIZES.max_batch_size,
        metadata=_documented("Maximum number of sequences that run at once."),
    )
    max_cached_tokens: int = field(
        default=_SIZES.max_cached_tokens,
        metadata=_documented("Capacity of the KV cache in tokens, over all sequences."),
    )
    kv_block_size: int = field(
        default=_SIZES.kv_block_size,
        metadata=_documented("Tokens in a block of the KV cache."),
    )
    max_tokens_per_step: int = field(
        default=_SIZES.max_tokens_per_step,
        metadata=_documented("Token budget of a step for decodes and chunked prefill together."),
    )
    prefix_cache_slots: int = field(
        default=_SIZES.prefix_cache_slots,
        metadata=_documented(
            "State slots for cached prefixes: later prompts that begin with the same tokens do not compute them again."
        ),
    )
    run_ahead: bool | None = field(
        default=_SIZES.run_ahead,
        metadata=_documented(
            "Whether greedy decodes may start before the tokens of the step before are on the host (default: on a GPU)."
        ),
    )
    memory_limit: int | None = field(
        default=_DEFAULTS.memory_limit,
        metadata=_documented("Maximum memory of weights, pools and steps together, in bytes (default: no limit)."),
    )

    def runner_options(self) -> RunnerOptions:
        """Return the sizes of the pools and of a step, and when steps start."""
        return RunnerOptions(
            max_batch_size=self.max_batch_size,
            max_cached_tokens=self.max_cached_tokens,
            kv_block_size=self.kv_block_size,
            max_tokens_per_step=self.max_tokens_per_step,
            prefix_cache_slots=self.prefix_cache_slots,
            run_ahead=self.run_ahead,
        )


documents_engine_args(EngineArgs)
