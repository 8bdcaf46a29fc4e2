# SPDX-License-Identifier: Apache-2.0
"""The kernel for SGLang: its interface, and results on pools as SGLang lays them out, against float64."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import sglang_stand_in
from cases import assert_bits_equal, assert_close
from xgdn.errors import UnsupportedError
from xgdn.integrations import sglang_kernel
from xgdn.integrations.sglang_kernel import GDNKernel, kernel_class, use_in_sglang

H, HV, K, V = 2, 4, 32, 48
# Of tokens and states: states in bf16 are rounded at every token.
TYPES = {
    "f32": (torch.float32, torch.float32, 2e-6),
    "bf16": (torch.bfloat16, torch.float32, 4e-3),
    "bf16-states": (torch.bfloat16, torch.bfloat16, 1.2e-2),
}
types = pytest.mark.parametrize("types", TYPES)


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in, at the place where SGLang has its base class."""
    package = ""
    for name in sglang_kernel._BASE.split("."):
        package = f"{package}.{name}".lstrip(".")
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, sglang_kernel._BASE, sglang_stand_in)


class Batch:
    """Packed tokens as views of one convolution's output, raw gates, a pool whose free slots are NaN."""

    def __init__(self, lengths: list[int], slots: list[int], types: str, strided_pool: bool = False) -> None:
        self.dtype, self.state_dtype, self.bound = TYPES[types]
        self.lengths, self.slots = lengths, slots
        self.scale: float | None = None  # K^-0.5
        tokens = sum(lengths)
        self.mixed_qkv = torch.randn(tokens, 2 * H * K + HV * V).to(self.dtype)
        q, k, v = self.mixed_qkv.split([H * K, H * K, HV * V], dim=-1)
        self.q, self.k = (x.view(1, tokens, H, K) for x in (q, k))
        self.v = v.view(1, tokens, HV, V)
        self.a, self.b = (torch.randn(tokens, HV).to(self.dtype) for _ in range(2))
        self.A_log, self.dt_bias = torch.randn(HV), torch.randn(HV).to(self.dtype)
        wide = torch.full((9, 2 if strided_pool else 1, HV, V, K), float("nan"), dtype=self.state_dtype)
        self.ssm_states = wide[:, -1]
        for slot in {slot for slot in slots if slot >= 0}:
            self.ssm_states[slot] = torch.randn(HV, V, K)
        self.before = self.ssm_states.clone()
        self.cache_indices = torch.tensor(slots, dtype=torch.int32)
        ends = torch.tensor(lengths).cumsum(0)
        self.query_start_loc = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int()

    @property
    def pools(self) -> dict[str, Tensor]:
        names = ("ssm_states", "cache_indices", "query_start_loc")
        return {name: getattr(self, name) for name in names}

    @property
    def gates(self) -> dict[str, Tensor]:
        return {"A_log": self.A_log, "dt_bias": self.dt_bias}

    def rows(self, n: int) -> slice:
        return slice(sum(self.lengths[:n]), sum(self.lengths[: n + 1]))

    def truth(self, n: int) -> tuple[Tensor, Tensor]:
        """Outputs of a sequence and its states after every token, the given one first."""
        rows = self.rows(n)
        g, beta = reference.gdn_gating(self.a[rows], self.b[rows], self.A_log, self.dt_bias)
        q, k, v = (x[0, rows] for x in (self.q, self.k, self.v))
        return reference.gated_delta_rule(q, k, v, g, beta, self.before[self.slots[n]], scale=self.scale)

    def check(self, out: Tensor, are_states_moved: bool = True) -> None:
        assert out.shape == self.v.shape
        for n, slot in enumerate(self.slots):
            got = out[0, self.rows(n)]
            if slot < 0:
                assert_bits_equal("padded rows", got, torch.zeros_like(got))
                continue
            want, states = self.truth(n)
            assert_close("outputs", got, want, self.bound)
            if are_states_moved:
                assert_close("state", self.ssm_states[slot], states[-1], self.bound)
        kept = [s for s in range(len(self.before)) if s not in self.slots or not are_states_moved]
        assert_bits_equal("slots that the call did not name", self.ssm_states[kept], self.before[kept])


