# SPDX-License-Identifier: Apache-2.0
"""Decode steps and prompts of vLLM on a CPU with and without the plugin of xgdn, in turns.

    make vllm-test                                     # makes the environment build/vllm/environment
    python benchmarks/random_checkpoint.py MODEL
    python benchmarks/vllm_plugin.py MODEL [--batch 8 32] [--prompts 2048] [--threads 2] [--rounds 3]

Each turn is a process of its own, with the same options of vLLM (peers/model_vllm.py): bfloat16, float32 states, no
prefix caching, torch.compile as by default, decode after prompts of 128 tokens. Times are medians of all rounds, in
milliseconds, with the median of each round beside it. A call that the plugin leaves to vLLM ends the program.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markdown_table import markdown
from peers.programs import output_of
from xgdn.bench.report import machine

SCRIPT = Path(__file__).with_name("peers") / "model_vllm.py"
REPETITIONS = 2  # timed prompts of a round
PLUGINS = {"vLLM": "none", "with xgdn": "xgdn"}  # what VLLM_PLUGINS names

Times = dict[tuple[str, int], list[float]]


def run(args: argparse.Namespace, plugins: str) -> tuple[Times, dict[str, Any] | None]:
    """One turn: times by case, and the report where there is one."""
    sizes = (args.threads, args.prompt_tokens, args.steps, REPETITIONS)
    lists = (",".join(map(str, numbers)) for numbers in (args.batch, args.prompts))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["VLLM_PLUGINS"] = plugins
    output = output_of([args.python, SCRIPT, args.model, *sizes, *lists], environment)
    rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"kind"')]
    report = next((row for row in rows if row["kind"] == "report"), None)
    return {(row["kind"], row["size"]): row["times"] for row in rows if row is not report}, report


def table(rounds: Mapping[str, list[Times]]) -> str:
    def cell(name: str, case: tuple[str, int]) -> tuple[float, str]:
        median = statistics.median(time for times in rounds[name] for time in times[case])
        of_rounds = " / ".join(f"{statistics.median(times[case]):,.1f}" for times in rounds[name])
        return median, f"{median:,.1f} ({of_rounds})"

    lines = []
    for kind, size in rounds["vLLM"][0]:
        (before, host), (after, own) = (cell(name, (kind, size)) for name in PLUGINS)
        what = f"decode step, batch {size}" if kind == "decode" else f"prompt of {size:,} tokens"
        tokens = 1e3 * size
        lines.append([what, host, own, f"{tokens / before:,.1f}", f"{tokens / after:,.1f}", f"{before / after:.2f} x"])
    return markdown(["case", *PLUGINS, "vLLM, tokens/s", "with xgdn, tokens/s", ""], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--python", type=Path, default=Path("build/vllm/environment/bin/python"))
    parser.add_argument("--batch", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--prompts", type=int, nargs="*", default=[2048])
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each sequence that decodes")
    parser.add_argument("--steps", type=int, default=24, help="decode steps of a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("  ".join(f"{name} {value}" for name, value in machine().items()), f" {args.threads} threads", flush=True)
    rounds: dict[str, list[Times]] = {name: [] for name in PLUGINS}
    for _ in range(args.rounds):
        for name, plugins in PLUGINS.items():
            times, report = run(args, plugins)
            rounds[name].append(times)
            if report is not None and report["fallbacks"]:
                sys.exit(report["text"])
    print(table(rounds))
    print(report["text"] if report is not None else "")


if __name__ == "__main__":
    main()
