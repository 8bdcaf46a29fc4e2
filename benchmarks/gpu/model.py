# SPDX-License-Identifier: Apache-2.0
"""Decode steps and prompts of a whole model on an NVIDIA GPU, beside transformers on the same one.

    python benchmarks/random_checkpoint.py MODEL
    PYTHONPATH=benchmarks python -m gpu.model MODEL [--batch 1,8,32,128] [--prompts 2048,16384] [--json FILE]

The limit of a step is the time to read the weights and the keys and values and to read and write the states once, at
the bandwidth of a copy. First the float32 logits of a prompt are compared with those of the cpu backend.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import xgdn
from gpu.report import device_facts, write_json
from kernels.compare import WrongResult, relative_error
from peers.programs import fail
from xgdn.bench.model import ModelBenchmark
from xgdn.bench.report import print_wide
from xgdn.cli.failure import errors_in_one_line
from xgdn.cli.options import ModelArgument, parse_counts

app = typer.Typer(add_completion=False)

TRANSFORMERS = Path(__file__).parents[1] / "peers" / "model_transformers.py"
REPETITIONS = 3  # of a prompt, after one that is not timed
STEPS_TOGETHER = 4  # a step that starts before it is asked for may end so, and the next one pays
MIN_STEP_TOKENS = 64
CHECKED_TOKENS = 64
LOGITS_BOUND = 1e-4  # the products' sums are in another order


@dataclass(frozen=True)
class Row:
    """A provider's decode steps at a batch size, or its prompts of a length; times in milliseconds."""

    kind: str  # "decode" | "prompt"
    size: int
    provider: str
    min: float
    median: float
    limit: float | None = None  # of a decode step

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.size / self.median

    @property
    def share(self) -> float | None:
        """Fraction of the limit's speed."""
        return None if self.limit is None else self.limit / self.median

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second, "share": self.share}


def row_of(kind: str, size: int, provider: str, times: Sequence[float], limit: float | None = None) -> Row:
    return Row(kind, size, provider, min(times), statistics.median(times), limit)


def step_bytes(weights: int, states: float, kv_rows: float) -> float:
    """Return the bytes that a step must move: the weights and the rows are read, the states read and written."""
    return weights + 2 * states + kv_rows


