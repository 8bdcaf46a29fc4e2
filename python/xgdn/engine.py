# SPDX-License-Identifier: Apache-2.0
"""The serving engine: load a checkpoint, submit token ids, step, read events."""

from collections.abc import Callable, Iterator, Sequence
from os import PathLike, fspath

import torch

from xgdn import _C
from xgdn._C import (
    EngineCounters,
    FinishReason,
    GenerationResult,
    LoadReport,
    Logprobs,
    Plan,
    Request,
    RequestEvent,
    RunnerOptions,
    SamplingParams,
    StepStats,
    TokenLogprob,
)
from xgdn.engine_loop import EngineLoop

__all__ = [
    "Engine",
    "EngineCounters",
    "EngineLoop",
    "FinishReason",
    "GenerationResult",
    "LoadReport",
    "Logprobs",
    "Plan",
    "Request",
    "RequestEvent",
    "RunnerOptions",
    "SamplingParams",
    "StepStats",
    "TokenLogprob",
    "plan",
]


def plan(
    model_dir: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    state_dtype: torch.dtype = torch.float32,
    runner: RunnerOptions | None = None,
) -> Plan:
    """Return the bytes that an `Engine` of these arguments would take, and what fits into a given memory.

    Reads config.json and the headers of the safetensors files, and allocates nothing. Raises as `Engine` does, but for
    what only a backend can tell.
    """
    options = _C.EngineOptions(runner=runner or RunnerOptions(), dtype=dtype, state_dtype=state_dtype)
    return _C.Engine.plan(fspath(model_dir), options)


