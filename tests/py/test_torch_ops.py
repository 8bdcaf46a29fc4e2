# SPDX-License-Identifier: Apache-2.0
"""The ops as PyTorch operators: opcheck, export, and compilation without graph breaks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map_only

from attention_calls import int8_rows
from cases import OPS, assert_bits_equal, i32
from quantized_calls import QuantizedExpertsCall, random_rows
from xgdn import ops
from xgdn.quantization import pack

Sample = tuple[tuple[Any, ...], dict[str, Any]]
H, HV, K, V, D, W, S = 2, 4, 16, 32, 24, 4, 9


def delta(T: int, N: int, dtype: torch.dtype, state_dtype: torch.dtype) -> tuple[Any, ...]:
    """q, k, v, g, beta, state of a call."""
    return (
        torch.randn(T, H, K).to(dtype),
        torch.randn(T, H, K).to(dtype),
        torch.randn(T, HV, V).to(dtype),
        -torch.rand(T, HV),
        torch.rand(T, HV),
        torch.randn(S, HV, V, K).to(state_dtype),
    )


def samples(op: str, dtype: torch.dtype, state_dtype: torch.dtype) -> list[Sample]:
    """Arguments as the schema has them; without and with the optional ones."""
    return copy.deepcopy(_samples(dtype, state_dtype)[op])


@cache
def _samples(dtype: torch.dtype, state_dtype: torch.dtype) -> dict[str, list[Sample]]:
    T, cu, slots, out = 7, i32([0, 3, 3, 7]), i32([4, 1, 0]), torch.zeros(7, HV, V, dtype=dtype)
    x = delta(T, 3, dtype, state_dtype)
    chunk = ops.build_chunk_metadata([3, 0, 4], HV)
    heads = (torch.randn(HV), torch.randn(HV))
    conv = (torch.randn(T, D).to(dtype), torch.randn(D, W).to(dtype), torch.randn(S, W + 2, D).to(dtype), cu, slots)
    conv_out = torch.zeros(T, D, dtype=dtype)
    more = {"write_indices": i32([4, 3, 8]), "scale": 0.5, "backend": "reference"}
    bias, flags = torch.randn(D).to(dtype), torch.tensor([True, False, True])
    packed = (torch.randn(3, 2 * H * K + HV * V).to(dtype), *(torch.randn(3, HV).to(dtype) for _ in range(2)), *heads)
    channels = 2 * H * K + HV * V
    step = (
        torch.randn(3, channels + HV * V + 2 * HV).to(dtype),
        torch.randn(channels, W).to(dtype),
        torch.randn(S, W, channels).to(dtype),
        *heads,
        x[5],
        torch.randn(V),
    )
    step_options = {**more, "conv_bias": torch.randn(channels).to(dtype), "cu_seqlens": i32([0, 1, 2, 3])}
    ring = (torch.randn(S, H, 24, K), torch.randn(S, HV, 24, V), -torch.rand(S, HV, 24), i32([15] * S))
    step_rings = {**more, **dict(zip(("ring_k", "ring_u", "ring_g", "ring_length"), ring, strict=True))}
    table = torch.arange(9, dtype=torch.int32).flip(0).view(3, 3)
    verify = (*x, i32([0, 3, 3, 6]), table, out[:6])
    verify = (*(t[:6] for t in verify[:5]), *verify[5:])
    cache = [torch.randn(9, 4, H, K).to(dtype) for _ in range(2)]
    attention = (torch.randn(T, HV, K).to(dtype), *cache, i32([[4, -1, -1], [1, 0, 6]]), i32([3, 9]), i32([0, 3, 7]))
    heads_out = torch.zeros(T, HV, K, dtype=dtype)
    experts = (conv[0], torch.rand(T, 2).to(dtype), torch.randint(0, 3, (T, 2)))
    experts = (*experts, torch.randn(3, 2 * V, D).to(dtype), torch.randn(3, D, V).to(dtype))
    rows = QuantizedExpertsCall(T, E=3, D=HV * K, I=V, dtype=dtype, formats=("int4", "int8"), zeros=(True, True)).make()
    packed_rows = pack(random_rows("int4", D, HV * V, 64, zeros=True, order=True))
    quantized = (x[2].flatten(1), packed_rows.codes, packed_rows.scales, conv_out)
    return {
        "recurrent_gated_delta_rule": [
            ((*x, cu, slots, out), {}),
            ((*x, cu, slots, out), {**more, "use_qk_l2norm_in_kernel": False}),
            (verify, {"num_accepted": i32([1, 3, 2]), "cu_seqlens_cpu": verify[6]}),
        ],
        "chunk_gated_delta_rule": [
            ((*x, cu, slots, chunk[0], chunk[1], out), {}),
            ((*x, cu, slots, chunk[0], chunk[1], out), {**more, "has_initial_state": flags, "cu_seqlens_cpu": cu}),
        ],
        "replay_gated_delta_rule": [
            ((*x, *ring, cu, slots, i32([2, 8, 3]), out), {}),
            (
                (*x, *ring, cu, slots, i32([2, 8, 3]), out),
                {
                    **more,
                    "ring_write_indices": i32([0, 5, 1]),
                    "num_accepted": i32([1, 0, 8]),
                    "has_initial_state": flags,
                    "commit": False,
                },
            ),
        ],
        "materialize_state": [((x[5], *ring, i32([0, 16, 3]), slots, i32([2, 8, 3]), i32([4, 3, 8])), {})],
        "packed_decode": [((*packed, x[5], slots, out[:3]), {}), ((*packed, x[5], slots, out[:3]), more)],
        "causal_conv1d": [
            ((*conv, conv_out), {}),
            ((*conv, conv_out), {"bias": bias, "has_initial_state": flags, "silu": False}),
        ],
        "causal_conv1d_update": [
            ((*conv, conv_out), {"max_len": 4}),
            ((*conv, conv_out), {"max_len": 4, "bias": bias, "num_accepted": i32([1, 3, 2])}),
        ],
        "gdn_decode_step": [((*step, slots, out[:3]), kwargs) for kwargs in ({}, step_options, step_rings)],
        "gdn_gating": [((packed[1], packed[2], *heads, torch.zeros(3, HV), torch.zeros(3, HV)), {})],
        "l2_norm": [((x[0], torch.zeros_like(x[0])), {}), ((x[0], torch.zeros_like(x[0])), {"eps": 0.1})],
        "rms_norm_gated": [((x[2], x[2].flip(0), torch.randn(V), out), {"eps": 1e-5})],
        "rms_norm": [
            ((x[2], torch.randn(V), out), {}),
            ((x[2], torch.randn(V), out), {"residual": x[2].flip(0), "eps": 1e-5}),
            ((x[2], torch.randn(V), out), {"cos": x[2][:, 0, :4], "sin": x[2][:, 1, :4]}),
        ],
        "sigmoid_and_mul": [((x[2], x[2].flip(0), out), {})],
        "silu_and_mul": [((conv[0], conv[0].flip(0), conv_out), {})],
        "linear": [
            ((x[2].flatten(1), torch.randn(D, HV * V).to(dtype), conv_out), {}),
            ((x[2].flatten(1), torch.randn(D, HV * V).to(dtype), conv_out), {"bias": bias}),
        ],
        "rms_norm_linear": [
            ((x[2].flatten(1), torch.randn(HV * V), torch.randn(D, HV * V).to(dtype), conv_out), {}),
            (
                (x[2].flatten(1), torch.randn(HV * V).to(dtype), torch.randn(2 * D, HV * V).to(dtype), conv_out),
                {
                    "bias": bias.repeat(2),
                    "residual": x[2].flip(0).flatten(1),
                    "residual_out": torch.zeros(T, HV * V, dtype=dtype),
                    "use_silu_and_mul": True,
                    "eps": 1e-5,
                },
            ),
        ],
        "paged_attention": [
            ((*attention, heads_out), {}),
            ((*attention, heads_out), {"context_rows": i32(range(12)), "scale": 0.3}),
            ((*attention, heads_out), {"cu_seqlens_cpu": attention[5], "context_lens_cpu": attention[4]}),
            ((attention[0], *map(int8_rows, attention[1:3]), *attention[3:], heads_out), {}),
        ],
        "store_kv": [
            ((*x[:2], *cache, i32([3, 0, -1, 35, 8, -1, 20])), {}),
            ((*x[:2], *map(int8_rows, cache), i32([3, 0, -1, 35, 8, -1, 20])), {}),
            ((*x[:2], *cache, i32(range(7))), {"may_have_padding": False, "backend": "reference"}),
        ],
        "copy_slots": [
            (([x[5], conv[2]], i32([4, 1, 0]), i32([8, -1, 2])), {}),
            (([], slots, slots), {"backend": "reference"}),
        ],
        "quantized_linear": [
            (quantized, {}),
            (quantized, {"zeros": packed_rows.zeros, "order": packed_rows.order, "bias": bias}),
        ],
        "moe_experts": [((*experts, torch.zeros(T, D, dtype=dtype)), {})],
        "quantized_moe_experts": [
            ((*rows.arguments(), torch.zeros(T, HV * K, dtype=dtype)), {}),
            ((*rows.arguments(), torch.zeros(T, HV * K, dtype=dtype)), rows.zero_points()),
        ],
    }


def packet(op: str) -> Callable[..., None]:
    return getattr(torch.ops.xgdn, op).default


def copied(sample: Sample) -> Sample:
    args, kwargs = sample
    return tree_map_only(torch.Tensor, torch.clone, args), kwargs


def written_arguments(op: str) -> list[Any]:
    return [a for a in packet(op)._schema.arguments if a.alias_info and a.alias_info.is_write]


def with_written_last(op: str, sample: Sample) -> Sample:
    """What is written by name follows the positional arguments, so that a graph has it as an input."""
    args, kwargs = sample
    names = [a.name for a in written_arguments(op) if a.name in kwargs]
    return (*args, *(kwargs[name] for name in names)), {k: v for k, v in kwargs.items() if k not in names}


class Call(torch.nn.Module):
    """Calls an op and returns what it wrote. Takes arguments as with_written_last makes them."""

    def __init__(self, op: str, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.kwargs = packet(op), kwargs
        arguments = self.op._schema.arguments
        self.num_positional = sum(not a.kwarg_only for a in arguments)
        written = {a.name for a in written_arguments(op)}
        self.written = [i for i, a in enumerate(arguments) if a.name in written and not a.kwarg_only]
        self.by_name = [a.name for a in written_arguments(op) if a.kwarg_only]

    def forward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        positional, rest = args[: self.num_positional], args[self.num_positional :]
        self.op(*positional, **self.kwargs, **dict(zip(self.by_name, rest, strict=False)))
        return tuple(x * 1 for x in tree_leaves([*(positional[i] for i in self.written), *rest]))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["f32", "bf16", "bf16_state"],
)
def test_opcheck(op: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """All of it once; with other arguments what depends on them: what is written, and what meta gives.
    test_compile_into_one_graph dispatches each of them too.
    """
    for i, (args, kwargs) in enumerate(samples(op, dtype, state_dtype)):
        is_first = i == 0 and dtype == torch.float32
        parts = {} if is_first else {"test_utils": ("test_schema", "test_faketensor")}
        torch.library.opcheck(packet(op), args, kwargs, **parts)


def test_opcheck_of_the_chunk_metadata() -> None:
    op = torch.ops.xgdn.build_chunk_metadata.default
    for heads in (1, 3, 8, 31, 64):
        torch.library.opcheck(op, ([130, 0, 64, 4000], heads), {})
    torch.library.opcheck(op, ([0, 5], 8, True), {})
    torch.library.opcheck(op, ([4000, 5000],), {})


def test_opcheck_where_a_gradient_is_wanted() -> None:
    (args, kwargs), *_ = samples("l2_norm", torch.float32, torch.float32)
    torch.library.opcheck(
        packet("l2_norm"), (args[0].requires_grad_(), args[1]), kwargs, test_utils="test_autograd_registration"
    )


RINGS = {f"ring_{field}" for field in ops.ReplayRing._fields}  # one argument of the functions


@pytest.mark.parametrize("op", OPS)
def test_schema_names_what_is_written(op: str) -> None:
    written = {a.name for a in written_arguments(op)}
    pools = {"state", "conv_state", "residual"} & {a.name for a in packet(op)._schema.arguments}
    others = {
        "gdn_gating": {"g", "beta"},
        "store_kv": {"k_cache", "v_cache"},
        "copy_slots": {"pools"},
        "replay_gated_delta_rule": {"out", "state", *RINGS},
        "gdn_decode_step": {"out", "state", "conv_state", *RINGS},
        "materialize_state": {"state"},
        "rms_norm_linear": {"out", "residual_out"},
    }
    assert written == others.get(op, {"out"} | pools)
    assert not packet(op)._schema.returns
    assert torch.Tag.pt2_compliant_tag in packet(op).tags


@pytest.mark.parametrize("op", OPS)
def test_the_function_has_the_defaults_of_the_schema(op: str) -> None:
    assert op in ops.__all__
    parameters = inspect.signature(OPS[op]).parameters
    defaults = {a.name: a.default_value for a in packet(op)._schema.arguments if a.has_default_value()}
    assert {name: parameters["ring" if name in RINGS else name].default for name in defaults} == defaults


@pytest.mark.parametrize("op", OPS)
def test_written_arguments_count_as_changed(op: str) -> None:
    args, kwargs = copied(samples(op, torch.float32, torch.float32)[0])
    tensors = [(i, t) for i, arg in enumerate(args) for t in tree_leaves(arg) if isinstance(t, torch.Tensor)]
    versions = [t._version for _, t in tensors]
    packet(op)(*args, **kwargs)
    written = Call(op, kwargs).written
    for (i, t), version in zip(tensors, versions, strict=True):
        assert t._version == version + (i in written)


@pytest.mark.parametrize("op", OPS)
def test_meta_checks_as_the_others_do(op: str) -> None:
    args, kwargs = samples(op, torch.float32, torch.float32)[0]
    on_meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), args)
    packet(op)(*on_meta, **kwargs)
    with pytest.raises(ValueError, match=rf"\[{op}\] .*: expected"):
        packet(op)(on_meta[0][:-1], *on_meta[1:-1], on_meta[-1][..., :1], **kwargs)


@pytest.mark.parametrize("op", OPS)
def test_export(op: str) -> None:
    for given in samples(op, torch.float32, torch.float32):
        sample = with_written_last(op, given)
        args, kwargs = copied(sample)
        program = torch.export.export(Call(op, kwargs), copied(sample)[0])
        for got, want in zip(program.module()(*copied(sample)[0]), Call(op, kwargs)(*args), strict=True):
            assert_bits_equal(op, got, want)


@pytest.mark.parametrize("op", OPS)
def test_compile_into_one_graph(op: str) -> None:
    for given in samples(op, torch.float32, torch.float32):
        sample = with_written_last(op, given)
        args, kwargs = copied(sample)
        torch._dynamo.reset()
        compiled = torch.compile(Call(op, kwargs), fullgraph=True, backend="aot_eager")
        got_args = copied(sample)[0]
        got = compiled(*got_args)
        want = Call(op, kwargs)(*args)
        for a, b in zip(tree_leaves((got, got_args)), tree_leaves((want, args)), strict=True):
            if isinstance(a, torch.Tensor) and a.is_floating_point():
                assert_bits_equal(op, a, b)


def test_float8_codes_in_a_graph() -> None:
    """opcheck has no arithmetic for them."""
    rows = pack(random_rows("float8", D, HV * V, 32))
    args = (torch.randn(7, HV * V), rows.codes, rows.scales, torch.zeros(7, D))
    call = Call("quantized_linear", {})
    program = torch.export.export(call, args)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    (want,) = call(*args)
    for (got,) in (program.module()(*args), compiled(*args)):
        assert_bits_equal("out", got, want)


def decode_step(
    mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor, heads: torch.Tensor, state: torch.Tensor, slots: Any
) -> torch.Tensor:
    """Ops alone, so that inductor has nothing to compile in C++ and the test stays quick."""
    o = ops.packed_decode(mixed_qkv, a, b, heads, heads, state, state_indices=slots)
    return ops.l2_norm(o)


def decode_arguments(N: int) -> tuple[Any, ...]:
    mixed_qkv, a, b = torch.randn(N, 2 * H * K + HV * V), torch.randn(N, HV), torch.randn(N, HV)
    return mixed_qkv, a, b, torch.randn(HV), torch.randn(40, HV, V, K), torch.randperm(40)[:N].int()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_one_compilation_serves_every_batch(compiler: str) -> None:
    torch._dynamo.reset()
    with (
        torch.compiler.set_stance("default", skip_guard_eval_unsafe=False),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        compiled = torch.compile(decode_step, fullgraph=True, backend=compiler)
        for N in (5, 2, 17, 33):
            args = decode_arguments(N)
            for i in (0, 1, 2, 5):
                torch._dynamo.mark_dynamic(args[i], 0)
            want_state = args[4].clone()
            want = decode_step(*args[:4], want_state, args[5])
            got = compiled(*args)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(args[4], want_state)


def test_export_with_a_dynamic_batch() -> None:
    class Step(torch.nn.Module):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return decode_step(*args)

    batch = {0: Dim("N", min=2, max=40)}
    program = torch.export.export(
        Step(), decode_arguments(5), dynamic_shapes=((batch, batch, batch, None, None, batch),)
    )
    for N in (2, 5, 31):
        args = decode_arguments(N)
        want = decode_step(*args[:4], args[4].clone(), args[5])
        torch.testing.assert_close(program.module()(*args), want)


def test_recurrent_rule_with_a_dynamic_number_of_tokens_and_sequences() -> None:
    def step(*args: torch.Tensor) -> torch.Tensor:
        *tokens, state, cu, slots = args
        return ops.recurrent_gated_delta_rule(*tokens, state, cu_seqlens=cu, state_indices=slots)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for cu in ([0, 3, 7], [0, 5, 6, 6, 11]):
            args = [*delta(cu[-1], len(cu) - 1, torch.float32, torch.float32), i32(cu), torch.arange(len(cu) - 1).int()]
            for i in (0, 1, 2, 3, 4, 6, 7):
                torch._dynamo.mark_dynamic(args[i], 0)
            state = args[5].clone()
            want = step(*args[:5], state, *args[6:])
            assert_bits_equal("out", compiled(*args), want)
            assert_bits_equal("pool", args[5], state)
