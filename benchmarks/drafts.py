# SPDX-License-Identifier: Apache-2.0
"""Greedy answers with drafts that are looked up and without: tokens per second, one request at a time.

    python benchmarks/drafts.py [MODEL] [--text FILE] [--drafts 0,4,8] [--rounds 4]

Prompts are pieces of a text, of the small model's held-out Python sources unless another is given. The engines take
turns in one process; the answers must be the same, or the program ends.
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer

import xgdn
from markdown_table import markdown
from xgdn.bench.report import machine
from xgdn.cli.failure import fail
from xgdn.cli.options import parse_ids

SMALL = Path(__file__).parents[1] / "examples" / "tiny_model" / "checkpoint"
PIECES, PIECE, STEP = 8, 1500, 3000  # characters


def main(
    model: Path = SMALL,
    text: Path = SMALL / "held_out.txt",
    drafts: Annotated[str, typer.Option(help="Draft tokens of each engine; the first is the baseline.")] = "0,4,8",
    new_tokens: int = 200,
    rounds: int = 4,
) -> None:
    """Measure drafts."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    source = text.read_text(encoding="utf-8")
    prompts = [tokenizer.encode(source[i * STEP : i * STEP + PIECE]).ids for i in range(PIECES)]
    counts = parse_ids(drafts, "--drafts")
    engines = {n: xgdn.Engine(model, dtype=torch.bfloat16, replay_states=True, draft_tokens=n) for n in counts}
    times: dict[int, list[float]] = {n: [] for n in counts}
    answers: dict[int, list[list[int]]] = {}
    for _ in range(rounds):
        for n, engine in engines.items():
            begin = time.perf_counter()
            results = [engine.generate([p], max_new_tokens=new_tokens, ignore_eos=True)[0] for p in prompts]
            times[n].append(time.perf_counter() - begin)
            answers[n] = [result.tokens for result in results]
    if any(answers[n] != answers[counts[0]] for n in counts):
        fail("expected the same answers with any number of drafts, got others")
    lines = []
    for n, engine in engines.items():
        stats = engine.speculation_stats
        right = f"{stats.num_right / stats.num_drafted:.2f}" if stats.num_drafted else ""
        speed = PIECES * new_tokens / min(times[n])
        ratio = f"{min(times[counts[0]]) / min(times[n]):.2f}"
        lines.append([str(n), f"{speed:,.0f}", ratio, right])
    print(machine())
    print(markdown(["draft tokens", "tokens/s", "of the first", "right"], lines))


if __name__ == "__main__":
    typer.run(main)
