# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture in bf16, 8 and 4 bits, with torch's products as baselines of those in bf16."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

import xgdn
from kernels.compare import WrongResult, relative_error
from xgdn.bench.turns import BYTES_BEYOND_CACHES, take_turns
from xgdn.quantization import pack, quantize


class Shape(NamedTuple):
    experts: int
    width: int  # of a token
    inner: int  # width of an expert
    choices: int  # experts of a token


# The layers of the models with fewer experts: those of one layer are beyond any cache.
SHAPES = {
    "Qwen3-Next": Shape(64, 2048, 512, 10),
    "narrow": Shape(128, 1024, 512, 8),
}
Format = Literal["bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = ("bf16", "int8", "int4")
_GROUP_SIZE = {"int8": 64, "int4": 32}
_ROTATE_CALLS = 16
_TOLERANCE = 6e-3  # two products, the activation and out are rounded to bf16
_FACTORS = 3  # an expert's outputs are 1, 2 or 4 times those of the first, in every format exactly


@dataclass(frozen=True)
class ExpertsRow:
    """A mixture of `tokens` tokens; times in microseconds. torch has no products of 8 and 4 bits."""

    shape: str
    format: Format
    tokens: int
    visited: float  # experts that a call reads, on average
    threads: int
    min: float
    median: float
    loop_min: float | None  # torch, expert after expert
    loop_median: float | None
    grouped_min: float | None  # torch's grouped_mm
    grouped_median: float | None
    roofline: float  # time to read the weights of those experts once, which bounds few tokens
    error: float  # ||got - truth|| / ||truth||

    @property
    def share(self) -> float:
        """Fraction of the roofline's speed."""
        return self.roofline / self.median

    @property
    def gflops(self) -> float:
        """GFLOP/s of the median."""
        shape = SHAPES[self.shape]
        return 6e-3 * self.tokens * shape.choices * shape.inner * shape.width / self.median

    @property
    def ratio(self) -> float | None:
        """Speedup over the faster of torch's two ways: its median time over xgdn's."""
        if self.loop_median is None or self.grouped_median is None:
            return None
        return min(self.loop_median, self.grouped_median) / self.median

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share, "gflops": self.gflops, "ratio": self.ratio}


@dataclass
class _Call:
    x: Tensor
    weights: Tensor
    chosen: Tensor


def _one_by_one(call: _Call, gate_up: Tensor, down: Tensor) -> Tensor:
    """The experts in a loop over those that are chosen, as in transformers' eager path."""
    out = torch.zeros_like(call.x)
    for expert in call.chosen.unique().tolist():
        token, choice = (call.chosen == expert).nonzero(as_tuple=True)
        gate, up = linear(call.x[token], gate_up[expert]).chunk(2, -1)
        out.index_add_(0, token, linear(silu(gate) * up, down[expert]) * call.weights[token, choice, None])
    return out


