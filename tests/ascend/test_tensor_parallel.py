# SPDX-License-Identifier: Apache-2.0
"""A model that processes share on devices of their own: torch_npu's process group above the emulated HCCL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import xgdn
from collective_ranks import part
from rank_processes import expect_errors_after_a_kill, run_ranks
from test_backend_model import HEAD_DIMS, NEW_TOKENS, Engines, compared_tokens, make_prompts

MOE, ONE_KEY_HEAD = (checkpoints.CHECKPOINTS[i] for i in (2, 3))
MODELS = {
    "one_key_head": replace(ONE_KEY_HEAD, changes=ONE_KEY_HEAD.changes | HEAD_DIMS),
    "qwen3_5_moe": replace(MOE, changes=MOE.changes | HEAD_DIMS),
}
OPTIONS: dict[str, Any] = {
    "device": "npu:0",
    "dtype": torch.bfloat16,
    "state_dtype": torch.bfloat16,
    "runner": xgdn.RunnerOptions(max_batch_size=8, max_cached_tokens=4096),
}


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATED_CANN_DEVICES", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_collectives_of_three_ranks() -> None:
    seen = run_ranks(3, Path(__file__).parent / "collective_ranks.py")
    for rank, of_rank in enumerate(seen):
        assert of_rank["communicators"] == [[rank, 3, rank]]
        for name in ("float32", "bfloat16", "float16", "int64"):
            dtype = getattr(torch, name)
            terms = [part(it, dtype).to(torch.float32 if dtype.is_floating_point else dtype) for it in range(3)]
            want = (terms[0] + terms[1] + terms[2]).to(dtype)
            assert torch.equal(torch.tensor(of_rank[name], dtype=dtype), want), f"{name} on rank {rank}"
        assert of_rank["gathered"] == [[r * 10 + i for i in range(4)] for r in range(3)]
        assert of_rank["broadcast"] == [20, 21, 22, 23]
        assert of_rank["unwaited"] == [[1.0] * 3, [3.0] * 3]
        # A barrier is a sum of one number.
        assert of_rank["collectives"] == ["AllReduce"] * 4 + ["AllGather", "Broadcast", "AllReduce", "AllReduce"]
        assert "rank 2: expected AllReduce of 4 fp32, got AllReduce of 4 int32" in of_rank["dtypes"]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_one_device(name: str, tmp_path: Path) -> None:
    """Or, where the two round to another token, near ties; sums of halves in bfloat16 round otherwise than a whole."""
    directory, _ = checkpoints.make(MODELS[name], tmp_path)
    prompts = make_prompts()

    def tokens(engine: xgdn.Engine, **options: Any) -> list[list[int]]:
        sampling = xgdn.SamplingParams(seed=3, **options)
        results = engine.generate(prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True, sampling=sampling)
        assert [result.error for result in results] == [""] * len(prompts)
        return [result.tokens for result in results]

    engine = xgdn.Engine(directory, tensor_parallel=2, **OPTIONS)
    try:
        got, again = tokens(engine), tokens(engine)
        sampled = [tokens(engine, temperature=0.8, **limit) for limit in ({"top_k": 1}, {"top_p": 1e-6})]
        engines = Engines(engine, xgdn.Engine(directory, **OPTIONS), xgdn.Engine(directory, dtype=torch.float32))
        for prompt in prompts:
            two, one = (engines.noise(prompt, it).norm(dim=-1).median() for it in (engines.npu, engines.cpu))
            assert two <= 1.5 * one, f"{len(prompt)} tokens: off by {two:.4g}, one device by {one:.4g}"
        want = tokens(engines.cpu)
        equal = [compared_tokens(engines, *each) for each in zip(prompts, got, want, strict=True)]
    finally:
        engine.close()
    assert got == again == sampled[0] == sampled[1]
    assert sum(equal) >= len(prompts) * NEW_TOKENS // 2, equal


def test_a_killed_rank_ends_every_request(tmp_path: Path) -> None:
    directory, _ = checkpoints.make(MODELS["one_key_head"], tmp_path)
    engine = xgdn.Engine(directory, tensor_parallel=2, **OPTIONS)
    expect_errors_after_a_kill(engine)
    engine.close()
