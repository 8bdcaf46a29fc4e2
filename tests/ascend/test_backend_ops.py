# SPDX-License-Identifier: Apache-2.0
"""The npu backend's delta rules on npu tensors, against the float64 recurrence: adaptation at the edge, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import reference
import xgdn
from cases import Case, Inputs, assert_bits_equal, assert_call, assert_close, cu_seqlens_of, i32, make_inputs
from ledger import recorded
from test_chunk_metadata import STEPS, assert_written_is_built
from xgdn import ops

BF16 = {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16}

DECODE = [
    Case((1,), **BF16),
    Case((1,) * 7, K=128, V=128, **BF16),
    Case((1, 1, 0, 1), **BF16),
    Case((2, 1, 4, 0, 3), **BF16),
    *(Case((1,) * 5, H=H, HV=H * ratio, K=32, V=16, **BF16) for H, ratio in ((2, 1), (2, 2), (2, 3), (1, 8))),
    *(Case((1, 2, 1), HV=1, K=K, V=V, **BF16) for K, V in ((64, 96), (128, 64), (256, 128))),
    Case((1,) * 3, out_dtype=torch.float32, **BF16),
    Case((1,) * 3, beta_dtype=torch.bfloat16, **BF16),
    *(Case((1, 3), gates=gates, **BF16) for gates in ("near0", "g5", "g380", "g1e4")),
    Case((1, 3), beta=0.0, **BF16),
    Case((1, 3), use_qk_l2norm=False, **BF16),
    Case((1, 3), scale=0.3, **BF16),
    Case((1,) * 5, H=2, HV=4, strided=True, **BF16),
    Case((1,) * 6, padded=(0, 3, 5), **BF16),
    Case((2, 3), padded=(0, 1), **BF16),
    Case((1,) * 4, writes_elsewhere=True, **BF16),
    Case((1, 0, 2, 1), writes_elsewhere=True, padded=(2,), **BF16),
    Case((17, 9, 1, 0, 3, 8, 2, 5, *(1,) * 12), HV=1, K=32, V=32, **BF16),  # pieces of 8
]

PREFILL = [
    Case((1,), K=128, V=128, **BF16),
    Case((130, 5), K=128, V=128, **BF16),
    Case((66, 1, 65), H=2, HV=6, K=128, V=128, strided=True, **BF16),
    Case((66, 0, 65, 0, 1), K=128, V=128, **BF16),
    Case((66, 1, 65, 0, 3), K=128, V=128, padded=(1, 2), **BF16),
    Case((66, 0, 65, 1), K=128, V=128, writes_elsewhere=True, **BF16),
    Case((66, 0, 65, 1), K=128, V=128, initial="none", **BF16),
    Case((70,), K=128, V=128, gates="g380", **BF16),
    Case((70,), K=128, V=128, scale=0.3, use_qk_l2norm=False, **BF16),
]

# q, k and beta are rounded to bf16 before the op and the read-out after it: three roundings of up to 2^-9 each.
SLACK = 3


def to_npu(x: Inputs) -> dict[str, Tensor]:
    """The tensors on the device; views stay views of one packed projection."""
    names = ("q", "k", "v", "g", "beta", "state", "out", "state_indices", "cu_seqlens", "has_initial_state")
    tensors = {name: getattr(x, name).contiguous().npu() for name in names}
    if x.case.strided:
        packed = torch.cat([x.q.flatten(1), x.k.flatten(1), x.v.flatten(1)], 1).npu()
        views = packed.split([t.flatten(1).shape[1] for t in (x.q, x.k, x.v)], 1)
        for name, view in zip("qkv", views, strict=True):
            tensors[name] = view.unflatten(1, getattr(x, name).shape[1:])
    if x.write_indices is not None:
        tensors["write_indices"] = x.write_indices.npu()
    return tensors


def run_recurrent(x: Inputs, **options: object) -> Tensor:
    t = to_npu(x)
    got = ops.recurrent_gated_delta_rule(
        *(t[name] for name in ("q", "k", "v", "g", "beta", "state")),
        cu_seqlens=t["cu_seqlens"],
        cu_seqlens_cpu=x.cu_seqlens,
        state_indices=t["state_indices"],
        write_indices=t.get("write_indices"),
        out=t["out"],
        scale=x.case.scale,
        use_qk_l2norm_in_kernel=x.case.use_qk_l2norm,
        **options,
    )
    assert xgdn.last_backend("recurrent_gated_delta_rule") == "npu"
    x.state.copy_(t["state"].cpu())
    return got.cpu()


def run_chunk(x: Inputs) -> Tensor:
    t = to_npu(x)
    chunk = ops.build_chunk_metadata(x.case.lengths, x.case.HV, device="npu")
    got = ops.chunk_gated_delta_rule(
        *(t[name] for name in ("q", "k", "v", "g", "beta", "state")),
        cu_seqlens=t["cu_seqlens"],
        cu_seqlens_cpu=x.cu_seqlens,
        state_indices=t["state_indices"],
        write_indices=t.get("write_indices"),
        has_initial_state=t["has_initial_state"],
        chunk=chunk,
        out=t["out"],
        scale=x.case.scale,
        use_qk_l2norm_in_kernel=x.case.use_qk_l2norm,
    )
    assert xgdn.last_backend("chunk_gated_delta_rule") == "npu"
    x.state.copy_(t["state"].cpu())
    return got.cpu()


@pytest.fixture(autouse=True)
def wider_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    import cases

    original = cases.tolerance
    monkeypatch.setattr(cases, "tolerance", lambda case, result: SLACK * original(case, result))


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_recurrent_matches_the_recurrence(case: Case) -> None:
    x = make_inputs(case, prefill=False)
    assert_call(x, run_recurrent(x), prefill=False)


@pytest.mark.parametrize("case", [c for c in DECODE if not c.padded], ids=str)
def test_recurrent_with_the_promise_of_no_padding(case: Case) -> None:
    x = make_inputs(case, prefill=False)
    assert_call(x, run_recurrent(x, may_have_padding=False), prefill=False)


@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_chunk_matches_the_recurrence(case: Case) -> None:
    x = make_inputs(case, prefill=True)
    assert_call(x, run_chunk(x), prefill=True)


@pytest.mark.parametrize("may_have_padding", [True, False])
@pytest.mark.parametrize("accepted", list(itertools.product((1, 2, 4), repeat=3)), ids=str)
def test_ragged_verification_at_every_acceptance_count(accepted: tuple[int, ...], may_have_padding: bool) -> None:
    """Also counts larger than this step's number of tokens, which torch_npu's per-token slots cannot name."""
    lengths = (4, 1, 2)
    case = Case(lengths, H=1, HV=2, K=64, V=32, **BF16)
    x = make_inputs(case, prefill=False)
    table = torch.randperm(14)[:12].view(3, 4).int()
    pool = torch.full((14, 2, 32, 64), torch.nan, dtype=torch.bfloat16)
    for n, m in enumerate(accepted):
        pool[table[n, m - 1]] = torch.randn(2, 32, 64).bfloat16()
    state = pool.npu()
    out = torch.full((case.T, 2, 32), torch.nan, dtype=torch.bfloat16).npu()
    ops.recurrent_gated_delta_rule(
        *(t.npu() for t in x.tensors()[:5]),
        state,
        cu_seqlens=x.cu_seqlens.npu(),
        cu_seqlens_cpu=x.cu_seqlens,
        state_indices=table.npu(),
        num_accepted=i32(accepted).npu(),
        out=out,
        may_have_padding=may_have_padding,
    )
    after = state.cpu()
    written = set()
    for n, rows in enumerate(case.rows):
        tokens = (t[rows] for t in x.tensors()[:5])
        want, states = reference.gated_delta_rule(*tokens, pool[table[n, accepted[n] - 1]])
        assert_close(f"out {n}", out[rows].cpu(), want, 1.2e-2, parts=(0, 1))
        for t in range(lengths[n]):
            written.add(int(table[n, t]))
            assert_close(f"state {n} {t}", after[table[n, t]], states[t + 1], 1.2e-2, parts=(0,))
    others = [slot for slot in range(14) if slot not in written]
    assert_bits_equal("untouched slots", after[others], pool[others])


def test_a_long_verification_is_chained_through_the_table() -> None:
    length = 19
    case = Case((length, 3), HV=1, K=32, V=32, **BF16)
    x = make_inputs(case, prefill=False)
    table = torch.arange(40).view(2, 20).int()
    pool = torch.full((40, 1, 32, 32), torch.nan, dtype=torch.bfloat16)
    pool[[0, 21]] = torch.randn(2, 1, 32, 32).bfloat16()
    state = pool.npu()
    out = torch.full((case.T, 1, 32), torch.nan, dtype=torch.bfloat16).npu()
    ops.recurrent_gated_delta_rule(
        *(t.npu() for t in x.tensors()[:5]),
        state,
        cu_seqlens=x.cu_seqlens.npu(),
        cu_seqlens_cpu=x.cu_seqlens,
        state_indices=table.npu(),
        num_accepted=i32([1, 2]).npu(),
        out=out,
    )
    for n, (rows, start) in enumerate(zip(case.rows, (0, 21), strict=True)):
        want, states = reference.gated_delta_rule(*(t[rows] for t in x.tensors()[:5]), pool[start])
        assert_close(f"out {n}", out[rows].cpu(), want, 3e-2, parts=(0,))  # the state is rounded after every token
        assert_close(f"state {n}", state.cpu()[table[n, rows.stop - rows.start - 1]], states[-1], 3e-2)


@pytest.mark.parametrize("may_have_padding", [True, False])
def test_packed_decode_agrees_with_the_cpu(may_have_padding: bool) -> None:
    N, H, HV, K, V = 5, 2, 6, 64, 32
    qkv, a, b = (torch.randn(N, width).bfloat16() for width in (2 * H * K + HV * V, HV, HV))
    A_log, dt_bias = torch.rand(HV), torch.rand(HV)
    state = torch.randn(9, HV, V, K).bfloat16()
    slots = i32([8, 0, 3, -1 if may_have_padding else 7, 2])
    want_state = state.clone()
    want = ops.packed_decode(qkv, a, b, A_log, dt_bias, want_state, state_indices=slots, backend="cpu")
    got_state = state.npu()
    got = ops.packed_decode(
        *(t.npu() for t in (qkv, a, b, A_log, dt_bias)),
        got_state,
        state_indices=slots.npu(),
        may_have_padding=may_have_padding,
    )
    assert_close("out", got.cpu(), want, 1.2e-2, parts=(1,))
    assert_close("state", got_state.cpu(), want_state, 6e-3, parts=(0, 1))
    others = [slot for slot in range(9) if slot not in slots.tolist()]
    assert_bits_equal("untouched slots", got_state.cpu()[others], state[others])
    if may_have_padding:
        assert not got[3].cpu().any()


def call(case: Case, **changes: object) -> Tensor:
    x = make_inputs(case, prefill=False)
    for name, value in changes.items():
        setattr(x, name, value)
    return run_recurrent(x)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case((1,), dtype=torch.float32, state_dtype=torch.bfloat16), ["bf16 q, k and v", "Float"]),
        (Case((1,), dtype=torch.float16, state_dtype=torch.bfloat16), ["bf16 q, k and v", "Half"]),
        (Case((1,), dtype=torch.bfloat16), ["bf16 states", "never downcast", "161002"]),
        (Case((40,), **BF16), ["as many tokens as slots", "T=40", "S=5"]),
    ],
    ids=str,
)
def test_refusals_are_sentences_with_numbers(case: Case, words: list[str]) -> None:
    with pytest.raises(NotImplementedError) as caught:
        call(case)
    message = str(caught.value)
    assert all(word in message for word in words), message
    for other in ("cpu", "reference"):  # nobody else may quietly serve npu tensors
        assert f"{other}: " in message


def test_chunk_head_dims_beyond_the_op_are_refused() -> None:
    x = make_inputs(Case((5,), K=128, V=64, **BF16), prefill=True)
    with pytest.raises(NotImplementedError, match=r"K = V = 128.*K=128 V=64"):
        run_chunk(x)


def test_lengths_must_be_known_on_the_host() -> None:
    x = make_inputs(Case((2, 1), **BF16), prefill=False)
    t = to_npu(x)
    with pytest.raises(NotImplementedError, match="cu_seqlens_cpu"):
        ops.recurrent_gated_delta_rule(
            *(t[name] for name in ("q", "k", "v", "g", "beta", "state")),
            cu_seqlens=t["cu_seqlens"],
            state_indices=t["state_indices"],
        )


def test_a_slot_stride_is_refused() -> None:
    x = make_inputs(Case((1,), **BF16), prefill=False)
    wide = torch.zeros((10, *x.state.shape[1:]), dtype=torch.bfloat16).npu()
    with pytest.raises(NotImplementedError, match="contiguous pool"):
        ops.recurrent_gated_delta_rule(
            *(t.npu() for t in x.tensors()[:5]),
            wide[::2],
            cu_seqlens=x.cu_seqlens.npu(),
            cu_seqlens_cpu=cu_seqlens_of((1,)),
            state_indices=x.state_indices.npu(),
        )


def test_mixed_devices_are_refused() -> None:
    x = make_inputs(Case((1,), **BF16), prefill=False)
    t = to_npu(x)
    with pytest.raises((ValueError, RuntimeError), match="npu"):
        ops.recurrent_gated_delta_rule(
            *(t[name] for name in ("q", "k", "v", "g", "beta")),
            x.state,
            cu_seqlens=t["cu_seqlens"],
            cu_seqlens_cpu=x.cu_seqlens,
            state_indices=t["state_indices"],
        )


@pytest.mark.parametrize("lengths", STEPS, ids=str)
def test_chunk_metadata_is_written_on_the_device(lengths: tuple[int, ...]) -> None:
    pooled = ops.ChunkMetadata.allocate(max_sequences=7, max_tokens=4000, num_v_heads_local=8, device="npu:0")
    cu_seqlens = cu_seqlens_of(lengths).npu()
    with recorded() as ledger:
        pooled.write(cu_seqlens, 8)
    assert (ledger.copies, ledger.syncs) == ([], [])
    assert_written_is_built(lengths, 8, pooled)


def delta_tensors(T: int, H: int, HV: int, K: int, V: int, S: int, state_dtype: torch.dtype) -> dict[str, Tensor]:
    tokens = {"q": (T, H, K), "k": (T, H, K), "v": (T, HV, V)}
    return {
        **{name: torch.zeros(*shape, dtype=torch.bfloat16).npu() for name, shape in tokens.items()},
        **{name: torch.zeros(T, HV).npu() for name in ("g", "beta")},
        "state": torch.zeros(S, HV, V, K, dtype=state_dtype).npu(),
    }


RECURRENT_LIMITS = {
    "HV": ({"HV": 257}, "at most 256 heads of at most 256, got H=1 HV=257 K=16 V=16"),
    "K": ({"K": 257}, "at most 256 heads of at most 256, got H=1 HV=1 K=257 V=16"),
    "V": ({"V": 272}, "at most 256 heads of at most 256, got H=1 HV=1 K=16 V=272"),
    "slots": ({"T": 3, "S": 2}, "at most as many tokens as slots, got T=3 S=2"),
    "state": ({"state_dtype": torch.float32}, "takes bf16 states, got a Float pool, which is never downcast"),
}
CHUNK_LIMITS = {
    "HV": ({"HV": 65}, "at most 64 heads, got H=1 HV=65"),
    "H": ({"H": 66, "HV": 66}, "at most 64 heads, got H=66 HV=66"),
    "below": ({"K": 64, "V": 64}, "head dims K = V = 128, got K=64 V=64"),
    "above": ({"K": 256, "V": 256}, "head dims K = V = 128, got K=256 V=256"),
    "state": ({"state_dtype": torch.float32}, "takes bf16 states, got a Float pool, which is never downcast"),
}


@pytest.mark.parametrize("name", RECURRENT_LIMITS)
def test_limits_of_the_recurrent_op(name: str) -> None:
    changes, sentence = RECURRENT_LIMITS[name]
    sizes = {"T": 1, "H": 1, "HV": 1, "K": 16, "V": 16, "S": 4, "state_dtype": torch.bfloat16} | changes
    slots, cu_seqlens = i32([0]), i32([0, sizes["T"]])
    with pytest.raises(NotImplementedError, match=f"backend npu cannot serve this call: .*{sentence}"):
        ops.recurrent_gated_delta_rule(
            **delta_tensors(**sizes),
            cu_seqlens=cu_seqlens.npu(),
            cu_seqlens_cpu=cu_seqlens,
            state_indices=slots.npu(),
            backend="npu",
        )


@pytest.mark.parametrize("name", [*CHUNK_LIMITS, "lengths"])
def test_limits_of_the_chunk_op(name: str) -> None:
    changes, sentence = CHUNK_LIMITS.get(name, ({}, "the lengths must be known on the host: pass cu_seqlens_cpu"))
    sizes = {"T": 1, "H": 1, "HV": 1, "K": 128, "V": 128, "S": 1, "state_dtype": torch.bfloat16} | changes
    chunk = ops.build_chunk_metadata([1], device="npu")
    with pytest.raises(NotImplementedError, match=f"backend npu cannot serve this call: .*{sentence}"):
        ops.chunk_gated_delta_rule(
            **delta_tensors(**sizes),
            cu_seqlens=i32([0, 1]).npu(),
            cu_seqlens_cpu=None if name == "lengths" else i32([0, 1]),
            state_indices=i32([0]).npu(),
            chunk=chunk,
            backend="npu",
        )
