# SPDX-License-Identifier: Apache-2.0
"""The serving engine: load a checkpoint, submit token ids, step, read events."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from os import PathLike, fspath
from typing import Any

import torch

from xgdn import _C
from xgdn import tensor_parallel as tensor_parallel_ranks
from xgdn._C import (
    EngineCounters,
    FinishReason,
    GenerationResult,
    LoadReport,
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
)
from xgdn.engine_args import EngineArgs, documents_engine_args
from xgdn.engine_loop import EngineLoop
from xgdn.grammar import Grammar, TokenMatcher

__all__ = [
    "Engine",
    "EngineArgs",
    "EngineCounters",
    "EngineLoop",
    "FinishReason",
    "GenerationResult",
    "Grammar",
    "LoadReport",
    "Logprobs",
    "Plan",
    "PrefixCacheStats",
    "Request",
    "RequestEvent",
    "RunnerOptions",
    "SamplingParams",
    "SpeculationStats",
    "StepStats",
    "TokenLogprob",
    "TokenMatcher",
    "plan",
]

_REQUEST = Request([])  # of default options


def plan(
    model_dir: str | PathLike[str],
    *,
    dtype: torch.dtype | None = EngineArgs.dtype,
    state_dtype: torch.dtype = EngineArgs.state_dtype,
    replay_states: bool = EngineArgs.replay_states,
    speculate: str | None = EngineArgs.speculate,
    draft_tokens: int = EngineArgs.draft_tokens,
    kv_dtype: torch.dtype | None = EngineArgs.kv_dtype,
    quantize: str | None = EngineArgs.quantize,
    activation_bits: int = EngineArgs.activation_bits,
    tensor_parallel: int = EngineArgs.tensor_parallel,
    runner: RunnerOptions | None = None,
) -> Plan:
    """Return the bytes that an `Engine` with these arguments would take, and what fits into a given memory.

    Of several processes that share the model, those of one of them.

    Reads config.json and the headers of the safetensors files, and allocates nothing. Raises what `Engine` raises,
    except for errors that only a backend can find.
    """
    options = _C.EngineOptions(
        runner=runner or RunnerOptions(),
        dtype=dtype,
        state_dtype=state_dtype,
        replay_states=replay_states,
        speculate=speculate,
        draft_tokens=draft_tokens,
        kv_dtype=kv_dtype,
        quantize=quantize,
        activation_bits=activation_bits,
        tensor_parallel=tensor_parallel,
    )
    return _C.Engine.plan(fspath(model_dir), options)


@documents_engine_args
class Engine:
    """A Hugging Face directory of Qwen3.5 or Qwen3-Next, ready to serve.

    Every method may be called from any thread at any time. Steps run one after the other: a thread that asks for one
    while another is running waits for it, and so do the counters (`num_free_slots` and the like); `submit`, `cancel`
    and `is_idle` never wait for a step.

    Args:
        model_dir: directory with config.json and safetensors.
        runner: sizes of the pools and of a step: `max_batch_size`, `max_cached_tokens`, `kv_block_size`,
            `max_tokens_per_step` and `prefix_cache_slots`.
        on_layer_loaded: called with (loaded, total) while loading.

    The other arguments are listed at the end, with those of `runner`; `from_args` takes all of them as `EngineArgs`.

    With `tensor_parallel` this process is the first of several that share the model. Under torchrun all processes run
    the same program: in the others this constructor does not return, it follows the first one's engine and ends the
    process with it. A process that ends before its time ends every request with an error.

    Raises:
        xgdn.errors.CheckpointError, DeviceError, UnsupportedError, RequestError; OutOfMemory before anything is
        allocated; RankError: a process that shares the model ended.
    """

    def __init__(
        self,
        model_dir: str | PathLike[str],
        *,
        dtype: torch.dtype | None = EngineArgs.dtype,
        state_dtype: torch.dtype = EngineArgs.state_dtype,
        replay_states: bool = EngineArgs.replay_states,
        speculate: str | None = EngineArgs.speculate,
        draft_tokens: int = EngineArgs.draft_tokens,
        kv_dtype: torch.dtype | None = EngineArgs.kv_dtype,
        quantize: str | None = EngineArgs.quantize,
        activation_bits: int = EngineArgs.activation_bits,
        device: torch.device | str = EngineArgs.device,
        tensor_parallel: int = EngineArgs.tensor_parallel,
        runner: RunnerOptions | None = None,
        prefill_backend: str = EngineArgs.prefill_backend,
        decode_backend: str = EngineArgs.decode_backend,
        prefill_accuracy: str = EngineArgs.prefill_accuracy,
        on_layer_loaded: Callable[[int, int], None] | None = None,
        memory_limit: int | None = EngineArgs.memory_limit,
    ) -> None:
        options: dict[str, Any] = {
            "dtype": dtype,
            "state_dtype": state_dtype,
            "replay_states": replay_states,
            "speculate": speculate,
            "draft_tokens": draft_tokens,
            "kv_dtype": kv_dtype,
            "quantize": quantize,
            "activation_bits": activation_bits,
            "device": device,
            "prefill_backend": prefill_backend,
            "decode_backend": decode_backend,
            "prefill_accuracy": prefill_accuracy,
            "memory_limit": memory_limit,
        }
        self._ranks: tensor_parallel_ranks.Ranks | None = None
        sizes = runner or RunnerOptions()
        if tensor_parallel == 1:
            alone = _C.EngineOptions(runner=sizes, on_layer_loaded=on_layer_loaded, **options)
            self._engine = _C.Engine.load(fspath(model_dir), alone)
            self._speculation = alone.speculation
            return
        # Before processes are started: what the model or the options do not allow.
        shared = _C.EngineOptions(runner=sizes, tensor_parallel=tensor_parallel, **options)
        _C.Engine.plan(fspath(model_dir), shared)
        self._speculation = shared.speculation
        ranks, of_rank = tensor_parallel_ranks.start_ranks(fspath(model_dir), tensor_parallel, options, sizes)
        try:
            self._engine = _C.Engine.load(fspath(model_dir), of_rank)
        except BaseException:
            ranks.close(None)
            raise
        self._ranks = ranks
        self._finalizer = weakref.finalize(self, ranks.close, self._engine)
        ranks.on_failure(self._engine.report_failed_rank)

    @classmethod
    def from_args(
        cls,
        model_dir: str | PathLike[str],
        args: EngineArgs,
        *,
        on_layer_loaded: Callable[[int, int], None] | None = None,
    ) -> "Engine":
        """Load a model with the arguments in `args`."""
        return cls(
            model_dir,
            dtype=args.dtype,
            state_dtype=args.state_dtype,
            replay_states=args.replay_states,
            speculate=args.speculate,
            draft_tokens=args.draft_tokens,
            kv_dtype=args.kv_dtype,
            quantize=args.quantize,
            activation_bits=args.activation_bits,
            device=args.device,
            tensor_parallel=args.tensor_parallel,
            runner=args.runner_options(),
            prefill_backend=args.prefill_backend,
            decode_backend=args.decode_backend,
            prefill_accuracy=args.prefill_accuracy,
            on_layer_loaded=on_layer_loaded,
            memory_limit=args.memory_limit,
        )

    plan = staticmethod(plan)

    def close(self) -> None:
        """End the processes that share the model, if there are any; requests end with an error from then on.

        Happens by itself when the engine is garbage-collected and when the interpreter ends.
        """
        if self._ranks is not None:
            self._finalizer()

    def on_rank_failure(self, callback: Callable[[str], None]) -> None:
        """Call back, on a thread of its own, when a process that this engine has started ends before its time."""
        if self._ranks is not None:
            self._ranks.on_failure(callback)

    @property
    def rank_process_ids(self) -> list[int]:
        """Processes that this engine has started, from rank 1 on."""
        return [] if self._ranks is None else self._ranks.process_ids

    def submit(self, request: Request) -> int:
        """Queue a request and return its id. Raises RequestError or RangeError."""
        return self._engine.submit(request)

    def step(self) -> list[RequestEvent]:
        """Run one model step; return an event for every request that moved, except those of `stream` and `generate`."""
        return self._engine.step()

    def cancel(self, request_id: int, branch: int | None = None) -> bool:
        """End a request, or one of its n branches, at the next step; False if there is no such request.

        The tokens of the other branches do not change, even while the prompt is still being prefilled.
        """
        return self._engine.cancel(request_id, branch)

    def is_idle(self) -> bool:
        """Return whether no request is waiting or running."""
        return self._engine.is_idle()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = _REQUEST.max_new_tokens,
        sampling: SamplingParams | None = None,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = _REQUEST.ignore_eos,
        n: int = _REQUEST.n,
        grammar: Grammar | None = None,
        raise_on_error: bool = True,
    ) -> list[GenerationResult]:
        """Run all prompts to completion, in one batch as far as the pools allow, and return results in prompt order.

        Each prompt has `n` results in a row, which share its prefill; result i uses the seed `sampling.seed + i`.
        Every result follows `grammar`, if there is one. Several threads may call this at once: their requests share the
        steps. An exception ends the call and cancels its requests, also one that a signal handler raises between steps
        (Ctrl-C).

        Raises:
            xgdn.errors.RequestError, RangeError: a prompt or an option that can never be served; nothing has run.
            xgdn.errors.GenerationError: a request ended with an error. With `raise_on_error=False` its result has
                `finish_reason` ERROR and `error` instead, and the others run to their end.
            xgdn.errors.NumericsError: likewise; its state or logits are not finite.
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
                    grammar=grammar,
                )
                for prompt in prompts
            ],
            raise_on_error=raise_on_error,
        )

    def stream(self, requests: Sequence[Request]) -> Iterator[RequestEvent]:
        """Submit requests and yield their events until all are finished.

        Its steps advance other requests too; their events go to the `stream` or `generate` that submitted them, in
        this thread or another, or to the next `step`. Closing the generator cancels its requests.
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
        """Return the logits `[T, vocab]` of one prompt in float32; running requests are not affected."""
        return self._engine.prompt_logits(list(prompt))

    @property
    def load_report(self) -> LoadReport:
        """Tensors of the checkpoint that were not used; the warnings have been written to stderr."""
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
        """Blocks that nobody holds, or cached prefixes alone, which go where room is wanted."""
        return self._engine.num_free_kv_blocks

    @property
    def num_preemptions(self) -> int:
        """Preemptions so far: a request gave its KV blocks to an older one and resumes when blocks are free."""
        return self._engine.num_preemptions

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats:
        """Contents and counts of the prefix cache; zeros without one."""
        return self._engine.prefix_cache_stats

    @property
    def speculation(self) -> str:
        """Where drafts come from: `mtp`, `lookup` or `off`."""
        return self._speculation

    @property
    def speculation_stats(self) -> SpeculationStats:
        """Tokens that were drafted so far, and those that were right; zeros without drafts."""
        return self._engine.speculation_stats

    @property
    def device_error(self) -> str:
        """Error of a device that has stopped, with which every request ends from then on; empty while it works."""
        return self._engine.device_error

    @property
    def max_context(self) -> int:
        """Maximum length of a sequence in tokens, prompt and reply, by positions and KV cache; 0: no maximum."""
        return self._engine.max_context

    @property
    def last_step(self) -> StepStats:
        """Counts and seconds of the last step that ran the model; zeros before the first."""
        return self._engine.last_step

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the weights that a step reads whole: not the token embedding, unless it is the head."""
        return self._engine.streamed_bytes

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the model's weights and of the two pools."""
        return {
            "weights": self._engine.weight_bytes,
            "states": self._engine.state_bytes,
            "kv_cache": self._engine.kv_bytes,
        }
