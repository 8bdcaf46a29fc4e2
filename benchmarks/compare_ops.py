# SPDX-License-Identifier: Apache-2.0
"""xgdn's ops against the roofline and against the kernels of other libraries, in one run.

    python benchmarks/compare_ops.py PEERS_DIR [--decode 1 8 32] [--prefill 512 2048] [--threads 1 2] [--json FILE]

Installs the peers' wheels into PEERS_DIR (without their dependencies: only their kernels are loaded, into this torch).
All providers get the same inputs, are checked against float64, and take turns, call by call.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

from kernels.ops import OpsBenchmark, Plan
from kernels.report import print_rows
from peers import hf_transformers, onnx_runtime, vllm_cpu, zen
from xgdn.bench.report import machine

PEERS = {"vllm": vllm_cpu, "zentorch": zen, "onnxruntime": onnx_runtime, "transformers": hf_transformers}


def install(peer: ModuleType, folder: Path) -> None:
    if peer.REQUIREMENT is None or folder.exists():
        return
    part = folder.with_suffix(".part")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(part)]
    subprocess.run([*pip, *shlex.split(peer.REQUIREMENT)], check=True)
    part.rename(folder)


def load(names: list[str], folder: Path) -> tuple[list[ModuleType], dict[str, str]]:
    """The peers that can be loaded here, and what each said."""
    loaded, said = [], {}
    for name in names:
        try:
            install(PEERS[name], folder / name)
            said[name] = PEERS[name].load(folder / name)
            loaded.append(PEERS[name])
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            said[name] = f"not run: {error}"
    return loaded, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="PEERS_DIR")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 8, 32], metavar="B", help="batch sizes")
    parser.add_argument("--verify", type=int, nargs="*", default=[8], metavar="B", help="batch sizes of 4 drafts each")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048, 8192], metavar="T", help="prompt lengths")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="time per provider and case (default: 1)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)

    peers, said = load(args.peers, args.folder)
    for key, value in {**machine(), **said}.items():
        print(f"{key}: {value}")
    benchmark = OpsBenchmark(peers, seconds=args.seconds)
    plan = Plan(decode=args.decode, verify=args.verify, prefill=args.prefill, threads=args.threads)
    rows = benchmark.run(plan)
    print_rows(rows)
    for sentence in benchmark.refused:
        print(f"refused: {sentence}")
    if args.json:
        args.json.write_text(
            json.dumps({"machine": {**machine(), **said}, "rows": [r.document() for r in rows]}, indent=1)
        )


if __name__ == "__main__":
    main()