def check_logits(model: Path, device: str) -> float:
    """Return the relative error of float32 logits on `device`. Raises WrongResult where it is too large."""
    prompt = torch.randint(0, 1000, (CHECKED_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    runner = xgdn.RunnerOptions(max_batch_size=1, max_cached_tokens=2 * CHECKED_TOKENS)
    got, want = (
        xgdn.Engine(model, dtype=torch.float32, device=where, runner=runner).prompt_logits(prompt)
        for where in (device, "cpu")
    )
    error = relative_error(got.cpu(), want)
    if not error <= LOGITS_BOUND:
        raise WrongResult(f"logits differ from the cpu backend's by {error:.1e}, expected at most {LOGITS_BOUND:.1e}")
    return error


def decode_rows(
    model: Path, batches: Sequence[int], args: xgdn.EngineArgs, *, prompt_tokens: int, steps: int, copy_gb_s: float
) -> list[Row]:
    loaded: list[tuple[xgdn.Engine, xgdn.EngineArgs]] = []

    def load(sized: xgdn.EngineArgs) -> xgdn.Engine:
        loaded.append((xgdn.Engine.from_args(model, sized), sized))
        return loaded[-1][0]

    benchmark = ModelBenchmark(load, args, prompt_tokens=prompt_tokens, steps=steps)
    rows = benchmark.run(batches, torch.get_num_threads())
    (engine, sized), memory = loaded[0], loaded[0][0].memory_bytes
    context = prompt_tokens + steps / 2

    def limit(batch: int) -> float:
        states = memory["states"] * batch / sized.max_batch_size
        kv_rows = memory["kv_cache"] * batch * context / sized.max_cached_tokens
        return step_bytes(engine.streamed_bytes, states, kv_rows) / copy_gb_s / 1e6

    return [row_of("decode", row.batch, "xgdn", means(row.times), limit(row.batch)) for row in rows]


def means(times: Sequence[float]) -> list[float]:
    """Return those of STEPS_TOGETHER steps each."""
    return [statistics.fmean(times[i : i + STEPS_TOGETHER]) for i in range(0, len(times), STEPS_TOGETHER)]


def prompt_rows(model: Path, lengths: Sequence[int], device: str) -> list[Row]:
    """Times until the first token, each prompt in one step."""
    longest = max(MIN_STEP_TOKENS, *lengths)
    runner = xgdn.RunnerOptions(max_batch_size=1, max_cached_tokens=longest + 64, max_tokens_per_step=longest)
    engine = xgdn.Engine(model, dtype=torch.bfloat16, device=device, runner=runner)
    rows = []
    for length in lengths:
        prompt = torch.randint(0, engine.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
        times = []
        for _ in range(1 + REPETITIONS):
            start = time.perf_counter()
            engine.generate([prompt], max_new_tokens=1, ignore_eos=True)
            times.append(1e3 * (time.perf_counter() - start))
        rows.append(row_of("prompt", length, "xgdn", times[1:]))
    return rows


def transformers_rows(
    model: Path,
    batches: Sequence[int],
    lengths: Sequence[int],
    *,
    prompt_tokens: int,
    steps: int,
    device: str,
    seconds: float,
) -> list[Row]:
    """Those that end within `seconds`."""
    name = "transformers, FLA's kernels" if importlib.util.find_spec("fla") else "transformers"
    sizes = (torch.get_num_threads(), prompt_tokens, steps, 1)
    lists = (",".join(map(str, numbers)) for numbers in (batches, lengths))
    command = [*map(str, (sys.executable, TRANSFORMERS, model, *sizes, *lists, device))]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(command, stdout=output, stderr=messages)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = 0  # what it has printed counts
        for file in (output, messages):
            file.seek(0)
        if status != 0:
            fail(command, status, messages.read())
        found = [json.loads(line) for line in output if line.startswith('{"kind"')]
    return [row_of(row["kind"], row["size"], name, row["times"]) for row in found]


def table(rows: Iterable[Row]) -> Table:
    shown = Table("", "provider", box=None)
    for heading in ("min ms", "median ms", "tokens/s", "limit ms", "of limit"):
        shown.add_column(heading, justify="right")
    for row in sorted(rows, key=lambda row: (row.kind, row.size)):
        shown.add_row(
            f"decode, batch {row.size}" if row.kind == "decode" else f"prompt, {row.size:,} tokens",
            row.provider,
            f"{row.min:,.2f}",
            f"{row.median:,.2f}",
            f"{row.tokens_per_second:,.0f}",
            "" if row.limit is None else f"{row.limit:,.2f}",
            "" if row.share is None else f"{row.share:.2f}",
        )
    return shown


@app.command()
def main(
    model: ModelArgument,
    batch: Annotated[str, typer.Option(metavar="B,..", help="Batch sizes of decode.")] = "1,8,32,128",
    prompts: Annotated[str, typer.Option(metavar="T,..", help="Prompt lengths in tokens.")] = "2048,16384",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompts before decode, in tokens.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Timed decode steps per batch size.")] = 64,
    transformers_seconds: Annotated[
        float, typer.Option(min=0, help="Time for transformers, which then leaves the rest out; 0: none.")
    ] = 240.0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures.")] = None,
) -> None:
    """Measure decode steps and prompts of MODEL in bf16 with float32 states on a GPU."""
    device = "cuda"
    batches, lengths = parse_counts(batch, "--batch"), parse_counts(prompts, "--prompts")
    from gpu import rooflines  # it needs triton, which comes with torch for CUDA

    with errors_in_one_line():
        facts = asdict(rooflines.measure_device())
        torch.cuda.empty_cache()
        error = check_logits(model, device)
        args = xgdn.EngineArgs(dtype=torch.bfloat16, device=device)
        rows = decode_rows(model, batches, args, prompt_tokens=prompt_tokens, steps=steps, copy_gb_s=facts["copy_gb_s"])
        rows += prompt_rows(model, lengths, device)
    print("  ".join(f"{name} {value}" for name, value in {**device_facts(), **facts}.items()))
    print(f"float32 logits differ from the cpu backend's by {error:.1e}")

    def show() -> None:
        print_wide(table(rows))
        if json_file is not None:
            write_json(json_file, rows, device=facts, logits_error=error)

    show()
    if transformers_seconds > 0:
        rows += transformers_rows(
            model,
            batches,
            lengths,
            prompt_tokens=prompt_tokens,
            steps=max(4, steps // 4),
            device=device,
            seconds=transformers_seconds,
        )
        show()


if __name__ == "__main__":
    app()
