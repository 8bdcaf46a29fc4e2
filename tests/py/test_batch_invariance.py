# SPDX-License-Identifier: Apache-2.0
"""Every op's promise of bits that do not depend on the batch, and where it is not given, a result within rounding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import xgdn
from attention_calls import AttentionCall, ExpertsCall
from cases import OPS, assert_batch_invariant, assert_bits_equal, i32
from quantized_calls import FORMATS, QuantizedExpertsCall, random_rows
from xgdn import ops
from xgdn.quantization import pack

LENGTHS = (1, 3, 70, 2, 65)  # of the ops on sequences of several tokens
H, HV, K, V, W = 2, 4, 32, 48, 4
QKV = 2 * H * K + HV * V
ROWS = [slice(a, b) for a, b in itertools.pairwise(itertools.accumulate(LENGTHS, initial=0))]
T, N = sum(LENGTHS), len(LENGTHS)

# Of two results of a library, both rounded to the type; between are at most three ops.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Results = list[tuple[Tensor, ...]]  # for each sequence what the call gave it
Call = Callable[[Sequence[int]], Results]  # of these sequences, in this order


def starts(order: Sequence[int], lengths: Sequence[int] = LENGTHS) -> Tensor:
    return i32([0, *itertools.accumulate(lengths[n] for n in order)])


def tokens(x: Tensor, order: Sequence[int]) -> Tensor:
    return torch.cat([x[ROWS[n]] for n in order])


def by_sequence(out: Tensor, state: Tensor, order: Sequence[int]) -> Results:
    return list(zip(out.split([LENGTHS[n] for n in order]), (state[n] for n in order), strict=True))


def delta_rule(op: str, dtype: torch.dtype, backend: str) -> Call:
    q, k, v = (torch.randn(T, heads, dim).to(dtype) for heads, dim in ((H, K), (H, K), (HV, V)))
    g, beta, state = -torch.rand(T, HV), torch.rand(T, HV), torch.randn(N, HV, V, K)

    def call(order: Sequence[int]) -> Results:
        pool = state.clone()
        chunk = {"chunk": ops.build_chunk_metadata([LENGTHS[n] for n in order], HV)} if op.startswith("chunk") else {}
        inputs = (tokens(x, order) for x in (q, k, v, g, beta))
        out = OPS[op](*inputs, pool, cu_seqlens=starts(order), state_indices=i32(order), backend=backend, **chunk)
        return by_sequence(out, pool, order)

    return call


def replay(op: str, dtype: torch.dtype, backend: str) -> Call:
    q, k, v = (torch.randn(T, heads, dim).to(dtype) for heads, dim in ((H, K), (H, K), (HV, V)))
    g, beta, state = -torch.rand(T, HV), torch.rand(T, HV), torch.randn(2 * N, HV, V, K)
    rings = ops.ReplayRing(torch.randn(N, H, 16, K), torch.randn(N, HV, 16, V), -torch.rand(N, HV, 16), i32(range(N)))

    def call(order: Sequence[int]) -> Results:
        pool, ring, indices = state.clone(), ops.ReplayRing(*(x.clone() for x in rings)), i32(order)
        if op == "materialize_state":
            lengths, to = i32([3 * n for n in order]), indices + N
            slots = {"state_indices": indices, "ring_indices": indices, "write_indices": to}
            ops.materialize_state(pool, ring, lengths=lengths, backend=backend, **slots)
            return [(pool[N + n],) for n in order]
        slots = {"state_indices": indices, "ring_indices": indices}
        inputs = (tokens(x, order) for x in (q, k, v, g, beta))
        out = ops.replay_gated_delta_rule(*inputs, pool, ring, cu_seqlens=starts(order), backend=backend, **slots)
        return [(*parts, *(x[n] for x in ring)) for parts, n in zip(by_sequence(out, pool, order), order, strict=True)]

    return call


def convolution(op: str, dtype: torch.dtype, backend: str) -> Call:
    x, weight, bias = torch.randn(T, QKV).to(dtype), torch.randn(QKV, W).to(dtype), torch.randn(QKV).to(dtype)
    max_len = {"max_len": max(LENGTHS)} if op.endswith("update") else {}
    state = torch.randn(N, W - 2 + max(LENGTHS), QKV).to(dtype)

    def call(order: Sequence[int]) -> Results:
        pool, indices = state.clone(), {"cu_seqlens": starts(order), "state_indices": i32(order)}
        out = OPS[op](tokens(x, order), weight, pool, bias=bias, backend=backend, **indices, **max_len)
        return by_sequence(out, pool, order)

    return call


def decode(op: str, dtype: torch.dtype, backend: str) -> Call:
    projected, conv = torch.randn(N, QKV + HV * V + 2 * HV).to(dtype), torch.randn(N, W - 1, QKV).to(dtype)
    A_log, dt_bias, state = torch.randn(HV), torch.randn(HV), torch.randn(N, HV, V, K)
    taps, norm = torch.randn(QKV, W).to(dtype), torch.randn(V)

    def call(order: Sequence[int]) -> Results:
        rows, pool, conv_pool, indices = projected[list(order)], state.clone(), conv.clone(), i32(order)
        if op == "packed_decode":
            b, a = rows[:, -2 * HV :].split(HV, 1)
            out = ops.packed_decode(rows[:, :QKV], a, b, A_log, dt_bias, pool, state_indices=indices, backend=backend)
        else:
            pools = (conv_pool, A_log, dt_bias, pool)
            out = ops.gdn_decode_step(rows, taps, *pools, norm, state_indices=indices, backend=backend)
        return [(out[i], pool[n], conv_pool[n]) for i, n in enumerate(order)]

    return call


def token_op(op: str, dtype: torch.dtype, backend: str) -> Call:
    """An op without sequences: each token is one."""
    heads, other = torch.randn(N, HV, 50).to(dtype), torch.randn(N, HV, 50).to(dtype)
    x, weight, bias = torch.randn(N, 96).to(dtype), torch.randn(80, 96).to(dtype), torch.randn(80).to(dtype)
    norm, A_log = torch.randn(50), torch.randn(HV)
    experts = torch.randn(6, 64, 96).to(dtype), torch.randn(6, 96, 32).to(dtype)
    weights, chosen = torch.rand(N, 2).to(dtype), torch.stack([torch.randperm(6)[:2] for _ in range(N)])
    codes, scales, zeros, columns = pack(random_rows("int4", 80, 96, 32, zeros=True, order=True))
    _, _, _, *quantized = QuantizedExpertsCall(N, D=96, formats=("int4", "int8")).make().arguments()
    calls: dict[str, Callable[[list[int]], Tensor | tuple[Tensor, ...]]] = {
        "gdn_gating": lambda n: ops.gdn_gating(heads[n, :, 0], other[n, :, 0], A_log, A_log, backend=backend),
        "l2_norm": lambda n: ops.l2_norm(heads[n], backend=backend),
        "rms_norm_gated": lambda n: ops.rms_norm_gated(heads[n], other[n], norm, backend=backend),
        "rms_norm": lambda n: ops.rms_norm(heads[n], norm, cos=heads[n, 0, :20], sin=other[n, 0, :20], backend=backend),
        "sigmoid_and_mul": lambda n: ops.sigmoid_and_mul(heads[n], other[n], backend=backend),
        "silu_and_mul": lambda n: ops.silu_and_mul(heads[n, 0], other[n, 0], backend=backend),
        "linear": lambda n: ops.linear(x[n], weight, bias=bias, backend=backend),
        "rms_norm_linear": lambda n: ops.rms_norm_linear(
            x[n],
            torch.linspace(-1, 1, 96),
            weight,
            bias=bias,
            residual=x.flip(0)[n],
            residual_out=torch.empty(len(n), 96, dtype=dtype),
            use_silu_and_mul=True,
            backend=backend,
        ),
        "quantized_linear": lambda n: ops.quantized_linear(
            x[n], codes, scales, zeros=zeros, order=columns, bias=bias, backend=backend
        ),
        "moe_experts": lambda n: ops.moe_experts(x[n], weights[n], chosen[n], *experts, backend=backend),
        "quantized_moe_experts": lambda n: ops.quantized_moe_experts(
            x[n], weights[n], chosen[n], *quantized, backend=backend
        ),
    }

    def call(order: Sequence[int]) -> Results:
        got = calls[op](list(order))
        return list(zip(*(got if isinstance(got, tuple) else (got,)), strict=True))

    return call


def attention(op: str, dtype: torch.dtype, backend: str) -> Call:
    whole = AttentionCall(((1, 40), (3, 9), (70, 70), (33, 150), (1, 17)), HQ=8, D=64, dtype=dtype).make()
    queries = whole.q.split([t for t, _ in whole.sequences])

    def call(order: Sequence[int]) -> Results:
        some = whole.alone(order[0])
        some.sequences = tuple(whole.sequences[n] for n in order)
        some.blocks, some.rows = tuple(whole.blocks[n] for n in order), [whole.rows[n] for n in order]
        some.q = torch.cat([queries[n] for n in order])
        return [(part,) for part in some.run(backend=backend).split([t for t, _ in some.sequences])]

    return call


def store(op: str, dtype: torch.dtype, backend: str) -> Call:
    """Each token is a sequence, which gets its row of both caches."""
    tokens, caches = torch.randn(2, N, HV, 50).to(dtype), torch.randn(2, 3, 4, HV, 50).to(dtype)
    rows = torch.randperm(12)[:N].int()

    def call(order: Sequence[int]) -> Results:
        stored, n = caches.clone(), list(order)
        ops.store_kv(*tokens[:, n], *stored, slot_mapping=rows[n], backend=backend)
        return [tuple(stored.flatten(1, 2)[:, rows[i]]) for i in n]

    return call


def copies(op: str, dtype: torch.dtype, backend: str) -> Call:
    """Each row is a sequence, which gets a slot of both pools."""
    pools, reads, writes = (torch.randn(2 * N, 4, 50).to(dtype), torch.randn(2 * N, 9)), *torch.randperm(2 * N).split(N)

    def call(order: Sequence[int]) -> Results:
        copied, n = [pool.clone() for pool in pools], list(order)
        ops.copy_slots(copied, from_indices=reads[n].int(), to_indices=writes[n].int(), backend=backend)
        return [tuple(pool[writes[i]] for pool in copied) for i in n]

    return call


MAKE = {
    "recurrent_gated_delta_rule": delta_rule,
    "chunk_gated_delta_rule": delta_rule,
    "replay_gated_delta_rule": replay,
    "materialize_state": replay,
    "causal_conv1d": convolution,
    "causal_conv1d_update": convolution,
    "packed_decode": decode,
    "gdn_decode_step": decode,
    "paged_attention": attention,
    "store_kv": store,
    "copy_slots": copies,
}


@pytest.mark.parametrize("dtype", BOUND, ids=["f32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_the_batch_changes_no_promised_bit(
    op: str, dtype: torch.dtype, num_threads: Callable[[int], None], backend: str
) -> None:
    call = MAKE.get(op, token_op)(op, dtype, backend)
    num_threads(3)
    together = {order: call(order) for order in ((0, 1, 2, 3, 4), (3, 1, 4, 0, 2), (2, 0))}
    num_threads(1)
    for n in range(N):
        (alone,) = call((n,))
        for order, results in together.items():
            if n in order:
                for got, want in zip(results[order.index(n)], alone, strict=True):
                    assert_batch_invariant(op, f"sequence {n} of {order}", got, want, BOUND[dtype])


def test_what_is_promised() -> None:
    """The backends' own kernels; where `linear` has one, test_ops_linear.py asks it."""
    promised = {
        backend: {row.op for row in xgdn.doctor() if row.backend == backend and row.is_batch_invariant}
        for backend in ("cpu", "reference", "npu", "cuda")
    }
    assert promised["cpu"] - {"linear"} == set(OPS) - {"l2_norm", "linear"}
    assert promised["reference"] == {
        "recurrent_gated_delta_rule",
        "chunk_gated_delta_rule",
        "replay_gated_delta_rule",
        "materialize_state",
        "store_kv",
        "copy_slots",
    }
    assert promised["npu"] == promised["cuda"] == set()


