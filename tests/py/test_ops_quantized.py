# SPDX-License-Identifier: Apache-2.0
"""Products with weights in 8 or 4 bits against float64, and the rounding and packing of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import xgdn
from cases import Matrix, assert_batch_invariant, assert_bits_equal, assert_close
from quantized_calls import (
    BF16,
    F16,
    F32,
    FORMATS,
    QUANTIZED_EXPERTS,
    QuantizedCall,
    QuantizedExpertsCall,
    QuantizedInputs,
    every_float8,
    plain,
    random_rows,
)
from xgdn import errors, ops
from xgdn.quantization import PackedWeight, QuantizedRows, WeightFormat, pack, quantize

NEEDS_CPU = pytest.mark.skipif("cpu" not in xgdn.available_backends(), reason="this build has no cpu backend")

TOKENS = (0, 1, 2, 3, 5, 6, 7, 12, 13, 17, 33, 96, 97, 130)
WIDTHS = (1, 15, 16, 17, 31, 33, 48, 80)
GROUPS = ((32, 32), (64, 32), (64, 64), (128, 128), (192, 64), (1184, 32), (1088, 64), (1152, 128))  # D, group size
CALLS = [
    *(QuantizedCall(f, T, O=width, bias=T % 2 == 0) for f in FORMATS for T in TOKENS for width in (16, 33, 80)),
    *(QuantizedCall(f, T, zeros=True, order=T > 5, out_dtype=F32) for f in FORMATS[:2] for T in TOKENS),
    *(QuantizedCall(f, T, O=width, zeros=True, gaps=(3, 5)) for f in FORMATS for T in (1, 7) for width in WIDTHS),
    *(
        QuantizedCall(f, T, D=D, group_size=size, zeros=T == 13, order=True, bias=True, out_dtype=F32)
        for f in FORMATS
        for T in (1, 13)
        for D, size in GROUPS
    ),
    *(
        QuantizedCall(f, 5, D=128, O=31, group_size=64, dtype=dtype, scales=scales, bias=True, out_dtype=out_dtype)
        for f in FORMATS
        for dtype in (F32, BF16, F16)
        for scales in (F32, BF16, F16)
        for out_dtype in (None, F32)
    ),
    *(
        QuantizedCall(f, T, D=D, O=33, group_size=size, zeros=T % 2 == 1, order=T > 5, out_dtype=F32, bits=8)
        for f in FORMATS[:2]
        for T in TOKENS
        for D, size in ((96, 32), (192, 64), (128, 128))
    ),
    *(QuantizedCall(f, 7, O=33, dtype=F32, zeros=True, gaps=gaps) for f in FORMATS for gaps in ((1, 0), (0, 7))),
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_quantized_linear(call: QuantizedCall, backend: str) -> None:
    x = call.make()
    assert_close("out", x.run(backend), x.expected(backend), call.bound(backend), parts=(0,))


@pytest.mark.parametrize("order", [False, True], ids=["plain", "order"])
@pytest.mark.parametrize("zeros", [False, True], ids=["", "zeros"])
@pytest.mark.parametrize("format", FORMATS)
def test_tokens_of_one_element_read_the_weight(format: WeightFormat, zeros: bool, order: bool, backend: str) -> None:
    """Each element of the weight by itself: its code, its scale, its zero, its place."""
    rows = random_rows(format, 33, 192, 64, zeros=zeros, order=order)
    call = QuantizedCall(format, 192, D=192, O=33, group_size=64, dtype=F32)
    got = QuantizedInputs(call, rows, Matrix(torch.eye(192), 0)).run(backend)
    want = plain(rows).T
    assert ((got - want).abs() <= 3e-7 * want.abs()).all()


def test_every_float8_is_its_value(backend: str) -> None:
    """Subnormals, -0 and the largest too, from an element of the weight to a result."""
    rows = QuantizedRows("float8", 128, every_float8()[None], torch.ones(1, 2))
    call = QuantizedCall("float8", 256, D=256, O=1, group_size=128, dtype=F32)
    got = QuantizedInputs(call, rows, Matrix(torch.eye(256), 0)).run(backend)
    assert torch.equal(got[:, 0], every_float8().float())


@pytest.mark.parametrize(
    ("format", "code", "zero"),
    [("int8", 127, -128), ("int8", -128, 127), ("int4", 15, 0), ("int4", 0, 15), ("int4", 0, 127), ("int4", 15, -128)],
)
def test_the_largest_sums_are_exact(format: WeightFormat, code: int, zero: int, backend: str) -> None:
    """Elements of one size in groups of 128, every code and zero at its end: a sum that an i32 must hold."""
    rows = random_rows(format, 17, 1024, 128, zeros=True)
    assert rows.zeros is not None
    rows = rows._replace(codes=torch.full_like(rows.codes, code), zeros=torch.full_like(rows.zeros, zero))
    call = QuantizedCall(format, 7, D=1024, O=17, group_size=128, dtype=F32)
    signs = torch.tensor([1.0, -1.0, 3.0, 1e-20, -1e20, 0.7, -2.5])[:, None].expand(-1, 1024)
    x = QuantizedInputs(call, rows, Matrix(signs, 0))
    assert_close("out", x.run(backend), x.expected(), 4e-6, parts=(0,))


@pytest.mark.parametrize("format", FORMATS)
def test_scales_below_the_normal_ones_of_float16(format: WeightFormat, backend: str) -> None:
    rows = random_rows(format, 33, 96, 32)
    tiny = (torch.arange(33 * 3).view(33, 3) % 1023 + 1) * 2.0**-24
    rows = rows._replace(scales=tiny.half())
    assert torch.equal(rows.scales.float(), tiny)
    x = QuantizedInputs(QuantizedCall(format, 5, O=33, dtype=F32), rows, Matrix(torch.randn(5, 96), 0))
    assert_close("out", x.run(backend), x.expected(), x.call.bound(backend), parts=(0,))


@pytest.mark.parametrize("format", FORMATS)
def test_groups_of_a_token_may_differ_in_size(format: WeightFormat, backend: str) -> None:
    """A small group keeps its digits beside a large one, whose weights are zero here."""
    rows = random_rows(format, 33, 96, 32)
    rows = rows._replace(scales=rows.scales * torch.tensor([1.0, 0.0, 1e3]))
    values = torch.randn(7, 96) * torch.tensor([1.0, 1e6, 1e-3]).repeat_interleave(32)
    x = QuantizedInputs(QuantizedCall(format, 7, O=33, dtype=F32), rows, Matrix(values, 0))
    assert_close("out", x.run(backend), x.expected(), x.call.bound(backend), parts=(0,))


@pytest.mark.parametrize("format", FORMATS)
def test_tokens_of_zeros_and_of_almost_nothing(format: WeightFormat, backend: str) -> None:
    x = QuantizedCall(format, 7, dtype=F32, bias=True).make()
    x.x.values[2] = 0
    x.x.values[5] *= 1e-38
    assert x.bias is not None
    got = x.run(backend)
    assert_bits_equal("a token of zeros", got[2], x.bias)
    assert_bits_equal("a token of almost nothing", got[5], x.bias)
    assert_close("out", got, x.expected(), x.call.bound(backend), parts=(0,))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_token_that_is_not_finite_spoils_its_own_row_alone(
    format: WeightFormat, dtype: torch.dtype, value: float, backend: str
) -> None:
    x = QuantizedCall(format, 33, O=41, dtype=dtype, zeros=True, bias=True).make()
    clean = x.run(backend)
    others = torch.ones(33, dtype=torch.bool)
    for token, column in ((3, 5), (17, 0), (32, 95)):
        x.x.values[token, column] = value
        others[token] = False
    got = x.run(backend)
    if format == "float8" or backend != "cpu":  # a sum with an infinity may be one
        assert not (got[~others].isfinite() & (plain(x.rows)[:, [5, 0, 95]].T != 0)).any()
    else:
        assert got[~others].isnan().all()
    assert_batch_invariant("quantized_linear", "other tokens", got[others], clean[others], x.call.bound(backend))


def test_out_is_made_like_x(backend: str) -> None:
    x = QuantizedCall("int4", 5, O=33).make()
    codes, scales, *_ = x.packed
    got = ops.quantized_linear(x.x.values, codes, scales, num_outputs=33, backend=backend)
    assert got.dtype == BF16
    assert_bits_equal("out", got, x.run(backend))
    whole = ops.quantized_linear(x.x.values, codes, scales, backend=backend)
    assert whole.shape == (5, 48)
    assert_close("the outputs", whole[:, :33], got, x.call.bound(backend))
    assert not whole[:, 33:].any()  # what fills up the last panel


@NEEDS_CPU
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("D", "group_size"), [(1184, 32), (1088, 64), (1152, 128)])
@pytest.mark.parametrize("out_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_other_tokens_do_not_change_bits(
    format: WeightFormat,
    out_dtype: torch.dtype,
    D: int,
    group_size: int,
    bias: bool,
    num_threads: Callable[[int], None],
) -> None:
    call = QuantizedCall(format, 130, D=D, O=1025, group_size=group_size, zeros=bias, bias=bias, out_dtype=out_dtype)
    x = call.make()
    num_threads(1)
    together = x.run("cpu")
    assert xgdn.last_is_batch_invariant("quantized_linear")
    for count in (2, 3, 4, 5, 6, 7, 8, 12, 13, 31, 33, 97):
        assert_bits_equal(f"the first {count} tokens", x.run("cpu", slice(count)), together[:count])
    for token in (0, 1, 5, 6, 11, 64, 129):
        assert_bits_equal(f"token {token}", x.run("cpu", slice(token, token + 1)), together[token : token + 1])
    num_threads(3)
    assert_bits_equal("three threads", x.run("cpu"), together)
    assert_bits_equal("a token on three threads", x.run("cpu", slice(7, 8)), together[7:8])


@NEEDS_CPU
@pytest.mark.parametrize("format", FORMATS)
def test_gaps_do_not_change_bits(format: WeightFormat) -> None:
    x = QuantizedCall(format, 13, O=33, zeros=True, bias=True).make()
    want = x.run("cpu")
    for gaps in ((1, 0), (0, 3), (6, 2)):
        moved = QuantizedInputs(replace(x.call, gaps=gaps), x.rows, Matrix(x.x.values, gaps[0]), x.bias)
        assert_bits_equal(f"gaps {gaps}", moved.run("cpu"), want)


@NEEDS_CPU
@pytest.mark.parametrize("format", FORMATS)
def test_threads_that_share_tokens_compute_the_same_bits(
    format: WeightFormat, num_threads: Callable[[int], None]
) -> None:
    x = QuantizedCall(format, 600, D=256, O=40, bias=True).make()
    num_threads(1)
    alone = x.run("cpu")
    num_threads(3)
    assert_bits_equal("three threads", x.run("cpu"), alone)


@NEEDS_CPU
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("T", [1, 7])
def test_out_is_rounded_once(T: int, format: WeightFormat) -> None:
    x = QuantizedCall(format, T, bias=True).make()
    wide = QuantizedInputs(replace(x.call, out_dtype=F32), x.rows, x.x, x.bias)
    assert_bits_equal("out", x.run("cpu"), wide.run("cpu").bfloat16())


@NEEDS_CPU
@pytest.mark.parametrize("format", FORMATS[:2])
def test_integer_codes_and_16_bits_of_x_is_all_that_is_rounded(format: WeightFormat) -> None:
    """Elements that are whole in 16 bits leave nothing to round but the sums of the groups."""
    x = QuantizedCall(format, 7, D=64, group_size=32, dtype=F32, zeros=True).make()
    x.x.values.copy_(torch.randint(-32639, 32640, (7, 64)))
    x.x.values[:, ::32] = 32639
    assert_close("out", x.run("cpu"), x.expected(), 2e-7, parts=(0, 1))


# ---- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", QUANTIZED_EXPERTS, ids=str)
def test_quantized_experts_are_the_formula(call: QuantizedExpertsCall, backend: str) -> None:
    call.make()
    if call.only is not None:  # what nobody chooses is not read
        for experts in call.rows:
            for e in set(range(call.E)) - set(call.only):
                experts[e].scales.fill_(torch.nan)
    assert_close("out", call.run(backend=backend), call.expected(), call.bound, parts=(0,))
    assert xgdn.last_backend("quantized_moe_experts") == backend


@NEEDS_CPU
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("formats", [("int8", "int4"), ("int4", "int8")], ids="_".join)
def test_experts_round_activations_as_products_do(
    formats: tuple[WeightFormat, WeightFormat], dtype: torch.dtype
) -> None:
    """One expert a token: the bits of two products in 8 bits, each token by itself."""
    call = QuantizedExpertsCall(40, A=1, formats=formats, zeros=(True, False), dtype=dtype).make()
    call.weights.fill_(1)
    options = {"activation_bits": 8, "backend": "cpu"}
    got = ops.quantized_moe_experts(*call.arguments(), **call.zero_points(), **options)
    for t, e in enumerate(call.chosen[:, 0].tolist()):
        gate_up, down = (pack(experts[e]) for experts in call.rows)
        both = ops.quantized_linear(call.x[t : t + 1], gate_up.codes, gate_up.scales, zeros=gate_up.zeros, **options)
        gated = ops.silu_and_mul(*both.chunk(2, dim=1), backend="cpu")
        want = ops.quantized_linear(gated, down.codes, down.scales, zeros=down.zeros, **options)
        assert_bits_equal(f"token {t}", got[t : t + 1], want)
    assert not torch.equal(got, call.run(backend="cpu"))  # of 16 bits


@pytest.mark.parametrize("bits", [0, 4, 32])
def test_other_bits_of_activations_are_refused(bits: int) -> None:
    x = QuantizedCall("int8", 3).make()
    with pytest.raises(IndexError, match=rf"\[quantized_linear\] activation_bits: expected 8 or 16, got {bits}"):
        ops.quantized_linear(x.x.values, x.packed.codes, x.packed.scales, activation_bits=bits)


# ---- rounding -------------------------------------------------------------------------------------------------------


def in_groups(x: Tensor, rows: QuantizedRows) -> Tensor:
    return x.double().unflatten(1, (-1, rows.group_size))


def errors_of_absmax(weight: Tensor, rows: QuantizedRows) -> Tensor:
    """Squared errors of the groups when the largest magnitude alone gives the scale."""
    groups = in_groups(weight, rows)
    largest = 127 if rows.format == "int8" else 7
    scales = (groups.abs().amax(2, keepdim=True) / largest).to(weight.dtype).double()
    codes = (groups / scales).nan_to_num(0, 0, 0).round().clamp(-largest - 1, largest)
    return (codes * scales - groups).square().sum(2)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("format", FORMATS[:2])
def test_rounding_is_to_nearest_and_no_worse_than_by_the_largest(
    format: WeightFormat, dtype: torch.dtype, group_size: int
) -> None:
    weight = torch.randn(37, 384) * torch.rand(37, 1).exp()
    weight[3] = 0
    weight[4, :group_size] = 0
    weight[5, 7] = 1e4
    weight[6] *= 1e-4
    weight[7] *= 1e-18  # squares leave f32; in float16 all are zeros
    if dtype != F16:
        weight[8] *= 1e30
    weight = weight.to(dtype)
    rows = quantize(weight, format, group_size=group_size)
    assert (rows.format, rows.group_size, rows.zeros, rows.order) == (format, group_size, None, None)
    assert rows.scales.dtype == dtype
    assert rows.scales.shape == (37, 384 // group_size)
    got = plain(rows)
    assert got[3].eq(0).all()
    assert got[4, :group_size].eq(0).all()
    difference = in_groups(got - weight.double(), rows)
    assert (difference.square().sum(2) <= errors_of_absmax(weight, rows) * (1 + 1e-4)).all()
    # No other code would be closer, but beyond the ends of the range.
    codes = in_groups(rows.codes, rows) - (8 if format == "int4" else 0)
    low, high = (-128, 127) if format == "int8" else (-8, 7)
    assert codes.amin() >= low
    assert codes.amax() <= high
    scales = rows.scales.double().abs().unsqueeze(2)
    is_nearest = difference.abs() <= scales * 0.5001
    assert (is_nearest | (codes == low) | (codes == high) | (scales == 0)).all()


@pytest.mark.parametrize(("format", "share"), [("int8", 0.87), ("int4", 0.72)])
def test_the_scale_is_searched(format: WeightFormat, share: float) -> None:
    weight = torch.randn(64, 512)
    rows = quantize(weight, format, group_size=32)
    error = (plain(rows) - weight).square().sum()
    assert error <= share * errors_of_absmax(weight, rows).sum()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("format", "ends"), [("int8", (-127, 127)), ("int8", (-128, 100)), ("int4", (-7, 7)), ("int4", (-8, 3))]
)
def test_what_is_representable_is_kept(format: WeightFormat, ends: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randint(ends[0], ends[1] + 1, (20, 128)).double()
    weight[:, ::32] = ends[0]
    weight *= (2.0 ** torch.randint(-9, 5, (20, 4))).repeat_interleave(32, 1)
    weight = weight.to(dtype)
    once = quantize(weight, format, group_size=32)
    assert torch.equal(plain(once), weight.double())


def test_rounding_takes_a_part_of_a_weight() -> None:
    wide = torch.randn(40, 200)
    part = wide[1:-2, 5:133]
    for got, want in zip(quantize(part, "int4"), quantize(part.contiguous(), "int4"), strict=True):
        assert torch.equal(got, want) if isinstance(got, Tensor) else got == want


@pytest.mark.parametrize(
    ("weight", "options", "error", "words"),
    [
        (torch.randn(4, 64), {"format": "float8"}, errors.UnsupportedError, ["format", "int8 or int4", "float8"]),
        (torch.randn(4, 64), {"format": "int3"}, errors.UnsupportedError, ["format", "int8, int4", "'int3'"]),
        (torch.randn(4, 64), {"group_size": 16}, errors.UnsupportedError, ["group_size", "32, 64 or 128", "16"]),
        (torch.randn(4, 96), {"group_size": 64}, errors.UnsupportedError, ["group_size", "divisor of D=96", "64"]),
        (torch.randn(64), {}, errors.ShapeError, ["weight", "[O, D]", "[64]"]),
        (torch.randn(4, 64).double(), {}, errors.DtypeError, ["weight", "float32", "Double"]),
        (torch.zeros(4, 64).int(), {}, errors.DtypeError, ["weight", "float32", "Int"]),
        *(
            (torch.randn(4, 64).index_fill(1, torch.tensor(column), value), {}, errors.RangeError, ["weight", "finite"])
            for column, value in ((0, torch.nan), (33, torch.inf), (63, -torch.inf))
        ),
        (torch.full((2, 64), torch.nan).bfloat16(), {}, errors.RangeError, ["weight", "finite", "nan"]),
    ],
)
def test_what_cannot_be_rounded(
    weight: Tensor, options: dict[str, object], error: type[Exception], words: list[str]
) -> None:
    arguments: dict[str, object] = {"format": "int8", "group_size": 32, **options}
    with pytest.raises(error, match=r"^\[quantize_rows\] \w+: expected ") as caught:
        quantize(weight, **arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# ---- packing --------------------------------------------------------------------------------------------------------


def unpacked(packed: PackedWeight, O: int) -> Tensor:  # noqa: E741
    """The plain weight in float64, read as docs and headers describe what is packed."""
    P, depth, outputs, row_bytes = packed.codes.shape
    is_int4 = packed.codes.dtype == torch.uint8
    order = {
        torch.int8: (0, 2, 1, 3),
        torch.uint8: (0, 2, 4, 6, 1, 3, 5, 7),
        torch.float8_e4m3fn: (0, 1),
    }[packed.codes.dtype]
    assert (outputs, row_bytes) == (16, 4 if is_int4 else len(order))
    elements = torch.full((P, 16, depth, len(order)), torch.nan, dtype=torch.float64)
    for place, element in enumerate(order):
        byte = packed.codes[..., place // 2 if is_int4 else place]
        values = byte >> 4 * (place % 2) & 15 if is_int4 else byte
        elements[..., element] = values.double().transpose(1, 2)
    weight = elements.flatten(2).flatten(0, 1)
    size = weight.shape[1] // packed.scales.shape[1]

    def of_groups(t: Tensor) -> Tensor:
        return t.double().transpose(1, 2).flatten(0, 1).repeat_interleave(size, 1)

    weight -= of_groups(packed.zeros) if packed.zeros is not None else 8 * is_int4
    weight *= of_groups(packed.scales)
    assert not weight[O:].any()
    if packed.order is None:
        return weight[:O]
    in_place = torch.full_like(weight, torch.nan)
    in_place[:, packed.order.long()] = weight
    return in_place[:O]


@pytest.mark.parametrize("order", [None, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("zeros", [False, True], ids=["", "zeros"])
@pytest.mark.parametrize("O", [1, 16, 33])
@pytest.mark.parametrize("format", FORMATS)
def test_packing_is_a_round_trip(format: WeightFormat, O: int, zeros: bool, order: torch.dtype | None) -> None:  # noqa: E741
    rows = random_rows(format, O, 192, 64, zeros=zeros, order=order is not None, scales=BF16)
    if order is not None and rows.order is not None:
        rows = rows._replace(order=rows.order.to(order))
    packed = pack(rows)
    assert torch.equal(rows.dequantize(), plain(rows))
    assert torch.equal(unpacked(packed, O), plain(rows))
    assert packed.codes.dtype == rows.codes.dtype
    assert packed.scales.dtype == BF16
    assert packed.order is None or packed.order.dtype == torch.int32


def test_rows_with_gaps_are_packed() -> None:
    rows = random_rows("int4", 40, 256, 32, zeros=True)
    assert rows.zeros is not None
    some = rows._replace(codes=rows.codes[3:20, 64:192], scales=rows.scales[3:20, 2:6], zeros=rows.zeros[3:20, 2:6])
    assert torch.equal(unpacked(pack(some), 17), plain(rows)[3:20, 64:192])


GOOD = random_rows("int8", 3, 64, 32, zeros=True, order=True)
INT4, FLOAT8 = (random_rows(format, 3, 64, 32) for format in ("int4", "float8"))


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (GOOD._replace(format="int3"), errors.UnsupportedError, ["format", "int8, int4, float8", "'int3'"]),
        (GOOD._replace(group_size=48), errors.UnsupportedError, ["group_size", "32, 64 or 128", "48"]),
        (GOOD._replace(group_size=128), errors.UnsupportedError, ["group_size", "a divisor of D=64", "128"]),
        (GOOD._replace(codes=GOOD.codes[0]), errors.ShapeError, ["codes", "[O, D]", "[64]"]),
        *(
            (GOOD._replace(format=format), errors.DtypeError, ["codes", dtype, "Char"])
            for format, dtype in (("int4", "Byte"), ("float8", "Float8_e4m3fn"))
        ),
        (GOOD._replace(codes=GOOD.codes.view(torch.uint8)), errors.DtypeError, ["codes", "Char", "Byte"]),
        (GOOD._replace(scales=GOOD.scales[:2]), errors.ShapeError, ["scales", "[O, G]", "[3, 2]", "[2, 2]"]),
        (GOOD._replace(scales=GOOD.scales[:, :1]), errors.ShapeError, ["scales", "[3, 2]", "[3, 1]"]),
        (GOOD._replace(group_size=64), errors.ShapeError, ["scales", "[3, 1]", "[3, 2]"]),
        (GOOD._replace(scales=GOOD.scales.double()), errors.DtypeError, ["scales", "Float or BFloat16", "Double"]),
        (GOOD._replace(scales=GOOD.scales.to("meta")), errors.DeviceError, ["scales", "cpu (set by codes)", "meta"]),
        (GOOD._replace(zeros=GOOD.scales), errors.DtypeError, ["zeros", "Char", "Float"]),
        (GOOD._replace(zeros=torch.zeros(3, dtype=torch.int8)), errors.ShapeError, ["zeros", "[O, G]", "[3]"]),
        (FLOAT8._replace(zeros=GOOD.zeros), errors.UnsupportedError, ["zeros", "none", "float8"]),
        (GOOD._replace(order=torch.arange(63)), errors.ShapeError, ["order", "[D]", "[64]", "[63]"]),
        (GOOD._replace(order=torch.arange(64.0)), errors.DtypeError, ["order", "Long or Int", "Float"]),
        *(
            (GOOD._replace(order=torch.arange(64).index_fill(0, torch.tensor(9), value)), errors.RangeError, words)
            for value, words in (
                (7, ["order", "0..63 once", "got 7 at index 9"]),
                (64, ["order", "0..63", "got 64 at index 9"]),
                (-1, ["order", "0..63", "got -1 at index 9"]),
            )
        ),
        (INT4._replace(codes=INT4.codes + 16), errors.RangeError, ["codes", "0..15"]),
        (
            INT4._replace(codes=torch.zeros(3, 64).byte().index_fill(1, torch.tensor(63), 16)),
            errors.RangeError,
            ["codes", "0..15", "got 16"],
        ),
        *(
            (
                FLOAT8._replace(codes=torch.full((3, 64), code, dtype=torch.uint8).view(torch.float8_e4m3fn)),
                errors.RangeError,
                ["codes", "finite", "nan"],
            )
            for code in (0x7F, 0xFF)
        ),
    ],
)
def test_rows_that_do_not_fit_each_other(rows: QuantizedRows, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error, match=r"^\[pack_rows\] \w+: expected ") as caught:
        pack(rows)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_meta_tensors_have_sizes_alone() -> None:
    rows = GOOD._replace(**{name: getattr(GOOD, name).to("meta") for name in ("codes", "scales", "zeros", "order")})
    for got, want in zip(pack(rows), pack(GOOD), strict=True):
        assert got is not None
        assert want is not None
        assert got.is_meta
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
    for got, want in zip(
        quantize(torch.randn(3, 64).to("meta"), "int4"), quantize(torch.randn(3, 64), "int4"), strict=True
    ):
        assert got.shape == want.shape if isinstance(got, Tensor) else got == want
