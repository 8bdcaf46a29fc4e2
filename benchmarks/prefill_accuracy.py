# SPDX-License-Identifier: Apache-2.0
"""Worst errors of prefill against float64 over gates and prompt lengths, by how similar the keys are.

    python benchmarks/prefill_accuracy.py [--lengths 65 512 8192]

The geometries of keys are those of the tests (tests/py/cases.py). Prints a table in Markdown.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from xgdn import ops
from xgdn.bench.report import machine

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests/py"))
from cases import KEY_GEOMETRIES, Case, expected, make_inputs, relative_error

GATES = ((0.0, 1.0), (0.0, 0.1), (-1e-5, 1.0), (-1e-3, 1.0), (-0.01, 0.9), (-0.1, 0.5), (-0.5, 1.0), (-0.5, 0.1))
ACCURACIES = ("fast", "exact")


def errors(case: Case, g: float, beta: float, q_like_k: bool) -> dict[str, tuple[float, float]]:
    """Return, by accuracy, the errors of the outputs and of the last state."""
    x = make_inputs(replace(case, beta=beta), prefill=True)
    x.g.fill_(g)
    if q_like_k:
        x.q.copy_(x.k + 0.03 * x.q)
    want, slots = expected(x, prefill=True)
    ((slot, last),) = slots.items()
    found = {}
    for accuracy in ACCURACIES:
        state = x.state.clone()
        out = ops.chunk_gated_delta_rule(
            *x.tensors()[:5],
            state,
            **x.shared(),
            chunk=ops.build_chunk_metadata(case.lengths, case.HV),
            accuracy=accuracy,
        )
        found[accuracy] = relative_error(out, want), relative_error(state[slot], last)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[65, 512, 8192], metavar="T")
    args = parser.parse_args()
    for key, value in machine().items():
        print(f"{key}: {value}")
    print("\n| keys | fast: out | fast: S | exact: out | exact: S |\n|---|---|---|---|---|", flush=True)
    for keys in KEY_GEOMETRIES:
        worst = {accuracy: (0.0, 0.0) for accuracy in ACCURACIES}
        for length in args.lengths:
            case = Case((length,), HV=1, K=128, V=128, dtype=torch.bfloat16, keys=keys, initial="all")
            for g, beta in GATES:
                for q_like_k in (False, True):
                    for accuracy, found in errors(case, g, beta, q_like_k).items():
                        worst[accuracy] = tuple(map(max, worst[accuracy], found))
        cells = [f"{error:.1e}" for accuracy in ACCURACIES for error in worst[accuracy]]
        print(f"| {keys} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