def test_the_promise_is_that_of_the_call() -> None:
    """Products of float32 weights are a library's."""
    for backend in ("cpu", "reference"):
        AttentionCall(((1, 5), (9, 9))).make().run(backend=backend)
        assert xgdn.last_is_batch_invariant("paged_attention") == (backend == "cpu")
    ops.linear(torch.randn(3, 32), torch.randn(16, 32), backend="cpu")
    assert not xgdn.last_is_batch_invariant("linear")
    for call in (ExpertsCall(3), ExpertsCall(3, dtype=torch.float32), ExpertsCall(3, I=48), ExpertsCall(3, D=48)):
        call.make().run(backend="cpu")
        is_ours = call.dtype == torch.bfloat16 and (call.D, call.I) == (64, 32)
        assert xgdn.last_is_batch_invariant("moe_experts") == is_ours, call
    QuantizedExpertsCall(3, dtype=torch.float32).make().run(backend="cpu")
    assert xgdn.last_is_batch_invariant("quantized_moe_experts")


def test_an_unknown_op_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match=r"\[last_is_batch_invariant\] op: expected one of .*'l3_norm'"):
        xgdn.last_is_batch_invariant("l3_norm")


@pytest.mark.parametrize(
    "call",
    [
        ExpertsCall(70, A=3),
        ExpertsCall(70, A=1, only=(2,)),
        *(QuantizedExpertsCall(70, A=3, formats=(a, a)) for a in FORMATS),
        QuantizedExpertsCall(70, A=3, formats=("int8", "float8"), dtype=torch.float32),
    ],
    ids=str,
)
def test_experts_of_a_prompt_give_each_token_the_bits_it_has_alone(
    call: ExpertsCall, num_threads: Callable[[int], None]
) -> None:
    call.make()
    if call.A > 1:
        call.chosen[::4, 1] = call.chosen[::4, 0]  # one expert twice
        call.chosen[:, 2] = 3  # one that everybody chooses
    num_threads(3)
    together = call.run(backend="cpu")
    num_threads(1)
    x, weights, chosen = call.x, call.weights, call.chosen
    for t in range(call.T):
        call.T, call.x, call.weights, call.chosen = 1, x[t : t + 1], weights[t : t + 1], chosen[t : t + 1]
        assert_bits_equal(f"token {t}", together[t], call.run(backend="cpu")[0])


def test_a_prompt_whose_visits_are_cut_gives_each_token_the_bits_it_has_alone() -> None:
    """The memory of the experts is bounded: they are read again for the tokens behind some hundred thousand."""
    few = ExpertsCall(3, D=32, E=3, A=2).make()
    few.chosen = torch.tensor([[0, 1], [2, 0], [1, 2]])
    times = 2**25 // (few.A * few.D) // few.T + 5
    many = replace(few, T=few.T * times)
    for name in ("x", "weights", "chosen"):
        setattr(many, name, getattr(few, name).repeat(times, 1))
    many.gate_up, many.down = few.gate_up, few.down
    assert_bits_equal("out", many.run(backend="cpu"), few.run(backend="cpu").repeat(times, 1))