def _grouped(call: _Call, gate_up: Tensor, down: Tensor) -> Tensor:
    """The experts as two grouped products over the choices in the order of their experts."""
    order = call.chosen.flatten().argsort()
    ends = call.chosen.flatten().bincount(minlength=len(gate_up)).cumsum(0, dtype=torch.int32)
    rows = call.x[order // call.chosen.shape[1]]
    gate, up = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    outputs = torch._grouped_mm(silu(gate) * up, down.transpose(1, 2), offs=ends)
    by_choice = torch.empty_like(outputs).index_copy_(0, order, outputs)
    return (by_choice.unflatten(0, call.chosen.shape) * call.weights.unsqueeze(2)).sum(1)


def _factors(experts: int) -> Tensor:
    return 2.0 ** (torch.arange(experts) % _FACTORS)


def _stack(weight: Tensor, factors: Tensor) -> Tensor:
    """A weight for each factor."""
    return weight.unsqueeze(0) * factors.to(weight.dtype).view(-1, *(1 for _ in weight.shape))


class _Weights:
    """Those of all experts, in one format; the experts differ by a factor."""

    def __init__(self, shape: Shape, format: Format) -> None:
        first = torch.randn(2 * shape.inner, shape.width) / shape.width**0.5
        second = torch.randn(shape.width, shape.inner) / shape.inner**0.5
        plain = first.bfloat16(), second.bfloat16()
        ones, factors = torch.ones(shape.experts), _factors(shape.experts)
        self.tensors: list[Tensor] = []  # the arguments of the op
        self.values: list[Tensor] = []  # of gate_up and of the first expert's down, in float64
        for weight, scale in zip(plain, (ones, factors), strict=True):
            if format == "bf16":
                self.tensors.append(_stack(weight, scale))
                self.values.append(weight.double())
                continue
            rows = quantize(weight, format, group_size=_GROUP_SIZE[format])
            packed = pack(rows)
            self.tensors += [packed.codes.repeat(shape.experts, 1, 1, 1, 1), _stack(packed.scales, scale)]
            self.values.append(rows.dequantize())
        self.expert_bytes = sum(t.nbytes for t in self.tensors) / shape.experts

    def truth(self, call: _Call) -> Tensor:
        gate, up = (call.x.double() @ self.values[0].t()).chunk(2, -1)
        factors = _factors(int(call.chosen.max()) + 1).double()[call.chosen]
        weight = (call.weights.double() * factors).sum(1, keepdim=True)
        return weight * ((silu(gate) * up) @ self.values[1].t())


def _calls(shape: Shape, tokens: int) -> list[_Call]:
    """Calls whose tokens go through the experts evenly: each takes the next ones of a random order of all."""
    count = tokens * shape.choices
    rounds = _ROTATE_CALLS * count // shape.experts + 1
    order = torch.cat([torch.randperm(shape.experts) for _ in range(rounds)])
    return [
        _Call(
            torch.randn(tokens, shape.width).bfloat16(),
            torch.rand(tokens, shape.choices).softmax(-1).bfloat16(),
            order[i * count : (i + 1) * count].view(tokens, shape.choices),
        )
        for i in range(_ROTATE_CALLS)
    ]


class ExpertsBenchmark:
    def __init__(self, *, seconds: float = 1.0) -> None:
        """`seconds` is the time for each of xgdn, torch's two ways and the roofline."""
        self._seconds = seconds

    def run(self, name: str, format: Format, tokens: int, threads: int) -> ExpertsRow:
        """Raises WrongResult where xgdn's mixture is further from float64 than rounding takes it."""
        torch.set_num_threads(threads)
        shape = SHAPES[name]
        calls, weights = _calls(shape, tokens), _Weights(shape, format)
        out = torch.full((tokens, shape.width), torch.nan, dtype=torch.bfloat16)

        def ours(i: int) -> None:
            call = calls[i % _ROTATE_CALLS]
            op = xgdn.ops.moe_experts if format == "bf16" else xgdn.ops.quantized_moe_experts
            op(call.x, call.weights, call.chosen, *weights.tensors, out=out)

        ours(0)
        error = relative_error(out, weights.truth(calls[0]))
        if not error <= _TOLERANCE:
            raise WrongResult(f"experts of {tokens} tokens: expected an error of at most {_TOLERANCE}, got {error:.1e}")

        visited = statistics.mean(len(call.chosen.unique()) for call in calls)
        floats = int(visited * weights.expert_bytes) // 4
        parts = -(-BYTES_BEYOND_CACHES // (4 * floats))
        memory = torch.ones(parts, floats).unbind()
        theirs: list[Callable[[int], object]] = []
        if format == "bf16":
            others = [weight.clone() for weight in weights.tensors]
            theirs = [
                lambda i: _one_by_one(calls[i % _ROTATE_CALLS], *others),
                lambda i: _grouped(calls[i % _ROTATE_CALLS], *others),
            ]
        mine, stream, *rest = take_turns([ours, lambda i: memory[i % parts].sum(), *theirs], self._seconds)
        loop, grouped = rest or (None, None)
        return ExpertsRow(
            shape=name,
            format=format,
            tokens=tokens,
            visited=visited,
            threads=threads,
            min=min(mine),
            median=statistics.median(mine),
            loop_min=_least(loop),
            loop_median=_median(loop),
            grouped_min=_least(grouped),
            grouped_median=_median(grouped),
            roofline=statistics.median(stream),
            error=error,
        )


def _least(times: Sequence[float] | None) -> float | None:
    return None if times is None else min(times)


def _median(times: Sequence[float] | None) -> float | None:
    return None if times is None else statistics.median(times)
