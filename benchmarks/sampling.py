# SPDX-License-Identifier: Apache-2.0
"""What the choice of tokens costs a step: every sampling parameter, flat and peaked distributions, beside torch.

    python benchmarks/sampling.py [--batch 32] [--vocab 248320] [--threads 2]

Steps an engine over a model of one small layer with a large vocabulary, all of whose requests have the parameter, and
prints the median time of a decode step outside the model's forward. The roofline is one read of the logits. torch does
the same with the usual compositions of its ops, on the logits of one step in memory.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

import xgdn
from markdown_table import markdown
from xgdn.bench.report import machine

PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top_k 40": {"temperature": 1.0, "top_k": 40},
    "top_k 4000": {"temperature": 1.0, "top_k": 4000},
    "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top_p 0.1": {"temperature": 1.0, "top_p": 0.1},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "logit_bias": {"logit_bias": {5: 1.0}},
    "logprobs 5": {"logprobs": 5},
    "all": {
        "temperature": 1.0,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {5: 1.0},
        "logprobs": 5,
    },
}
# Standard deviations of the logits: that of random weights in the shape of Qwen3.5-0.8B; with few likely tokens.
DEVIATIONS = {"flat": 0.64, "peaked": 5.0}
HIDDEN = 256


def draw(probabilities: torch.Tensor) -> torch.Tensor:
    """Draw a token a row. torch.multinomial takes many times as long."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def draw_nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    probabilities, order = torch.softmax(logits, -1).sort(descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    return order.gather(-1, draw(probabilities.masked_fill_(outside, 0))[:, None])


def draw_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    values, tokens = logits.topk(k)
    return tokens.gather(-1, draw(torch.softmax(values, -1))[:, None])


def draw_min_p(logits: torch.Tensor, share: float) -> torch.Tensor:
    probabilities = torch.softmax(logits, -1)
    return draw(probabilities.masked_fill_(probabilities < share * probabilities.amax(-1, keepdim=True), 0))


TORCH: dict[str, Callable[[torch.Tensor], object]] = {
    "greedy": lambda logits: logits.argmax(-1),
    "temperature": lambda logits: draw(torch.softmax(logits, -1)),
    "top_k 40": lambda logits: draw_top_k(logits, 40),
    "top_k 4000": lambda logits: draw_top_k(logits, 4000),
    "min_p 0.05": lambda logits: draw_min_p(logits, 0.05),
    "top_p 0.9": lambda logits: draw_nucleus(logits, 0.9),
    "top_p 0.1": lambda logits: draw_nucleus(logits, 0.1),
    "logprobs 5": lambda logits: torch.log_softmax(logits, -1).topk(5),
}


def write_model(folder: Path, vocab: int, deviation: float) -> None:
    """Write a checkpoint whose logits are normal, with this standard deviation."""
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = transformers.Qwen3_5ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=deviation / HIDDEN**0.5)
    model.save_pretrained(folder)


def of_engine(engine: xgdn.Engine, parameters: dict[str, Any], batch: int, steps: int) -> float:
    """Return the median time of a full decode step outside the forward, in ms."""
    for i in range(batch):
        sampling = xgdn.SamplingParams(seed=i, **parameters)
        prompt = [i + 1, *range(100, 115)]
        engine.submit(xgdn.Request(prompt, max_new_tokens=steps, ignore_eos=True, sampling=sampling))
    times = []
    while not engine.is_idle():
        engine.step()
        step = engine.last_step
        if step.num_decodes == batch:
            times.append(step.seconds - step.forward_seconds)
    return 1e3 * statistics.median(times)


def of_torch(act: Callable[[torch.Tensor], object], logits: torch.Tensor, steps: int) -> float:
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        act(logits)
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def main(
    batch: int = 32, vocab: int = 248320, steps: int = 12, threads: Annotated[int, typer.Option(min=1)] = 2
) -> None:
    """Measure every sampling parameter."""
    torch.set_num_threads(threads)
    print(machine())
    rows: dict[str, list[str]] = {name: [name] for name in PARAMETERS}
    for deviation in DEVIATIONS.values():
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), vocab, deviation)
            engine = xgdn.Engine(folder, runner=xgdn.RunnerOptions(max_batch_size=batch, max_cached_tokens=batch * 256))
        logits = deviation * torch.randn(batch, vocab)
        read = of_torch(lambda x: x.sum(), logits, steps)
        for name, parameters in PARAMETERS.items():
            rows[name].append(f"{of_engine(engine, parameters, batch, steps):.2f}")
            rows[name].append(f"{of_torch(TORCH[name], logits, min(steps, 5)):.1f}" if name in TORCH else "")
        print(f"standard deviation {deviation}: one read of the logits {read:.2f} ms")
    headings = [f"{name}, {who}" for name in DEVIATIONS for who in ("ms", "torch")]
    print(f"ms per step outside the forward, batch {batch}, vocabulary {vocab}, {threads} threads")
    print(markdown(["", *headings], rows.values()))


if __name__ == "__main__":
    typer.run(main)
