# SPDX-License-Identifier: Apache-2.0
"""Every op on cuda tensors beside the reference backend on the same numbers; copies, attention and experts beside their
formulas; a captured step that is replayed with other slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

import xgdn
from attention_calls import ATTENTION, EXPERTS, ROUNDING, AttentionCall, ExpertsCall
from cases import OPS, assert_bits_equal, assert_close, i32
from copy_calls import COPY, STORE, CopyCall, StoreCall
from test_ops_decode_step import CASES as STEPS
from test_ops_decode_step import TOLERANCE, Inputs, make_inputs
from test_ops_decode_step import Case as StepCase
from test_torch_ops import Sample, packet, samples, written_arguments
from xgdn import ops

MOST_TOKENS = 32  # that xgdn multiplies itself: linear.cu

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def on_cuda(sample: Sample) -> Sample:
    args, kwargs = sample
    host = {name: x for name, x in kwargs.items() if name.endswith("_cpu")}
    moved = tree_map_only(torch.Tensor, lambda t: t.clone().cuda(), {k: v for k, v in kwargs.items() if k not in host})
    return tree_map_only(torch.Tensor, lambda t: t.clone().cuda(), args), {**moved, **host}


def written(op: str, sample: Sample) -> dict[str, Any]:
    args, kwargs = sample
    values = {a.name: x for a, x in zip(packet(op)._schema.arguments, args, strict=False)} | kwargs
    return {a.name: values[a.name] for a in written_arguments(op) if values.get(a.name) is not None}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_writes_what_the_reference_writes(op: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    for i, (args, kwargs) in enumerate(samples(op, dtype, state_dtype)):
        want = tree_map_only(torch.Tensor, torch.clone, args), {**kwargs, "backend": "reference"}
        got = on_cuda((args, {**kwargs, "backend": "cuda"}))
        packet(op)(*want[0], **want[1])
        packet(op)(*got[0], **got[1])
        results = written(op, got)
        for name, expected in written(op, want).items():
            for a, b in zip(*map(torch.utils._pytree.tree_leaves, (results[name], expected)), strict=True):
                assert a.is_cuda
                if b.dtype.is_floating_point:
                    assert_close(f"{name} of sample {i}", a.cpu(), b, BOUNDS[dtype])
                else:
                    assert_bits_equal(f"{name} of sample {i}", a.cpu(), b)


def has_kernel(call: AttentionCall) -> bool:
    return call.D % 8 == 0


@pytest.mark.parametrize("call", [c for c in ATTENTION if has_kernel(c)], ids=str)
@pytest.mark.parametrize("with_lengths", [True, False])
def test_attention_is_the_formula(call: AttentionCall, with_lengths: bool) -> None:
    call.make()
    got = call.run("cuda", with_rows=False, with_lengths=with_lengths)
    assert_close("out", got, call.expected(), call.bound, parts=(0,))
    assert xgdn.last_backend("paged_attention") == "cuda"


@pytest.mark.parametrize("call", [c for c in ATTENTION if not has_kernel(c)], ids=str)
def test_attention_without_a_kernel_is_refused(call: AttentionCall) -> None:
    with pytest.raises(NotImplementedError, match=r"cuda.*a multiple of 8"):
        call.make().run("cuda")


@pytest.mark.parametrize("call", EXPERTS, ids=str)
def test_experts_are_the_formula(call: ExpertsCall) -> None:
    call.make()
    got, want = call.run("cuda"), call.expected()
    if call.T > 0:
        assert_close("out", got, want, ROUNDING[call.dtype], parts=(0,))
    assert got.shape == want.shape
    assert xgdn.last_backend("moe_experts") == "cuda"


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        *((1, 32, 16), (3, 1024, 100), (8, 96, 33), (9, 2048, 16), (16, 3584, 40), (17, 64, 24), (33, 64, 24)),
        *((5, 4000, 40), (8, 6144, 24), (7, 8192, 24), (1, 12288, 24)),  # much shared memory, the most, none, some
        *((1, 1024, 4107), (5, 3584, 4107), (11, 1024, 4107), (16, 5120, 4107), (25, 1024, 4107), (32, 3584, 4107)),
        *((13, 1024, 4300), (16, 96, 5003), (17, 512, 8000), (31, 1024, 5003)),  # a block an SM, or two
        *((2, 1024, 9003), (8, 992, 20000)),  # blocks in turns
        *((9, 96, 36_001), (12, 1024, 40_003), (24, 2048, 34_000), (32, 1024, 34_000)),  # a vocabulary
    ],
)
@pytest.mark.parametrize("is_constant", [True, False])
def test_linear_is_the_product(
    shape: tuple[int, int, int], has_bias: bool, out_dtype: torch.dtype, is_constant: bool
) -> None:
    """Tokens and rows of the weight lie inside wider memory of NaN. Few and many outputs, one and two passes over D."""
    T, D, width = shape
    wide_x, wide_weight = torch.full((T + 2, D + 8), torch.nan), torch.full((width + 2, D + 16), torch.nan)
    x, weight, bias = torch.randn(T, D).bfloat16(), torch.randn(width, D).bfloat16(), torch.randn(width).bfloat16()
    wide_x[1:-1, :D], wide_weight[1:-1, :D] = x, weight
    out = torch.full((T, width + 3), torch.nan, dtype=out_dtype, device="cuda")
    ops.linear(
        wide_x.bfloat16().cuda()[1:-1, :D],
        wide_weight.bfloat16().cuda()[1:-1, :D],
        bias=bias.cuda() if has_bias else None,
        has_constant_weight=is_constant,
        out=out[:, :width],
    )
    want = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    assert_close("out", out[:, :width].cpu(), want, 4e-3 if out_dtype == torch.bfloat16 else 1e-6, parts=(0, 1))
    assert out[:, width:].isnan().all()


def test_linear_waits_for_a_weight_that_an_op_writes() -> None:
    """Products of products, each launched while the one before runs, whose result is its weight."""
    torch.manual_seed(0)
    weight = (torch.randn(512, 512) / 512**0.5).bfloat16().cuda()
    wide = weight.repeat(8, 1)  # blocks enough that some begin late
    first = ops.linear(wide[:16], wide)  # [16, 4096]: as the weight of what follows
    torch.cuda.synchronize()
    want = ops.linear(torch.ones(1, 4096, device="cuda").bfloat16(), first)
    torch.cuda.synchronize()
    for _ in range(20):
        made = torch.full_like(first, torch.nan)
        torch.cuda.synchronize()
        ops.linear(wide[:16], wide, out=made)
        got = ops.linear(torch.ones(1, 4096, device="cuda").bfloat16(), made)
        assert_bits_equal("out", got.cpu(), want.cpu())


@pytest.mark.parametrize("T", [1, 7, 13, 30])
@pytest.mark.parametrize(
    ("D", "width"),
    [
        *((1024, 1024), (3584, 1024), (1024, 5000), (512, 9000)),
        *((1024, 40_001), (2048, 40_000), (288, 36_000), (2560, 40_000)),  # a vocabulary
    ],
)
def test_tokens_of_linear_have_the_bits_that_they_have_alone(D: int, width: int, T: int) -> None:
    """Up to 32 tokens: how many there are changes what is loaded together, not what is added."""
    x, weight = torch.randn(T, D).bfloat16().cuda(), torch.randn(width, D).bfloat16().cuda()
    together = ops.linear(x, weight, has_constant_weight=True)
    for token in range(T):
        alone = ops.linear(x[token : token + 1], weight, has_constant_weight=True)
        assert_bits_equal(f"token {token}", together[token : token + 1].cpu(), alone.cpu())


@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize(
    "shape",
    [
        *((1, 256, 24), (1, 1024, 8224), (2, 1024, 7168), (4, 1024, 90), (8, 512, 400), (1, 2560, 2056)),
        *((2, 2048, 34), (1, 4096, 1032), (8, 1024, 7168), (3, 2560, 90), (1, 8192, 90)),
        *((5, 2048, 90), (9, 512, 34), (1, 96, 34), (1, 8448, 34), (40, 1024, 90)),  # a norm, and then the product
        *((16, 1024, 7168), (30, 2560, 90)),
    ],
    ids=str,
)
def test_norm_and_gate_around_a_product_keep_its_bits(
    shape: tuple[int, int, int], gated: bool, has_bias: bool, has_residual: bool
) -> None:
    """Rows lie inside wider memory of NaN, which stays as it was."""
    T, D, O = shape  # noqa: E741
    torch.manual_seed(0)
    weight, norm = (torch.randn(O, D) / D**0.5).bfloat16().cuda(), (0.3 * torch.randn(D)).bfloat16().cuda()
    bias = torch.randn(O).bfloat16().cuda() if has_bias else None

    def rows(width: int, values: torch.Tensor | None = None) -> torch.Tensor:
        wide = torch.full((T + 2, width + 16), torch.nan, dtype=torch.bfloat16, device="cuda")
        if values is not None:
            wide[1:-1, :width] = values
        return wide

    x, residual = rows(D, torch.randn(T, D).cuda()), rows(D, 3 * torch.randn(T, D).cuda())
    width = O // 2 if gated else O
    residual_out, out = rows(D), rows(width)
    before = residual.clone()
    ops.rms_norm_linear(
        x[1:-1, :D],
        norm,
        weight,
        bias=bias,
        residual=residual[1:-1, :D] if has_residual else None,
        residual_out=residual_out[1:-1, :D] if has_residual else None,
        use_silu_and_mul=gated,
        eps=1e-5,
        out=out[1:-1, :width],
    )
    assert xgdn.last_backend("rms_norm_linear") == "cuda"

    summed = residual[1:-1, :D].clone()
    normed = ops.rms_norm(x[1:-1, None, :D], norm, residual=summed[:, None] if has_residual else None, eps=1e-5)
    product = ops.linear(normed[:, 0], weight, bias=bias)
    want = ops.silu_and_mul(*product.chunk(2, 1)) if gated else product
    if T > MOST_TOKENS:  # the product is a library's, whose bits depend on where its operands lie
        assert_close("out", out[1:-1, :width].cpu(), want.cpu(), 4e-3)
    else:
        assert_bits_equal("out", out[1:-1, :width].cpu(), want.cpu())
    assert_bits_equal("residual", residual.cpu(), before.cpu())
    for wide, used in ((out, width), (residual_out, D if has_residual else 0)):
        for around in (wide[0], wide[-1], wide[:, used:]):
            assert around.isnan().all()
    if has_residual:
        assert_bits_equal("residual_out", residual_out[1:-1, :D].cpu(), summed.cpu())


@pytest.mark.parametrize("call", STORE, ids=str)
def test_tokens_are_stored_in_their_rows_and_nowhere_else(call: StoreCall) -> None:
    call.make().check("cuda")
    assert xgdn.last_backend("store_kv") == "cuda"


@pytest.mark.parametrize("call", COPY, ids=str)
def test_slots_are_copied_and_no_other_bit_changes(call: CopyCall) -> None:
    call.make().check("cuda")
    assert xgdn.last_backend("copy_slots") == "cuda"


def decode_step(
    projected: torch.Tensor, pools: dict[str, torch.Tensor], slots: torch.Tensor, out: torch.Tensor
) -> None:
    ops.gdn_decode_step(
        projected,
        pools["taps"],
        pools["conv"],
        pools["A_log"],
        pools["dt_bias"],
        pools["state"],
        pools["norm"],
        state_indices=slots,
        out=out,
    )


def step_pools(num_slots: int, H: int, HV: int, K: int, V: int, state_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a decode step reads and writes, the same at every call."""
    torch.manual_seed(1)
    D = 2 * H * K + HV * V
    made = {
        "taps": torch.randn(D, 4).bfloat16(),
        "conv": torch.randn(num_slots, 3, D).bfloat16(),
        "A_log": torch.rand(HV),
        "dt_bias": torch.randn(HV),
        "state": torch.randn(num_slots, HV, V, K).to(state_dtype),
        "norm": torch.randn(V),
    }
    return {name: t.cuda() for name, t in made.items()}


