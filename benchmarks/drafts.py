# SPDX-License-Identifier: Apache-2.0
"""Greedy answers with drafts and without: tokens per second, one request at a time.

    python benchmarks/drafts.py [MODEL] [--text FILE] [--pieces 8] [--drafts off,lookup:4,mtp:1] [--rounds 4]

Prompts are pieces of a text, of the small model's held-out Python sources unless another is given; random tokens for a
model whose tokenizer knows no word of it. The engines take turns in one process; the answers must be the same, or the
program ends. A model without an MTP head gets one that is untrained: its drafts are as good as none, its steps cost
what those of a trained one do. `to break even`: how many drafts of a step must be right for the speed of the first.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer

import xgdn
from markdown_table import markdown
from untrained_head import has_head, with_untrained_head
from xgdn.bench.report import machine
from xgdn.cli.failure import fail

SMALL = Path(__file__).parents[1] / "examples" / "tiny_model" / "checkpoint"
PIECE, STEP = 1500, 3000  # characters
RANDOM_TOKENS = 400


def load(model: Path, drafts: str) -> xgdn.Engine:
    """An engine by its name: off, or a source of drafts and their number."""
    source, _, count = drafts.partition(":")
    return xgdn.Engine(
        model, dtype=torch.bfloat16, replay_states=True, speculate=source, draft_tokens=int(count or "0")
    )


def make_prompts(model: Path, text: Path, count: int, vocab_size: int) -> list[list[int]]:
    """Pieces of the text, or random tokens."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    source = text.read_text(encoding="utf-8")
    prompts = [tokenizer.encode(source[i * STEP : i * STEP + PIECE]).ids for i in range(count)]
    if all(len(set(prompt)) > 1 for prompt in prompts):
        return prompts
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (RANDOM_TOKENS,), generator=draw).tolist() for _ in range(count)]


def answer(engine: xgdn.Engine, prompt: list[int], new_tokens: int) -> tuple[list[int], float]:
    """The tokens, and the seconds from the first of them to the last."""
    tokens: list[int] = []
    begin = 0.0
    for event in engine.stream([xgdn.Request(prompt, max_new_tokens=new_tokens, ignore_eos=True)]):
        if event.tokens and not tokens:
            begin = time.perf_counter()
        tokens += event.tokens
    return tokens, time.perf_counter() - begin


def main(
    model: Annotated[Path, typer.Argument(help="Directory with config.json and safetensors.")] = SMALL,
    text: Path = SMALL / "held_out.txt",
    drafts: Annotated[
        str, typer.Option(help="Source and number of drafts of each engine; the first is the baseline.")
    ] = "off,lookup:4,lookup:8,mtp:1,mtp:2,mtp:4",
    pieces: int = 8,
    new_tokens: int = 200,
    rounds: int = 4,
) -> None:
    """Measure drafts."""
    names = drafts.split(",")
    with tempfile.TemporaryDirectory() as folder:
        has_untrained = any(name.startswith("mtp") for name in names) and not has_head(model)
        served = with_untrained_head(model, Path(folder)) if has_untrained else model
        engines = {name: load(served, name) for name in names}
    prompts = make_prompts(model, text, pieces, engines[names[0]].vocab_size)
    times: dict[str, list[float]] = {name: [] for name in names}
    answers: dict[str, list[list[int]]] = {}
    for _ in range(rounds):
        for name, engine in engines.items():
            results = [answer(engine, prompt, new_tokens) for prompt in prompts]
            times[name].append(sum(seconds for _, seconds in results))
            answers[name] = [tokens for tokens, _ in results]
    if any(answers[name] != answers[names[0]] for name in names):
        fail("expected the same answers with any drafts, got others")
    num_tokens = len(prompts) * (new_tokens - 1)  # behind the first, which the prompt gives
    first_step = min(times[names[0]]) / (num_tokens - engines[names[0]].speculation_stats.num_right / rounds)
    lines = []
    for name, engine in engines.items():
        stats, seconds = engine.speculation_stats, min(times[name])
        step = seconds / (num_tokens - stats.num_right / rounds)
        right = f"{stats.num_right / stats.num_drafted:.2f}" if stats.num_drafted else ""
        even = f"{step / first_step - 1:.2f}" if stats.num_drafted else ""
        ratio = f"{min(times[names[0]]) / seconds:.2f}"
        lines.append([name, f"{num_tokens / seconds:,.0f}", ratio, right, f"{step * 1e3:.2f}", even])
    print(machine())
    if has_untrained:
        print("the MTP head is untrained")
    print(markdown(["drafts", "tokens/s", "of the first", "right", "ms a step", "to break even"], lines))


if __name__ == "__main__":
    typer.run(main)
