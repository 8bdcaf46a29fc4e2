# SPDX-License-Identifier: Apache-2.0
"""Copies into the paged cache and in state pools on npu tensors, bit by bit: launches that do not grow, nothing read on
the host."""

from __future__ import annotations

import pytest
import torch

import xgdn
from copy_calls import COPY, STORE, CopyCall, StoreCall
from ledger import Ledger, recorded

PLAIN = [c for c in STORE if not c.int8]
PROMISED = ["InplaceCopy", "InplaceIndexCopy", "InplaceIndexCopy"]  # rows to int64, keys, values


def assert_nothing_comes_back_before_the_last_launch(ledger: Ledger) -> None:
    launches = [i for i, entry in enumerate(ledger.entries) if entry["kind"] == "op"]
    inside = ledger.entries[launches[0] : launches[-1]]
    assert not {"copy", "sync"} & {entry["kind"] for entry in inside}


@pytest.mark.parametrize("call", PLAIN, ids=str)
def test_tokens_are_stored_in_their_rows_and_nowhere_else(call: StoreCall) -> None:
    call.make().check("npu:0")
    assert xgdn.last_backend("store_kv") == "npu"


@pytest.mark.parametrize("call", [c for c in PLAIN if not c.padded], ids=str)
def test_the_promise_of_no_padding_changes_nothing(call: StoreCall) -> None:
    call.make().check("npu:0", may_have_padding=False)


def test_int8_is_refused() -> None:
    call = StoreCall(7, int8=True).make()
    with pytest.raises(NotImplementedError, match="keys and values of the dtype of the tokens, Float, not Char"):
        call.check("npu:0", backend="npu")


@pytest.mark.parametrize("may_have_padding", [True, False])
def test_storing_launches_the_same_for_any_number_of_tokens(may_have_padding: bool) -> None:
    launches = []
    for call in (StoreCall(2), StoreCall(19)):
        with recorded() as ledger:
            call.make().check("npu:0", may_have_padding=may_have_padding)
        launches.append(ledger.launches)
        assert_nothing_comes_back_before_the_last_launch(ledger)
    assert launches[0] == launches[1]
    assert len(launches[0]) == 25 if may_have_padding else launches[0] == PROMISED


@pytest.mark.parametrize("call", COPY, ids=str)
def test_slots_are_copied_and_no_other_bit_changes(call: CopyCall) -> None:
    call.make().check("npu:0")
    assert xgdn.last_backend("copy_slots") == "npu"


@pytest.mark.parametrize("call", [c for c in COPY if -1 not in sum(c.rows, ())], ids=str)
def test_the_promise_of_no_padded_copies_changes_nothing(call: CopyCall) -> None:
    with recorded() as ledger:
        call.make().check("npu:0", may_have_padding=False)
    if call.rows and call.pools:
        assert ledger.launches == ["InplaceCopy"] * 2 + ["IndexSelect", "InplaceIndexCopy"] * len(call.pools)


def test_copies_launch_the_same_for_any_number_of_rows() -> None:
    pools = (((5,), torch.float32), ((3, 2), torch.bfloat16), ((4,), torch.int32))
    launches = []
    for rows in (((0, 1), (2, 3)), ((0, 1), (2, -1), (2, 3), (4, 5), (-1, 6))):
        with recorded() as ledger:
            CopyCall(rows, pools=pools).make().check("npu:0")
        launches.append(ledger.launches)
        assert_nothing_comes_back_before_the_last_launch(ledger)
    assert launches[0] == launches[1]
    assert len(launches[0]) == 14 + 2 * len(pools)
    assert launches[0][-2 * len(pools) :] == ["IndexSelect", "InplaceIndexCopy"] * len(pools)