@pytest.mark.parametrize("HV", [8, 32])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_a_decoded_sequence_has_the_bits_that_it_has_alone(packed: bool, state_dtype: torch.dtype, HV: int) -> None:
    """More sequences make smaller clusters of the step, and more rows a block of the rule. A block alone with eight
    value heads takes more shared memory than a kernel gets without asking."""
    H, K, V, N = 4, 128, 128, 130
    projected = torch.randn(N, 2 * H * K + 2 * HV * V + 2 * HV).bfloat16().cuda()
    slots = torch.randperm(N).int().cuda()

    def run(rows: slice) -> tuple[torch.Tensor, ...]:
        pools = step_pools(N, H, HV, K, V, state_dtype)
        out = torch.empty(projected[rows].shape[0], HV, V).bfloat16().cuda()
        if packed:
            mixed, _, b, a = projected[rows].split([2 * H * K + HV * V, HV * V, HV, HV], 1)
            ops.packed_decode(
                mixed, a, b, pools["A_log"], pools["dt_bias"], pools["state"], state_indices=slots[rows], out=out
            )
        else:
            decode_step(projected[rows], pools, slots[rows], out)
        assert xgdn.last_is_batch_invariant("packed_decode" if packed else "gdn_decode_step")
        return out.cpu(), pools["state"].cpu(), pools["conv"].cpu()

    out, state, conv = run(slice(None))
    for n, count in ((0, 1), (77, 1), (129, 1), (3, 9), (20, 40)):
        rows = slice(n, n + count)
        own_out, own_state, own_conv = run(rows)
        assert_bits_equal("out", own_out, out[rows])
        own = slots[rows].cpu().long()
        assert_bits_equal("state", own_state[own], state[own])
        assert_bits_equal("conv", own_conv[own], conv[own])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_many_sequences_has_the_same_bits_every_time(state_dtype: torch.dtype) -> None:
    """Blocks that fill a stage of shared memory again while the memory is busy, which delays what still reads it."""
    H, HV, K, V, N = 16, 32, 128, 128, 64
    projected = torch.randn(N, 2 * H * K + 2 * HV * V + 2 * HV).bfloat16().cuda()
    slots = torch.randperm(N).int().cuda()
    pools = step_pools(N, H, HV, K, V, state_dtype)
    before = {name: pools[name].clone() for name in ("state", "conv")}

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        for name, t in before.items():
            pools[name].copy_(t)
        out = torch.full((N, HV, V), torch.nan, dtype=torch.bfloat16, device="cuda")
        decode_step(projected, pools, slots, out)
        return out, pools["state"].clone()

    want = run()
    for _ in range(100):
        for name, got, expected in zip(("out", "state"), run(), want, strict=True):
            assert_bits_equal(name, got, expected)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("H", "HV", "V"), [(1, 1, 160), (2, 6, 96), (1, 2, 72), (16, 16, 128)])
