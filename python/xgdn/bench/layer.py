# SPDX-License-Identifier: Apache-2.0
"""What a layer's decode step costs beside its two projections, and what the rule alone would cost in their place."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import xgdn
from xgdn.bench.measure import take_turns
from xgdn.bench.problems import CONV_WIDTH, HV, SHORT, DecodeProblem, H, K, V
from xgdn.layers import GdnBatch, GdnConfig, GdnState, Qwen3GatedDeltaNet, Segment, SegmentKind, StateKind

HIDDEN = 2048  # of Qwen3-Next-80B and Qwen3.5-35B
ROTATE_MIB = 1024  # beyond any cache


@dataclass(frozen=True)
class LayerRow:
    """Medians in microseconds."""

    batch: int
    state_dtype: str
    threads: int
    layer: float
    with_rule: float  # the projections with packed_decode alone between them
    projections: float  # the two alone

    @property
    def between(self) -> float:
        """The layer without its projections."""
        return self.layer - self.projections

    @property
    def rule(self) -> float:
        """The rule where it stands in a layer: after a projection that has read its weights through the caches."""
        return self.with_rule - self.projections

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "between": self.between, "rule": self.rule, "ratio": self.between / self.rule}


def _weights() -> dict[str, torch.Tensor]:
    """Of a layer in Qwen3.5's layout."""
    channels, values = 2 * H * K + HV * V, HV * V
    shapes = {
        "in_proj_qkv.weight": (channels, HIDDEN),
        "in_proj_z.weight": (values, HIDDEN),
        "in_proj_b.weight": (HV, HIDDEN),
        "in_proj_a.weight": (HV, HIDDEN),
        "conv1d.weight": (channels, 1, CONV_WIDTH),
        "A_log": (HV,),
        "dt_bias": (HV,),
        "norm.weight": (V,),
        "out_proj.weight": (HIDDEN, values),
    }
    return {name: (0.02 * torch.randn(shape)).bfloat16() for name, shape in shapes.items()}


class LayerBenchmark:
    """One layer in bf16."""

    def __init__(self, *, seconds: float = 1.0) -> None:
        self._weights = _weights()
        projections = [self._weights[f"in_proj_{name}.weight"] for name in ("qkv", "z", "b", "a")]
        self._in_proj = torch.cat(projections)
        self._out_proj = self._weights["out_proj.weight"].clone()
        self._seconds = seconds

    def decode(self, batch: int, state_dtype: torch.dtype, threads: int) -> LayerRow:
        torch.set_num_threads(threads)
        config = GdnConfig(
            hidden_size=HIDDEN, num_k_heads=H, num_v_heads=HV, head_k_dim=K, head_v_dim=V, state_dtype=state_dtype
        )
        layer = Qwen3GatedDeltaNet(config, self._weights, dtype=torch.bfloat16)
        problem = DecodeProblem(batch, state_dtype, ROTATE_MIB)
        state = GdnState.allocate(layer.state_specs(), problem.pool.parts * batch)
        state.pool(StateKind.DELTA).normal_()
        batches = [self._batch(problem, i) for i in range(problem.pool.parts)]
        hidden = torch.randn(batch, HIDDEN).bfloat16()
        values = torch.randn(batch, HV * V).bfloat16()
        rule_pool, out = problem.pool.make(), torch.empty_like(problem.v)
        gates = problem.gates

        projected = torch.empty(batch, len(self._in_proj), dtype=torch.bfloat16)
        summed = torch.empty_like(hidden)

        # Weights of its own for each, as the layer has: shared ones would be found in a cache more often.
        def projection(x: Tensor, weight: Tensor, out: Tensor) -> Callable[[], Tensor]:
            own = weight.clone()
            return lambda: xgdn.ops.linear(x, own, out=out)

        before, after, before_alone, after_alone = (
            projection(*tensors)
            for _ in range(2)
            for tensors in ((hidden, self._in_proj, projected), (values, self._out_proj, summed))
        )

        def with_rule(i: int) -> None:
            before()
            slots = problem.pool.slots(i)
            xgdn.ops.packed_decode(
                problem.mixed_qkv, gates.a, gates.b, gates.A_log, gates.dt_bias, rule_pool, state_indices=slots, out=out
            )
            after()

        def projections(_: int) -> None:
            before_alone()
            after_alone()

        times = take_turns(
            [lambda i: layer.forward(hidden, batches[i % len(batches)], state), with_rule, projections], self._seconds
        )
        return LayerRow(batch, SHORT[state_dtype], threads, *(statistics.median(taken) for taken in times))

    @staticmethod
    def _batch(problem: DecodeProblem, i: int) -> GdnBatch:
        slots = problem.pool.slots(i)
        segment = Segment(
            kind=SegmentKind.DECODE,
            cu_seqlens_cpu=problem.cu_seqlens,
            state_indices=slots,
            conv_indices=slots,
            may_have_padding=False,
        )
        return GdnBatch([segment])
