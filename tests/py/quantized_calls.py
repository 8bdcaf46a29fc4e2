# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 or 4 bits, calls of the ops that take them, and what they must compute in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import xgdn
from attention_calls import ROUNDING, ExpertsCall
from cases import Matrix, assert_bits_equal
from xgdn import ops
from xgdn.quantization import PackedWeight, QuantizedRows, WeightFormat, pack

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHORT = {F32: "f32", BF16: "bf16", F16: "f16"}
FORMATS: tuple[WeightFormat, ...] = ("int8", "int4", "float8")

MOST = {16: 32639, 8: 127}  # of an integer that an activation becomes, by its bits

# The cpu backend keeps x in 16 bits behind a scale for each group: an element is off by up to 2^-16 of the largest one
# of its group, 3e-5 in the 2-norm. float8 is multiplied in f32.
INTEGER_BOUND = 4e-5
BOUND = {F32: 1e-6, BF16: 4e-3, F16: 5e-4}


def every_float8() -> Tensor:
    """All 254 values of float8_e4m3fn, and two zeros in place of NaN."""
    codes = torch.arange(256).to(torch.uint8)
    codes[codes % 128 == 127] = 0
    return codes.view(torch.float8_e4m3fn)


def random_codes(format: WeightFormat, *shape: int) -> Tensor:
    if format == "int8":
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    if format == "int4":
        return torch.randint(0, 16, shape, dtype=torch.uint8)
    return every_float8().view(torch.uint8)[torch.randint(0, 256, shape)].view(torch.float8_e4m3fn)


def random_rows(
    format: WeightFormat,
    O: int,  # noqa: E741
    D: int,
    group_size: int,
    *,
    zeros: bool = False,
    order: bool = False,
    scales: torch.dtype = F32,
) -> QuantizedRows:
    """Any codes, scales of either sign, and zeros over all of the format's range; float8 has none."""
    low, high = (-128, 128) if format == "int8" else (0, 16)
    groups = O, D // group_size
    size = (0.1 if format == "int4" else 0.01) * (0.5 + torch.rand(groups))
    return QuantizedRows(
        format,
        group_size,
        random_codes(format, O, D),
        (size * torch.where(torch.rand(groups) < 0.2, -1, 1)).to(scales),
        torch.randint(low, high, groups, dtype=torch.int8) if zeros and format != "float8" else None,
        torch.randperm(D) if order else None,
    )


def plain(rows: QuantizedRows) -> Tensor:
    """The weight in float64."""
    D = rows.codes.shape[1]
    group = torch.arange(D) // rows.group_size
    zero = torch.full(rows.scales.shape, 8 if rows.format == "int4" else 0) if rows.zeros is None else rows.zeros
    weight = torch.full(rows.codes.shape, torch.nan, dtype=torch.float64)
    column = torch.arange(D) if rows.order is None else rows.order.long()
    weight[:, column] = rows.scales.double()[:, group] * (rows.codes.double() - zero.double()[:, group])
    return weight


def rounded(x: Tensor, rows: QuantizedRows, bits: int) -> Tensor:
    """`x` as the cpu backend multiplies it with integers: whole multiples of a scale for each group of columns, in the
    order of the codes; float64.
    """
    if rows.format == "float8":
        return x.double()
    column = torch.arange(x.shape[1]) if rows.order is None else rows.order.long()
    groups = x.float()[:, column].unflatten(1, (-1, rows.group_size))
    largest = groups.abs().amax(2, keepdim=True)
    most = torch.tensor(float(MOST[bits]))
    whole = (groups * torch.where(largest > 0, most / largest, 0)).round()
    result = torch.full(x.shape, torch.nan, dtype=torch.float64)
    result[:, column] = (whole.double() * (largest / most)).flatten(1)
    return result


@dataclass(frozen=True)
class QuantizedCall:
    """A product with a weight in 8 or 4 bits; gaps lie between the rows of x and of out."""

    format: WeightFormat
    T: int
    D: int = 96
    O: int = 48  # noqa: E741
    group_size: int = 32
    dtype: torch.dtype = BF16
    out_dtype: torch.dtype | None = None  # None: dtype
    scales: torch.dtype = F32
    zeros: bool = False
    order: bool = False
    bias: bool = False
    gaps: tuple[int, int] = (0, 0)
    bits: int = 16  # of activations

    def __str__(self) -> str:
        parts = [self.format, f"T{self.T}", f"D{self.D}", f"O{self.O}", f"g{self.group_size}", SHORT[self.dtype]]
        parts += [f"out_{SHORT[self.out_dtype]}"] if self.out_dtype is not None else []
        parts += [f"scales_{SHORT[self.scales]}"] if self.scales != F32 else []
        parts += [f"a{self.bits}"] if self.bits != 16 else []
        parts += ["zeros"] * self.zeros + ["order"] * self.order + ["bias"] * self.bias
        return "-".join(parts + (["gaps" + "_".join(map(str, self.gaps))] if any(self.gaps) else []))

    @property
    def result_dtype(self) -> torch.dtype:
        return self.dtype if self.out_dtype is None else self.out_dtype

    def make(self) -> QuantizedInputs:
        rows = random_rows(
            self.format,
            self.O,
            self.D,
            self.group_size,
            zeros=self.zeros,
            order=self.order,
            scales=self.scales,
        )
        x = Matrix(torch.randn(self.T, self.D).to(self.dtype), self.gaps[0])
        return QuantizedInputs(self, rows, x, (10 * torch.randn(self.O)).to(self.dtype) if self.bias else None)

    def bound(self, backend: str) -> float:
        """ATen rounds the weight to the dtype of x and gives the sum in it."""
        if backend != "cpu":
            return 1.5 * BOUND[self.dtype]
        return max(BOUND[self.result_dtype], BOUND[F32] if self.format == "float8" else INTEGER_BOUND)


