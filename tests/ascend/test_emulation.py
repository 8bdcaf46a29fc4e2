# SPDX-License-Identifier: Apache-2.0
"""The emulated CANN itself: that the unmodified torch_npu dispatches into it, that it computes and refuses what the
vendor documents, and that the ledger counts."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from child_process import run_python, task_queue_environment
from gdn_calls import Call, assert_close, assert_only_written
from ledger import recorded, switched

BF16_ROUNDING = 4e-3  # half a unit in the last place of 8 bits of significand

recurrent = torch.ops.npu.npu_recurrent_gated_delta_rule
chunk = torch.ops.npu.npu_chunk_gated_delta_rule


class Inputs:
    """The operands of the probes, on one device."""

    def __init__(self, device: str) -> None:
        def make(t: Tensor) -> Tensor:
            return t.to(device)

        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return make(torch.randn(*shape, generator=generator))

        self.device = device
        self.x, self.y = normal(3, 4), normal(3, 4)
        self.h = normal(3, 4).bfloat16()  # half precision
        self.z = normal(2, 3, 4)
        self.q = normal(1, 4, 5, 16).bfloat16()
        self.kv = normal(1, 2, 5, 16).bfloat16()
        self.n = make(torch.tensor([0, 1, 2, 3]))  # int64
        self.n32 = self.n.int()
        self.at = make(torch.tensor([2, 0, 1]))
        self.b = self.x > 0
        self.nan = make(torch.tensor([1.0, torch.nan, torch.inf]))

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.device)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).npu()


def assigned(target: Tensor, index: object, value: object) -> Tensor:
    target[index] = value
    return target


PROBES: dict[str, Callable[[Inputs], object]] = {
    # Making and copying
    "zeros": lambda i: torch.zeros(3, 4, device=i.device),
    "zeros_bool": lambda i: torch.zeros(5, dtype=torch.bool, device=i.device),
    "zeros_0d": lambda i: torch.zeros((), device=i.device),
    "ones": lambda i: torch.ones(3, dtype=torch.bfloat16, device=i.device),
    "ones_like": lambda i: torch.ones_like(i.n),
    "full": lambda i: torch.full((2, 3), 2.5, device=i.device),
    "full_like": lambda i: torch.full_like(i.x, 3),
    "fill_": lambda i: torch.empty(3, device=i.device).fill_(4),
    "arange": lambda i: torch.arange(7, device=i.device),
    "arange_step": lambda i: torch.arange(0, 9, 2, dtype=torch.float32, device=i.device),
    "tensor": lambda i: torch.tensor([1, 2, 3], device=i.device),
    "clone": lambda i: i.x.clone(),
    "contiguous": lambda i: i.x.t().contiguous(),
    "copy_strided": lambda i: i.zeros(4, 3).copy_(i.x.t()),
    "copy_broadcast": lambda i: i.zeros(3, 4).copy_(i.x[0]),
    "expand_contiguous": lambda i: i.x.unsqueeze(0).expand(2, 3, 4).contiguous(),
    "slice": lambda i: i.x[:, 1:3],
    "to_bf16": lambda i: i.x.bfloat16(),
    "to_float": lambda i: i.h.float(),
    "to_long": lambda i: i.n32.long(),
    "to_bool": lambda i: i.n.bool(),
    "view_dtype": lambda i: i.n32.view(torch.bool),
    # Arithmetic
    "add": lambda i: i.x + i.y,
    "add_scalar": lambda i: i.x + 1.5,
    "add_mixed": lambda i: i.x + i.h,
    "add_int": lambda i: i.n + 3,
    "add_": lambda i: i.x.clone().add_(i.y),
    "sub": lambda i: i.x - i.y,
    "sub_scalar": lambda i: i.n - 1,
    "rsub": lambda i: 3 - i.x,
    "mul": lambda i: i.x * i.y,
    "mul_scalar": lambda i: i.h * 2.0,
    "mul_": lambda i: i.x.clone().mul_(i.y),
    "div": lambda i: i.x / i.y,
    "div_scalar": lambda i: i.x / 3.0,
    "floor_divide": lambda i: i.n.floor_divide(i.n + 1),
    "floor_divide_scalar": lambda i: i.n.floor_divide(2),
    "remainder": lambda i: i.n % 2,
    "square": lambda i: i.x.square(),
    "pow": lambda i: i.x**3,
    "pow_of_scalar": lambda i: torch.pow(10000.0, i.x),
    "maximum": lambda i: torch.maximum(i.x, i.y),
    "minimum": lambda i: torch.minimum(i.x, i.y),
    # Functions of one element
    "neg": lambda i: -i.x,
    "abs": lambda i: i.x.abs(),
    "exp": lambda i: i.x.exp(),
    "log": lambda i: i.x.abs().log(),
    "sqrt": lambda i: i.x.abs().sqrt(),
    "rsqrt": lambda i: i.x.abs().rsqrt(),
    "reciprocal": lambda i: i.x.reciprocal(),
    "cos": lambda i: i.x.cos(),
    "sin": lambda i: i.x.sin(),
    "tanh": lambda i: i.x.tanh(),
    "sigmoid": lambda i: i.h.sigmoid(),
    "silu": lambda i: F.silu(i.h),
    "softplus": lambda i: F.softplus(i.x),
    "isnan": lambda i: i.nan.isnan(),
    "isfinite": lambda i: i.nan.isfinite(),
    "clamp": lambda i: i.n.clamp(1, 2),
    "clamp_min": lambda i: i.n.clamp_min(1),
    "clamp_max": lambda i: i.x.clamp_max(0.5),
    # Comparisons and choices
    "eq": lambda i: i.n == i.n,
    "ne": lambda i: i.x != i.y,
    "lt": lambda i: i.x < i.y,
    "le": lambda i: i.x <= i.y,
    "gt": lambda i: i.x > i.y,
    "ge": lambda i: i.x >= i.y,
    "eq_scalar": lambda i: i.n32 == 2,
    "ne_scalar": lambda i: i.n32 != 2,
    "lt_scalar": lambda i: i.x < 0,
    "le_scalar": lambda i: i.x <= 0,
    "gt_scalar": lambda i: i.x > 0,
    "ge_scalar": lambda i: i.n >= 1,
    "logical_and": lambda i: i.b.logical_and(i.y > 0),
    "logical_not": lambda i: i.b.logical_not(),
    "and": lambda i: i.b & (i.y > 0),
    "or": lambda i: i.b | (i.y > 0),
    "not": lambda i: ~i.b,
    "where": lambda i: torch.where(i.b, i.x, i.y),
    "where_0d": lambda i: torch.where(i.b, i.x, torch.zeros((), device=i.device)),
    "masked_fill": lambda i: i.x.masked_fill(i.b, -9.0),
    "tril": lambda i: torch.ones(3, 4, dtype=torch.bool, device=i.device).tril(1),
    # Along a dimension
    "sum": lambda i: i.x.sum(),
    "sum_dim": lambda i: i.x.sum(-1, keepdim=True),
    "sum_int": lambda i: i.n32.sum(0),
    "mean": lambda i: i.x.mean(-1, keepdim=True),
    "max": lambda i: i.x.max(),
    "min": lambda i: i.x.min(),
    "max_dim": lambda i: i.x.max(1),
    "argmax": lambda i: i.n32.argmax(),
    "argmax_dim": lambda i: i.x.argmax(-1),
    "any": lambda i: i.b.any(),
    "all": lambda i: i.b.all(),
    "cumsum": lambda i: i.n32.cumsum(0),
    "cumsum_int32": lambda i: i.n32.cumsum(0, dtype=torch.int32),
    "softmax": lambda i: torch.softmax(i.h, -1, torch.float32),
    "topk": lambda i: i.x.topk(2, -1),
    "sort": lambda i: i.x.sort(-1),
    "normalize": lambda i: F.normalize(i.x, dim=-1),
    "cat": lambda i: torch.cat([i.x, i.y], -1),
    "stack": lambda i: torch.stack([i.x, i.y]),
    "repeat": lambda i: i.x.repeat(2, 1),
    "repeat_interleave": lambda i: i.x.repeat_interleave(2, 1),
    "repeat_interleave_tensor": lambda i: torch.arange(3, device=i.device).repeat_interleave(i.at + 1, output_size=6),
    # By index
    "index": lambda i: i.x[i.at],
    "index_int32": lambda i: i.x[i.at.int()],
    "index_two": lambda i: i.x[i.at, i.at],
    "index_broadcast": lambda i: i.x[i.at[:, None], i.at[None]],
    "index_second": lambda i: i.x[:, i.at],
    "index_put": lambda i: i.zeros(5, 4).index_put_((i.at,), i.x),
    "assign_scalar": lambda i: assigned(i.zeros(5, 4), i.at, 2.0),
    "assign_second": lambda i: assigned(i.zeros(3, 5), (slice(None), i.at), i.x[:, :3]),
    "assign_slice": lambda i: assigned(i.zeros(5, 4), slice(1, 4), i.x),
    "index_select": lambda i: i.x.index_select(0, i.at),
    "index_select_int32": lambda i: i.x.index_select(1, i.at.int()),
    "index_copy_": lambda i: i.zeros(5, 4).index_copy_(0, i.at, i.x),
    "index_add_": lambda i: i.zeros(5, 4).index_add_(0, i.at, i.x),
    "gather": lambda i: i.x.gather(1, i.at.expand(3, 3).contiguous()),
    "embedding": lambda i: F.embedding(i.at, i.x),
    "searchsorted": lambda i: torch.searchsorted(i.n + 1, i.n, right=True),
    # Products
    "mm": lambda i: i.x @ i.y.t(),
    "bmm": lambda i: torch.bmm(i.z, i.z.transpose(1, 2)),
    "linear": lambda i: F.linear(i.h, i.h),
    "linear_bias": lambda i: F.linear(i.x, i.y, i.y[0, :3]),
    "linear_3d": lambda i: F.linear(i.z, i.y),
    "addmm": lambda i: torch.addmm(i.y[0, :3], i.x, i.y.t()),
    "attention": lambda i: F.scaled_dot_product_attention(i.q, i.kv, i.kv, enable_gqa=True),
    "attention_causal": lambda i: F.scaled_dot_product_attention(i.q, i.kv, i.kv, is_causal=True, enable_gqa=True),
    "attention_mask": lambda i: F.scaled_dot_product_attention(
        i.q[:, :, :2],
        i.kv,
        i.kv,
        attn_mask=torch.ones(2, 5, dtype=torch.bool, device=i.device).tril(3),
        enable_gqa=True,
    ),
    # To the host
    "item": lambda i: torch.tensor(i.x[0, 0].item()),
    "equal": lambda i: torch.tensor(torch.equal(i.x, i.x)),
}


@pytest.mark.parametrize("name", PROBES)
def test_op_agrees_with_the_cpu(name: str) -> None:
    want = PROBES[name](Inputs("cpu"))
    got = PROBES[name](Inputs("npu"))
    for got_part, want_part in zip(
        *(part if isinstance(part, tuple) else (part,) for part in (got, want)), strict=True
    ):
        assert got_part.dtype == want_part.dtype
        assert torch.equal(got_part.cpu().isnan(), want_part.isnan())
        torch.testing.assert_close(got_part.cpu(), want_part, equal_nan=True)


def test_an_op_that_is_not_emulated_is_an_error_with_its_name() -> None:
    x = torch.ones(3, device="npu")
    with pytest.raises(RuntimeError, match="Erf"):
        torch.erf(x)


def test_new_memory_is_poisoned() -> None:
    assert (torch.empty(5, dtype=torch.uint8, device="npu").cpu() == 0xFB).all()
    assert (torch.empty(3, device="npu").cpu() < -1e36).all()


def test_the_device_is_an_npu() -> None:
    assert torch._C._get_privateuse1_backend_name() == "npu"
    assert torch.npu.device_count() == 1
    assert torch.npu.get_device_name(0) == "Ascend910B2"


# The launch ledger.


def test_ledger_counts_copies_launches_and_synchronisations() -> None:
    host = torch.tensor([1.0, 2.0])
    with recorded() as ledger:
        x = host.npu()
    assert (ledger.launches, ledger.copies, ledger.syncs) == ([], ["H2D"], ["stream"])  # pageable memory
    with recorded() as ledger:
        y = x + x
    assert (ledger.launches, ledger.copies, ledger.syncs) == (["Add"], [], [])
    with recorded() as ledger:
        assert y.cpu().tolist() == [2.0, 4.0]
    assert (ledger.launches, ledger.copies, ledger.syncs) == ([], ["D2H"], ["stream"])
    with recorded() as ledger:
        torch.npu.synchronize()
    assert (ledger.launches, ledger.copies, ledger.syncs) == ([], [], ["device"])


def test_ledger_shows_pinned_copies_as_asynchronous() -> None:
    pinned = torch.ones(6).pin_memory()
    with recorded() as ledger:
        pinned.to("npu", non_blocking=True)
    assert [(c["direction"], c["bytes"], c["async"]) for c in ledger.of("copy")] == [("H2D", 24, True)]
    assert ledger.syncs == []


def test_ledger_has_shapes_strides_and_addresses() -> None:
    x = torch.zeros(4, 6, dtype=torch.bfloat16, device="npu")
    with recorded() as ledger:
        x[1:, ::2] * 3
    ((view, factor, out),) = ledger.args("Muls")
    assert (view["shape"], view["strides"], view["dtype"]) == ([3, 3], [6, 2], "BFloat16")
    assert view["data"] == x.data_ptr() + 6 * 2
    assert factor == 3
    assert (out["shape"], out["strides"]) == ([3, 3], [3, 1])


def test_ledger_does_not_count_what_frees_memory() -> None:
    x = torch.zeros(1000, device="npu")
    with recorded() as ledger:
        del x
    assert [entry["kind"] for entry in ledger.entries] == ["free"]


def test_a_copy_beyond_its_allocation_is_refused() -> None:
    import ctypes

    library = ctypes.CDLL("libascendcl.so")
    library.aclrtMemcpy.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    x = torch.zeros(4, device="npu")
    host = torch.empty(1 << 16)
    device_to_host, host_to_device = 2, 1
    size = host.numel() * 4
    with recorded() as ledger:
        assert library.aclrtMemcpy(host.data_ptr(), size, x.data_ptr(), size, device_to_host) == 107000
        assert library.aclrtMemcpy(host.data_ptr(), size, x.data_ptr(), 16, host_to_device) == 107000
        assert library.aclrtMemcpy(host.data_ptr(), 8, x.data_ptr(), 16, device_to_host) == 107000
    assert len(ledger.of("refusal")) == 3
    assert ledger.copies == []


# The two ops against the recurrence in float64.

RECURRENT = [
    Call((1,)),
    Call((1,) * 5),
    Call((1, 3, 8, 2)),
    Call((2, 3), Nk=1, Nv=1),
    Call((2, 3), Nk=4, Nv=4),
    Call((2, 1), Nk=2, Nv=6),
    Call((2, 1), Nk=1, Nv=8),
    Call((1, 2), Dk=64, Dv=96),
    Call((1, 2), Dk=96, Dv=64),
    Call((3, 4, 2), accepted=(2, 4, 1)),
    Call((8,), accepted=(8,)),
    Call((2, 3), strided=True),
    Call((2, 3), with_g=False),
]


@pytest.mark.parametrize("call", RECURRENT, ids=str)
def test_recurrent_op_follows_the_recurrence(call: Call) -> None:
    call.make()
    arguments = call.recurrent_arguments()
    state = arguments["state"]
    with recorded() as ledger:
        out = recurrent(**arguments)
    assert (ledger.launches, ledger.copies, ledger.syncs) == (["RecurrentGatedDeltaRule"], [], [])
    (passed,) = ledger.args("RecurrentGatedDeltaRule")
    assert passed[4]["data"] == state.data_ptr(), "the pool is updated in place"
    assert out.is_contiguous()
    want, _ = call.expected()
    assert_close("out", out, want, BF16_ROUNDING)
    written = call.written()
    for slot, S in written.items():
        assert_close(f"state of slot {slot}", state[slot], S, BF16_ROUNDING)
    assert_only_written(call.tensors["state"], state.contiguous(), set(written))


def test_recurrent_op_of_a_newer_cann_keeps_an_fp32_state() -> None:
    call = Call((2, 3), Dk=320, Dv=272, state_dtype=torch.float32).make()
    arguments = call.recurrent_arguments()
    with switched(FP32_STATE="1"):
        out = recurrent(**arguments)
    assert_close("out", out, call.expected()[0], BF16_ROUNDING)
    for slot, S in call.written().items():
        assert_close(f"state of slot {slot}", arguments["state"][slot], S, 1e-5)


CHUNK = [
    Call((1,)),
    Call((65, 3, 130)),
    Call((9, 20), Nk=1, Nv=3),
    Call((9, 20), Nk=2, Nv=2, with_g=False),
    Call((9, 20), Nk=1, Nv=8, strided=True),
]


@pytest.mark.parametrize("call", CHUNK, ids=str)
def test_chunk_op_follows_the_recurrence(call: Call) -> None:
    call.make()
    arguments = call.chunk_arguments()
    with recorded() as ledger:
        out, final = chunk(**arguments)
    # torch_npu makes the final state as a copy of the initial one.
    assert (ledger.launches, ledger.copies, ledger.syncs) == (["InplaceCopy", "ChunkGatedDeltaRule"], [], [])
    want, states = call.expected()
    assert_close("out", out, want, BF16_ROUNDING)
    assert_close("final_state", final, torch.stack([after[-1] for after in states]), BF16_ROUNDING)
    assert torch.equal(arguments["initial_state"].cpu(), call.chunk_arguments()["initial_state"].cpu())


def test_chunk_op_hands_an_empty_sequence_its_state_back() -> None:
    arguments = Call((4, 1, 7)).make().chunk_arguments()
    arguments["actual_seq_lengths"] = int32(5, 0, 7)
    _, final = chunk(**arguments)
    assert torch.equal(final[1].cpu(), arguments["initial_state"][1].cpu())


def test_chunk_op_of_an_ascend950_keeps_an_fp32_state() -> None:
    call = Call((9, 5), state_dtype=torch.float32).make()
    with switched(SOC="Ascend950PR_9589"):
        _, final = chunk(**call.chunk_arguments())
    assert final.dtype == torch.float32
    assert_close("final_state", final, torch.stack([after[-1] for after in call.expected()[1]]), 1e-5)


# The two meanings of lengths under one name.


def test_a_custom_package_reads_lengths_as_first_token_and_lengths() -> None:
    call = Call((2, 3)).make()
    arguments = call.recurrent_arguments(lengths=(0, 2, 3))
    with switched(LENGTHS="bplus1"):
        out = recurrent(**arguments)
    assert_close("out", out, call.expected()[0], BF16_ROUNDING)
    assert_only_written(call.tensors["state"], arguments["state"], set(call.written()))


@pytest.mark.parametrize(("convention", "written"), [("", [True, True]), ("bplus1", [False, True])])
def test_two_tokens_tell_the_conventions_apart(convention: str, written: list[bool]) -> None:
    call = Call((1, 1)).make()
    arguments = call.recurrent_arguments()
    with switched(LENGTHS=convention):
        recurrent(**arguments)
    state, before = arguments["state"].cpu(), call.tensors["state"]
    assert [not torch.equal(state[slot], before[slot]) for slot in call.tensors["indices"]] == written


@pytest.mark.parametrize("length", [17, 4])
def test_a_custom_package_returns_in_silence_at_a_bad_length(length: int) -> None:
    call = Call((2, 3)).make()
    arguments = call.recurrent_arguments(lengths=(0, 2, length))
    with switched(LENGTHS="bplus1"):
        out = recurrent(**arguments)
    assert_close("out", out[:2], call.expected()[0][:2], BF16_ROUNDING)
    assert (out[2:].cpu().view(torch.uint8) == 0xFB).all()
    assert_only_written(call.tensors["state"], arguments["state"], set(call.tensors["indices"][:2].tolist()))


# What the vendor documents as refused.


def changed(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[dict], None]:
    def apply(arguments: dict) -> None:
        arguments[name] = function(arguments[name])

    return apply


RECURRENT_REFUSALS = {
    "query_f32": (Call((2,)), changed("query", Tensor.float), 161002, "query not implemented for DT_FLOAT"),
    "value_f16": (Call((2,)), changed("value", Tensor.half), 161002, "value not implemented for DT_FLOAT16"),
    "beta_f32": (Call((2,)), changed("beta", Tensor.float), 161002, "beta not implemented for DT_FLOAT"),
    "g_bf16": (Call((2,)), changed("g", Tensor.bfloat16), 161002, "g not implemented for DT_BFLOAT16"),
    "state_f32": (Call((2,)), changed("state", Tensor.float), 161002, "state not implemented for DT_FLOAT"),
    "lengths_i64": (Call((2,)), changed("actual_seq_lengths", Tensor.long), 161002, "not implemented for DT_INT64"),
    "indices_i64": (Call((2,)), changed("ssm_state_indices", Tensor.long), 161002, "not implemented for DT_INT64"),
    "indices_of_sequences": (Call((2, 2)), changed("ssm_state_indices", lambda t: t[:2]), 161002, "expected shape"),
    "key_shape": (Call((2,)), changed("key", lambda t: t[:, :1]), 161002, "key: expected shape"),
    "heads_not_a_multiple": (Call((1,), Nk=3, Nv=4), None, 161002, "integer multiple of Nk"),
    "empty": (Call((1,)), changed("query", lambda t: t[:0]), 161002, r"expected shape|empty"),
    "state_transposed": (Call((2,)), changed("state", lambda t: t.transpose(2, 3)), 161002, "may be non-contiguous"),
    "too_many_tokens": (Call((4,)), changed("state", lambda t: t[:3]), 161002, "BlockNum=3, T=4"),
    "no_accepted": (Call((2,)), changed("num_accepted_tokens", lambda t: None), 161001, "num_accepted_tokens"),
    "Nv": (Call((1,), Nk=1, Nv=257, Dk=16, Dv=16), None, 161002, "Nv is 257"),
    "Dk": (Call((1,), Nk=1, Nv=1, Dk=272, Dv=16), None, 161002, "Dk is 272"),
    # Values: the device does not check them, and computes garbage or leaves the pool.
    "length_9": (Call((9,)), None, 507015, r"expected 1\.\.8, got 9"),
    "length_0": (Call((2,)), changed("actual_seq_lengths", lambda t: t - 2), 507015, r"expected 1\.\.8, got 0"),
    "lengths_sum": (Call((2, 2)), changed("actual_seq_lengths", lambda t: t - 1), 507015, "a sum of T=4, got 2"),
    "slot": (Call((2,)), changed("ssm_state_indices", lambda t: t + 100), 507015, r"ssm_state_indices\[\d\]"),
    "pad_slot": (Call((1, 1)), changed("ssm_state_indices", lambda t: t * 0 - 1), 507015, "got -1"),
    "accepted": (Call((2,)), changed("num_accepted_tokens", lambda t: t + 2), 507015, r"expected 1\.\.2, got 3"),
    "not_normalised": (Call((2,)), changed("key", lambda t: t * 20), 507015, "key: expected values in"),
    "growing": (Call((2,)), changed("g", lambda t: -t), 507015, "g: expected values in"),
    "logits": (Call((2,)), changed("beta", lambda t: t + 3), 507015, "beta: expected values in"),
}


@pytest.mark.parametrize("name", RECURRENT_REFUSALS)
def test_recurrent_op_refuses(name: str) -> None:
    call, change, status, sentence = RECURRENT_REFUSALS[name]
    arguments = call.make().recurrent_arguments()
    if change is not None:
        change(arguments)
    before = arguments["state"].cpu()
    with recorded() as ledger, pytest.raises(RuntimeError, match=sentence) as error:
        recurrent(**arguments)
    assert f"error code is {status}" in str(error.value)
    assert [refusal["status"] for refusal in ledger.of("refusal")] == [status]
    assert_only_written(before, arguments["state"], set())


CHUNK_REFUSALS = {
    "query_f32": (Call((2,)), changed("query", Tensor.float), 161002, "query not implemented for DT_FLOAT"),
    "beta_f32": (Call((2,)), changed("beta", Tensor.float), 161002, "beta not implemented for DT_FLOAT"),
    "g_bf16": (Call((2,)), changed("g", Tensor.bfloat16), 161002, "g not implemented for DT_BFLOAT16"),
    "state_f32": (Call((2,)), changed("initial_state", Tensor.float), 161002, "state not implemented for DT_FLOAT"),
    "lengths_i64": (Call((2,)), changed("actual_seq_lengths", Tensor.long), 161002, "not implemented for DT_INT64"),
    "batch": (Call((2, 2)), changed("initial_state", lambda t: t[:1]), 561002, "state: expected shape"),
    "heads_not_a_multiple": (Call((1,), Nk=3, Nv=4), None, 561002, "integer multiple of Nk"),
    "head_dim": (Call((2,), Dk=64, Dv=64), None, 561002, "Dk and Dv should be 128"),
    "Nv": (Call((1,), Nk=1, Nv=65), None, 561002, "Nv is 65"),
    "lengths_sum": (Call((2, 2)), changed("actual_seq_lengths", lambda t: t - 1), 507015, "a sum of T=4, got 2"),
    "not_normalised": (Call((2,)), changed("query", lambda t: t * 20), 507015, "query: expected values in"),
}


@pytest.mark.parametrize("name", CHUNK_REFUSALS)
def test_chunk_op_refuses(name: str) -> None:
    call, change, status, sentence = CHUNK_REFUSALS[name]
    arguments = call.make().chunk_arguments()
    if change is not None:
        change(arguments)
    with pytest.raises(RuntimeError, match=sentence) as error:
        chunk(**arguments)
    assert f"error code is {status}" in str(error.value)


def test_a_newer_cann_takes_other_head_dims_in_the_chunk_op() -> None:
    call = Call((5,), Dk=64, Dv=96).make()
    with switched(FP32_STATE="1"):
        out, _ = chunk(**call.chunk_arguments())
    assert_close("out", out, call.expected()[0], BF16_ROUNDING)


def test_a_broken_chunk_op_fails_when_it_is_prepared() -> None:
    arguments = Call((2,)).make().chunk_arguments()
    with switched(CHUNK_BROKEN="1"), recorded() as ledger, pytest.raises(RuntimeError, match="does not work"):
        chunk(**arguments)
    assert "ChunkGatedDeltaRule" not in ledger.launches


def test_limits_can_be_lifted() -> None:
    call = Call((9, 11)).make()
    with switched(STRICT="0"):
        out = recurrent(**call.recurrent_arguments())
    assert_close("out", out, call.expected()[0], BF16_ROUNDING)


# Ragged attention and the ops of a mixture of experts: what the vendor documents, and refusals.


def attention_arguments() -> dict[str, object]:
    """Sequences of 2 and 3 queries that see 4 and 3 keys."""
    q, k, v = (torch.randn(rows, heads, 16).bfloat16().npu() for rows, heads in ((5, 4), (7, 2), (7, 2)))
    return {
        "query": q,
        "key": k,
        "value": v,
        "head_num": 4,
        "input_layout": "TND",
        "atten_mask": torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu(),
        "scale": 0.25,
        "actual_seq_qlen": [2, 5],
        "actual_seq_kvlen": [4, 7],
        "sparse_mode": 3,
    }


@pytest.mark.parametrize("is_causal", [True, False])
def test_ragged_attention_agrees_with_the_cpu(is_causal: bool) -> None:
    arguments = attention_arguments()
    if not is_causal:
        arguments["atten_mask"] = None  # the vendor: then sparse_mode has no effect
    got = torch.ops.npu.npu_fusion_attention(**arguments)[0].cpu()
    q, k, v = (arguments[name].cpu().double() for name in ("query", "key", "value"))
    for rows, columns in ((slice(0, 2), slice(0, 4)), (slice(2, 5), slice(4, 7))):
        sequence = (t.transpose(0, 1).unsqueeze(0) for t in (q[rows], k[columns], v[columns]))
        seen = torch.ones(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool)
        seen = seen.tril(seen.shape[1] - seen.shape[0]) if is_causal else seen
        want = F.scaled_dot_product_attention(*sequence, attn_mask=seen, scale=0.25, enable_gqa=True)
        assert_close("out", got[rows], want[0].transpose(0, 1), BF16_ROUNDING)


ATTENTION_REFUSALS = {
    "key_f32": (changed("key", Tensor.float), 161002, "key not implemented for DT_FLOAT"),
    "value_shape": (changed("value", lambda t: t[:6]), 161002, "value: expected shape"),
    "heads": (
        changed("key", lambda t: t.repeat_interleave(2, 1)[:, :3]),
        161002,
        "value: expected shape|multiple of 3",
    ),
    "q_ends": (changed("actual_seq_qlen", lambda ends: [2, 4]), 161002, "actualSeqQLen: expected to end at T=5, got 4"),
    "kv_ends": (changed("actual_seq_kvlen", lambda ends: [8, 7]), 161002, "actualSeqKvLen: expected values that never"),
    "mask_shape": (changed("atten_mask", lambda t: t[:64, :64].contiguous()), 161002, "attenMask: expected shape"),
    "mask_values": (changed("atten_mask", lambda t: ~t), 507015, "true above the diagonal"),
    "more_queries": (changed("actual_seq_kvlen", lambda ends: [1, 7]), 507015, "at most Skv=1 queries, got 2"),
    "head_dim": (None, 161002, r"D: expected 1\.\.768, got 784"),
    "sequences": (None, 161002, r"the number of sequences: expected 1\.\.1024, got 1025"),
}


@pytest.mark.parametrize("name", ATTENTION_REFUSALS)
def test_ragged_attention_refuses(name: str) -> None:
    change, status, sentence = ATTENTION_REFUSALS[name]
    arguments = attention_arguments()
    if change is not None:
        change(arguments)
    elif name == "head_dim":
        for part in ("query", "key", "value"):
            arguments[part] = arguments[part].repeat(1, 1, 49)
    else:
        arguments["actual_seq_qlen"] = [0] * 1023 + [2, 5]
        arguments["actual_seq_kvlen"] = [0] * 1023 + [4, 7]
    with pytest.raises(RuntimeError, match=sentence) as error:
        torch.ops.npu.npu_fusion_attention(**arguments)
    assert f"error code is {status}" in str(error.value)


def route(experts: Tensor, **changes: object) -> tuple[Tensor, ...]:
    x = torch.arange(6.0).view(3, 2).npu()
    options = {
        "active_num": 6,
        "expert_num": 4,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, 4],
    }
    return torch.ops.npu.npu_moe_init_routing_v2(x, experts, **options | changes)


def test_routing_sorts_visits_by_expert_and_keeps_their_order() -> None:
    rows, places, counts, _ = route(int32(2, 0, 3, 2, 0, 3).view(3, 2))
    assert counts.cpu().tolist() == [2, 0, 2, 2]
    assert places.cpu().tolist() == [2, 0, 4, 3, 1, 5]
    assert rows.cpu()[:, 0].tolist() == [0, 4, 0, 2, 2, 4]


def test_routing_refuses() -> None:
    experts = int32(2, 0, 3, 2, 0, 3).view(3, 2)
    for changes, sentence in (
        ({"active_num": 5}, "activeNum: expected T K=6, got 5"),
        ({"active_expert_range": [0, 3]}, "activeExpertRange"),
        ({"expert_tokens_num_type": 2}, "is emulated|expected"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            route(experts, **changes)
    with pytest.raises(RuntimeError, match="expertIdx not implemented for DT_INT64"):
        route(experts.long())
    with pytest.raises(RuntimeError, match=r"507015[\s\S]*expertIdx: expected 0\.\.3"):
        route(experts + 1)


def grouped(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    groups = torch.tensor(counts).npu()
    (out,) = torch.ops.npu.npu_grouped_matmul(
        [x], [weight], group_list=groups, split_item=2, group_type=0, group_list_type=1
    )
    return out


def test_grouped_product_takes_each_groups_own_weight() -> None:
    x, weight = torch.randn(5, 8).bfloat16(), torch.randn(3, 6, 8).bfloat16()
    want = torch.cat([x[:2].double() @ weight[0].double().t(), x[2:].double() @ weight[2].double().t()])
    for on_device in (weight.npu().transpose(1, 2), weight.transpose(1, 2).contiguous().npu()):
        assert_close("out", grouped(x.npu(), on_device, [2, 0, 3]), want, BF16_ROUNDING)


def test_grouped_product_refuses() -> None:
    x, weight = torch.randn(5, 8).bfloat16().npu(), torch.randn(3, 8, 6).bfloat16().npu()
    with pytest.raises(RuntimeError, match=r"507015[\s\S]*groupList: expected a sum of 5, got 4"):
        grouped(x, weight, [2, 0, 2])
    with pytest.raises(RuntimeError, match=r"507015[\s\S]*groupList\[2\]: expected 0\.\.3, got 4"):
        grouped(x, weight, [2, 0, 4])
    with pytest.raises(RuntimeError, match="groupList: expected shape"):
        grouped(x, weight, [2, 3])
    with pytest.raises(RuntimeError, match=r"groupList: expected 2\.\.1024 groups, got 1"):
        grouped(x, weight[:1], [5])
    with pytest.raises(RuntimeError, match="weight not implemented for DT_FLOAT,"):
        grouped(x, weight.float(), [2, 0, 3])
    with pytest.raises(RuntimeError, match="x: expected a contiguous tensor"):
        grouped(torch.randn(5, 16).bfloat16().npu()[:, ::2], weight, [2, 0, 3])


def test_swiglu_and_the_weighted_sum_of_visits() -> None:
    x = torch.randn(3, 8).bfloat16()
    left, right = x.double().chunk(2, -1)
    assert_close("swiglu", torch.ops.npu.npu_swiglu(x.npu()), F.silu(left) * right, BF16_ROUNDING)
    rows, scales, places = torch.randn(6, 8).bfloat16(), torch.rand(3, 2).bfloat16(), int32(2, 0, 4, 3, 1, 5)
    none = (None, None, None)
    got = torch.ops.npu.npu_moe_finalize_routing(rows.npu(), *none, scales.npu(), places, None, drop_pad_mode=2)
    want = (rows.double()[places.cpu().long()].view(3, 2, 8) * scales.double().unsqueeze(-1)).sum(1)
    assert_close("out", got, want, BF16_ROUNDING)
    with pytest.raises(RuntimeError, match=r"507015[\s\S]*expandedRowIdx: expected 0\.\.5"):
        torch.ops.npu.npu_moe_finalize_routing(rows.npu(), *none, scales.npu(), places + 1, None, drop_pad_mode=2)


# What only a process of its own can show.


def test_absent_ops_are_named() -> None:
    code = """
from gdn_calls import Call
call = Call((2,)).make()
for op, arguments in (("recurrent", call.recurrent_arguments()), ("chunk", call.chunk_arguments())):
    try:
        getattr(torch.ops.npu, f"npu_{op}_gated_delta_rule")(**arguments)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""
    lines = run_python(code, ABSENT="RecurrentGatedDeltaRule,ChunkGatedDeltaRule")
    for op, line in zip(("Recurrent", "Chunk"), lines, strict=True):
        assert re.search(f"aclnn{op}GatedDeltaRule .* not in libopapi.so", line)


def test_the_task_queue_raises_an_error_once_and_drops_what_follows() -> None:
    """torch_npu's default mode: why an engine must take the first error of a device as final."""
    code = """
import ledger
x = torch.ones(3, device="npu")
torch.npu.synchronize()
ledger.reset()
y = x.exp()
for attempt in range(2):
    try:
        print("read", bool((y.cpu() < -1e36).all()))
    except RuntimeError as error:
        print("raised", "aclnnExp" in str(error))
(x + 1).cpu()
print(ledger.read().launches)
"""
    lines = run_python(code, environment=task_queue_environment(), FAIL="Exp")
    assert lines == ["raised True", "read True", "['Exp']"]