def test_clusters_of_any_size_give_a_step_the_same_bits(H: int, HV: int, V: int, state_dtype: torch.dtype) -> None:
    """Passes that blocks share unevenly, and the last of a head that is not full. 600 sequences have no clusters."""
    K, N = 128, 600
    projected = torch.randn(N, 2 * H * K + 2 * HV * V + 2 * HV).bfloat16().cuda()
    slots = torch.randperm(N).int().cuda()

    def run(rows: slice) -> tuple[torch.Tensor, ...]:
        pools = step_pools(N, H, HV, K, V, state_dtype)
        out = torch.full((projected[rows].shape[0], HV, V), torch.nan, dtype=torch.bfloat16, device="cuda")
        decode_step(projected[rows], pools, slots[rows], out)
        return out.cpu(), pools["state"][slots[rows].long()].cpu(), pools["conv"][slots[rows].long()].cpu()

    together = run(slice(None))
    for n, count in ((0, 1), (599, 1), (7, 2), (40, 5), (100, 33), (200, 130)):
        rows = slice(n, n + count)
        for name, got, want in zip(("out", "state", "conv"), run(rows), together, strict=True):
            assert_bits_equal(f"{name} of {rows}", got, want[rows])


STEP_DIMS = (16, 32, 64, 128, 256)  # of keys, that the kernel is for
ODD_STEPS = [  # not in packets of four: rows that end elsewhere, rows of memory that begin elsewhere, short histories
    StepCase(V=18),
    StepCase(N=40, H=1, HV=3, K=128, V=33, bias=True),
    StepCase(H=1, HV=1, K=64, V=16, dtype=torch.bfloat16),
    *(StepCase(H=1, HV=3, K=128, V=46, W=W, bias=True, dtype=torch.bfloat16) for W in (2, 3)),
]


