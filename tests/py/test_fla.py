# SPDX-License-Identifier: Apache-2.0
"""The two functions with FLA's names: signatures, results, layouts, options, and agreement with transformers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import reference
import xgdn
from cases import assert_bits_equal, assert_close
from xgdn.fla import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

FUNCTIONS = [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule]
BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3}

both = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def make(B: int = 2, T: int = 70, H: int = 1, HV: int = 2, K: int = 32, V: int = 48, dtype: Any = torch.float32) -> Any:
    return (
        torch.randn(B, T, H, K).to(dtype),
        torch.randn(B, T, H, K).to(dtype),
        torch.randn(B, T, HV, V).to(dtype),
        -torch.rand(B, T, HV),
        torch.rand(B, T, HV).to(dtype),
    )


def truth(x: Any, initial: Any = None, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B, T, HV, V] and the final states [B, HV, K, V] of equally long sequences."""
    q, k, v, g, beta = x
    outputs, finals = [], []
    for n in range(q.shape[0]):
        S = torch.zeros(v.shape[2], v.shape[3], q.shape[3]) if initial is None else initial[n].mT
        o, states = reference.gated_delta_rule(q[n], k[n], v[n], g[n], beta[n], S, **options)
        outputs.append(o)
        finals.append(states[-1].mT)
    return torch.stack(outputs), torch.stack(finals)


CHUNK_PARAMETERS = """q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel
    use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu chunk_indices
    cp_context kwargs"""
RECURRENT_PARAMETERS = """q k v g gk gv beta scale initial_state output_final_state use_qk_l2norm_in_kernel
    use_gate_in_kernel A_log dt_bias use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens kwargs"""


def test_signatures() -> None:
    assert list(inspect.signature(xgdn.chunk_gated_delta_rule).parameters) == CHUNK_PARAMETERS.split()
    assert list(inspect.signature(xgdn.fused_recurrent_gated_delta_rule).parameters) == RECURRENT_PARAMETERS.split()


@both
def test_defaults_are_none_or_false(function: Any) -> None:
    parameters = inspect.signature(function).parameters.values()
    defaults = [p.default for p in parameters if p.default is not inspect.Parameter.empty]
    assert all(default is None or default is False for default in defaults)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 64, 70])
