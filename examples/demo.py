# SPDX-License-Identifier: Apache-2.0
"""A small random Qwen3.5 model continues the same prompts here and in transformers, side by side.

Exits with 1 when a single token differs.
"""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

import xgdn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is made here; nothing is downloaded
import transformers

PROMPT_SIZES = (5, 17, 64, 130, 300)  # chunks are 64 tokens long: less than one, exactly one, several
NEW_TOKENS = 24
VOCAB_SIZE = 512


@dataclass
class Run:
    """The continuations of all prompts, and how long they took."""

    name: str
    tokens: list[list[int]]
    seconds_to_first_token: list[float]  # of each prompt, from the moment it was handed in
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(len(tokens) for tokens in self.tokens) / self.seconds


def make_model(folder: Path) -> transformers.Qwen3_5ForCausalLM:
    torch.manual_seed(1)
    config = transformers.Qwen3_5TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        initializer_range=0.1,  # large enough for decided choices: the default leaves the logits almost equal
        dtype="float32",
    )
    model = transformers.Qwen3_5ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def run_engine(engine: xgdn.Engine, prompts: Sequence[Sequence[int]], name: str, num_new: int = NEW_TOKENS) -> Run:
    """All prompts at once, as a server would run them."""
    begin = time.perf_counter()
    ids = [engine.submit(xgdn.Request(list(prompt), max_new_tokens=num_new, ignore_eos=True)) for prompt in prompts]
    tokens: dict[int, list[int]] = {request_id: [] for request_id in ids}
    first: dict[int, float] = {}
    while not engine.is_idle():
        for event in engine.step():
            if event.error:
                raise RuntimeError(event.error)
            if event.token is not None:
                first.setdefault(event.id, time.perf_counter() - begin)
                tokens[event.id].append(event.token)
    return Run(name, [tokens[i] for i in ids], [first[i] for i in ids], time.perf_counter() - begin)


class Stopwatch(transformers.generation.BaseStreamer):
    """Notes when the first new token comes; `generate` hands in the prompt before it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def run_transformers(
    model: transformers.Qwen3_5ForCausalLM, prompts: Sequence[Sequence[int]], name: str, num_new: int = NEW_TOKENS
) -> Run:
    """One prompt after the other."""
    tokens, first = [], []
    begin = time.perf_counter()
    for prompt in prompts:
        ids = torch.tensor([prompt])
        watch, submitted = Stopwatch(), time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            streamer=watch,
        )
        tokens.append(output[0, len(prompt) :].tolist())
        first.append(watch.times[1] - submitted)
    return Run(name, tokens, first, time.perf_counter() - begin)


def one_by_one(engine: xgdn.Engine, prompts: Sequence[Sequence[int]], name: str) -> Run:
    """One prompt after the other, for a comparison with transformers under the same conditions."""
    runs = [run_engine(engine, [prompt], name) for prompt in prompts]
    return Run(
        name,
        [run.tokens[0] for run in runs],
        [run.seconds_to_first_token[0] for run in runs],
        sum(run.seconds for run in runs),
    )


def print_continuations(console: Console, prompts: Sequence[Sequence[int]], ours: Run, theirs: Run) -> bool:
    """True when all are identical."""
    num_identical = 0
    for prompt, mine, other in zip(prompts, ours.tokens, theirs.tokens, strict=True):
        is_identical = mine == other
        num_identical += is_identical
        verdict = Text("identical", "bold green") if is_identical else Text("DIFFERENT", "bold red")
        console.print(Rule(Text.assemble(f"prompt of {len(prompt)} tokens: ", verdict), align="left", style="dim"))
        grid = Table.grid(padding=(0, 2))
        grid.add_row("xgdn", " ".join(map(str, mine)))
        grid.add_row("transformers", " ".join(map(str, other)))
        console.print(grid)
    console.print(f"\n{num_identical} of {len(prompts)} continuations of {NEW_TOKENS} tokens are identical.\n")
    return num_identical == len(prompts)


def print_times(console: Console, runs: Sequence[Run]) -> None:
    table = Table("", "time to first token", "tokens per second")
    for run in runs:
        first = 1e3 * sum(run.seconds_to_first_token) / len(run.seconds_to_first_token)
        table.add_row(run.name, f"{first:.1f} ms", f"{run.tokens_per_second:.0f}")
    console.print(table)
    console.print(
        "Time to first token: mean over the prompts. Tokens per second: new tokens, with reading the prompts."
    )


def main() -> int:
    console = Console()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCAB_SIZE, (size,), generator=generator).tolist() for size in PROMPT_SIZES]

    with tempfile.TemporaryDirectory() as folder:
        with console.status("building a random Qwen3.5 checkpoint"):
            model = make_model(Path(folder))
        engine = xgdn.Engine(folder)
        num_weights = sum(weight.numel() for weight in model.parameters())
        console.print(
            f"A random Qwen3.5 of {num_weights / 1e6:.1f} million weights in float32, {len(prompts)} prompts, greedy, "
            f"{torch.get_num_threads()} threads"
        )
        with console.status("generating here"):
            run_engine(engine, prompts, "warm-up", num_new=2)
            ours = run_engine(engine, prompts, "xgdn, all in one batch")
            ours_single = one_by_one(engine, prompts, "xgdn, one at a time")
        backends = {op: xgdn.last_backend(op) for op in ("chunk_gated_delta_rule", "gdn_decode_step")}
        with console.status("generating with transformers"):
            run_transformers(model, prompts[:1], "warm-up", num_new=2)
            theirs = run_transformers(model, prompts, f"transformers {transformers.__version__}, one at a time")

    are_identical = print_continuations(console, prompts, ours, theirs)
    print_times(console, [ours, ours_single, theirs])
    console.print("Backends that ran here: " + ", ".join(f"{op}: {backend}" for op, backend in backends.items()))
    return 0 if are_identical and ours_single.tokens == theirs.tokens else 1


if __name__ == "__main__":
    sys.exit(main())
