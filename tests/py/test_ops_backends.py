# SPDX-License-Identifier: Apache-2.0
"""Which backend runs, and that nothing else ever does."""

from __future__ import annotations

import pytest
import torch

import forked
import xgdn
from cases import OPS
from xgdn import ops


def norm(**options: str) -> None:
    ops.l2_norm(torch.randn(2, 1, 16), **options)


def test_reference_is_always_built_and_comes_last() -> None:
    names = xgdn.available_backends()
    assert names[-1] == "reference"
    assert len(set(names)) == len(names)


def test_auto_takes_the_first_that_can() -> None:
    norm()
    assert xgdn.last_backend("l2_norm") == xgdn.available_backends()[0]


def test_a_named_backend_runs(backend: str) -> None:
    norm(backend=backend)
    assert xgdn.last_backend("l2_norm") == backend


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(NotImplementedError, match=r"\[l2_norm\] backend: expected auto or one of .*reference.*'gpu'"):
        norm(backend="gpu")
    with (
        pytest.raises(NotImplementedError, match=r"expected auto or one of .*reference.*'gpu'"),
        xgdn.use_backend("gpu"),
    ):
        pass


@pytest.mark.parametrize("name", ["cuda", "npu"])
def test_a_backend_that_cannot_says_so(name: str) -> None:
    """Built or not, it does not serve CPU tensors."""
    sentences = {row.why_not for row in xgdn.doctor() if row.backend == name and row.op == "l2_norm"}
    with pytest.raises(NotImplementedError) as caught:
        norm(backend=name)
    assert {str(caught.value)} == {f"[l2_norm] backend {name} cannot serve this call: {why}" for why in sentences}


def test_use_backend_is_restored(backend: str) -> None:
    first = xgdn.available_backends()[0]
    with xgdn.use_backend(backend):
        norm()
        assert xgdn.last_backend("l2_norm") == backend
        with xgdn.use_backend("auto"):
            norm()
            assert xgdn.last_backend("l2_norm") == first
        norm()
        assert xgdn.last_backend("l2_norm") == backend
    with pytest.raises(RuntimeError, match="inside"), xgdn.use_backend("reference"):
        raise RuntimeError("inside")
    norm()
    assert xgdn.last_backend("l2_norm") == first


def test_phases_are_chosen_apart() -> None:
    first = xgdn.available_backends()[0]
    x, weight, state = torch.randn(1, 4), torch.randn(4, 2), torch.zeros(1, 1, 4)
    batch = {
        "cu_seqlens": torch.tensor([0, 1], dtype=torch.int32),
        "state_indices": torch.tensor([0], dtype=torch.int32),
    }
    with xgdn.use_backend(prefill="reference"):
        ops.causal_conv1d(x, weight, state, **batch)
        ops.causal_conv1d_update(x, weight, state, **batch)
    assert xgdn.last_backend("causal_conv1d") == "reference"
    assert xgdn.last_backend("causal_conv1d_update") == first
    with xgdn.use_backend(decode="reference"):
        ops.causal_conv1d(x, weight, state, **batch)
        ops.causal_conv1d_update(x, weight, state, **batch)
    assert xgdn.last_backend("causal_conv1d") == first
    assert xgdn.last_backend("causal_conv1d_update") == "reference"


def test_an_argument_beats_the_default() -> None:
    with xgdn.use_backend(xgdn.available_backends()[0]):
        norm(backend="reference")
    assert xgdn.last_backend("l2_norm") == "reference"


def test_last_backend_knows_its_ops() -> None:
    with pytest.raises(NotImplementedError, match=r"\[last_backend\] op: expected one of .*l2_norm.*'l3_norm'"):
        xgdn.last_backend("l3_norm")


def test_doctor_names_one_backend_per_op() -> None:
    rows = xgdn.doctor()
    assert {row.op for row in rows} == set(OPS)
    for op in OPS:
        of_op = [row for row in rows if row.op == op]
        assert {*xgdn.available_backends(), "cuda", "npu"} == {row.backend for row in of_op}
        assert [row.backend for row in of_op if row.is_selected] == [xgdn.available_backends()[0]]
        assert all(row.why_not for row in of_op if row.backend not in xgdn.available_backends())
    with xgdn.use_backend("reference"):
        assert {row.backend for row in xgdn.doctor() if row.is_selected} == {"reference"}


# The variables are read once a process, at the first question about a backend.
_ASK = """
for ask in (xgdn.doctor, xgdn.available_backends, lambda: xgdn.ops.l2_norm(torch.zeros(1, 1, 16))):
    try:
        ask()
    except NotImplementedError as error:
        print(isinstance(error, xgdn.errors.UnsupportedError), str(error))
"""
_PRINT_CHOICE = """
xgdn.ops.l2_norm(torch.zeros(1, 1, 16))
print(repr(xgdn.last_backend('causal_conv1d')), xgdn.last_backend('l2_norm'), torch.ops.xgdn.default_backend('prefill'))
"""


def test_the_environment_chooses_too_and_what_is_wrong_in_it_is_an_error() -> None:
    unknown_set, chosen, unknown_backend = forked.run(
        [
            (_ASK, {"XGDN_CPU_ISA": "avx3"}),
            (_PRINT_CHOICE, {"XGDN_DECODE_BACKEND": "reference"}),
            (_PRINT_CHOICE, {"XGDN_DECODE_BACKEND": "gpu"}),
        ]
    )
    sentence = "XGDN_CPU_ISA: expected sse4, avx2, avx512, avx512_bf16 or amx, got 'avx3'"
    # What goes through torch.ops raises the built-in.
    assert unknown_set.stdout.splitlines() == [f"True {sentence}", f"False {sentence}", f"False {sentence}"]
    assert (chosen.status, chosen.stdout.split()) == (0, ["''", "reference", "auto"])
    assert unknown_backend.status != 0
    assert "expected auto or one of" in unknown_backend.stderr