class Engine:
    """A Hugging Face directory of Qwen3.5 or Qwen3-Next, ready to serve.

    Every method may be called from any thread at any time. Steps run one after the other: who asks for one while
    another is under way waits for it, as do the figures (`num_free_slots` and the like); `submit`, `cancel` and
    `is_idle` never wait for a step.

    Args:
        model_dir: directory with config.json and safetensors.
        dtype: of weights and activations; default the checkpoint's.
        state_dtype: of the delta-rule states, `torch.float32` or `torch.bfloat16`.
        device: of weights, activations and pools, such as "cpu" or "npu:0".
        runner: sizes of the pools and of a step.
        prefill_backend, decode_backend: a name of `xgdn.available_backends()`, or "auto".
        prefill_accuracy: "fast", "exact" or "auto", as in `xgdn.ops.chunk_gated_delta_rule`.
        on_layer_loaded: called with (loaded, total) while loading.
        memory_limit: bytes that weights, pools and steps may take together; default no limit.

    Raises:
        xgdn.errors.CheckpointError, DeviceError, UnsupportedError, RequestError; OutOfMemory before anything is
        allocated.
    """

    def __init__(
        self,
        model_dir: str | PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        runner: RunnerOptions | None = None,
        prefill_backend: str = "auto",
        decode_backend: str = "auto",
        prefill_accuracy: str = "auto",
        on_layer_loaded: Callable[[int, int], None] | None = None,
        memory_limit: int | None = None,
    ) -> None:
        options = _C.EngineOptions(
            runner=runner or RunnerOptions(),
            dtype=dtype,
            state_dtype=state_dtype,
            device=device,
            prefill_backend=prefill_backend,
            decode_backend=decode_backend,
            prefill_accuracy=prefill_accuracy,
            on_layer_loaded=on_layer_loaded,
            memory_limit=memory_limit,
        )
        self._engine = _C.Engine.load(fspath(model_dir), options)

    plan = staticmethod(plan)

    def submit(self, request: Request) -> int:
        """Queue a request and return its id; any thread may call it. Raises RequestError or RangeError."""
        return self._engine.submit(request)

    def step(self) -> list[RequestEvent]:
        """Run one model step: an event for every request that moved, but for those of `stream` and `generate`."""
        return self._engine.step()

    def cancel(self, request_id: int, branch: int | None = None) -> bool:
        """End a request, or one of its n branches, with the next step; False when it is not there.

        The tokens of the other branches do not change, whether or not the prompt is computed already.
        """
        return self._engine.cancel(request_id, branch)

    def is_idle(self) -> bool:
        """True when no request waits or runs."""
        return self._engine.is_idle()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 16,
        sampling: SamplingParams | None = None,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        n: int = 1,
        raise_on_error: bool = True,
    ) -> list[GenerationResult]:
        """Run all prompts to their end, in one batch as far as the pools allow; results in the order given.

        Each prompt has `n` results in a row; they share its computation, and their seeds count up from sampling's.
        Several threads may call it at once: their requests share the steps. An exception, of a signal handler too (such
        as Ctrl-C, within a step), ends the call and cancels its requests.

        Raises:
            xgdn.errors.RequestError, RangeError: a prompt or an option that can never be served; nothing has run.
            xgdn.errors.GenerationError: a request ended with an error. With `raise_on_error=False` its result has
                `finish_reason` ERROR and `error` instead, and the others run to their end.
        """
        return self._engine.generate(
            [
                Request(
                    list(prompt),
                    max_new_tokens=max_new_tokens,
                    sampling=sampling or SamplingParams(),
                    stop_token_ids=list(stop_token_ids),
                    ignore_eos=ignore_eos,
                    n=n,
                )
                for prompt in prompts
            ],
            raise_on_error=raise_on_error,
        )

    def stream(self, requests: Sequence[Request]) -> Iterator[RequestEvent]:
        """Submit requests and yield their events until all are finished.

        Stepping for them moves other requests too, whose events come to those that wait for them: another `stream` or
        `generate`, in this thread or another, or the next `step`. A generator that is closed cancels its requests.
        """
        stream = self._engine.stream(list(requests))
        try:
            while events := stream.next():
                yield from events
        finally:
            stream.close()

    def loop(
        self,
        *,
        before_step: Callable[[], None] | None = None,
        after_step: Callable[[EngineCounters], None] | None = None,
        on_error: Callable[[str], None] | None = None,
    ) -> EngineLoop:
        """Start a thread that steps the engine while there is work: see `EngineLoop`."""
        return EngineLoop(self._engine, before_step=before_step, after_step=after_step, on_error=on_error)

    def prompt_logits(self, prompt: Sequence[int]) -> torch.Tensor:
        """Logits `[T, vocab]` in float32 of one prompt, beside the running requests."""
        return self._engine.prompt_logits(list(prompt))

    @property
    def load_report(self) -> LoadReport:
        """What of the checkpoint was left unused; its warnings were written to stderr."""
        return self._engine.load_report

    @property
    def vocab_size(self) -> int:
        return self._engine.vocab_size

    @property
    def eos_token_ids(self) -> list[int]:
        return self._engine.eos_token_ids

    @property
    def counters(self) -> EngineCounters:
        """The figures below in one piece."""
        return _C.counters(self._engine)

    @property
    def num_free_slots(self) -> int:
        return self._engine.num_free_slots

    @property
    def num_free_kv_blocks(self) -> int:
        return self._engine.num_free_kv_blocks

    @property
    def num_preemptions(self) -> int:
        """How often a request so far had to give its KV blocks to an older one; it goes on when blocks are free."""
        return self._engine.num_preemptions

    @property
    def device_error(self) -> str:
        """Why every request ends with an error from now on: the device has stopped. Empty while it computes."""
        return self._engine.device_error

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence, prompt and reply, for which there are positions and room; 0: any."""
        return self._engine.max_context

    @property
    def last_step(self) -> StepStats:
        """What the last step that ran the model did, and its seconds; zeros before the first."""
        return self._engine.last_step

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the model's weights and of the two pools."""
        return {
            "weights": self._engine.weight_bytes,
            "states": self._engine.state_bytes,
            "kv_cache": self._engine.kv_bytes,
        }
