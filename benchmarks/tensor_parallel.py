# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of a model that one process has, and of the same model that several share.

python benchmarks/tensor_parallel.py MODEL --tensor-parallel 1,2 --device cpu|cuda --batch 1,8 [--json]

Greedy, all sequences of a batch at once; the tokens of every number of processes are compared with those of the first,
and the share of equal ones is printed. The bench starts the processes itself, one engine after the other. --threads on
a host are of all processes together, in equal shares.
"""

import json
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import xgdn
from xgdn.cli.failure import errors_in_one_line
from xgdn.cli.options import ModelArgument, parse_counts


def _prompts(vocab_size: int, batch: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (batch, length), generator=generator).tolist()


def measure(engine: xgdn.Engine, batch: int, prompt_tokens: int, output_tokens: int) -> tuple[dict[str, Any], Any]:
    """Prompt and decode rates of one batch, in tokens per second of all sequences, and the tokens."""
    prompts = _prompts(engine.vocab_size, batch, prompt_tokens)
    for prompt in prompts:  # memory that nobody has touched yet, and what a device prepares at the first step
        engine.submit(xgdn.Request(prompt, max_new_tokens=8, ignore_eos=True))
    while not engine.is_idle():
        engine.step()
    ids = [engine.submit(xgdn.Request(p, max_new_tokens=output_tokens, ignore_eos=True)) for p in prompts]
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    prefill_seconds = decode_seconds = 0.0
    num_decoded = 0
    while not engine.is_idle():
        began = time.perf_counter()
        events = engine.step()
        seconds = time.perf_counter() - began
        if error := next((event.error for event in events if event.error), ""):
            raise xgdn.errors.Error(error)
        for event in events:
            tokens[event.id] += event.tokens
        if engine.last_step.num_prefill_tokens > 0:
            prefill_seconds += seconds
        else:
            decode_seconds += seconds
            num_decoded += sum(len(event.tokens) for event in events)
    rates = {
        "prompt_tokens_per_second": batch * prompt_tokens / prefill_seconds,
        "decode_tokens_per_second": num_decoded / decode_seconds,
        "ms_per_decode_step": 1e3 * decode_seconds * batch / num_decoded,
    }
    return rates, [tokens[i] for i in ids]


def main(
    model: ModelArgument,
    tensor_parallel: Annotated[str, typer.Option(metavar="N,..", help="Numbers of processes.")] = "1,2",
    batch: Annotated[str, typer.Option(metavar="B,..", help="Batch sizes.")] = "1,8",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt in tokens.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=2, help="Length of each reply in tokens.")] = 64,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of all processes together; else what an engine takes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure a model with each number of processes."""
    worlds, batches = parse_counts(tensor_parallel, "--tensor-parallel"), parse_counts(batch, "--batch")
    of_process = torch.get_num_threads()
    first: dict[int, Any] = {}
    rows = []
    for world in worlds:
        torch.set_num_threads(of_process if threads is None else max(threads // world, 1))
        runner = xgdn.RunnerOptions(
            max_batch_size=max(batches),
            max_cached_tokens=max(batches) * (prompt_tokens + output_tokens + 16),
            max_tokens_per_step=2048,
        )
        with errors_in_one_line():
            engine = xgdn.Engine(
                model, device=device, dtype=getattr(torch, dtype), tensor_parallel=world, runner=runner
            )
            for size in batches:
                rates, tokens = measure(engine, size, prompt_tokens, output_tokens)
                known = first.setdefault(size, tokens)
                pairs = [(x, y) for a, b in zip(known, tokens, strict=True) for x, y in zip(a, b, strict=True)]
                row = {
                    "tensor_parallel": world,
                    "batch": size,
                    **rates,
                    "weight_bytes_of_rank_0": engine.memory_bytes["weights"],
                    "equal_tokens": sum(x == y for x, y in pairs) / len(pairs),
                }
                rows.append(row)
                if not as_json:
                    typer.echo(
                        "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
                    )
            engine.close()
    if as_json:
        name = platform.processor() or platform.machine()
        where = torch.cuda.get_device_name() if device.startswith("cuda") else name
        options = {"model": Path(model).name, "dtype": dtype, "prompt_tokens": prompt_tokens, "threads": threads}
        typer.echo(json.dumps({"device": where, "torch": torch.__version__, **options, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
