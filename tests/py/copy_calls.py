# SPDX-License-Identifier: Apache-2.0
"""Calls of store_kv and copy_slots, with the bits that they must leave behind."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_calls import int8_rows
from cases import DTYPES, assert_bits_equal, i32
from xgdn import PAD_SLOT_ID, ops


def random_bits(*shape: int, dtype: torch.dtype) -> Tensor:
    """Every pattern of bits, so also NaN of every payload, which arithmetic would not keep."""
    itemsize = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * itemsize), dtype=torch.uint8).view(dtype)


def on(device: str, t: Tensor) -> Tensor:
    """`t` itself on the CPU; elsewhere with the strides that it has here, whose gaps .to() would close."""
    if device == "cpu":
        return t
    storage = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return storage.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


@dataclass
class StoreCall:
    """Tokens for rows of a cache of P blocks of B rows, in no order; those of `padded` have none."""

    T: int
    P: int = 5
    B: int = 4
    HKV: int = 2
    D: int = 16
    dtype: torch.dtype = torch.float32
    strided: bool = False
    padded: tuple[int, ...] = ()
    int8: bool = False  # of the caches

    def __str__(self) -> str:
        parts = [f"T{self.T}", f"P{self.P}", f"B{self.B}", f"HKV{self.HKV}", f"D{self.D}"]
        parts += [str(self.dtype).removeprefix("torch.")] + ["strided"] * self.strided
        parts += ["int8"] * self.int8
        return "-".join(parts + (["pad" + "_".join(map(str, self.padded))] if self.padded else []))

    def make(self) -> StoreCall:
        # Heads with gaps between them, and tokens with gaps between them.
        wide = random_bits(self.T, self.HKV, self.D + 8, dtype=self.dtype)[..., 3 : self.D + 3]
        high = random_bits(self.T, 3, self.HKV, self.D, dtype=self.dtype)[:, 1]
        self.k, self.v = (wide, high) if self.strided else (wide.contiguous(), high.contiguous())
        if self.int8:  # numbers in every second row
            for x in (self.k, self.v):
                x[::2] = torch.randn(x[::2].shape).to(self.dtype)
        row, dtype = (self.D + 4, torch.int8) if self.int8 else (self.D, self.dtype)
        cache = random_bits(2, self.P, self.B, self.HKV, row, dtype=dtype)
        self.k_cache, self.v_cache = cache.unbind()
        self.slot_mapping = torch.randperm(self.P * self.B)[: self.T].int()
        self.slot_mapping[list(self.padded)] = PAD_SLOT_ID
        return self

    def expected(self, cache: Tensor, tokens: Tensor) -> Tensor:
        """Each row of the result is one of [cache | tokens]."""
        rows = torch.cat([cache.flatten(0, 1), int8_rows(tokens) if self.int8 else tokens])
        source = torch.arange(self.P * self.B)
        for t, row in enumerate(self.slot_mapping.tolist()):
            if row != PAD_SLOT_ID:
                source[row] = self.P * self.B + t
        return rows[source].view(cache.shape)

    def check(self, device: str = "cpu", *, may_have_padding: bool = True, backend: str = "auto") -> None:
        """Runs the call and compares every bit of the caches and of the tokens."""
        given = {name: getattr(self, name) for name in ("k", "v", "k_cache", "v_cache", "slot_mapping")}
        before = {name: t.clone() for name, t in given.items()}
        on_device = {name: on(device, t) for name, t in given.items()}
        ops.store_kv(**on_device, may_have_padding=may_have_padding, backend=backend)
        after = {name: t.cpu() for name, t in on_device.items()}
        for name, tokens in (("k_cache", self.k), ("v_cache", self.v)):
            assert_bits_equal(name, after[name], self.expected(before[name], tokens))
        for name in ("k", "v", "slot_mapping"):
            assert_bits_equal(name, after[name], before[name])


STORE = [
    *(StoreCall(T) for T in (0, 1, 7, 20)),
    *(
        StoreCall(7, dtype=dtype, strided=strided)
        for dtype in (torch.bfloat16, torch.float16)
        for strided in (False, True)
    ),
    StoreCall(7, strided=True),
    StoreCall(3, P=1, B=9),
    StoreCall(3, P=9, B=1),
    StoreCall(1, P=1, B=1),
    StoreCall(7, HKV=1, D=1, dtype=torch.bfloat16),
    StoreCall(7, HKV=1, D=5, dtype=torch.bfloat16, strided=True),
    StoreCall(7, HKV=3, D=256, dtype=torch.bfloat16, strided=True),
    StoreCall(900, P=60, B=16, D=64, dtype=torch.bfloat16, strided=True),  # several threads
    StoreCall(7, padded=(0, 3, 6)),
    StoreCall(7, padded=(0, 1, 2), dtype=torch.bfloat16, strided=True),
    StoreCall(4, padded=(0, 1, 2, 3)),
    StoreCall(1, padded=(0,)),
    *(StoreCall(19, D=D, dtype=dtype, strided=True, int8=True) for D in (4, 20, 64, 256) for dtype in DTYPES),
    StoreCall(900, P=60, B=16, D=64, dtype=torch.bfloat16, int8=True),
    StoreCall(7, padded=(0, 3, 6), int8=True),
    StoreCall(4, padded=(0, 1, 2, 3), dtype=torch.bfloat16, int8=True),
]


@dataclass
class CopyCall:
    """Rows of (slot read, slot written) over pools of S slots, each of a shape and a dtype."""

    rows: tuple[tuple[int, int], ...]
    pools: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (((2, 4, 6), torch.float32), ((3, 10), torch.bfloat16))
    S: int = 7
    strided: bool = False

    def __str__(self) -> str:
        rows = "+".join(f"{read}to{write}" for read, write in self.rows) if len(self.rows) < 9 else len(self.rows)
        pools = (f"{'x'.join(map(str, shape))}_{str(dtype).removeprefix('torch.')}" for shape, dtype in self.pools)
        return "-".join([str(rows), f"S{self.S}", *pools] + ["strided"] * self.strided)

    def make(self) -> CopyCall:
        def pool(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            size = math.prod(shape)
            slots = random_bits(self.S, size + 5, dtype=dtype)[:, 2 : size + 2]  # with gaps between them
            return (slots if self.strided else slots.contiguous()).unflatten(1, shape) if shape else slots[:, 0].clone()

        self.tensors = [pool(shape, dtype) for shape, dtype in self.pools]
        self.read, self.write = i32([n for n, _ in self.rows]), i32([n for _, n in self.rows])
        return self

    def check(self, device: str = "cpu", *, may_have_padding: bool = True, backend: str = "auto") -> None:
        """Runs the call and compares every bit of the pools, the gaps between their slots too."""
        memory = [t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0) for t in self.tensors]
        want = [t.clone() for t in memory]
        for before, bits, t in zip([t.clone() for t in self.tensors], want, self.tensors, strict=True):
            slots = list(before)
            for read, write in self.rows:
                if PAD_SLOT_ID not in (read, write):
                    slots[write] = before[read]
            if slots:
                bits.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(torch.stack(slots))
        there = [t.to(device) for t in memory]
        pools = [
            t.as_strided(x.shape, x.stride(), x.storage_offset()) for t, x in zip(there, self.tensors, strict=True)
        ]
        indices = {"from_indices": self.read.to(device), "to_indices": self.write.to(device)}
        ops.copy_slots(pools, **indices, may_have_padding=may_have_padding, backend=backend)
        for i, (got, bits) in enumerate(zip(there, want, strict=True)):
            assert_bits_equal(f"pools[{i}]", got.cpu(), bits)
        assert_bits_equal("from_indices", indices["from_indices"].cpu(), self.read)
        assert_bits_equal("to_indices", indices["to_indices"].cpu(), self.write)


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

COPY = [
    CopyCall(()),
    CopyCall(((2, 5),)),
    CopyCall(((6, 0),), strided=True),
    CopyCall(((0, 1), (6, 2), (3, 5))),
    CopyCall(((0, 1), (6, 2), (3, 5)), strided=True),
    CopyCall(((0, 1), (0, 2), (0, 6))),  # one slot, several copies
    CopyCall(((3, 3), (0, 6))),  # a slot to itself
    CopyCall(((0, 1), (-1, 2), (3, -1), (-1, -1), (4, 5))),
    CopyCall(((-1, 2), (4, 5), (3, -1)), strided=True),
    CopyCall(((2, 3), (3, -1))),  # slot 3 is not read
    CopyCall(((-1, -1), (2, -1), (-1, 0))),
    CopyCall(((-1, -1),), S=0),
    CopyCall(((2, 5), (1, 0)), pools=()),
    CopyCall(((2, 5), (1, 0)), pools=(((), torch.int32), ((1,), torch.float16), ((0,), torch.float32))),
    *(
        CopyCall(((2, 5), (1, 0)), pools=(((3, 5), dtype), ((7,), torch.float32)), strided=strided)
        for dtype in (*DTYPES, *INTEGERS)
        for strided in (False, True)
    ),
    CopyCall(tuple((n, n + 20) for n in range(20)), pools=(((4, 32, 32), torch.float32),) * 3, S=41),  # threads
    CopyCall(((1, 0),), pools=(((400, 400), torch.float32), ((3,), torch.bfloat16)), S=2),
]
