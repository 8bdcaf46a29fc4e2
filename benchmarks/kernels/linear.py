# SPDX-License-Identifier: Apache-2.0
"""The projections of a small model in bf16, with torch's as the baseline."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

import xgdn
from kernels.compare import WrongResult, relative_error
from xgdn.bench.turns import BYTES_BEYOND_CACHES, take_turns

# Outputs and depth of the matrices of a layer of Qwen3.5-0.8B.
SHAPES = {
    "GDN input": (8224, 1024),
    "GDN output": (1024, 2048),
    "MLP gate and up": (7168, 1024),
    "MLP down": (1024, 3584),
}
_TOLERANCE = 2.5e-3  # rounding out to bf16 costs 1.7e-3


@dataclass(frozen=True)
class LinearRow:
    """One matrix product with `tokens` rows; times in microseconds."""

    matrix: str
    outputs: int
    depth: int
    tokens: int
    threads: int
    min: float
    median: float
    torch_min: float
    torch_median: float
    roofline: float  # time to read the weights once, which bounds products of few tokens
    error: float  # ||got - truth|| / ||truth||

    @property
    def share(self) -> float:
        """Fraction of the roofline's speed."""
        return self.roofline / self.median

    @property
    def gflops(self) -> float:
        """GFLOP/s of the median."""
        return 2e-3 * self.tokens * self.outputs * self.depth / self.median

    @property
    def ratio(self) -> float:
        """Speedup over torch: its median time over xgdn's."""
        return self.torch_median / self.median

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share, "gflops": self.gflops, "ratio": self.ratio}


class LinearBenchmark:
    def __init__(self, *, seconds: float = 1.0) -> None:
        """`seconds` is the time for each of xgdn, torch and the roofline."""
        self._seconds = seconds

    def run(self, matrix: str, tokens: int, threads: int) -> LinearRow:
        """Raises WrongResult where xgdn's product is further from float64 than rounding takes it."""
        torch.set_num_threads(threads)
        outputs, depth = SHAPES[matrix]
        x = torch.randn(tokens, depth).bfloat16()
        out = torch.full((tokens, outputs), torch.nan, dtype=torch.bfloat16)
        parts = -(-BYTES_BEYOND_CACHES // (outputs * depth * 2))
        first = (torch.randn(outputs, depth) / depth**0.5).bfloat16()
        weights, torch_weights = (first.repeat(parts, 1, 1).unbind() for _ in range(2))
        memory = torch.ones(parts, outputs * depth // 2).unbind()

        xgdn.ops.linear(x, weights[0], out=out)
        error = relative_error(out, x.double() @ first.double().t())
        if not error <= _TOLERANCE:
            raise WrongResult(f"linear of {tokens} tokens: expected an error of at most {_TOLERANCE}, got {error:.1e}")

        ours, theirs, stream = take_turns(
            [
                lambda i: xgdn.ops.linear(x, weights[i % parts], out=out),
                lambda i: torch.nn.functional.linear(x, torch_weights[i % parts]),
                lambda i: memory[i % parts].sum(),
            ],
            self._seconds,
        )
        return LinearRow(
            matrix=matrix,
            outputs=outputs,
            depth=depth,
            tokens=tokens,
            threads=threads,
            min=min(ours),
            median=statistics.median(ours),
            torch_min=min(theirs),
            torch_median=statistics.median(theirs),
            roofline=statistics.median(stream),
            error=error,
        )
