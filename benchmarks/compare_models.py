# SPDX-License-Identifier: Apache-2.0
"""Decode steps and prompts of a whole model: xgdn, llama.cpp, vLLM-CPU and transformers, in turns.

    python benchmarks/random_checkpoint.py MODEL
    python benchmarks/compare_models.py MODEL PEERS_DIR [--batch 1 8 32] [--prompts 512 2048]
        [--quantize none int8 int8-a8 int4 int4-a8] [--threads 2] [--rounds 3] [--json FILE]

Each provider is a process of its own, since each brings its own thread pool; they take turns, round by round, with
prompts of the same lengths and with float32 states. xgdn and llama.cpp run with weights of 16, 8 and 4 bits, the others
in bfloat16. First xgdn's logits of a prompt are compared with transformers' in float32. The first call builds llama.cpp
and an environment for vLLM in PEERS_DIR; with --peers they can be left out.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import xgdn
from kernels.compare import relative_error
from markdown_table import markdown
from peers import model_llama_cpp
from peers.programs import output_of
from peers.vllm_environment import vllm_python
from xgdn.bench.report import machine

PEERS = Path(__file__).with_name("peers")
PEER_NAMES = ("llama.cpp", "vllm", "transformers")
FLOAT32_BOUND = 1e-5
BFLOAT16_SLACK = 1.25  # times the error of transformers' own bfloat16


BITS = {"none": 16, "int8": 8, "int8-a8": 8, "int4": 4, "int4-a8": 4}  # of a weight, by the value of --quantize
REPETITIONS = 1  # of a prompt in a round, after one that touches memory that nobody has used yet


@dataclass(frozen=True)
class Case:
    """What is timed: a decode step of `size` sequences, or a prompt of `size` tokens."""

    kind: str  # "decode" | "prompt"
    size: int

    def __str__(self) -> str:
        return f"decode, batch {self.size}" if self.kind == "decode" else f"prompt, {self.size:,} tokens"


@dataclass(frozen=True)
class Measured:
    """Times of a case in one round, in milliseconds."""

    times: list[float]
    roofline: float | None = None


Round = dict[Case, Measured]


@dataclass(frozen=True)
class Provider:
    name: str
    bits: int  # of a weight
    run: Callable[[], Round]


@dataclass(frozen=True)
class Figure:
    """Times of a provider over all rounds, in milliseconds."""

    provider: str
    bits: int
    kind: str
    size: int
    count: int
    min: float
    median: float
    rounds: list[float]  # medians
    roofline: float | None

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.size / self.median

    @property
    def share(self) -> float | None:
        """Fraction of the roofline's speed."""
        return None if self.roofline is None else self.roofline / self.median


def check_logits(model: Path) -> dict[str, float]:
    """Relative errors of logits against transformers' float32 ones. Raises SystemExit where xgdn's are too large."""
    prompt = torch.randint(0, 1000, (96,), generator=torch.Generator().manual_seed(1))

    def reference(dtype: torch.dtype) -> torch.Tensor:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        with torch.inference_mode():
            return loaded(prompt.unsqueeze(0)).logits[0]

    def own(dtype: torch.dtype) -> torch.Tensor:
        return xgdn.Engine(model, dtype=dtype).prompt_logits(prompt.tolist())

    want = reference(torch.float32)
    errors = {
        "xgdn float32": relative_error(own(torch.float32), want),
        "xgdn bfloat16": relative_error(own(torch.bfloat16), want),
        "transformers bfloat16": relative_error(reference(torch.bfloat16), want),
    }
    bounds = {"xgdn float32": FLOAT32_BOUND, "xgdn bfloat16": BFLOAT16_SLACK * errors["transformers bfloat16"]}
    for name, bound in bounds.items():
        if not errors[name] <= bound:
            sys.exit(f"logits of {name} differ from transformers' by {errors[name]:.1e}, expected at most {bound:.1e}")
    return errors


def bench_xgdn(args: argparse.Namespace, quantize: str, *options: object) -> list[dict[str, Any]]:
    command = ["xgdn", "bench", "model", args.model, "--threads", args.threads, *options, "--json"]
    weights, _, activations = quantize.partition("-")
    if weights != "none":
        command += ["--quantize", weights]
    if activations == "a8":
        command += ["--activation-bits", "8"]
    rows: list[dict[str, Any]] = json.loads(output_of(command))["rows"]
    return rows


def run_xgdn(args: argparse.Namespace, quantize: str) -> Round:
    batches = ",".join(map(str, args.batch))
    decode = bench_xgdn(
        args, quantize, "--batch", batches, "--prompt-tokens", args.prompt_tokens, "--steps", args.steps
    )
    measured = {Case("decode", row["batch"]): Measured(row["times"], row["roofline"]) for row in decode}
    ones = ",".join(["1"] * (1 + REPETITIONS))
    for length in args.prompts:
        _, *rows = bench_xgdn(args, quantize, "--batch", ones, "--prompt-tokens", length, "--steps", 1)
        measured[Case("prompt", length)] = Measured([1e3 * length / row["prefill"] for row in rows])
    return measured


