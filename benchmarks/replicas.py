# SPDX-License-Identifier: Apache-2.0
"""Conversations on replicas behind Ray Serve (examples/ray_serve): time to first token and cached share.

    PYTHONPATH=examples python benchmarks/replicas.py MODEL [--conversations 6] [--turns 5]

Two replicas of one thread, routed by prefix and by Ray Serve's own router, and one replica of two threads. All
conversations are held at once; every prompt is the conversation so far, in the words of random_checkpoint.py. Runs with
the interpreter of an environment with Ray, such as that of `make ray-test`: build/ray/environment/bin/python.
"""

import json
import random
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import ray
import typer
from ray import serve

from markdown_table import markdown
from ray_serve.app import build
from ray_serve.arguments import Arguments
from xgdn.bench.report import machine

ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "2 replicas x 1 thread, by prefix": {"min_replicas": 2, "threads": 1},
    "2 replicas x 1 thread, Ray Serve's own router": {"min_replicas": 2, "threads": 1, "routing": "load"},
    "1 replica x 2 threads": {"min_replicas": 1, "max_replicas": 1, "threads": 2},
}


@dataclass(frozen=True)
class Turn:
    first_token: float  # seconds
    prompt_tokens: int
    cached_tokens: int


def answer(url: str, model: str, prompt: str, num_tokens: int) -> tuple[Turn, str]:
    """Stream a completion; return its figures and its text."""
    body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    begin, first, text, usage = time.perf_counter(), 0.0, "", {}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            document = json.loads(line.removeprefix("data: "))
            first = first or time.perf_counter() - begin
            text += "".join(choice["text"] for choice in document["choices"])
            usage = document["usage"] or usage
    return Turn(first, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]), text


def conversation(url: str, model: str, seed: int, turns: int, first: int, message: int, reply: int) -> list[Turn]:
    draw = random.Random(seed)
    prompt, told = "", []
    for turn in range(turns):
        words = (f"word{draw.randrange(1000)}" for _ in range(message if turn else first))
        prompt = " ".join([prompt, *words]).strip()
        figures, text = answer(url, model, prompt, reply)
        told.append(figures)
        prompt = f"{prompt} {text.strip()}"
    return told


@contextmanager
def served(model: Path, port: int, **arguments: Any) -> Iterator[str]:
    """The address of an application that is ready."""
    serve.run(build(Arguments(model=model, max_cached_tokens=2**15, prefix_cache_slots=32, **arguments)))
    yield f"http://127.0.0.1:{port}"
    serve.delete("default")


def main(
    model: Path,
    conversations: int = 6,
    turns: int = 5,
    first: Annotated[int, typer.Option(help="Tokens of the first prompt.")] = 256,
    message: Annotated[int, typer.Option(help="Tokens of each further message.")] = 64,
    reply: Annotated[int, typer.Option(help="Tokens of each reply.")] = 16,
) -> None:
    """Measure every arrangement."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": port})
    lines = []
    for name, arguments in ARRANGEMENTS.items():
        with served(model, port, **arguments) as url, ThreadPoolExecutor(conversations) as clients:
            begin = time.perf_counter()
            held = list(
                clients.map(
                    lambda seed, url=url: conversation(url, model.resolve().name, seed, turns, first, message, reply),
                    range(conversations),
                )
            )
            seconds = time.perf_counter() - begin
        later = sorted(turn.first_token for told in held for turn in told[1:])
        opening = statistics.median(told[0].first_token for told in held)
        every = [turn for told in held for turn in told]
        share = sum(turn.cached_tokens for turn in every) / sum(turn.prompt_tokens for turn in every)
        figures = [f"{share:.0%}", f"{opening:.2f}", f"{statistics.median(later):.2f}", f"{later[-1]:.2f}"]
        lines.append([name, *figures, f"{seconds:.1f}"])
    serve.shutdown()
    ray.shutdown()
    print("  ".join(f"{name} {value}" for name, value in machine().items()), f" ray {ray.__version__}")
    print(f"{conversations} conversations of {turns} turns")
    headings = ["", "cached", "first turn, s", "later turns, s (median)", "(longest)", "all, s"]
    print(markdown(headings, lines))


if __name__ == "__main__":
    typer.run(main)
