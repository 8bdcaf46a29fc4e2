# SPDX-License-Identifier: Apache-2.0
"""Whole models on the GPU beside the same models on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import checkpoints
import xgdn

SMALL_MODEL = Path(__file__).parents[2] / "examples" / "tiny_model"
PROMPT_LENGTHS = (3, 65, 7, 130)


@pytest.mark.parametrize("model", checkpoints.CHECKPOINTS, ids=str)
def test_tokens_are_those_of_the_cpu_in_f32(model: checkpoints.Tiny, tmp_path: Path) -> None:
    directory, _ = checkpoints.make(model, tmp_path)
    prompts = [torch.randint(0, 128, (length,)).tolist() for length in PROMPT_LENGTHS]
    options = {"dtype": torch.float32, "runner": xgdn.RunnerOptions(max_batch_size=8, max_cached_tokens=2048)}
    cpu, gpu = (xgdn.Engine(directory, device=device, **options) for device in ("cpu", "cuda"))
    want, got = (engine.generate(prompts, max_new_tokens=12, ignore_eos=True) for engine in (cpu, gpu))
    assert [x.tokens for x in got] == [x.tokens for x in want]
    for prompt in prompts:
        torch.testing.assert_close(gpu.prompt_logits(prompt).cpu(), cpu.prompt_logits(prompt), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("vocab_size", [131, 1000, 20_003])
def test_the_largest_logit_of_any_row_is_found(vocab_size: int, tmp_path: Path) -> None:
    """Rows that are aligned and those that are not, shorter and longer than the threads that search them."""
    model = checkpoints.Tiny("wide", checkpoints.qwen3_5, {"vocab_size": vocab_size, "tie_word_embeddings": False})
    directory, _ = checkpoints.make(model, tmp_path)
    prompts = [torch.randint(0, 128, (length,)).tolist() for length in PROMPT_LENGTHS]
    engine = xgdn.Engine(
        directory,
        device="cuda",
        dtype=torch.float32,
        runner=xgdn.RunnerOptions(max_batch_size=8, max_cached_tokens=2048),
    )
    for prompt, got in zip(prompts, engine.generate(prompts, max_new_tokens=4, ignore_eos=True), strict=True):
        for i, token in enumerate(got.tokens):
            logits = engine.prompt_logits(prompt + got.tokens[:i])[-1]
            assert logits[token] >= logits.max() - 1e-2


def test_sequences_that_go_on_from_others_beside_recorded_steps(tmp_path: Path) -> None:
    """Branches of a prompt and a cached prefix read one slot and write another, which a recorded step does not."""
    directory, _ = checkpoints.make(checkpoints.CHECKPOINTS[0], tmp_path)
    runner = xgdn.RunnerOptions(max_batch_size=8, max_cached_tokens=4096, prefix_cache_slots=4)
    cpu, gpu = (xgdn.Engine(directory, device=device, dtype=torch.float32, runner=runner) for device in ("cpu", "cuda"))
    prompts = [torch.randint(0, 128, (length,)).tolist() for length in (320, 7)]
    prompts.append(prompts[0] + [1, 2, 3])
    for prompt in prompts * 2:
        for n in (1, 3):
            sampling = xgdn.SamplingParams(temperature=1.0 if n > 1 else 0.0, seed=1)
            want, got = (
                engine.generate([prompt], max_new_tokens=12, ignore_eos=True, sampling=sampling, n=n)
                for engine in (cpu, gpu)
            )
            assert [x.tokens for x in got] == [x.tokens for x in want]
            assert [x.num_cached for x in got] == [x.num_cached for x in want]
    assert gpu.prefix_cache_stats.num_found == cpu.prefix_cache_stats.num_found > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_perplexity_of_the_small_model_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    sys.path.insert(0, str(SMALL_MODEL))
    import perplexity

    windows = perplexity.held_out_windows(2)
    exact = perplexity.by_prefill(windows, perplexity.Numbers())
    rows = perplexity.figures(windows, ("cuda",), dtype=dtype, device="cuda")
    assert len(rows) == 4
    for (backend, phase, state), figure in rows.items():
        assert isinstance(figure, float), f"{backend} {phase} {state}: {figure}"
        bound = 1e-3 if dtype == torch.bfloat16 or state == "bf16" else 1e-5
        assert abs(figure / exact - 1) < bound, f"{phase} {state}: {figure} beside {exact}"