def test_interface(sglang: None) -> None:
    base = sglang_stand_in.LinearAttnKernelBase
    kernel = kernel_class()()
    assert isinstance(kernel, base)
    for name in ("decode", "extend", "target_verify"):
        ours = inspect.signature(getattr(kernel, name)).parameters
        theirs = [p for p in inspect.signature(getattr(base, name)).parameters.values() if p.name != "self"]
        positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
        for parameter in theirs:
            assert ours[parameter.name].kind is parameter.kind
        added = set(ours) - {p.name for p in theirs}
        assert all(ours[name].default is not inspect.Parameter.empty for name in added), (
            "an argument of our own is asked for"
        )


def test_a_dispatcher_gets_the_kernel(sglang: None) -> None:
    dispatcher = sglang_stand_in.GDNKernelDispatcher()
    tree = dispatcher.tree_verify_kernel
    kernel = use_in_sglang(dispatcher, backend="reference")
    assert dispatcher.decode_kernel is dispatcher.extend_kernel is dispatcher.verify_kernel is kernel
    assert dispatcher.tree_verify_kernel is tree
    assert dispatcher.supports_packed_decode
    assert not dispatcher.verify_kernel_is_flashinfer
    assert kernel.backend == "reference"
    with pytest.raises(UnsupportedError, match=r"use_in_sglang.*GDNKernelDispatcher.*got object without decode_kernel"):
        use_in_sglang(object())


@types
def test_decode(types: str) -> None:
    x = Batch([1, 1, 1, 1], [6, -1, 2, 3], types, strided_pool=True)
    x.check(GDNKernel().decode(x.q, x.k, x.v, x.a, x.b, **x.gates, **x.pools))


@types
def test_packed_decode(types: str) -> None:
    x = Batch([1, 1, 1], [6, -1, 2], types)
    x.scale = 0.25
    heads = {"num_v_heads": HV, "head_v_dim": V}
    pools = {"ssm_states": x.ssm_states, "cache_indices": x.cache_indices}
    unused = {f"replayssm_{name}": None for name in ("d", "k", "g", "write_pos", "force_flush")}
    x.check(GDNKernel().packed_decode(x.mixed_qkv, x.a, x.b, **x.gates, **pools, **heads, **unused, scale=x.scale))


@types
def test_extend(types: str) -> None:
    x = Batch([70, 0, 3, 64, 5], [6, 1, 2, 3, -1], types, strided_pool=True)
    g, beta = reference.gdn_gating(x.a, x.b, x.A_log, x.dt_bias)
    given = {"g": g.float().unsqueeze(0), "beta": beta.float().unsqueeze(0)}
    out, last, chunks = GDNKernel().extend(x.q, x.k, x.v, **given, **x.pools, layer_id=3, output=None)
    assert last is None
    assert chunks is None
    x.check(out)


def test_extend_that_leaves_the_states() -> None:
    x = Batch([5, 66], [6, 2], "f32")
    g, beta = reference.gdn_gating(x.a, x.b, x.A_log, x.dt_bias)
    given = {"g": g.float().unsqueeze(0), "beta": beta.float().unsqueeze(0)}
    out, *_ = GDNKernel().extend(x.q, x.k, x.v, **given, **x.pools, inplace_update=False)
    x.check(out, are_states_moved=False)


def test_extend_with_rows_behind_the_last_sequence() -> None:
    x = Batch([5, 3], [6, 2], "f32")
    x.query_start_loc[-1] = 7
    x.lengths[1] = 2
    x.q[:, 7:], x.k[:, 7:], x.v[:, 7:] = float("nan"), float("nan"), float("nan")
    g, beta = reference.gdn_gating(x.a, x.b, x.A_log, x.dt_bias)
    out, *_ = GDNKernel().extend(x.q, x.k, x.v, g.float().unsqueeze(0), beta.float().unsqueeze(0), **x.pools)
    x.check(out)
    assert_bits_equal("rows behind", out[:, 7:], torch.zeros_like(out[:, 7:]))


