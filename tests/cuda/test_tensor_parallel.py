# SPDX-License-Identifier: Apache-2.0
"""A model that two GPUs share, over NCCL, beside the same model on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import xgdn
from rank_processes import expect_errors_after_a_kill

OPTIONS: dict[str, Any] = {
    "device": "cuda:0",
    "dtype": torch.float32,
    "runner": xgdn.RunnerOptions(max_batch_size=8, max_cached_tokens=4096, prefix_cache_slots=2),
}


@pytest.fixture(autouse=True)
def two_gpus() -> None:
    if (count := torch.cuda.device_count()) < 2:
        pytest.skip(f"needs two GPUs, got {count}")


def replies(engine: xgdn.Engine) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 128, (length,), generator=generator).tolist() for length in (3, 65, 7, 130, 300)]

    def tokens(**options: Any) -> list[list[int]]:
        sampling = xgdn.SamplingParams(seed=3, **options)
        results = engine.generate(prompts, max_new_tokens=16, ignore_eos=True, sampling=sampling)
        return [result.tokens for result in results]

    return {
        "greedy": tokens(),
        "again": tokens(),
        "top_k": tokens(temperature=0.8, top_k=9),
        "top_p": tokens(temperature=0.8, top_p=0.9),
        "logits": engine.prompt_logits(prompts[1]).cpu(),
    }


@pytest.mark.parametrize("model", checkpoints.CHECKPOINTS, ids=str)
def test_tokens_are_those_of_one_gpu(model: checkpoints.Tiny, tmp_path: Path) -> None:
    directory, _ = checkpoints.make(model, tmp_path)
    want = replies(xgdn.Engine(directory, **OPTIONS))
    engine = xgdn.Engine(directory, tensor_parallel=2, **OPTIONS)
    try:
        got = replies(engine)
    finally:
        engine.close()
    torch.testing.assert_close(got.pop("logits"), want.pop("logits"), rtol=1e-3, atol=1e-3)
    assert got == want


def test_a_session_goes_on_at_another_degree(tmp_path: Path) -> None:
    directory, _ = checkpoints.make(checkpoints.CHECKPOINTS[0], tmp_path)
    prompt = list(range(20)) * 5
    seen = []
    for world in (1, 2):
        engine = xgdn.Engine(directory, tensor_parallel=world, **OPTIONS)
        session = xgdn.Session(engine)
        first = session.generate(prompt, max_new_tokens=16, ignore_eos=True).tokens
        session.save(tmp_path / f"{world}.safetensors")
        second = session.generate([5, 6], max_new_tokens=16, ignore_eos=True).tokens
        seen.append((first, second))
        engine.close()
    assert seen[0] == seen[1]
    engine = xgdn.Engine(directory, **OPTIONS)
    loaded = xgdn.Session.load(engine, tmp_path / "2.safetensors")
    assert loaded.generate([5, 6], max_new_tokens=16, ignore_eos=True).tokens == seen[0][1]


def test_a_killed_rank_ends_every_request(tmp_path: Path) -> None:
    directory, _ = checkpoints.make(checkpoints.CHECKPOINTS[0], tmp_path)
    engine = xgdn.Engine(directory, tensor_parallel=2, **OPTIONS)
    expect_errors_after_a_kill(engine)
    engine.close()