@pytest.mark.parametrize("initial", [False, True], ids=["from_zero", "from_state"])
def test_matches_recurrence(function: Any, dtype: torch.dtype, T: int, initial: bool, backend: str) -> None:
    x = make(T=T, dtype=dtype)
    state = torch.randn(2, 2, 32, 48) if initial else None
    before = None if state is None else state.clone()
    with xgdn.use_backend(backend):
        o, final = function(
            *x[:3],
            g=x[3],
            beta=x[4],
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
    assert o.dtype == dtype
    assert final.dtype == torch.float32
    want_o, want_final = truth(x, state)
    assert_close("o", o, want_o, BOUND[dtype])
    assert_close("final_state", final, want_final, BOUND[dtype])
    if state is not None:
        assert_bits_equal("initial_state", state, before)
        assert final.data_ptr() != state.data_ptr()


@both
def test_without_l2norm_and_with_a_scale(function: Any, backend: str) -> None:
    q, k, v, g, beta = make()
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    with xgdn.use_backend(backend):
        o, final = function(q, k, v, g=g, beta=beta, scale=0.5)
    assert final is None
    want, _ = truth((q, k, v, g, beta), use_qk_l2norm=False, scale=0.5)
    assert_close("o", o, want, 1e-6)


@both
def test_state_v_first_is_the_transpose(function: Any) -> None:
    x = make()
    state = torch.randn(2, 2, 32, 48)
    kwargs = {"g": x[3], "beta": x[4], "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    o, final = function(*x[:3], initial_state=state, **kwargs)
    before = state.mT.contiguous()
    given = before.clone()
    o_v, final_v = function(*x[:3], initial_state=given, state_v_first=True, **kwargs)
    assert_bits_equal("o", o_v, o)
    assert_bits_equal("final_state", final_v, final.mT)
    assert_bits_equal("initial_state", given, before)
    assert final.shape == (2, 2, 32, 48)
    assert final_v.shape == (2, 2, 48, 32)


@both
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_varlen_equals_one_by_one(function: Any, dtype: torch.dtype, backend: str) -> None:
    lengths = [65, 0, 3, 70]
    ends = torch.tensor([0, 65, 65, 68, 138], dtype=dtype)
    x = make(B=1, T=138)
    state = torch.randn(4, 2, 32, 48)
    kwargs = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    with xgdn.use_backend(backend):
        o, final = function(*x[:3], g=x[3], beta=x[4], initial_state=state, cu_seqlens=ends, **kwargs)
    assert o.shape == (1, 138, 2, 48)
    assert final.shape == (4, 2, 32, 48)
    for n, length in enumerate(lengths):
        rows = slice(int(ends[n]), int(ends[n + 1]))
        want_o, want_final = truth([t[:, rows] for t in x], state[n : n + 1]) if length else (None, state[n : n + 1])
        assert_close(f"final_state {n}", final[n : n + 1], want_final.double(), 1e-6)
        if want_o is not None:
            assert_close(f"o {n}", o[:, rows], want_o, 1e-6)


def test_chunk_takes_flas_extra_index_arguments() -> None:
    x = make(B=1, T=73)
    ends = torch.tensor([0, 65, 65, 73])
    # As FLA numbers them: behind the empty sequence by rank.
    chunk_indices = torch.tensor([[0, 0], [0, 1], [1, 0]])
    want, _ = chunk_gated_delta_rule(*x, cu_seqlens=ends)
    got, _ = chunk_gated_delta_rule(*x, cu_seqlens=ends, cu_seqlens_cpu=ends.clone(), chunk_indices=chunk_indices)
    assert_bits_equal("o", got, want)
    got, _ = chunk_gated_delta_rule(*x, cu_seqlens_cpu=ends)
    assert_bits_equal("o", got, want)
    with pytest.raises(ValueError, match=r"chunk_indices: expected \[M, 2\] with M=3.*got \[2, 2\]"):
        chunk_gated_delta_rule(*x, cu_seqlens=ends, chunk_indices=chunk_indices[:2])


@both
@pytest.mark.parametrize("sigmoid", [False, True], ids=["beta", "sigmoid"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
def test_gates_inside(function: Any, sigmoid: bool, with_bias: bool) -> None:
    q, k, v, _, beta = make(dtype=torch.bfloat16)
    a, b = torch.randn(2, 70, 2).bfloat16(), torch.randn(2, 70, 2).bfloat16() if sigmoid else beta
    A_log, dt_bias = torch.randn(2), torch.randn(2) if with_bias else torch.zeros(2)
    o, _ = function(
        q,
        k,
        v,
        g=a,
        beta=b,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias if with_bias else None,
        use_beta_sigmoid_in_kernel=sigmoid,
    )
    g, sigmoid_of_b = reference.gdn_gating(a, b, A_log, dt_bias)
    want, _ = truth((q, k, v, g, sigmoid_of_b if sigmoid else b))
    assert_close("o", o, want, 4e-3)


@both
def test_beta_sigmoid_alone(function: Any) -> None:
    q, k, v, g, _ = make()
    b = torch.randn(2, 70, 2)
    o, _ = function(q, k, v, g=g, beta=b, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True)
    want, _ = truth((q, k, v, g, b.double().sigmoid()))
    assert_close("o", o, want, 1e-6)


def test_recurrent_without_gates() -> None:
    q, k, v, g, beta = make()
    o, _ = fused_recurrent_gated_delta_rule(q, k, v, use_qk_l2norm_in_kernel=True)
    want, _ = truth((q, k, v, torch.zeros_like(g), torch.ones_like(beta)))
    assert_close("o", o, want, 1e-6)


@pytest.mark.parametrize(
    ("function", "option", "value"),
    [
        (chunk_gated_delta_rule, "cp_context", object()),
        (chunk_gated_delta_rule, "head_first", True),
        (fused_recurrent_gated_delta_rule, "gk", torch.zeros(2, 70, 2, 32)),
        (fused_recurrent_gated_delta_rule, "gv", torch.zeros(2, 70, 2, 48)),
        (fused_recurrent_gated_delta_rule, "head_first", True),
        (fused_recurrent_gated_delta_rule, "beta", torch.zeros(2, 70, 2, 48)),
    ],
)
def test_options_that_xgdn_does_not_have(function: Any, option: str, value: object) -> None:
    q, k, v, g, beta = make()
    with pytest.raises(NotImplementedError, match=rf"\[{function.__name__}\] {option}: "):
        function(q, k, v, **{"g": g, "beta": beta, option: value})


@both
def test_unknown_and_inconsistent_arguments(function: Any) -> None:
    q, k, v, g, beta = make()
    name = function.__name__
    gates = {"g": g, "beta": beta}
    with pytest.raises(TypeError, match=rf"\[{name}\] got unexpected keyword arguments: chunksize, speed"):
        function(q, k, v, **gates, speed=1, chunksize=64)
    with pytest.raises(ValueError, match=rf"\[{name}\] q: expected a batch of 1 with cu_seqlens.*got 2"):
        function(q, k, v, **gates, cu_seqlens=torch.tensor([0, 70, 140]))
    with pytest.raises(ValueError, match=rf"\[{name}\] initial_state: expected \[N, HV, K, V\] = \[2, 2, 32, 48\]"):
        function(q, k, v, **gates, initial_state=torch.zeros(2, 2, 48, 32))
    with pytest.raises(ValueError, match=rf"\[{name}\] A_log: expected \[HV\]"):
        function(q, k, v, **gates, use_gate_in_kernel=True)
    with pytest.raises(NotImplementedError, match="requires grad"):
        function(q.requires_grad_(), k, v, **gates)


def laid_out_by_head(t: torch.Tensor) -> torch.Tensor:
    """The same values in memory of [B, H, T, ...]."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


@both
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("arguments", [(3,), (4,), (0, 1, 2), (0, 1, 2, 3, 4)], ids=str)
def test_any_strides(function: Any, B: int, arguments: tuple[int, ...]) -> None:
    x = make(B=B, H=2, HV=4)
    state = torch.randn(B, 4, 32, 48)
    kwargs = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    want = function(*x[:3], g=x[3], beta=x[4], initial_state=state, **kwargs)
    views = [laid_out_by_head(t) if i in arguments else t for i, t in enumerate(x)]
    assert not all(t.is_contiguous() for t in views)
    got = function(*views[:3], g=views[3], beta=views[4], initial_state=laid_out_by_head(state), **kwargs)
    assert_bits_equal("o", got[0], want[0])
    assert_bits_equal("final_state", got[1], want[1])


@both
def test_columns_that_are_not_contiguous_and_heads_that_are_expanded(function: Any) -> None:
    q, k, v, g, beta = make(H=2, HV=4)
    wide = [torch.stack([t, t.new_full(t.shape, torch.nan)], -1)[..., 0] for t in (q, k, v, g, beta)]
    shared = [wide[0], wide[1], wide[2], wide[3][..., :1].expand(g.shape), wide[4][..., :1].expand(beta.shape)]
    o, _ = function(*shared[:3], g=shared[3], beta=shared[4], use_qk_l2norm_in_kernel=True)
    want, _ = truth((q, k, v, g[..., :1].expand(g.shape), beta[..., :1].expand(beta.shape)))
    assert_close("o", o, want, 1e-6)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@both
@pytest.mark.parametrize(
    ("qk", "of_v", "of_beta", "of_g"),
    [
        (F32, F16, F16, F32),
        (F32, BF16, F32, F32),
        (BF16, F32, BF16, BF16),
        (F16, BF16, F32, F16),
        (F16, F16, BF16, F32),
    ],
    ids=str,
)
def test_dtypes_that_differ(
    function: Any, qk: torch.dtype, of_v: torch.dtype, of_beta: torch.dtype, of_g: torch.dtype, backend: str
) -> None:
    q, k, v, g, beta = make()
    x = (q.to(qk), k.to(qk), v.to(of_v), g.to(of_g), beta.to(of_beta))
    with xgdn.use_backend(backend):
        o, final = function(*x[:3], g=x[3], beta=x[4], use_qk_l2norm_in_kernel=True, output_final_state=True)
    want_o, want_final = truth(x)
    assert o.dtype == (qk if function is chunk_gated_delta_rule else of_v)
    assert_close("o", o, want_o, {F32: 1e-6, BF16: 4e-3, F16: 5e-4}[o.dtype])
    assert_close("final_state", final, want_final, 1e-6 if torch.promote_types(qk, of_v) == F32 else 4e-3)


@both
def test_initial_states_of_other_dtypes(function: Any) -> None:
    x = make()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        state = torch.randn(2, 2, 32, 48).to(dtype)
        o, _ = function(*x[:3], g=x[3], beta=x[4], initial_state=state, use_qk_l2norm_in_kernel=True)
        assert_close("o", o, truth(x, state)[0], 1e-6)


BAD_ENDS = [
    (torch.tensor([0.0, 30.9, 70.5]), TypeError, "expected int32 or int64, got torch.float32"),
    (torch.tensor([0, 30, 70]).to(torch.int16), TypeError, "expected int32 or int64, got torch.int16"),
    (torch.tensor([False, True]), TypeError, "expected int32 or int64, got torch.bool"),
    (torch.tensor([[0, 70]]), ValueError, r"expected \[N \+ 1\], got \[1, 2\]"),
    (torch.tensor([], dtype=torch.int64), ValueError, r"expected \[N \+ 1\], got \[0\]"),
    (torch.tensor([0, 2**32 + 30, 70]), IndexError, r"never fall \(4294967326 before\), got 70 at index 2"),
    (torch.tensor([0, -(2**32) + 30, 70]), IndexError, r"never fall \(0 before\), got -4294967266 at index 1"),
    (torch.tensor([0, 30, 2**32 + 70]), IndexError, "from 0 to T=70 .*, got 0 to 4294967366"),
    (torch.tensor([2**32, 30, 70]), IndexError, "from 0 to T=70 .*, got 4294967296 to 70"),
    (torch.tensor([0, 30, 71]), IndexError, "from 0 to T=70 .*, got 0 to 71"),
    (torch.tensor([0, 40, 30, 70], dtype=torch.int32), IndexError, r"never fall \(40 before\), got 30 at index 2"),
]


@pytest.mark.parametrize(("ends", "error", "words"), BAD_ENDS, ids=lambda value: str(getattr(value, "tolist", str)()))
@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (chunk_gated_delta_rule, "cu_seqlens"),
        (chunk_gated_delta_rule, "cu_seqlens_cpu"),
        (fused_recurrent_gated_delta_rule, "cu_seqlens"),
    ],
)
def test_bad_cu_seqlens(function: Any, argument: str, ends: torch.Tensor, error: type[Exception], words: str) -> None:
    q, k, v, g, beta = make(B=1)
    given = {argument: ends}
    if argument == "cu_seqlens_cpu" and ends.dim() == 1 and len(ends) > 1:
        given["cu_seqlens"] = torch.linspace(0, 70, len(ends)).long()
    name = function.__name__
    with pytest.raises(error, match=rf"\[{name}\] cu_seqlens(_cpu)?: .*{words}"):
        function(q, k, v, g=g, beta=beta, **given)


def test_a_host_copy_of_another_number_of_sequences() -> None:
    x = make(B=1)
    with pytest.raises(ValueError, match=r"cu_seqlens_cpu: expected \[3\] \(set by cu_seqlens\), got \[2\]"):
        chunk_gated_delta_rule(*x, cu_seqlens=torch.tensor([0, 30, 70]), cu_seqlens_cpu=torch.tensor([0, 70]))


@both
def test_shapes_that_only_agree_once_flattened(function: Any) -> None:
    q, k, v, g, beta = make(B=2, T=70)
    name = function.__name__
    with pytest.raises(ValueError, match=rf"\[{name}\] g: expected \[B, T, HV\] = \[2, 70, 2\] .*got \[70, 2, 2\]"):
        function(q, k, v, g=g.transpose(0, 1), beta=beta)
    with pytest.raises(ValueError, match=rf"\[{name}\] k: expected \[B, T, ...\] = \[2, 70\] .*got \[70, 2, 1, 32\]"):
        function(q, k.transpose(0, 1), v, g=g, beta=beta)
    with pytest.raises(ValueError, match=rf"\[{name}\] q: expected \[B, T, H, K\]"):
        function(q[0], k, v, g=g, beta=beta)


@both
def test_negative_eigenvalues(function: Any) -> None:
    q, k, v, g, _ = make()
    b = torch.randn(2, 70, 2)
    options = {"g": g, "beta": b, "use_qk_l2norm_in_kernel": True, "allow_neg_eigval": True}
    o, _ = function(q, k, v, use_beta_sigmoid_in_kernel=True, **options)
    assert_close("o", o, truth((q, k, v, g, 2 * b.double().sigmoid()))[0], 3e-6)
    with pytest.raises(ValueError, match="allow_neg_eigval: expected it with use_beta_sigmoid_in_kernel=True"):
        function(q, k, v, **options)


@both
def test_the_older_name_of_state_v_first(function: Any) -> None:
    x = make()
    kwargs = {"g": x[3], "beta": x[4], "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    want = function(*x[:3], state_v_first=True, **kwargs)
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        got = function(*x[:3], transpose_state_layout=True, **kwargs)
    assert_bits_equal("final_state", got[1], want[1])
    with pytest.raises(ValueError, match="transpose_state_layout"):
        function(*x[:3], state_v_first=True, transpose_state_layout=True, **kwargs)


def test_chunk_sizes() -> None:
    x = make(B=1, T=73)
    want, _ = chunk_gated_delta_rule(*x)
    for chunk_size, num_chunks in ((16, 5), (32, 3), (64, 2)):
        indices = torch.tensor([[0, i] for i in range(num_chunks)])
        got, _ = chunk_gated_delta_rule(
            *x, chunk_size=chunk_size, cu_seqlens=torch.tensor([0, 73]), chunk_indices=indices
        )
        assert_bits_equal("o", got, want)
    with pytest.raises(ValueError, match=r"chunk_size: expected 16, 32 or 64, got 48"):
        chunk_gated_delta_rule(*x, chunk_size=48)


def test_a_raw_gate_is_wanted_where_it_is_computed() -> None:
    q, k, v, _, beta = make()
    with pytest.raises(ValueError, match=r"\[fused_recurrent_gated_delta_rule\] g: expected the raw gate"):
        fused_recurrent_gated_delta_rule(q, k, v, beta=beta, use_gate_in_kernel=True, A_log=torch.zeros(2))


def test_more_heads_than_the_chunk_tables_allow() -> None:
    x = make(B=1, T=5, H=1, HV=72, K=16, V=16)
    o, _ = chunk_gated_delta_rule(*x, use_qk_l2norm_in_kernel=True)
    assert_close("o", o, truth(x)[0], 1e-6)


@both
def test_compiles_into_one_graph(function: Any) -> None:
    x = make()
    state = torch.randn(2, 2, 32, 48)

    def call(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
        o, final = function(
            q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        return o * 2, final

    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*x, state)
    want = call(*x, state)
    assert_bits_equal("o", got[0], want[0])
    assert_bits_equal("final_state", got[1], want[1])


@pytest.mark.parametrize("T", [1, 33, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("initial", [False, True], ids=["from_zero", "from_state"])
def test_agrees_with_transformers(T: int, dtype: torch.dtype, initial: bool, backend: str) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    q, k, v, g, beta = make(T=T, H=2, HV=4, dtype=dtype)
    state = torch.randn(2, 4, 32, 48) if initial else None
    kwargs = {"g": g, "beta": beta, "initial_state": state}
    kwargs |= {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    for theirs, ours in (
        (modeling.torch_chunk_gated_delta_rule, chunk_gated_delta_rule),
        (modeling.torch_recurrent_gated_delta_rule, fused_recurrent_gated_delta_rule),
    ):
        want_o, want_final = theirs(q, k, v, **kwargs)
        with xgdn.use_backend(backend):
            o, final = ours(q, k, v, **kwargs)
        assert o.dtype == want_o.dtype
        # transformers computes in f32, so both carry f32 rounding, and both round o to the input's dtype.
        assert_close("o", o, want_o, 3e-6 if dtype == torch.float32 else 8e-3)
        assert_close("final_state", final, want_final, 3e-6 if dtype == torch.float32 else 8e-3)
