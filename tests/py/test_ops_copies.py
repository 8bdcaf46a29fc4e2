# SPDX-License-Identifier: Apache-2.0
"""What new tokens leave in the paged cache and copies in the pools of state, bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import xgdn
from attention_calls import AttentionCall
from cases import assert_bits_equal, assert_close, i32
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


def test_what_was_stored_is_attended(backend: str) -> None:
    """The rows of store_kv are those of paged_attention."""
    call = AttentionCall(((1, 17), (5, 5), (3, 30)), dtype=torch.float32).make()
    rows, want = torch.cat(call.rows), call.expected()
    k, v = (pool.flatten(0, 1)[rows.long()] for pool in (call.k, call.v))
    call.k, call.v = (torch.full_like(pool, torch.nan) for pool in (call.k, call.v))
    ops.store_kv(k, v, call.k, call.v, slot_mapping=rows.int(), backend=backend)
    assert_close("out", call.run(backend=backend), want, call.bound, parts=(0, 1))


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
