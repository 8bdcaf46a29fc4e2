# SPDX-License-Identifier: Apache-2.0
"""A conversation that grows turn by turn, with and without cached prefixes: the time to the first token of each turn.

    python benchmarks/conversation.py MODEL [--turns 20] [--first 512] [--message 37] [--reply 29] [--replay-states]

Every prompt is the conversation so far: the prompt before, its reply and a new message. Token ids are random, replies
greedy. Both engines take turns in one process; the replies must be the same, or the program ends.
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import xgdn
from markdown_table import markdown
from xgdn.bench.report import machine
from xgdn.cli.failure import fail

SLOTS = 8


def answer(engine: xgdn.Engine, prompt: Sequence[int], max_new_tokens: int) -> tuple[float, int, list[int]]:
    """Seconds to the first token, prompt tokens that were cached, and the reply."""
    request = xgdn.Request(list(prompt), max_new_tokens=max_new_tokens, ignore_eos=True)
    begin, first, num_cached, reply = time.perf_counter(), 0.0, 0, []
    for event in engine.stream([request]):
        if event.tokens and not reply:
            first = time.perf_counter() - begin
        reply += event.tokens
        num_cached = event.num_cached
    return first, num_cached, reply


def main(
    model: Path,
    turns: int = 20,
    first: Annotated[int, typer.Option(help="Tokens of the first prompt.")] = 512,
    message: Annotated[int, typer.Option(help="Tokens of each further message.")] = 37,
    reply: Annotated[int, typer.Option(help="Tokens of each reply.")] = 29,
    replay_states: bool = False,
    quantize: str | None = None,
) -> None:
    """Measure a conversation."""
    tokens = first + turns * (message + reply) + reply
    engines = [
        xgdn.Engine(
            model,
            replay_states=replay_states,
            quantize=quantize,
            runner=xgdn.RunnerOptions(max_batch_size=2, max_cached_tokens=2 * tokens, prefix_cache_slots=slots),
        )
        for slots in (SLOTS, 0)
    ]
    draw = random.Random(1)
    words = range(min(1000, engines[0].vocab_size))
    prompt = draw.choices(words, k=first)
    for engine in engines:
        answer(engine, draw.choices(words, k=first), 2)  # the first use of the memory
    lines, times = [], []
    for turn in range(1, turns + 1):
        (cached, num_cached, text), (plain, _, want) = (answer(engine, prompt, reply) for engine in engines)
        if text != want:
            fail(f"turn {turn}: expected the reply without cached prefixes, {want}, got {text}")
        lines.append([str(turn), str(len(prompt)), str(num_cached), f"{cached * 1e3:.1f}", f"{plain * 1e3:.1f}"])
        times.append(cached)
        prompt += text + draw.choices(words, k=message)
    print(machine())
    print(markdown(["turn", "prompt", "cached", "to first token, ms", "without the cache, ms"], lines))
    print(f"the last turn took {times[-1] / times[1]:.2f} of the second; all replies equal")


if __name__ == "__main__":
    typer.run(main)