def run_llama_cpp(args: argparse.Namespace, folder: Path, file: Path) -> Round:
    steps = model_llama_cpp.decode(
        folder,
        file,
        threads=args.threads,
        prompt_tokens=args.prompt_tokens,
        steps=args.steps,
        batches=args.batch,
    )
    prompts = model_llama_cpp.prompts(folder, file, threads=args.threads, lengths=args.prompts, repetitions=REPETITIONS)
    decode = {Case("decode", batch): Measured([time]) for batch, time in steps.items()}
    return decode | {Case("prompt", length): Measured(times) for length, times in prompts.items()}


def run_script(python: str | Path, script: str, args: argparse.Namespace, steps: int) -> Round:
    sizes = (args.threads, args.prompt_tokens, steps, REPETITIONS)
    lists = (",".join(map(str, sizes)) for sizes in (args.batch, args.prompts))
    command = [python, PEERS / script, args.model, *map(str, sizes), *lists]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    output = output_of(command, environment)
    rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"kind"')]
    return {Case(row["kind"], row["size"]): Measured(row["times"]) for row in rows}


def make_providers(args: argparse.Namespace) -> list[Provider]:
    """xgdn and the peers that were asked for, built and installed; the order is that of their turns."""
    names = {value: "xgdn bf16" if value == "none" else f"xgdn {value}" for value in BITS}
    providers = [Provider(names[value], BITS[value], partial(run_xgdn, args, value)) for value in args.quantize]
    if "llama.cpp" in args.peers:
        folder = model_llama_cpp.install(args.folder.resolve())
        formats = {model_llama_cpp.FORMATS[BITS[value]]: BITS[value] for value in args.quantize}
        files = model_llama_cpp.checkpoint_files(folder, args.model, list(formats))
        providers += [
            Provider(f"llama.cpp {name}", bits, partial(run_llama_cpp, args, folder, files[name]))
            for name, bits in formats.items()
        ]
    if "vllm" in args.peers:
        python = vllm_python(args.folder.resolve() / "vllm-env")
        run = partial(run_script, python, "model_vllm.py", args, args.steps)
        providers.append(Provider("vLLM-CPU", 16, run))
    if "transformers" in args.peers:
        few = max(args.steps // 4, 2)
        run = partial(run_script, sys.executable, "model_transformers.py", args, few)
        providers.append(Provider("transformers", 16, run))
    return providers


def summarise(case: Case, provider: Provider, rounds: Sequence[Measured]) -> Figure:
    every = [time for measured in rounds for time in measured.times]
    rooflines = [measured.roofline for measured in rounds if measured.roofline is not None]
    return Figure(
        provider=provider.name,
        bits=provider.bits,
        kind=case.kind,
        size=case.size,
        count=len(every),
        min=min(every),
        median=statistics.median(every),
        rounds=[statistics.median(measured.times) for measured in rounds],
        roofline=statistics.median(rooflines) if rooflines else None,
    )


def table(figures: Sequence[Figure]) -> str:
    """The figures with their ratios to xgdn's median in the same case with weights of as many bits."""
    own = {(f.kind, f.size, f.bits): f.median for f in figures if f.provider.startswith("xgdn ")}
    headings = ["case", "provider", "min ms", "median ms", "medians of the rounds", "tokens/s", "of roofline"]
    headings.append("x xgdn's time, equal bits")
    lines = []
    for figure in figures:
        reference = own.get((figure.kind, figure.size, figure.bits))
        lines.append(
            [
                str(Case(figure.kind, figure.size)),
                figure.provider,
                f"{figure.min:,.1f}",
                f"{figure.median:,.1f}",
                " / ".join(f"{median:,.1f}" for median in figure.rounds),
                f"{figure.tokens_per_second:,.1f}",
                "" if figure.share is None else f"{figure.share:.2f}",
                "" if reference is None else f"{figure.median / reference:.2f}",
            ]
        )
    return markdown(headings, lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path, metavar="PEERS_DIR")
    parser.add_argument("--peers", nargs="*", default=list(PEER_NAMES), choices=PEER_NAMES)
    parser.add_argument(
        "--quantize",
        nargs="+",
        default=list(BITS),
        choices=list(BITS),
        help="weights of xgdn (none: bf16); llama.cpp takes the formats of as many bits (default: all)",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], metavar="B", help="batch sizes of decode")
    parser.add_argument(
        "--prompts", type=int, nargs="*", default=[512, 2048], metavar="T", help="lengths of single prompts, timed"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="length of the prompts before decode")
    parser.add_argument(
        "--steps", type=int, default=24, help="timed decode steps per round; transformers gets a quarter"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    providers = make_providers(args)
    errors = check_logits(args.model)
    rounds: list[dict[str, Round]] = []
    for number in range(args.rounds):
        rounds.append({provider.name: provider.run() for provider in providers})
        print(f"round {number + 1} of {args.rounds} is done", file=sys.stderr)

    cases = [Case("decode", batch) for batch in args.batch] + [Case("prompt", length) for length in args.prompts]
    figures = [
        summarise(case, provider, [measured[provider.name][case] for measured in rounds])
        for case in cases
        for provider in providers
    ]
    document = {"machine": machine(), "threads": args.threads, "prompt_tokens": args.prompt_tokens, "logits": errors}
    print("  ".join(f"{name} {value}" for name, value in document["machine"].items()))
    told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"{args.threads} threads, decode after {args.prompt_tokens} tokens; errors of the logits: {told}")
    print(table(figures))
    if args.json is not None:
        args.json.write_text(json.dumps({**document, "rows": [asdict(figure) for figure in figures]}))


if __name__ == "__main__":
    main()
