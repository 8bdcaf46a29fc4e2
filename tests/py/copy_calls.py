# SPDX-License-Identifier: Apache-2.0
"""Calls of store_kv, with the bits that they must leave behind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cases import assert_bits_equal
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

    def __str__(self) -> str:
        parts = [f"T{self.T}", f"P{self.P}", f"B{self.B}", f"HKV{self.HKV}", f"D{self.D}"]
        parts += [str(self.dtype).removeprefix("torch.")] + ["strided"] * self.strided
        return "-".join(parts + (["pad" + "_".join(map(str, self.padded))] if self.padded else []))

    def make(self) -> StoreCall:
        # Heads with gaps between them, and tokens with gaps between them.
        wide = random_bits(self.T, self.HKV, self.D + 8, dtype=self.dtype)[..., 3 : self.D + 3]
        high = random_bits(self.T, 3, self.HKV, self.D, dtype=self.dtype)[:, 1]
        self.k, self.v = (wide, high) if self.strided else (wide.contiguous(), high.contiguous())
        cache = random_bits(2, self.P, self.B, self.HKV, self.D, dtype=self.dtype)
        self.k_cache, self.v_cache = cache.unbind()
        self.slot_mapping = torch.randperm(self.P * self.B)[: self.T].int()
        self.slot_mapping[list(self.padded)] = PAD_SLOT_ID
        return self

    def expected(self, cache: Tensor, tokens: Tensor) -> Tensor:
        """Each row of the result is one of [cache | tokens]."""
        rows = torch.cat([cache.flatten(0, 1), tokens])
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
]