def step_on_cuda(x: Inputs) -> Inputs:
    tensors = {f.name: getattr(x, f.name) for f in fields(x)}
    return replace(x, **{name: t.cuda() for name, t in tensors.items() if isinstance(t, torch.Tensor)})


@pytest.mark.parametrize("case", [c for c in STEPS + ODD_STEPS if c.K in STEP_DIMS], ids=str)
def test_a_step_is_what_the_reference_computes(case: StepCase) -> None:
    want, got = make_inputs(case), step_on_cuda(make_inputs(case))
    want.step("reference")
    got.step("cuda")
    kept = [n for n in range(case.N) if n not in case.padded]
    if kept:
        assert_close("out", got.out[kept].cpu(), want.out[kept], TOLERANCE[case.dtype])
    assert not got.out[list(case.padded)].any()
    assert_bits_equal("conv_state", got.conv_state.cpu(), want.conv_state)
    state, written = got.state.cpu(), ~want.state.isnan()
    assert state[~written].isnan().all()
    if kept:
        bound = max(TOLERANCE[case.dtype], TOLERANCE[case.state_dtype])
        assert_close("state", state[written], want.state[written], bound)


@pytest.mark.parametrize("N", [1, 4, 40])
def test_a_step_reads_what_the_kernels_right_before_it_wrote(N: int) -> None:
    """Slots, inputs and states of the step before; a step begins to fetch before those are there."""
    H, HV, K, V = 4, 8, 128, 128
    torch.manual_seed(0)
    weight = (torch.randn(2 * H * K + 2 * HV * V + 2 * HV, 256) / 16).bfloat16().cuda()
    x = torch.randn(6, N, 256).bfloat16().cuda()
    first = torch.arange(N, dtype=torch.int32, device="cuda")

    def run(wait: Callable[[], None]) -> list[torch.Tensor]:
        pools = step_pools(N + 3, H, HV, K, V, torch.float32)
        slots, out = torch.full_like(first, 2**30), torch.empty(12, N, HV, V).bfloat16().cuda()
        projected = torch.full((N, weight.shape[0]), torch.nan, dtype=torch.bfloat16, device="cuda")
        for i in range(6):
            wait()
            torch.add(first, i % 4, out=slots)
            wait()
            ops.linear(x[i], weight, out=projected)
            for j in range(2):
                wait()
                decode_step(projected, pools, slots, out[2 * i + j])
            wait()
            torch.add(first, 2**30, out=slots)
        return [out.cpu(), pools["state"].cpu(), pools["conv"].cpu()]

    for name, got, want in zip(("out", "state", "conv"), run(lambda: None), run(torch.cuda.synchronize), strict=True):
        assert got.isfinite().all()
        assert_bits_equal(name, got, want)


