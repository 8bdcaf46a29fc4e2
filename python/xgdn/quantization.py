# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 or 4 bits: rounding plain ones, and packing them for `xgdn.ops.quantized_linear`.

rows = quantize(weight, "int4", group_size=32)
packed = pack(rows)
out = ops.quantized_linear(x, packed.codes, packed.scales, num_outputs=weight.shape[0])
"""

from typing import Literal, NamedTuple

from torch import Tensor

from xgdn import _C, errors

__all__ = ["PackedWeight", "QuantizedRows", "WeightFormat", "pack", "quantize"]

WeightFormat = Literal["int8", "int4", "float8"]
FORMATS = {
    "int8": _C.WeightFormat.INT8,
    "int4": _C.WeightFormat.INT4,
    "float8": _C.WeightFormat.FLOAT8,
}


class QuantizedRows(NamedTuple):
    """A weight `[O, D]` row by row: `scales[o, g] * (codes[o, d] - zeros[o, g])` with `g = d // group_size` stands in
    column `order[d]` of row `o`.
    """

    format: WeightFormat
    group_size: int  # 32, 64 or 128
    codes: Tensor  # [O, D]  int8; int4: uint8, 0..15; float8: float8_e4m3fn
    scales: Tensor  # [O, D / group_size]  f32 | bf16 | f16
    zeros: Tensor | None = None  # as scales, int8; default 0, of int4 8; float8 has none
    order: Tensor | None = None  # [D]  a permutation; default the columns as they are

    def dequantize(self) -> Tensor:
        """Return the plain weight in float64."""
        codes = self.codes.double().view(self.codes.shape[0], -1, self.group_size)
        if self.zeros is not None:
            codes = codes - self.zeros.double().unsqueeze(2)
        elif self.format == "int4":
            codes = codes - 8
        plain: Tensor = (codes * self.scales.double().unsqueeze(2)).flatten(1)
        return plain if self.order is None else plain[:, self.order.long().argsort()]


class PackedWeight(NamedTuple):
    """A weight in the order in which kernels read it; the arguments of `xgdn.ops.quantized_linear`."""

    codes: Tensor  # [P, D/4, 16, 4]; int4: [P, D/8, 16, 4]; float8: [P, D/2, 16, 2]
    scales: Tensor  # [P, G, 16]
    zeros: Tensor | None  # [P, G, 16]
    order: Tensor | None  # [D]  int32


def _format(op: str, name: str) -> _C.WeightFormat:
    if name not in FORMATS:
        raise errors.UnsupportedError(f"[{op}] format: expected {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def quantize(weight: Tensor, format: Literal["int8", "int4"], *, group_size: int = 64) -> QuantizedRows:
    """Round a weight `[O, D]` of f32, bf16 or f16 to the nearest codes, with the scale for each group, in the dtype of
    the weight, that makes the group's squared error smallest among a few candidates; it may be negative.

    Raises:
        NotImplementedError: for another format, or a group size that is not 32, 64 or 128 or does not divide D.
        ValueError, TypeError: for a weight of another shape, dtype or device.
        IndexError: for values that are not finite.
    """
    codes, scales = _C.quantize_rows(weight, _format("quantize_rows", format), group_size)
    return QuantizedRows(format, group_size, codes, scales)


def pack(rows: QuantizedRows) -> PackedWeight:
    """Bring rows into the order in which kernels read them.

    Raises:
        NotImplementedError: for another format, zeros of float8, or a group size as in `quantize`.
        ValueError, TypeError: for tensors of another shape, dtype or device.
        IndexError: for codes that the format does not have, or an order that is no permutation.
    """
    format = _format("pack_rows", rows.format)
    return PackedWeight(*_C.pack_rows(rows.codes, rows.scales, rows.zeros, rows.order, format, rows.group_size))
