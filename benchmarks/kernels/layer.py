# SPDX-License-Identifier: Apache-2.0
"""A layer's decode step: the time of everything between its two projections, against that of the rule alone."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import xgdn
from kernels.cases import CONV_WIDTH, HV, SHORT, DecodeCase, H, K, V
from xgdn.bench.turns import take_turns
from xgdn.layers import GdnBatch, GdnConfig, GdnState, Qwen3GatedDeltaNet, Segment, SegmentKind, StateKind

HIDDEN = 2048  # of Qwen3-Next-80B and Qwen3.5-35B


@dataclass(frozen=True)
class LayerRow:
    """Medians in microseconds."""

    batch: int
    state_dtype: str
    threads: int
    layer: float
    with_rule: float  # the projections with packed_decode alone between them
    projections: float  # the projections alone, the baseline

    @property
    def between(self) -> float:
        """Time of the layer without its projections."""
        return self.layer - self.projections

    @property
    def rule(self) -> float:
        """Time of the rule as it runs in a layer: after a projection whose weights have passed through the caches."""
        return self.with_rule - self.projections

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "between": self.between, "rule": self.rule, "ratio": self.between / self.rule}


def _weights() -> dict[str, torch.Tensor]:
    """Random weights of a layer in Qwen3.5's layout."""
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
        case = DecodeCase(batch, state_dtype)
        state = GdnState.allocate(layer.state_specs(), case.pool.parts * batch)
        state.pool(StateKind.DELTA).normal_()
        batches = [self._batch(case, i) for i in range(case.pool.parts)]
        hidden = torch.randn(batch, HIDDEN).bfloat16()
        values = torch.randn(batch, HV * V).bfloat16()
        rule_pool, out = case.pool.make(), torch.empty_like(case.v)
        gates = case.gates

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
            slots = case.pool.slots(i)
            xgdn.ops.packed_decode(
                case.mixed_qkv, gates.a, gates.b, gates.A_log, gates.dt_bias, rule_pool, state_indices=slots, out=out
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
    def _batch(case: DecodeCase, i: int) -> GdnBatch:
        slots = case.pool.slots(i)
        segment = Segment(
            kind=SegmentKind.DECODE,
            cu_seqlens_cpu=case.cu_seqlens,
            state_indices=slots,
            conv_indices=slots,
            may_have_padding=False,
        )
        return GdnBatch([segment])
