# SPDX-License-Identifier: Apache-2.0
"""Decode steps and prompts of vLLM on a CPU with and without the plugin of xgdn, in turns.

    make vllm-test                                     # makes the environment build/vllm/environment
    python benchmarks/random_checkpoint.py MODEL
    python benchmarks/vllm_plugin.py MODEL [--batch 8 32] [--prompts 2048] [--threads 2] [--repetitions 6]

Two processes with the same options of vLLM (peers/model_vllm.py: bfloat16, no prefix caching, torch.compile as by
default) take turns, step by step and prompt by prompt, while the other waits. Times are medians in
milliseconds, with the shortest in brackets. A call that the plugin leaves to vLLM ends the program.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markdown_table import markdown
from peers.programs import fail
from xgdn.bench.report import machine

SCRIPT = Path(__file__).with_name("peers") / "model_vllm.py"
PLUGINS = {"vLLM": "none", "with xgdn": "xgdn"}  # what VLLM_PLUGINS names
PAUSE = 0.03  # seconds before a turn: OpenMP's threads of the other process go on turning for some milliseconds

Times = dict[tuple[str, int], list[float]]


class Process:
    """vLLM with or without the plugin, which waits for its turns."""

    def __init__(self, args: argparse.Namespace, plugins: str) -> None:
        sizes = map(str, (args.threads, args.prompt_tokens, args.steps, args.repetitions))
        lists = (",".join(map(str, numbers)) for numbers in (args.batch, args.prompts))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"VLLM_PLUGINS": plugins, "TAKES_TURNS": "1", "STATE_DTYPE": args.state_dtype}
        self.command = [str(args.python), str(SCRIPT), str(args.model), *sizes, *lists]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(self.command, **pipes, text=True, env=environment)
        self.said: list[str] = []
        self.times: Times = {}
        self.report: dict[str, Any] | None = None

    def runs_to_its_next_turn(self) -> bool:
        """Whether there is one."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            row = json.loads(line) if line.startswith('{"kind"') else {"kind": None}
            if row["kind"] == "turn":
                return True
            if row["kind"] == "report":
                self.report = row
            elif row["kind"] is not None:
                self.times[row["kind"], row["size"]] = row["times"]
        if (status := self.process.wait()) != 0:
            fail(self.command, status, "".join(self.said))
        return False

    def take_turn(self) -> bool:
        assert self.process.stdin is not None
        time.sleep(PAUSE)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.runs_to_its_next_turn()


def table(times: Mapping[str, Times]) -> str:
    lines = []
    for kind, size in times["vLLM"]:
        host, own = (times[name][kind, size] for name in PLUGINS)
        what = f"decode step, batch {size}" if kind == "decode" else f"prompt of {size:,} tokens"
        before, after = statistics.median(host), statistics.median(own)
        cells = [f"{median:,.1f} ({min(all_):,.1f})" for median, all_ in ((before, host), (after, own))]
        speeds = [f"{1e3 * size / median:,.1f}" for median in (before, after)]
        lines.append([what, *cells, *speeds, f"{before / after:.2f} x"])
    return markdown(["case", *PLUGINS, "vLLM, tokens/s", "with xgdn, tokens/s", ""], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--python", type=Path, default=Path("build/vllm/environment/bin/python"))
    parser.add_argument("--batch", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--prompts", type=int, nargs="*", default=[2048])
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each sequence that decodes")
    parser.add_argument("--steps", type=int, default=24, help="decode steps")
    parser.add_argument("--repetitions", type=int, default=6, help="timed prompts of each length")
    parser.add_argument("--state-dtype", choices=("float32", "bfloat16"), default="float32", help="of recurrent states")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print("  ".join(f"{name} {value}" for name, value in machine().items()), f" {args.threads} threads", flush=True)
    processes = {name: Process(args, plugins) for name, plugins in PLUGINS.items()}
    waiting = [process for process in processes.values() if process.runs_to_its_next_turn()]
    while waiting:
        waiting = [process for process in waiting if process.take_turn()]
    print(table({name: process.times for name, process in processes.items()}))
    report = processes["with xgdn"].report
    assert report is not None
    print(report["text"])
    if report["fallbacks"] or not report["served"]:
        sys.exit("calls were left to vLLM")


if __name__ == "__main__":
    main()