def test_pools_of_more_than_two_billion_elements() -> None:
    """Offsets of 32 bits would wrap to the first slots."""
    H, HV, K, V = 16, 32, 128, 128
    last = 2**31 // (HV * V * K) + 2
    state = torch.empty(last + 1, HV, V, K, dtype=torch.bfloat16, device="cuda")
    state[:4], state[-1] = 0, torch.randn(HV, V, K)
    small = state[-1:].clone()
    q, k, v = (torch.randn(3, heads, K).bfloat16().cuda() for heads in (H, H, HV))
    g, beta = -torch.rand(3, HV).cuda(), torch.rand(3, HV).cuda()
    for rule in ("recurrent", "chunk", "step"):
        results = []
        for pool, slot in ((state, last), (small, 0)):
            at = {"cu_seqlens": i32([0, 3]).cuda(), "state_indices": i32([slot]).cuda()}
            if rule == "recurrent":
                out = ops.recurrent_gated_delta_rule(q, k, v, g, beta, pool, **at)
            elif rule == "chunk":
                chunk = ops.build_chunk_metadata([3], HV, device="cuda")
                out = ops.chunk_gated_delta_rule(q, k, v, g, beta, pool, **at, chunk=chunk)
            else:
                pools = step_pools(1, H, HV, K, V, torch.bfloat16) | {"state": pool}
                slots = i32([slot]).cuda()
                projected = torch.linspace(-1, 1, 2 * H * K + 2 * HV * V + 2 * HV).bfloat16().cuda()[None]
                out = torch.empty(1, HV, V).bfloat16().cuda()
                ops.gdn_decode_step(
                    projected,
                    pools["taps"],
                    pools["conv"],
                    pools["A_log"],
                    pools["dt_bias"],
                    pool,
                    pools["norm"],
                    state_indices=slots,
                    conv_indices=i32([0]).cuda(),
                    out=out,
                )
            results.append(out)
        assert_bits_equal(f"out of {rule}", results[0].cpu(), results[1].cpu())
        assert_bits_equal(f"state of {rule}", state[-1].cpu(), small[0].cpu())
        assert not state[:4].any()
    cache = torch.zeros(2**31 // (64 * 256) + 2, 64, 1, 256, dtype=torch.bfloat16, device="cuda")
    tokens = torch.randn(2, 1, 256).bfloat16().cuda()
    rows = i32([cache.shape[0] * 64 - 2, cache.shape[0] * 64 - 1]).cuda()
    ops.store_kv(tokens, tokens, cache, cache.clone(), slot_mapping=rows)
    assert_bits_equal("stored", cache[-1, -2:].cpu(), tokens.cpu())
    assert not cache[:2].any()


def test_a_captured_decode_step_is_replayed_with_other_slots_and_padding() -> None:
    """The graph is of eight sequences; it is replayed for fewer, the others being padding."""
    H, HV, K, V = 2, 4, 128, 128
    D = 2 * H * K + HV * V

    projected = torch.randn(8, D + HV * V + 2 * HV).bfloat16().cuda()
    slots, out = torch.zeros(8, dtype=torch.int32, device="cuda") - 1, torch.empty(8, HV, V).bfloat16().cuda()
    captured, eager = (step_pools(20, H, HV, K, V, torch.float32) for _ in range(2))
    decode_step(projected, captured, slots, out)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_step(projected, captured, slots, out)
    for chosen in ([3, 0, 19, 7, 5, 4, 1, 2], [8, -1, 3, -1, -1, -1, -1, -1], [-1] * 8):
        slots.copy_(i32(chosen))
        projected.copy_(torch.randn(projected.shape))
        out.fill_(torch.nan)
        graph.replay()
        want = torch.full_like(out, torch.nan)
        decode_step(projected, eager, slots, want)
        assert_bits_equal("out", out.cpu(), want.cpu())
        for name in ("conv", "state"):
            assert_bits_equal(name, captured[name].cpu(), eager[name].cpu())