class QuantizedInputs:
    def __init__(self, call: QuantizedCall, rows: QuantizedRows, x: Matrix, bias: Tensor | None = None) -> None:
        self.call, self.rows, self.x, self.bias = call, rows, x, bias
        self.packed = pack(rows)

    def run(self, backend: str, tokens: slice = slice(None)) -> Tensor:
        """The result for some tokens; what lies around it must keep its bits."""
        x = self.x.values[tokens]
        empty = torch.full((len(x), self.call.O), torch.nan, dtype=self.call.result_dtype)
        out = Matrix(empty, self.call.gaps[1], around=3.0)
        before = out.memory.clone()
        codes, scales, zeros, order = self.packed
        options = {"activation_bits": self.call.bits, "backend": backend}
        ops.quantized_linear(x, codes, scales, zeros=zeros, order=order, bias=self.bias, out=out.values, **options)
        assert xgdn.last_backend("quantized_linear") == backend
        after = out.memory.clone()
        out.within(after).fill_(torch.nan)
        assert_bits_equal("memory around out", after, before)
        return out.values

    def expected(self, backend: str = "reference") -> Tensor:
        """In float64, of activations that the cpu backend has rounded to few bits: its bound is that of 16 of them."""
        is_rounded = backend == "cpu" and self.call.bits != 16
        x = rounded(self.x.values, self.rows, self.call.bits) if is_rounded else self.x.values.double()
        sums = x @ plain(self.rows).T
        return sums if self.bias is None else sums + self.bias.double()


def stacked(experts: list[QuantizedRows]) -> PackedWeight:
    """The packed weights of all experts, with a dimension for them before their own."""
    packed = [pack(rows) for rows in experts]
    zeros = [weight.zeros for weight in packed if weight.zeros is not None]
    return PackedWeight(
        torch.stack([weight.codes.view(torch.uint8) for weight in packed]).view(packed[0].codes.dtype),
        torch.stack([weight.scales for weight in packed]),
        torch.stack(zeros) if zeros else None,
        None,
    )


@dataclass
class QuantizedExpertsCall(ExpertsCall):
    """A mixture whose two weights may differ in all that a weight has but an order."""

    formats: tuple[WeightFormat, WeightFormat] = ("int8", "int8")  # of gate_up and of down
    group_sizes: tuple[int, int] = (32, 32)
    zeros: tuple[bool, bool] = (False, False)
    scales: torch.dtype = F32

    def __str__(self) -> str:
        parts = [super().__str__(), "_".join(self.formats), "g" + "_".join(map(str, self.group_sizes))]
        return "-".join(parts + (["zeros" + "_".join(str(int(z)) for z in self.zeros)] if any(self.zeros) else []))

    def make(self) -> QuantizedExpertsCall:
        super().make()
        shapes = (2 * self.I, self.D), (self.D, self.I)
        self.rows = [
            [
                random_rows(format, *shape, group_size, zeros=zeros, scales=self.scales)
                for _ in range(self.E)
            ]
            for format, shape, group_size, zeros in zip(
                self.formats, shapes, self.group_sizes, self.zeros, strict=True
            )
        ]  # fmt: skip
        # What `expected` of the plain mixture reads.
        self.gate_up, self.down = (torch.stack([plain(rows) for rows in experts]) for experts in self.rows)
        return self

    def arguments(self) -> tuple[Tensor, ...]:
        gate_up, down = map(stacked, self.rows)
        return self.x, self.weights, self.chosen, gate_up.codes, gate_up.scales, down.codes, down.scales

    def zero_points(self) -> dict[str, Tensor | None]:
        gate_up, down = map(stacked, self.rows)
        return {"gate_up_zeros": gate_up.zeros, "down_zeros": down.zeros}

    def run(self, device: str = "cpu", backend: str = "auto") -> Tensor:
        out = torch.full((self.T, self.D), torch.nan, dtype=self.dtype).to(device)
        zeros = {name: None if t is None else t.to(device) for name, t in self.zero_points().items()}
        ops.quantized_moe_experts(*(t.to(device) for t in self.arguments()), **zeros, out=out, backend=backend)
        return out.cpu()

    @property
    def bound(self) -> float:
        """Three products, one after the other."""
        exact = set(self.formats) == {"float8"}
        return max(1.5 * ROUNDING[self.dtype], (2e-6 if exact else 3 * INTEGER_BOUND) if self.dtype == F32 else 0)


QUANTIZED_EXPERTS = [
    *(QuantizedExpertsCall(9, formats=(a, b)) for a in FORMATS for b in FORMATS),
    *(QuantizedExpertsCall(9, formats=(a, a), dtype=dtype) for a in FORMATS for dtype in (F32, F16)),
    *(QuantizedExpertsCall(7, formats=(a, b), zeros=(a != "float8", True)) for a in FORMATS for b in FORMATS[:2]),
    QuantizedExpertsCall(7, formats=("int4", "int8"), zeros=(True, False), scales=BF16),
    QuantizedExpertsCall(5, D=128, I=64, formats=("int4", "int4"), group_sizes=(128, 64), zeros=(True, True)),
    QuantizedExpertsCall(5, D=128, I=96, formats=("int8", "int4"), group_sizes=(64, 32), scales=F16),
    QuantizedExpertsCall(40, E=8, A=4, formats=("int4", "int8")),
    QuantizedExpertsCall(1),
    QuantizedExpertsCall(0),
    QuantizedExpertsCall(7, E=5, A=5),
    QuantizedExpertsCall(9, only=(5, 1), formats=("int4", "int4")),
    *(QuantizedExpertsCall(35, A=1, D=96, I=64, only=(2,), formats=(a, a), strided=True) for a in FORMATS),
]
