# SPDX-License-Identifier: Apache-2.0
"""One of the processes of test_tensor_parallel.py: rank 0 runs the checks and prints what it saw, the others follow.

python tensor_parallel_ranks.py FOLDER_OF_CHECKPOINTS FOLDER_OF_FILES, with torchrun's variables.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import xgdn
from xgdn import Request, RunnerOptions, SamplingParams

WORLD = int(os.environ["WORLD_SIZE"])
CHECKPOINTS = Path(sys.argv[1])
FILES = Path(sys.argv[2])
EVEN = str(FILES / "even")  # a checkpoint whose products are of this library's kernels on every rank
CPU: dict[str, Any] = {"dtype": torch.float32}
# Three sequences at once, prompts in pieces, so few blocks that some are preempted, cached prefixes.
TIGHT = RunnerOptions(
    max_batch_size=3, max_cached_tokens=480, kv_block_size=16, max_tokens_per_step=128, prefix_cache_slots=2
)
ROOMY = RunnerOptions(max_batch_size=4, max_cached_tokens=1024, prefix_cache_slots=2)


def prompts(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)

    def draw(count: int) -> list[int]:
        return torch.randint(0, vocab, (count,), generator=generator).tolist()

    shared = draw(256)
    return [draw(1), draw(70), shared + draw(9), shared + draw(3), draw(150), draw(152), draw(151)]


def observed(engine: xgdn.Engine, requests: list[Request]) -> list[dict[str, Any]]:
    """What each request got, and the events' figures."""
    ids = [engine.submit(request) for request in requests]
    replies: dict[tuple[int, int], dict[str, Any]] = {
        (i, b): {"tokens": [], "error": "", "logprobs": [], "prompt_logprobs": [], "hidden": []}
        for i, request in zip(ids, requests, strict=True)
        for b in range(request.n)
    }
    while not engine.is_idle():
        for event in engine.step():
            reply = replies[event.id, event.branch]
            reply["tokens"] += event.tokens
            reply["error"] += event.error
            reply["logprobs"] += [it.chosen for it in event.logprobs]
            reply["prompt_logprobs"] += [it.chosen for it in event.prompt_logprobs]
            reply["hidden"] = list(event.hidden) or reply["hidden"]
    return list(replies.values())


def batched(engine: xgdn.Engine) -> dict[str, Any]:
    ids = prompts(engine.vocab_size)
    alone = observed(engine, [Request(ids[2], max_new_tokens=2, ignore_eos=True)])
    together = observed(engine, [Request(p, max_new_tokens=8, ignore_eos=True) for p in ids[:4]])
    crowd = observed(engine, [Request(p, max_new_tokens=20, ignore_eos=True) for p in ids[4:]])
    stats = engine.prefix_cache_stats
    return {
        "replies": alone + together + crowd,
        "num_preemptions": engine.num_preemptions,
        "num_found": stats.num_found,
        "memory": engine.memory_bytes,
        "logits": engine.prompt_logits(ids[1])[-1].tolist(),
    }


def sampled(engine: xgdn.Engine) -> dict[str, Any]:
    prompt = prompts(engine.vocab_size)[1]

    def of(**options: Any) -> Request:
        return Request(prompt, max_new_tokens=16, ignore_eos=True, sampling=SamplingParams(seed=5, **options))

    requests = {
        "top_k": of(temperature=0.9, top_k=7),
        "top_k_p_min_p": of(temperature=1.5, top_k=30, top_p=0.8, min_p=0.02),
        "top_p": of(temperature=1.0, top_p=0.7),
        "all": of(temperature=1.0),
        "logprobs": of(temperature=0.0, logprobs=3),
        "penalties": of(temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.5),
        "bias": of(temperature=0.0, logit_bias={3: 100.0}),
        "branches": Request(prompt, max_new_tokens=8, n=3, sampling=SamplingParams(temperature=1.0, top_k=9, seed=1)),
        "prompt": Request(prompt, max_new_tokens=2, prompt_logprobs=2, wants_hidden=True),
    }
    return {name: observed(engine, [request]) for name, request in requests.items()} | {
        "together": observed(engine, list(requests.values()))
    }


def drafted(engine: xgdn.Engine) -> dict[str, Any]:
    repeated = prompts(engine.vocab_size)[1][:12] * 6
    biased = SamplingParams(logit_bias={3: 100.0})  # whose text repeats itself
    requests = [Request(repeated, max_new_tokens=20, ignore_eos=True, sampling=s) for s in (SamplingParams(), biased)]
    replies = observed(engine, requests)
    return {"replies": replies, "num_right": engine.speculation_stats.num_right}


