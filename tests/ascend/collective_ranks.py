# SPDX-License-Identifier: Apache-2.0
"""One of the processes of test_tensor_parallel.py, on the device of its rank: rank 0 prints what all have seen."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401  registers the device
from torch import Tensor

import ledger

RANK = int(os.environ.get("RANK", "0"))
DEVICE = torch.device("npu", RANK)


def part(rank: int, dtype: torch.dtype) -> Tensor:
    """Of numbers whose sum depends on the order of its terms."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(1000, generator=generator) * 10.0**rank).to(dtype)


def summed(dtype: torch.dtype) -> list[float]:
    x = part(RANK, dtype).to(DEVICE)
    dist.all_reduce(x)
    return x.cpu().tolist()


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
        torch.npu.synchronize()
    except RuntimeError as error:
        return str(error)
    return ""


def unwaited() -> list[list[float]]:
    """What a stream reads that is not ordered behind the sum, and what one reads that is."""
    x = torch.ones(3, device=DEVICE)
    work = dist.all_reduce(x, async_op=True)
    before = x.cpu().tolist()
    work.wait()
    return [before, x.cpu().tolist()]


def everything() -> dict[str, Any]:
    ledger.reset()
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int64": torch.int64}
    seen: dict[str, Any] = {name: summed(dtype) for name, dtype in dtypes.items()}
    row = torch.arange(4, device=DEVICE) + 10 * RANK
    gathered = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, row)
    seen["gathered"] = torch.stack(gathered).cpu().tolist()
    dist.broadcast(row, 2)
    seen["broadcast"] = row.cpu().tolist()
    dist.barrier(device_ids=[RANK])
    seen["unwaited"] = unwaited()
    entries = ledger.read()
    seen["communicators"] = [[it["rank"], it["world"], it["device"]] for it in entries.of("communicator")]
    seen["collectives"] = [it["name"] for it in entries.of("collective")]
    # The last: the group has failed then. As many bytes on all ranks, of another type on one.
    dtype = torch.int32 if RANK == 2 else torch.float32
    seen["dtypes"] = error_of(lambda: dist.all_reduce(torch.ones(4, dtype=dtype, device=DEVICE)))
    return seen


if __name__ == "__main__":
    torch.npu.set_device(DEVICE)
    dist.init_process_group("cpu:gloo,npu:hccl")
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, everything(), group=dist.new_group(backend="gloo"))
    if RANK == 0:
        json.dump(seen, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # torch_npu would wait for the device, which has failed
