# SPDX-License-Identifier: Apache-2.0
"""A small Qwen3.5, trained on Python's standard library, continues the same prompts in xgdn and in transformers.

Exits with 1 when a single token differs, or when the perplexity of a held-out text does in its first four digits.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

import xgdn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is here; nothing is downloaded
import transformers
from tokenizers import Tokenizer

MODEL = Path(__file__).parent / "tiny_model" / "checkpoint"
PROMPT_SIZES = (5, 17, 64, 130, 300)  # chunks are 64 tokens long: less than one, exactly one, several
NEW_TOKENS = 32
WRITING_PROMPT = 'def read_file(path):\n    """'
WRITING_TOKENS = 120
WINDOW = 512  # tokens of the held-out text that are read at once
NUM_WINDOWS = 8


@dataclass
class Run:
    """The continuations of all prompts, and the time they took."""

    name: str
    tokens: list[list[int]]
    seconds_to_first_token: list[float]  # of each prompt, from the moment it was handed in
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(len(tokens) for tokens in self.tokens) / self.seconds


def run_engine(engine: xgdn.Engine, prompts: Sequence[Sequence[int]], name: str, num_new: int = NEW_TOKENS) -> Run:
    """Run all prompts at once, as a server would."""
    begin = time.perf_counter()
    ids = [engine.submit(xgdn.Request(list(prompt), max_new_tokens=num_new)) for prompt in prompts]
    tokens: dict[int, list[int]] = {request_id: [] for request_id in ids}
    first: dict[int, float] = {}
    while not engine.is_idle():
        for event in engine.step():
            if event.error:
                raise RuntimeError(event.error)
            if event.tokens:
                first.setdefault(event.id, time.perf_counter() - begin)
                tokens[event.id] += event.tokens
    return Run(name, [tokens[i] for i in ids], [first[i] for i in ids], time.perf_counter() - begin)


class Stopwatch(transformers.generation.BaseStreamer):
    """A streamer that records the time of the first new token; `generate` passes the prompt before it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def run_transformers(
    model: transformers.Qwen3_5ForCausalLM, prompts: Sequence[Sequence[int]], name: str, num_new: int = NEW_TOKENS
) -> Run:
    """Run one prompt after the other."""
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
            streamer=watch,
        )
        tokens.append(output[0, len(prompt) :].tolist())
        first.append(watch.times[1] - submitted)
    return Run(name, tokens, first, time.perf_counter() - begin)


def one_by_one(engine: xgdn.Engine, prompts: Sequence[Sequence[int]], name: str) -> Run:
    """Run one prompt after the other, for a comparison with transformers under the same conditions."""
    runs = [run_engine(engine, [prompt], name) for prompt in prompts]
    return Run(
        name,
        [run.tokens[0] for run in runs],
        [run.seconds_to_first_token[0] for run in runs],
        sum(run.seconds for run in runs),
    )


def print_continuations(
    console: Console, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], ours: Run, theirs: Run
) -> bool:
    """Print the continuations; return whether all are identical."""
    num_identical = 0
    for prompt, mine, other in zip(prompts, ours.tokens, theirs.tokens, strict=True):
        is_identical = mine == other
        num_identical += is_identical
        verdict = Text("identical", "bold green") if is_identical else Text("DIFFERENT", "bold red")
        console.print(Rule(Text.assemble(f"prompt of {len(prompt)} tokens: ", verdict), align="left", style="dim"))
        last_line = tokenizer.decode(prompt).rsplit("\n", 1)[-1]
        console.print(Text.assemble((last_line, "dim"), tokenizer.decode(mine)))
        if not is_identical:
            console.print(Text.assemble("transformers: ", tokenizer.decode(other)))
    console.print(f"\n{num_identical} of {len(prompts)} continuations of at most {NEW_TOKENS} tokens are identical.\n")
    return num_identical == len(prompts)


def perplexity(logits_of: Callable[[list[int]], torch.Tensor], windows: Sequence[list[int]]) -> float:
    """Return the perplexity; `logits_of` maps T tokens to logits [T, vocab]."""
    losses = [
        torch.nn.functional.cross_entropy(logits_of(window)[:-1].double(), torch.tensor(window[1:]))
        for window in windows
    ]
    return torch.stack(losses).mean().exp().item()


def write(engine: xgdn.Engine, tokenizer: Tokenizer) -> str:
    """Return a sampled text, since greedy ones of so small a model repeat themselves."""
    prompt = tokenizer.encode(WRITING_PROMPT).ids
    sampling = xgdn.SamplingParams(temperature=0.7, top_p=0.95, seed=5)
    [result] = engine.generate([prompt], max_new_tokens=WRITING_TOKENS, sampling=sampling)
    return WRITING_PROMPT + tokenizer.decode(result.tokens)


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
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    held_out = tokenizer.encode((MODEL / "held_out.txt").read_text(encoding="utf-8")).ids
    prompts = [held_out[i * 1000 : i * 1000 + size] for i, size in enumerate(PROMPT_SIZES)]
    windows = [held_out[i * WINDOW : (i + 1) * WINDOW] for i in range(NUM_WINDOWS)]

    engine = xgdn.Engine(MODEL, dtype=torch.float32)
    model = transformers.Qwen3_5ForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    console.print(
        f"A Qwen3.5 of {model.num_parameters() / 1e6:.1f} million weights, trained on Python's standard library, in "
        f"float32; {len(prompts)} prompts from files that it has not seen, greedy, {torch.get_num_threads()} threads"
    )
    with console.status("generating here"):
        run_engine(engine, prompts, "warm-up", num_new=2)
        ours = run_engine(engine, prompts, "xgdn, all in one batch")
        ours_single = one_by_one(engine, prompts, "xgdn, one at a time")
        backends = {op: xgdn.last_backend(op) for op in ("chunk_gated_delta_rule", "gdn_decode_step")}
        our_perplexity = perplexity(engine.prompt_logits, windows)
    with console.status("generating with transformers"), torch.no_grad():
        run_transformers(model, prompts[:1], "warm-up", num_new=2)
        theirs = run_transformers(model, prompts, f"transformers {transformers.__version__}, one at a time")
        their_perplexity = perplexity(lambda ids: model(input_ids=torch.tensor([ids])).logits[0], windows)

    are_identical = print_continuations(console, tokenizer, prompts, ours, theirs)
    console.print(Rule("xgdn writes, at temperature 0.7", align="left", style="dim"))
    console.print(Text(write(engine, tokenizer)))
    console.print(Rule(style="dim"))
    print_times(console, [ours, ours_single, theirs])
    console.print("Backends that ran here: " + ", ".join(f"{op}: {backend}" for op, backend in backends.items()))
    console.print(
        f"Perplexity of {NUM_WINDOWS * WINDOW} held-out tokens: xgdn {our_perplexity:.4f}, "
        f"transformers {their_perplexity:.4f}"
    )
    is_equal = abs(our_perplexity / their_perplexity - 1) < 5e-5
    return 0 if are_identical and ours_single.tokens == theirs.tokens and is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
