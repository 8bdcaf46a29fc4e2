# SPDX-License-Identifier: Apache-2.0
"""Whole models on the GPU beside the same models on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("are_equal", [False, True])
@pytest.mark.parametrize("vocab_size", [131, 1000, 20_003])
def test_tokens_of_the_likeliest_are_those_of_whole_rows(vocab_size: int, are_equal: bool, tmp_path: Path) -> None:
    """Requests that draw from few tokens have those found on the device; with log-probabilities whole rows come.

    With equal logits, far more than any list of the likeliest has room for, the first tokens are the likeliest.
    """
    model = checkpoints.Tiny("wide", checkpoints.qwen3_5, {"vocab_size": vocab_size, "tie_word_embeddings": False})
    directory, _ = checkpoints.make(model, tmp_path)
    if are_equal:
        path = directory / "model.safetensors"
        weights = {name: weight.clone() for name, weight in load_file(path).items()}  # the file is written again
        weights["lm_head.weight"].zero_()
        save_file(weights, path, metadata={"format": "pt"})
    runner = xgdn.RunnerOptions(max_batch_size=8, max_cached_tokens=2048)
    engine = xgdn.Engine(directory, device="cuda", dtype=torch.float32, runner=runner)
    drawn = set()
    for top_k in (1, 2, 20, 131, 256, 257):
        replies = []
        for logprobs in (None, 0):
            for i, length in enumerate(PROMPT_LENGTHS):
                mixed = xgdn.SamplingParams(temperature=0.0) if i == 1 else None
                sampling = xgdn.SamplingParams(
                    temperature=1.3, top_k=top_k, top_p=0.97, min_p=0.01, seed=i, logprobs=logprobs
                )
                prompt = torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(i)).tolist()
                engine.submit(xgdn.Request(prompt, max_new_tokens=12, ignore_eos=True, sampling=mixed or sampling))
            tokens: dict[int, list[int]] = {}
            while not engine.is_idle():
                for event in engine.step():
                    assert not event.error
                    tokens.setdefault(event.id, []).extend(event.tokens)
            replies.append(list(tokens.values()))
        assert replies[0] == replies[1], f"top_k={top_k}"
        of_drawn = {token for i in (0, 2, 3) for token in replies[0][i]}
        if are_equal:
            assert of_drawn <= set(range(top_k)), f"top_k={top_k}"
        drawn |= of_drawn
    assert len(drawn) > 20


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


@pytest.mark.parametrize("replay_states", [False, True])
def test_steps_that_start_ahead_choose_the_same_tokens(replay_states: bool, tmp_path: Path) -> None:
    """Requests that come, end and are cancelled while the device is a step ahead."""
    directory, _ = checkpoints.make(checkpoints.CHECKPOINTS[0], tmp_path)
    prompts = [torch.randint(0, 128, (length,)).tolist() for length in (3, 65, 7, 130, 20, 33, 64, 5, 90, 41)]
    replies, num_ahead = [], []
    for run_ahead in (None, False):
        runner = xgdn.RunnerOptions(
            max_batch_size=4, max_cached_tokens=2048, prefix_cache_slots=2, poison_freed_slots=True, run_ahead=run_ahead
        )
        engine = xgdn.Engine(directory, device="cuda", dtype=torch.float32, replay_states=replay_states, runner=runner)
        tokens: dict[int, list[int]] = {}
        ahead = steps = 0
        waiting = list(enumerate(prompts * 2))
        while waiting or not engine.is_idle():
            if waiting and steps % 3 == 0:
                i, prompt = waiting.pop(0)
                sampling = xgdn.SamplingParams(temperature=float(i % 7 == 6), seed=i)
                stops = list(range(0, 128, 16)) if i % 3 == 0 else []
                request = xgdn.Request(prompt, max_new_tokens=5 + 4 * i, sampling=sampling, stop_token_ids=stops)
                cancelled = engine.submit(request)
                if i == 12:
                    engine.cancel(cancelled)
            for event in engine.step():
                assert not event.error
                tokens.setdefault(event.id, []).extend(event.tokens)
            ahead += engine.last_step.started_ahead
            steps += 1
        assert engine.num_free_slots == 4
        replies.append(tokens)
        num_ahead.append(ahead)
    assert replies[0] == replies[1]
    assert num_ahead[0] > 40
    assert num_ahead[1] == 0


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
