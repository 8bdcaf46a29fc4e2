# SPDX-License-Identifier: Apache-2.0
"""Memory that the ops of a forward pass share for their results."""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cases import assert_bits_equal
from xgdn import ops

X, GATE, UP = torch.randn(8, 1, 32), torch.randn(2048, 512), torch.randn(2048, 512)


def result() -> Tensor:
    return ops.silu_and_mul(GATE, UP)


def test_a_result_lies_where_another_lay_that_nobody_has() -> None:
    with ops.step_memory():
        result()
        first = result()
        place = first.data_ptr()
        other = result()
        assert other.data_ptr() != place
        del first
        assert result().data_ptr() == place


def test_results_are_those_without_it_and_outlive_it() -> None:
    want = result()
    with ops.step_memory():
        got = result()
        view = got[3:5]
    assert_bits_equal("result", got, want)
    del got
    others = [result() for _ in range(4)]
    assert_bits_equal("view", view, want[3:5])
    assert all(o.untyped_storage().data_ptr() != view.untyped_storage().data_ptr() for o in others)


def test_a_memory_within_another() -> None:
    with ops.step_memory():
        outer = result().data_ptr()
        with ops.step_memory():
            assert result().data_ptr() != outer
        assert result().data_ptr() == outer


def test_it_ends_with_an_error_and_is_the_threads_own() -> None:
    places = []
    try:
        with ops.step_memory():
            place = result().data_ptr()
            thread = threading.Thread(target=lambda: places.append([result(), result()]))
            thread.start()
            thread.join()
            raise KeyError
    except KeyError:
        pass
    assert place not in [r.data_ptr() for r in places[0]]
    kept = [result() for _ in range(3)]
    assert len({r.data_ptr() for r in kept}) == 3


def test_compiled_and_traced_calls_take_no_part() -> None:
    want = result()
    with ops.step_memory():
        compiled = torch.compile(ops.silu_and_mul, fullgraph=True, backend="aot_eager")
        assert_bits_equal("compiled", compiled(GATE, UP), want)
        with FakeTensorMode() as mode:
            fake = ops.silu_and_mul(mode.from_tensor(GATE), mode.from_tensor(UP))
    assert fake.shape == want.shape
    assert isinstance(fake, torch._subclasses.FakeTensor)


def test_dtypes_and_no_elements() -> None:
    with ops.step_memory(), torch.inference_mode():
        g, beta = ops.gdn_gating(*torch.randn(2, 5, 4).bfloat16(), torch.zeros(4), torch.zeros(4))
        assert (g.dtype, beta.dtype) == (torch.float32, torch.float32)
        assert ops.rms_norm(X[:0], torch.zeros(32)).shape == (0, 1, 32)
