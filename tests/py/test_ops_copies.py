# SPDX-License-Identifier: Apache-2.0
"""What new tokens leave in the paged cache and copies in the pools of state, bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import xgdn
from attention_calls import AttentionCall, from_int8_rows
from cases import DTYPES, assert_bits_equal, assert_close, i32
from copy_calls import COPY, STORE, CopyCall, StoreCall
from xgdn import ops


@pytest.mark.parametrize("call", STORE, ids=str)
def test_tokens_are_stored_in_their_rows_and_nowhere_else(call: StoreCall, backend: str) -> None:
    call.make().check(backend=backend)
    assert xgdn.last_backend("store_kv") == backend


@pytest.mark.parametrize("call", [c for c in STORE if not c.padded], ids=str)
def test_the_promise_of_no_padding_changes_nothing(call: StoreCall, backend: str) -> None:
    call.make().check(may_have_padding=False, backend=backend)


def test_storing_does_not_depend_on_the_threads(num_threads: Callable[[int], None], backend: str) -> None:
    call = StoreCall(300, P=20, B=16, D=80, dtype=torch.bfloat16).make()
    for threads in (1, 3):
        num_threads(threads)
        call.check(backend=backend)


@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
def test_what_was_stored_is_attended(int8: bool, backend: str) -> None:
    """The rows of store_kv are those of paged_attention."""
    call = AttentionCall(((1, 17), (5, 5), (3, 30)), dtype=torch.float32, int8=int8).make()
    rows, want = torch.cat(call.rows), call.expected()
    k, v = (call.numbers(pool).float().flatten(0, 1)[rows.long()] for pool in (call.k, call.v))
    call.k, call.v = (torch.full_like(pool, -1 if int8 else torch.nan) for pool in (call.k, call.v))  # -1: NaN
    ops.store_kv(k, v, call.k, call.v, slot_mapping=rows.int(), backend=backend)
    assert_close("out", call.run(backend=backend), want, call.bound, parts=(0, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_as_near_as_their_scale_allows(dtype: torch.dtype, backend: str) -> None:
    """A row's largest number is a code of 127; no other is further from its code than half a unit."""
    x = (torch.randn(50, 2, 36) * torch.logspace(-3, 3, 50)[:, None, None]).to(dtype)
    x[7, 1], x[8, 0], x[8, 1], x[9, 0, 5] = 0, 2e-30, 5e-31, torch.inf
    caches = torch.full((2, 5, 10, 2, 40), 77, dtype=torch.int8).unbind()
    ops.store_kv(x, x, *caches, slot_mapping=torch.arange(50).int(), backend=backend)
    rows = caches[0].flatten(0, 1)
    assert_bits_equal("values", caches[1].flatten(0, 1), rows)
    numbers, scales = from_int8_rows(rows), rows[..., 36:].contiguous().view(torch.float32).double()
    assert numbers[9, 0].isnan().all()
    assert numbers[7, 1].eq(0).all()
    assert numbers[8, 1].eq(0).all()
    for row in ((8, 1), (9, 0)):
        x[row], rows[row] = x[0, 0], rows[0, 0]
    numbers, scales = from_int8_rows(rows), rows[..., 36:].contiguous().view(torch.float32).double()
    assert ((numbers - x.double()).abs() <= scales * 0.50001).all()
    largest = x.double().abs().amax(-1)
    assert (scales[..., 0] - largest / 127).abs().le(1e-7 * largest).all()


@pytest.mark.parametrize("call", COPY, ids=str)
def test_slots_are_copied_and_no_other_bit_changes(call: CopyCall, backend: str) -> None:
    call.make().check(backend=backend)
    assert xgdn.last_backend("copy_slots") == backend


@pytest.mark.parametrize("call", [c for c in COPY if -1 not in sum(c.rows, ())], ids=str)
def test_the_promise_of_no_padded_copies_changes_nothing(call: CopyCall, backend: str) -> None:
    call.make().check(may_have_padding=False, backend=backend)


def test_copies_do_not_depend_on_the_threads(num_threads: Callable[[int], None], backend: str) -> None:
    pools = (((4, 32, 32), torch.float32), ((3, 500), torch.bfloat16), ((2,), torch.int64))
    call = CopyCall(tuple((n, n + 20) for n in range(20)), pools=pools, S=41).make()
    for threads in (1, 3):
        num_threads(threads)
        call.check(backend=backend)


def test_one_pool_may_lie_between_the_slots_of_another(backend: str) -> None:
    memory = torch.randn(5, 2, 8)
    want = memory.clone()
    want[4] = want[1]
    pair = i32([1]), i32([4])
    ops.copy_slots(memory.unbind(1), from_indices=pair[0], to_indices=pair[1], backend=backend)
    assert_bits_equal("pools", memory, want)