@types
@pytest.mark.parametrize("room", [3, 5], ids=["rows", "wider-rows"])
def test_target_verify(types: str, room: int) -> None:
    steps = 3
    x = Batch([steps] * 3, [6, -1, 2], types, strided_pool=True)
    whole = torch.full((4, room, HV, V, K), float("nan"), dtype=x.state_dtype)
    buffer_rows = [2, 0, 1]
    out = GDNKernel().target_verify(
        x.A_log,
        x.dt_bias,
        x.q,
        x.k,
        x.v,
        x.a,
        x.b,
        **x.pools,
        intermediate_states_buffer=whole[:, :steps],
        intermediate_state_indices=torch.tensor(buffer_rows, dtype=torch.int32),
        cache_steps=steps,
        retrieve_parent_token=None,
        stable_rows=False,
    )
    x.check(out, are_states_moved=False)
    for n in (0, 2):
        assert_close("drafts' states", whole[buffer_rows[n], :steps], x.truth(n)[1][1:], x.bound)
        assert whole[buffer_rows[n], steps:].isnan().all(), "behind the drafts"
    assert whole[[0, 3]].isnan().all(), "rows that no sequence has"


def test_target_verify_of_padding_alone() -> None:
    x = Batch([2, 2], [-1, -1], "f32")
    buffer = torch.randn(2, 2, HV, V, K)
    before = buffer.clone()
    rows = torch.tensor([0, 1], dtype=torch.int32)
    drafts = {"intermediate_states_buffer": buffer, "intermediate_state_indices": rows, "cache_steps": 2}
    x.check(GDNKernel().target_verify(x.A_log, x.dt_bias, x.q, x.k, x.v, x.a, x.b, **x.pools, **drafts))
    assert_bits_equal("the buffer", buffer, before)


def _refused(name: str) -> Any:
    return pytest.raises(UnsupportedError, match=rf"\[sglang {name}: expected None, got Tensor")


def test_what_would_change_the_result_is_refused() -> None:
    x = Batch([1], [2], "f32")
    kernel, some = GDNKernel(), torch.zeros(1)
    verify = (x.A_log, x.dt_bias, x.q, x.k, x.v, x.a, x.b)
    with _refused(r"target_verify\] retrieve_parent_token"):
        kernel.target_verify(*verify, **x.pools, retrieve_parent_token=some)
    with pytest.raises(UnsupportedError, match=r"target_verify\] intermediate_states_buffer.*expected two tensors"):
        kernel.target_verify(*verify, **x.pools)
    rows = torch.zeros(1, dtype=torch.int32)
    for buffer, steps, words in (
        (torch.zeros(2, 1, HV, V, K), 2, "cache_steps: expected 1 to the 1 of the buffer, got 2"),
        (torch.zeros(2, 1, HV, V, K), 0, "cache_steps: expected 1 to the 1 of the buffer, got 0"),
        (
            torch.zeros(5 * HV * V * K).as_strided((2, 2, HV, V, K), (2 * HV * V * K + 8, HV * V * K, V * K, K, 1)),
            1,
            "strides",
        ),
    ):
        drafts = {"intermediate_states_buffer": buffer, "intermediate_state_indices": rows, "cache_steps": steps}
        with pytest.raises(UnsupportedError, match=rf"target_verify\] .*{words}"):
            kernel.target_verify(*verify, **x.pools, **drafts)
        assert not buffer.any()
    for name in ("track_state", "track_chunk_idx", "state_checkpoint_cu_starts"):
        with _refused(rf"extend\] {name}"):
            kernel.extend(x.q, x.k, x.v, x.a, x.b, **x.pools, **{name: some})
    pools = {"ssm_states": x.ssm_states, "cache_indices": x.cache_indices}
    for name in ("replayssm_d", "replayssm_k", "replayssm_g", "replayssm_write_pos"):
        with _refused(rf"packed_decode\] {name}"):
            kernel.packed_decode(
                x.mixed_qkv, x.a, x.b, **x.gates, **pools, scale=1.0, num_v_heads=HV, head_v_dim=V, **{name: some}
            )
    assert_bits_equal("the pool", x.ssm_states, x.before)
