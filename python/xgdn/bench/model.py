# SPDX-License-Identifier: Apache-2.0
"""Decode steps of a whole model: `xgdn bench model`."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import xgdn
from xgdn.bench.op_times import RecordedStep, StepProfile, record_ops, step_profile
from xgdn.bench.turns import BYTES_BEYOND_CACHES, take_turns

_WARM_UP = 4  # steps; the first ones touch memory that nobody has read yet
_KV_BLOCK = 16  # tokens
_STEP_TOKENS = 2048  # token budget of a step


@dataclass(frozen=True)
class ModelRow:
    """Decode steps of `batch` sequences; times in milliseconds."""

    batch: int
    threads: int
    times: list[float]  # of every step, from the tokens of the one before it to its own
    engine: float  # median share of a step that is not the model's forward
    roofline: float  # time to read the weights once, and to read and write the states once
    prefill: float  # tokens per second of the prompts before
    profiles: list[StepProfile]  # of the steps with prompts and of the timed ones, if asked for

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.batch / self.median

    @property
    def share(self) -> float:
        """Fraction of the roofline's speed."""
        return self.roofline / self.median

    def document(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "median": self.median,
            "tokens_per_second": self.tokens_per_second,
            "share": self.share,
        }


class ModelBenchmark:
    """One engine, in which batches of requests with prompts of one length decode in lockstep."""

    def __init__(
        self,
        load: Callable[[xgdn.EngineArgs], xgdn.Engine],
        args: xgdn.EngineArgs,
        *,
        prompt_tokens: int,
        steps: int,
        profile: bool = False,
    ) -> None:
        """`load` gets `args` with the sizes that the largest batch needs. With `profile`, steps are recorded by op."""
        self._load = load
        self._args = args
        self._prompt_tokens = prompt_tokens
        self._steps = steps + _WARM_UP
        self._profile = profile

    def run(self, batches: Sequence[int], threads: int) -> list[ModelRow]:
        torch.set_num_threads(threads)
        length = self._prompt_tokens + self._max_new_tokens(max(batches)) + _KV_BLOCK
        args = replace(
            self._args,
            max_batch_size=max(batches),
            max_cached_tokens=max(batches) * length,
            kv_block_size=_KV_BLOCK,
            max_tokens_per_step=_STEP_TOKENS,
        )
        engine = self._load(args)
        return [self._decode(engine, batch, max(batches), threads) for batch in batches]

    def _max_new_tokens(self, batch: int) -> int:
        """Return how many tokens the first sequence needs to still decode when the last has decoded `steps` times."""
        return self._steps + 2 + batch * self._prompt_tokens // _STEP_TOKENS

    def _submit(self, engine: xgdn.Engine, batch: int, *, max_new_tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(batch):
            prompt = torch.randint(0, engine.vocab_size, (self._prompt_tokens,), generator=generator)
            engine.submit(xgdn.Request(prompt.tolist(), max_new_tokens=max_new_tokens, ignore_eos=True))

    def _decode(self, engine: xgdn.Engine, batch: int, slots: int, threads: int) -> ModelRow:
        self._submit(engine, batch, max_new_tokens=1)  # the first steps of a size touch memory that nobody has used yet
        while not engine.is_idle():
            engine.step()
        self._submit(engine, batch, max_new_tokens=self._max_new_tokens(batch))
        steps, times, prefill_seconds = [], [], 0.0
        recorded: dict[str, list[RecordedStep]] = {"prompt": [], "decode": []}
        last = time.perf_counter()
        while not engine.is_idle():
            events, seconds, ops = record_ops(engine.step) if self._profile else (engine.step(), 0.0, [])
            begin, last = last, time.perf_counter()  # a device may compute between two calls
            if error := next((event.error for event in events if event.error), ""):
                raise xgdn.errors.Error(error)
            step = engine.last_step
            if step.num_prefill_tokens > 0:
                prefill_seconds += step.seconds
                recorded["prompt"].append(RecordedStep(step.num_prefill_tokens + step.num_decodes, seconds, ops))
            elif step.num_decodes == batch:
                steps.append(step)
                times.append(1e3 * (last - begin))
                recorded["decode"].append(RecordedStep(batch, seconds, ops))
        timed = steps[_WARM_UP:]
        recorded["decode"] = recorded["decode"][_WARM_UP:]
        return ModelRow(
            batch=batch,
            threads=threads,
            times=times[_WARM_UP:],
            engine=statistics.median(1 - step.forward_seconds / step.seconds for step in timed),
            roofline=1e3
            * _roofline(engine.streamed_bytes, engine.memory_bytes["states"] * batch // slots, self._args.device),
            prefill=batch * self._prompt_tokens / prefill_seconds,
            profiles=[step_profile(kind, steps) for kind, steps in recorded.items()] if self._profile else [],
        )


def _roofline(read_bytes: int, updated_bytes: int, device: str) -> float:
    """Return the seconds to sum over `read_bytes` and to update `updated_bytes` in place, in the memory of `device`."""
    on_host = torch.device(device).type == "cpu"
    memory = torch.ones(BYTES_BEYOND_CACHES // 4, device=device)

    def finished(result: torch.Tensor) -> None:
        if not on_host:
            result.view(-1)[0].item()

    times = take_turns([lambda _: finished(memory.sum()), lambda _: finished(memory.mul_(1.0))], 0.3)
    read, update = (1e-6 * min(taken) / BYTES_BEYOND_CACHES for taken in times)
    return read * read_bytes + update * updated_bytes