def beside_others(engine: xgdn.Engine) -> dict[str, Any]:
    """The same requests one by one and in one batch."""
    sampling = SamplingParams(logprobs=0)
    requests = [
        Request(p, max_new_tokens=6, ignore_eos=True, sampling=sampling) for p in prompts(engine.vocab_size)[:3]
    ]
    alone = [observed(engine, [request])[0] for request in requests]
    return {"alone": alone, "together": observed(engine, requests)}


def conversation(engine: xgdn.Engine, save: Path | None, load: Path | None) -> dict[str, Any]:
    """A session's second reply: to what was saved elsewhere, or to its own first."""
    ids = prompts(engine.vocab_size)
    if load is not None:
        session = xgdn.Session.load(engine, load)
    else:
        session = xgdn.Session(engine)
        session.generate(ids[2], max_new_tokens=5, ignore_eos=True)
    if save is not None:
        session.save(save)
    kept = session.num_kept
    found = engine.prefix_cache_stats.num_found
    reply = session.generate(ids[0], max_new_tokens=12, ignore_eos=True)
    return {"kept": kept, "tokens": reply.tokens, "found": engine.prefix_cache_stats.num_found - found}


@contextmanager
def engine_of(name: str, world: int, runner: RunnerOptions, **options: Any) -> Iterator[xgdn.Engine]:
    engine = xgdn.Engine(CHECKPOINTS / name, runner=runner, tensor_parallel=world, **CPU | options)
    try:
        yield engine
    finally:
        engine.close()


def check_everything(worlds: tuple[int, ...]) -> dict[str, Any]:
    """Of several ranks and of one, in the same order on all of them."""
    seen: dict[str, Any] = {}
    for folder in sorted(CHECKPOINTS.iterdir()):
        for world in worlds:
            seen.setdefault("errors", {})
            if world > 1 and (error := plan_error(folder.name)):
                seen["errors"][folder.name] = error
                continue
            with engine_of(folder.name, world, TIGHT) as engine:
                seen[f"batched/{folder.name}/{world}"] = batched(engine)
    for world in worlds:
        with engine_of("qwen3_5-dense", world, ROOMY) as engine:
            seen[f"sampled/{world}"] = sampled(engine)
        with engine_of("qwen3_5-dense", world, ROOMY, replay_states=True, draft_tokens=4) as engine:
            seen[f"drafted/{world}"] = drafted(engine)
    for world in worlds:
        with engine_of(EVEN, world, ROOMY, dtype=torch.bfloat16) as engine:
            seen[f"beside/{world}"] = beside_others(engine)
    for states in (False, True):
        for step, (world, save, load) in enumerate([(WORLD, "w", ""), (1, "", "w"), (1, "1", ""), (WORLD, "", "1")]):
            if world not in worlds:
                continue
            with engine_of("qwen3_5-wrapper", world, ROOMY, replay_states=states) as engine:
                files = [FILES / f"{it}-{states}.safetensors" if it else None for it in (save, load)]
                seen[f"session/{states}/{step}"] = conversation(engine, *files)
    return seen


def plan_error(name: str) -> str:
    try:
        xgdn.plan(CHECKPOINTS / name, tensor_parallel=WORLD)
    except xgdn.errors.RequestError as error:
        return str(error)
    return ""


def follow_everything() -> None:
    """Make the engines that rank 0 makes, each of which follows."""
    names = [(name, {}, TIGHT) for name in sorted(os.listdir(CHECKPOINTS)) if not plan_error(name)]
    names += [("qwen3_5-dense", {}, ROOMY), ("qwen3_5-dense", {"replay_states": True, "draft_tokens": 4}, ROOMY)]
    names += [(EVEN, {"dtype": torch.bfloat16}, ROOMY)]
    names += [("qwen3_5-wrapper", {"replay_states": states}, ROOMY) for states in (False, False, True, True)]
    for name, options, runner in names:
        with pytest.raises(SystemExit, check=lambda end: end.code == 0):
            xgdn.Engine(CHECKPOINTS / name, runner=runner, tensor_parallel=WORLD, **CPU | options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_rank() > 0:
        follow_everything()
    else:
        json.dump(check_everything((1, WORLD)), sys.stdout)
    dist.destroy_process_group()
