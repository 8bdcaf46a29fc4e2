# SPDX-License-Identifier: Apache-2.0
"""Pools of more than 2^31 elements: the first and the last slot give the bits that a small pool gives.

Such a pool costs address space only: of an uninitialised tensor this large, no page exists before it is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cases import assert_bits_equal, i32
from xgdn import ops

H, HV, K, V, D, W = 1, 2, 64, 64, 96, 4
LENGTHS = (66, 1)
LIMIT = 2**31

Op = Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]


def delta_rule(length: tuple[int, ...]) -> dict[str, Any]:
    T = sum(length)
    names = {"q": (T, H, K), "k": (T, H, K), "v": (T, HV, V)}
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in names.items()}
    cu_seqlens = i32([0, length[0], T])
    return {**tensors, "g": -torch.rand(T, HV), "beta": torch.rand(T, HV), "cu_seqlens": cu_seqlens}


def recurrent() -> Op:
    x = delta_rule((2, 1))
    return lambda pool, slots, name: ops.recurrent_gated_delta_rule(**x, state=pool, state_indices=slots, backend=name)


def chunk() -> Op:
    x, tables = delta_rule(LENGTHS), ops.build_chunk_metadata(LENGTHS, HV)
    return lambda pool, slots, name: ops.chunk_gated_delta_rule(
        **x, state=pool, state_indices=slots, chunk=tables, backend=name
    )


def packed() -> Op:
    mixed, a, b = (torch.randn(2, width).bfloat16() for width in (2 * H * K + HV * V, HV, HV))
    heads = torch.randn(HV)
    return lambda pool, slots, name: ops.packed_decode(
        mixed, a, b, heads, heads, pool, state_indices=slots, backend=name
    )


def conv() -> Op:
    x, weight = torch.randn(sum(LENGTHS), D).bfloat16(), torch.randn(D, W).bfloat16()
    cu_seqlens = i32([0, LENGTHS[0], sum(LENGTHS)])
    return lambda pool, slots, name: ops.causal_conv1d(
        x, weight, pool, cu_seqlens=cu_seqlens, state_indices=slots, backend=name
    )


def conv_update() -> Op:
    x, weight = torch.randn(2, D).bfloat16(), torch.randn(D, W).bfloat16()
    return lambda pool, slots, name: ops.causal_conv1d_update(
        x, weight, pool, cu_seqlens=i32([0, 1, 2]), state_indices=slots, backend=name
    )


@pytest.mark.parametrize("make", [recurrent, chunk, packed, conv, conv_update], ids=lambda make: make.__name__)
def test_first_and_last_slot(make: Callable[[], Op], backend: str) -> None:
    op = make()
    slot_shape = (W - 1, D) if make in (conv, conv_update) else (HV, V, K)
    small = torch.randn(2, *slot_shape).bfloat16()
    last = LIMIT // small[0].numel() + 1
    large = torch.empty(last + 1, *slot_shape, dtype=torch.bfloat16)
    assert last * small[0].numel() > LIMIT
    large[0], large[last] = small[0], small[1]
    want = op(small, i32([0, 1]), backend)
    got = op(large, i32([0, last]), backend)
    assert_bits_equal("out", got, want)
    assert_bits_equal("first slot", large[0], small[0])
    assert_bits_equal("last slot", large[last], small[1])


def test_copies_between_the_first_and_the_last_slots(backend: str) -> None:
    slots = torch.randn(2, HV, V, K).bfloat16()
    last = LIMIT // slots[0].numel() + 1
    large = torch.empty(last + 1, HV, V, K, dtype=torch.bfloat16)
    large[0], large[last] = slots
    ops.copy_slots([large], from_indices=i32([last, 0]), to_indices=i32([1, last - 1]), backend=backend)
    for slot, want in ((0, 0), (1, 1), (last - 1, 0), (last, 1)):
        assert_bits_equal(f"slot {slot}", large[slot], slots[want])


def test_first_and_last_row_of_a_cache(backend: str) -> None:
    k, v = torch.randn(2, 2, HV, K).bfloat16()
    block_size = 16
    num_blocks = LIMIT // (block_size * k[0].numel()) + 2
    caches = [torch.empty(num_blocks, block_size, HV, K, dtype=torch.bfloat16) for _ in range(2)]
    ops.store_kv(k, v, *caches, slot_mapping=i32([num_blocks * block_size - 1, 0]), backend=backend)
    for cache, tokens in zip(caches, (k, v), strict=True):
        assert_bits_equal("last row", cache[-1, -1], tokens[0])
        assert_bits_equal("first row", cache[0, 0], tokens[1])
